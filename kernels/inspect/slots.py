"""What the machine code of launches executes: a lower bound on their time, without a GPU.

A multiprocessor starts four instructions a cycle at most, one of each of its schedulers. So a launch
takes at least

    programs a multiprocessor, at least one  x  instructions a warp  x  warps / 4      cycles,

its *slots*. Memory, tensor cores and the waits of dependent instructions come on top or run beside.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..device.launch import Launch, flat
from . import sass
from .compile import SHARED_LIMIT, Specialisation, build, cuobjdump, resource_usage


class Chip(NamedTuple):
    """A GPU of a compute capability."""

    name: str
    processors: int
    gigahertz: float


CHIPS = {80: Chip("A100", 108, 1.41), 90: Chip("H100, H200", 132, 1.755), 100: Chip("B200", 148, 1.85)}

# Where programs do different things, so many of them stand for all.
_SAMPLED = 5

# Somewhere that is aligned: nothing is loaded from there.
_ADDRESS = 0x7F0000000000

_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_GLOBAL = ("LDG", "STG", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG", "UBLKCP", "UTMALDG", "UTMASTG")
_TENSOR = ("HGMMA", "UTCHMMA", "HMMA", "UTCQMMA")


class Call(NamedTuple):
    """A launch as a process that compiles its kernel needs it."""

    values: tuple[float | int | None, ...]  # arguments in the kernel's order; None: a pointer
    grid: tuple[int, int, int]


def call_of(launch: Launch, spec: Specialisation) -> Call:
    """Return what a launch passes, constants left out."""
    given, values = launch.arguments(), []

    def take(x: Any, place: tuple[int, ...]) -> None:
        if place in spec.constants:
            return
        if isinstance(x, tuple):
            for i, y in enumerate(x):
                take(y, (*place, i))
        else:
            values.append(None if isinstance(x, Tensor) else x)

    for i, name in enumerate(launch.kernel.arg_names):
        take(given.get(name), (i,))
    x, y, z = (*launch.grid, 1, 1)[:3]
    return Call(tuple(values), (x, y, z))


def packed(values: tuple[float | int | None, ...], assembly: str) -> bytes:
    """Return arguments as they lie in constant memory, their types as PTX declares them."""
    entry = re.search(r"\.entry.*?\)", assembly, re.DOTALL)
    assert entry is not None
    out = b""
    for kind, value in zip(re.findall(r"\.param \.([a-z]+\d+)", entry[0]), values, strict=False):
        size = _SIZES[kind.lstrip("abcdefghijklmnopqrstuvwxyz")]
        out += b"\0" * (-len(out) % size)
        if isinstance(value, float):
            out += struct.pack("<f", value)
        else:
            number = _ADDRESS if value is None else int(value)
            out += (number & (1 << 8 * size) - 1).to_bytes(size, "little")
    return out + b"\0" * (-len(out) % 4)


class Executed(NamedTuple):
    """What one warp of a launch executes; of several programs, the mean."""

    instructions: float
    tensor: int  # instructions for tensor cores, in the first program
    waits: int  # how often it waits until all of them are done


@dataclass(frozen=True)
class Examined:
    """What a kernel's machine code shows on one chip."""

    name: str
    arch: int
    label: str
    registers: int
    shared: int
    faults: tuple[str, ...]
    calls: dict[Call, Executed] = field(default_factory=dict)


def examine(spec: Specialisation, arch: int, calls: tuple[Call, ...]) -> Examined:
    """Compile a kernel and walk through it as each call does; suits worker processes."""
    done = build(spec, arch)
    cubin, assembly = done.asm["cubin"], done.asm["ptx"]
    program, usage = sass.parse(cuobjdump("-sass", cubin)), resource_usage(cubin)
    found, faults = {}, []
    for call in calls:
        arguments, walks = packed(call.values, assembly), []
        for at in _sample(call.grid):
            walks.append(sass.walk(program, sass.Warp(arguments, arch, at, call.grid)))
        total = sum(x.instructions for x in walks) / len(walks)
        mma = sum(n for name, n in walks[0].executed.items() if name.split(".")[0] in _TENSOR)
        path = [program[i] for i in walks[0].path]
        found[call] = Executed(total, mma, _serial_waits(path))
        faults += _early(path) if spec.options.get("launch_pdl") else []
        faults += _serial(found[call]) if arch == 90 and flat(spec.tile).get("READY") else []
    if spills := usage["STACK"] + usage["LOCAL"]:
        faults.append(f"spills {spills} bytes a thread")
    if done.metadata.shared > SHARED_LIMIT[arch]:
        faults.append(f"{done.metadata.shared} bytes of shared memory, the chip has {SHARED_LIMIT[arch]}")
    if spec.cluster > 1 and f".reqnctapercluster {spec.cluster}" not in assembly:
        faults.append(f"is no cluster of {spec.cluster}")
    faults += _in_place(spec.name, spec.tile, spec.options.get("num_warps", 4))
    unique = tuple(dict.fromkeys(faults))
    return Examined(spec.name, arch, spec.label, usage["REG"], done.metadata.shared, unique, found)


def _sample(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Return programs that stand for all: the first, the last, and some between."""
    x, y, z = grid
    count = x * y * z
    places = sorted({i * (count - 1) // max(_SAMPLED - 1, 1) for i in range(_SAMPLED)})
    return [(i % x, i // x % y, i // (x * y)) for i in places]


def _early(path: list[sass.Instruction]) -> list[str]:
    """Find what touches global memory before the kernels ahead are done (programmatic dependent launch)."""
    for x in path:
        if x.stem == "ACQBULK":
            return []
        if x.stem in _GLOBAL:
            return [f"{x.name} before it waits for the kernels ahead"]
    return ["never waits for the kernels ahead"]


def _serial_waits(path: list[sass.Instruction]) -> int:
    """Count the waits that leave no tensor instruction in flight."""
    return sum(x.name.startswith("WARPGROUP.DEPBAR") and x.operands[-1] == "0x0" for x in path)


def _serial(done: Executed) -> list[str]:
    """Find products of ready operands of which each waits for the one before; once a step, of four, is as meant."""
    return [f"{done.waits} waits for {done.tensor} products"] if done.waits > max(done.tensor / 4, 3) else []


# Kernels that may write over what they read; their tiles are BM rows of BN columns.
_WRITE_OVER = ("activate_kernel", "norm_gradient_kernel", "activation_gradient_kernel")


def _in_place(name: str, constants: dict[str, Any], warps: int) -> list[str]:
    """Find a tile with fewer entries than threads: a warp may load again what another has stored by then."""
    if name not in _WRITE_OVER or warps == 1 or (entries := constants["BM"] * constants["BN"]) >= 32 * warps:
        return []
    return [f"{entries} entries for {32 * warps} threads, in place"]


def slots(launch: Launch, spec: Specialisation, done: Examined) -> float:
    """Return the least time of a launch, in microseconds."""
    chip, warps = CHIPS[done.arch], spec.options.get("num_warps", 4)
    instructions = done.calls[call_of(launch, spec)].instructions
    cycles: float = max(1, launch.programs / chip.processors) * instructions * warps / 4
    return cycles / chip.gigahertz / 1000
