"""What a plan costs, counted from the arguments of the launches of a dry run: nothing is estimated.

Needs neither a GPU nor Triton, and holds no weights. Tiles are those a GPU is given, under
Triton's interpreter, too. No time follows from these numbers alone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..device.launch import How, Launch, Precision, log_launches
from ..device.pointers import Slab
from ..layers.rows import Source, Weights
from ..plan.buffers import PlanSizes, PlanWeights
from ..plan.chain import PlanChain
from .work import Work, bytes_of, launch_work


@dataclass(frozen=True)
class PlanWork(Work):
    """What one plan of all its environments costs.

    Attributes:
        bytes: what must cross the memory bus once whatever the caches do: weights (every slab a
            plan may use, so all critics, though an iteration draws two), inputs, random draws, and
            the action, mean and plan counter written.
        l2_bytes: what programs read and write, all told: a layer's weights once a row tile, its
            input once a column tile. One program reads an element once.
    """

    bytes: int
    l2_bytes: int


def plan_work(sizes: PlanSizes, precision: Precision) -> PlanWork:
    """Count a plan of these sizes.

    One environment, bfloat16, GFLOP beside those the products need by hand (6 actions unless said):
    1M 12.33 (12.2), 5M 31.80 (31.7), 5M with 38 actions 43.65 (43.4), 19M 108.0 (108), 48M 264.2
    (263), 317M 1269 (1260). Of what need not be computed there are only the rewards of the prior's sequences, anew in
    each iteration.
    """
    plan, log = dry_plan(sizes, precision)
    work = [launch_work(launch) for launch in log]
    flops, padded, l2 = (sum(x) for x in zip(*work, strict=True))
    kernels = dict(Counter(launch.name for launch in log))
    return PlanWork(len(log), kernels, flops, padded, _compulsory_bytes(plan, log), l2)


def dry_plan(
    sizes: PlanSizes,
    precision: Precision,
    arch: int = 90,
    once: bool | None = None,
) -> tuple[PlanChain, list[Launch]]:
    """Make a plan, and its launches as on a GPU of a compute capability, none of them executed.

    Weights take no memory. Activations are never touched, so they take address space alone.
    """
    with not_interpreted():
        weights = PlanWeights.empty(sizes, precision, torch.device("meta"))
        plan = PlanChain(sizes, weights, How.of_chip(arch, precision), torch.device("cpu"), once)
        with log_launches(dry=True) as log:
            plan.run()
    return plan, log


@contextmanager
def not_interpreted() -> Iterator[None]:
    """Let tiles within be those of a GPU; the interpreter's are larger."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _compulsory_bytes(plan: PlanChain, log: list[Launch]) -> int:
    """Count as `PlanWork.bytes` says."""
    used: dict[tuple[int, int], int] = {}
    ours = {id(t) for layer in plan.weights.layers() for t in layer.tensors()}
    for launch in log:
        a, groups = launch.arguments(), launch.grid[-1]
        if "w" in a:
            w: Weights = a["w"]
            read = [w.bias_ptr] + [w.ptr] * a.get("HAS_X", True) + [w.side_ptr] * a.get("HAS_SIDE", False)
            read += [w.gamma_ptr, w.beta_ptr] if a.get("ACT") else []
            _note(used, ours, read, _slabs(w.slab, a.get("MEMBERS", False), groups, len(w.ptr)))
        if a.get("END"):
            v: Weights = a["end"].w
            _note(used, ours, [v.ptr, v.bias_ptr], _slabs(v.slab, a["OF_MEMBERS"], groups, len(v.ptr)))
        if a.get("IN_ACT"):
            x: Source = a["x"]
            _note(used, ours, [x.gamma_ptr, x.beta_ptr], _slabs(x.slab, a["IN_MEMBERS"], groups, len(x.gamma_ptr)))
    i, d = plan.inputs, plan.draws
    moved = [getattr(x, f.name) for x in (i, d) for f in fields(x)]
    moved += [plan.state.action, i.prev_mean, i.rng[1:]]
    return sum(used.values()) + sum(bytes_of(t) for t in moved if t is not None)


def _slabs(slab: Slab, drawn: bool, groups: int, count: int) -> list[int]:
    """List the slabs a launch may read; where critics are drawn, all of them."""
    if drawn:
        return list(range(slab.base + int(slab.members_ptr.min()), count))
    return [slab.base + slab.step * g for g in range(groups)]


def _note(used: dict[tuple[int, int], int], ours: set[int], tensors: list[Tensor], slabs: list[int]) -> None:
    """Note the bytes of slabs of those tensors that are `ours`."""
    for t in tensors:
        if id(t) in ours:
            used.update({(id(t), s): bytes_of(t) // len(t) for s in slabs})
