"""How updates that GPUs share scale, from counted work and a stated interconnect; and the same model held against CPUs.

    python -m tdmpc2_fast.benchmarks.scaling              the tables of docs/scaling.md
    python -m tdmpc2_fast.benchmarks.scaling measure      1, 2 and 4 ranks of this machine beside their prediction

    update(n, b) = FLOP(b) / rate + launches gap + bytes / HBM + world + gather + policy + metrics
    all-reduce(G, n) = start + 2 (g-1)/g G / NVLink + 2 (m-1)/m (G/g) / NIC + 2 log2(g) hop + 2 log2(m) leap

with b slices on each of n GPUs, m machines of g, and a NIC for each GPU. FLOP are those of products as tiles execute
them, so that a batch too small for its tiles is paid for. Collectives wait for what comes before them and hold up what
comes after: nothing of them is hidden behind products.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import log2

import torch

from tdmpc2_fast.kernels.device.launch import How, Precision
from tdmpc2_fast.kernels.inspect.published import update_sizes
from tdmpc2_fast.kernels.inspect.update_work import UpdateMemory, update_memory, update_work
from tdmpc2_fast.kernels.update.chain import UpdateChain

SIZES = (5, 19, 48, 317)
GPUS = (1, 8, 64, 512)
_ACTIONS = 6
_BFLOAT16 = Precision("bfloat16")
_FLOAT = 4
_PASSES = 3
"""Times an update reads its weights beside Adam: forward, targets and policy, backward."""


@dataclass(frozen=True)
class Machine:
    """What a GPU and its connections do; latencies are rough, and stand for NCCL's of small messages."""

    flops: float = 0.4 * 989e12  # an H100's tensor cores in bfloat16, and the share of them that products reach
    memory: float = 3.35e12  # bytes a second of HBM
    gap: float = 7e-6  # seconds a launch takes beside: so the 5M update takes 869 us, as measured on an H200
    gpus: int = 8  # in a machine
    nvlink: float = 450e9  # bytes a second in each direction
    nic: float = 50e9  # 400 Gb/s InfiniBand, one for each GPU
    start: float = 8e-6  # of a collective
    hop: float = 1e-6  # to a GPU of the machine
    leap: float = 5e-6  # to another machine


H100 = Machine()


@dataclass(frozen=True)
class Counted:
    """What an update of b slices costs on one GPU.

    world, policy: bytes of the gradients; others: of what else ranks exchange.
    """

    flops: float
    launches: int
    traffic: float  # bytes of parameters, moments and gradients, and of the weights that products read
    world: int
    policy: int
    others: tuple[int, int]


@cache
def counted(size: int, b: int) -> Counted:
    """Count an update of a published multi-task model."""
    sizes = replace(update_sizes(size, _ACTIONS, "multi"), batch=b)
    work, chain = update_work(sizes, _BFLOAT16), UpdateChain(sizes, How(_BFLOAT16), torch.device("meta"))
    world, policy = chain.world.grad.numel(), chain.policy.grad.numel()
    # Adam: gradient for the norm; gradient, moments and parameter read, all but the gradient written; the shadow.
    adam = (world + policy) * (4 + 28 + 2) + chain.target.param.numel() * (8 + 2)
    traffic = adam + _PASSES * 2 * (world + policy)
    others = b * _FLOAT, chain.losses.told.numel() * _FLOAT
    return Counted(work.padded_flops, work.launches, traffic, world * _FLOAT, policy * _FLOAT, others)


def all_reduce(nbytes: float, n: int, machine: Machine = H100) -> float:
    """Return the seconds that adding up so many bytes over n GPUs takes."""
    if n == 1:
        return 0.0
    g, m = min(n, machine.gpus), -(-n // machine.gpus)
    inside = 2 * (g - 1) / g * nbytes / machine.nvlink
    between = 2 * (m - 1) / m * (nbytes / g) / machine.nic
    return machine.start + inside + between + 2 * log2(g) * machine.hop + 2 * log2(m) * machine.leap


def compute(size: int, b: int, machine: Machine = H100) -> float:
    """Return the seconds of an update of b slices without its collectives."""
    x = counted(size, b)
    return x.flops / machine.flops + x.launches * machine.gap + x.traffic / machine.memory


def collectives(size: int, b: int, n: int, machine: Machine = H100) -> float:
    """Return the seconds of an update's four collectives; gathering Q values takes half the way of adding up."""
    x = counted(size, b)
    gather, metrics = x.others
    reduced = sum(all_reduce(nbytes, n, machine) for nbytes in (x.world, x.policy, metrics))
    return reduced + all_reduce(gather * n, n, machine) / 2


def update(size: int, b: int, n: int, machine: Machine = H100) -> float:
    """Return the seconds of an update of b slices on each of n GPUs."""
    return compute(size, b, machine) + collectives(size, b, n, machine)


def memory(size: int, b: int) -> UpdateMemory:
    """Return the bytes of an update of b slices on one GPU."""
    return update_memory(replace(update_sizes(size, _ACTIONS, "multi"), batch=b), _BFLOAT16)


def strong(size: int, whole: int = 1024) -> Iterator[tuple[int, int, float, float]]:
    """Yield GPUs, slices on each, seconds of an update and speed-up, for a batch that stays as it is."""
    for n in (x for x in GPUS if whole % x == 0):
        seconds = update(size, whole // n, n)
        yield n, whole // n, seconds, update(size, whole, 1) / seconds


def weak(size: int, b: int = 256) -> Iterator[tuple[int, int, float, float]]:
    """Yield GPUs, the whole batch, seconds of an update and efficiency, for a batch that grows with the GPUs."""
    for n in GPUS:
        seconds = update(size, b, n)
        yield n, b * n, seconds, update(size, b, 1) / seconds


def stops(size: int, whole: int = 1024) -> int:
    """Return from how many GPUs on twice as many make a batch of this size less than a tenth faster."""
    n = 1
    while whole % (2 * n) == 0 and update(size, whole // n, n) > 1.1 * update(size, whole // (2 * n), 2 * n):
        n *= 2
    return n


def tables() -> str:
    """Return the tables of docs/scaling.md."""
    lines = ["| model | gradient, MB | one GPU, ms | speed-up on 8 | 64 | 512 | stops at |", "| --- |" + " ---: |" * 6]
    for size in SIZES:
        rows = list(strong(size))
        ups = " | ".join(f"{up:.1f}" for *_, up in rows[1:])
        nbytes = (counted(size, 256).world + counted(size, 256).policy) / 1e6
        lines.append(f"| {size}M | {nbytes:.0f} | {1e3 * rows[0][2]:.2f} | {ups} | {stops(size)} |")
    lines += ["", "| model | one GPU, slices/s | efficiency on 8 | 64 | 512 | collectives on 512, ms |"]
    lines.append("| --- |" + " ---: |" * 5)
    for size in SIZES:
        rows = list(weak(size))
        shares = " | ".join(f"{share:.0%}" for *_, share in rows[1:])
        apart = 1e3 * collectives(size, 256, GPUS[-1])
        lines.append(f"| {size}M | {256 / rows[0][2]:,.0f} | {shares} | {apart:.2f} |")
    lines += ["", "| model | slices | parameters, GB | gradients, moments | working memory | all |"]
    lines.append("| --- |" + " ---: |" * 5)
    for size, b in ((48, 1024), (317, 1024), (317, 128)):
        x = memory(size, b)
        each = " | ".join(f"{y / 1e9:.2f}" for y in (x.parameters, x.optimiser, x.working, x.total))
        lines.append(f"| {size}M | {b} | {each} |")
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    """Print the tables, or measure."""
    if not words:
        print(tables())
        return 0
    if words != ["measure"]:
        print(f"error: got {' '.join(words)!r}, allowed: measure, or nothing", file=sys.stderr)
        return 2
    from .scaling_ranks import measured

    print(measured())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
