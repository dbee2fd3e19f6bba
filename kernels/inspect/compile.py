"""Compiles a logged launch for a chip that need not be there, and reads what came out."""

from __future__ import annotations

import importlib
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..device.cluster import clusters_compiled
from ..device.launch import COMPILER_OPTIONS, Launch, flat, triton

# Shared memory a program may take: bytes, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*u1",
    torch.uint8: "*u8",
}
# Tensor-core instructions in PTX, widest first, and what they are called in machine code. PTX is
# read because disassembling takes half as long as compiling; ptxas translates them one to one.
_TENSOR = {"tcgen05.mma": "tcgen05 UTC*MMA", "wgmma.mma_async": "wgmma HGMMA", "mma.sync": "mma.sync HMMA"}

# Constants that tell configurations of a kernel apart in a table; of flags, those that are set.
_SHOWN = ("BM", "BN", "BK", "BA", "BJ", "BG", "IN_ACT", "ACT", "CLUSTER", "BINS")
_FLAGS = (
    "HAS_X",
    "HAS_SIDE",
    "ENV_BIAS",
    "MEMBERS",
    "EVEN_K",
    "HAS_MASK",
    "MASKED",
    "EPISODIC",
    "NEXT",
    "CHOICE",
    "DROPOUT",
    "GRADIENT",
    "KEEP",
)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one configuration on one chip."""

    name: str
    arch: int
    config: str
    warps: int
    registers: int  # a thread
    spills: int  # bytes of local memory a thread
    shared: int  # bytes a program
    tensor: str  # widest tensor-core instruction, "-" where there is none
    size: int  # bytes of machine code

    def faults(self, needs_tensor: bool) -> list[str]:
        """List what makes this configuration unfit."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes a thread")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, the chip has {SHARED_LIMIT[self.arch]}")
        if needs_tensor and self.tensor == "-":
            found.append("no tensor-core instruction")
        return found


Place = tuple[int, ...]
"""Position of an argument, then positions within the tuples it is."""


@dataclass(frozen=True)
class Specialisation:
    """What a launch on a GPU would have compiled; unlike the launch it can be sent to a process."""

    module: str
    name: str
    signature: dict[str, Any]  # types; of a tuple, a tuple of them
    constants: dict[Place, Any]  # constexprs, and arguments that are 1 or None
    attributes: dict[Place, Any]  # divisible by 16
    options: dict[str, Any]
    tile: dict[str, Any]  # the constexprs alone, by name
    cluster: int = 1

    @property
    def precision(self) -> str:
        """The name of a `Precision`; "-" for a kernel that is the same at every precision, or at two."""
        if "*bf16" in str(self.signature) or flat(self.tile).get("BFLOAT16"):
            return "bfloat16"
        return {None: "-", "tf32": "tf32", "ieee": "float32"}[flat(self.tile).get("DOT")]

    @property
    def needs_tensor(self) -> bool:
        """Tells whether tensor cores are meant to compute this kernel's products."""
        tile = flat(self.tile)
        return "DOT" in tile and tile.get("BK", 1) > 1 and self.precision != "float32"

    @property
    def configuration(self) -> str:
        """A name that launches of one tile, activation and form share.

        Left out is what Triton derives from the arguments: alignment, and strides or sizes that are 1.
        """
        return f"{self.name} {self.precision} {sorted(self.tile.items())} {self.options}"

    @property
    def label(self) -> str:
        """The constants worth showing in a table."""
        tile = flat(self.tile)
        values = [f"{k}={tile[k]}" for k in _SHOWN if k in tile]
        return " ".join([*values, *(k for k in _FLAGS if tile.get(k))])


def specialisation(launch: Launch) -> Specialisation:
    """Find the signature, constants, alignment attributes and compiler options that a launch on a GPU gives."""
    kernel, values = launch.kernel, launch.arguments()
    constants: dict[Place, Any] = {}
    attributes: dict[Place, Any] = {}

    def type_of(value: Any, place: Place) -> Any:
        if isinstance(value, tuple):
            return getattr(value, "_make", tuple)(type_of(x, (*place, i)) for i, x in enumerate(value))
        if value is None or (type(value) is int and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, bool):
            return "u1"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, Tensor):
            # Torch aligns what it allocates; a view starts anywhere.
            kind, number = _TYPES[value.dtype], value.storage_offset() * value.element_size()
        else:
            kind, number = "i32" if -(2**31) <= value < 2**31 else "i64", value
        if number % 16 == 0:
            attributes[place] = [["tt.divisibility", 16]]
        return kind

    fixed = {x.name: values[x.name] for x in kernel.params if x.is_constexpr}
    signature = {}
    for i, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name], constants[(i,)] = "constexpr", fixed[name]
        else:
            signature[name] = type_of(values[name], (i,))
    options = {k: v for k, v in launch.options.items() if k in COMPILER_OPTIONS}
    options.setdefault("enable_fp_fusion", True)  # as `launch` does
    return Specialisation(
        kernel.fn.__module__, launch.name, signature, constants, attributes, options, fixed, launch.cluster
    )


def compile_specialisation(spec: Specialisation, arch: int) -> Compiled:
    """Compile for compute capability arch/10; needs Triton, no GPU, and no TRITON_INTERPRET."""
    done = build(spec, arch)
    usage = resource_usage(done.asm["cubin"])
    # Spills are the stack frame in the cubin itself. Triton makes no local arrays and no calls, so
    # nothing else is in that frame: `ptxas -v` reports the same frame, and there are local loads
    # and stores (LDL, STL) exactly where it is not 0. Asking ptxas anew would need the very flags
    # Triton chose, its own log is gone when the kernel comes from the cache, and Triton's `n_spills`
    # needs a GPU's driver.
    tensor = next((shown for name, shown in _TENSOR.items() if name in done.asm["ptx"]), "-")
    return Compiled(
        name=spec.name,
        arch=arch,
        config=spec.label,
        warps=spec.options.get("num_warps", 4),
        registers=usage["REG"],
        spills=usage["STACK"] + usage["LOCAL"],
        shared=done.metadata.shared,
        tensor=tensor,
        size=sum(size for name, size in _sections(done.asm["cubin"]) if name.startswith(".text.")),
    )


def build(spec: Specialisation, arch: int) -> Any:
    """Return Triton's compiled kernel, with all stages in its `asm`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(spec.module), spec.name)
    constants, options = dict(spec.constants), dict(spec.options)
    source = ASTSource(fn=kernel, signature=spec.signature, constexprs=constants, attrs=spec.attributes)
    with clusters_compiled(spec.cluster):
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return REG, STACK, SHARED and LOCAL of the one kernel in a cubin."""
    return {k: int(v) for k, v in re.findall(r"\b([A-Z]+):(\d+)", cuobjdump("--dump-resource-usage", cubin))}


def _sections(cubin: bytes) -> Iterator[tuple[str, int]]:
    """Yield name and bytes of each section of an ELF file of 64 bits."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    for name, *_, length in headers:
        begin = headers[names][4] + name
        yield cubin[begin : cubin.index(b"\0", begin)].decode(), length


@lru_cache
def _tool() -> str:
    """Find the cuobjdump that comes with Triton."""
    found = sorted(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump*"))
    if not found:
        raise RuntimeError("cuobjdump is not part of this installation of triton")
    return str(found[0])


def cuobjdump(what: str, cubin: bytes) -> str:
    """Return what the tool prints about a cubin: --dump-resource-usage, --dump-sass."""
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as f:
        f.write(cubin)
    try:
        return subprocess.run([_tool(), what, f.name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(f.name)


def try_compile(spec: Specialisation, arch: int) -> Compiled | str:
    """Do as `compile_specialisation`, or return why it failed; suits worker processes."""
    try:
        return compile_specialisation(spec, arch)
    except Exception as e:
        return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
