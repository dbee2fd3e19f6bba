"""What every kernel launch shares: whether Triton can run here, precisions, early starts, and a launch log.

Triton is optional. Kernel files take `triton`, `tl` and `jit` from here, so that they import,
with their plain-torch references, where it is missing.
"""

import inspect
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..cpu.build import why_not as why_not_built
from ..cpu.call import run as run_on_cpu
from .cluster import check_clustered, clusters_compiled

# What Triton raises for a kernel it cannot compile or a chip too small for it: KERNEL_ERRORS.
try:
    import triton as _triton
    import triton.language as _tl

    triton: Any = _triton
    tl: Any = _tl
    from triton.errors import TritonError as _TritonError

    jit: Any = _triton.jit
    KERNEL_ERRORS: tuple[type[Exception], ...] = (_TritonError,)
except ImportError:
    triton = None
    KERNEL_ERRORS = ()

    class _Absent:
        """Stands in for Triton where kernels are defined: gives back what it is given. None is launched."""

        def __getattr__(self, name: str) -> Any:
            return lambda value=None: value

    tl = _Absent()
    jit = tl.jit


PRECISIONS = ("float32", "tf32", "bfloat16")

PROCESSORS = 132
"""Multiprocessors of an H100 or H200; A100 has 108, B200 148."""


@dataclass(frozen=True)
class Precision:
    """Tells how products are computed; sums, norms and returns are float32 always.

    dtype: of weights and activations in memory. dot: Triton's `input_precision`. Weights are
    rounded when they are packed (`operand`), what they meet is when it is read.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in PRECISIONS:
            raise ValueError(f"precision: got {self.name!r}, allowed: {', '.join(PRECISIONS)}")

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of packed weights and activations."""
        return torch.bfloat16 if self.name == "bfloat16" else torch.float32

    @property
    def dot(self) -> str:
        """The `input_precision` of float32 products."""
        return "tf32" if self.name == "tf32" else "ieee"

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        """Return x as products take it, rounded to nearest; float64, the oracle's, is left alone.

        Tensor cores cut float32 off after the 10 stored bits of tf32, which errs twice as far and to one
        side, so it is rounded to them (Dekker's split); what is not finite comes out NaN.
        """
        if x.dtype == torch.float64:
            return x
        if self.name != "tf32":
            return x.to(self.dtype)
        x = x.float()
        far = x * (2.0**13 + 1)
        return far - (far - x)


class How(NamedTuple):
    """Tells how an op's kernels are launched."""

    precision: Precision  # of products
    pdl: bool = False  # programmatic dependent launch: a kernel may start while the one before it ends
    clusters: bool = False  # whether programs may wait for their neighbours (cluster.py)

    @classmethod
    def of_chip(cls, arch: int, precision: Precision) -> "How":
        """Return what chips of a compute capability (90 is 9.0) can, which need not be there."""
        return cls(precision, arch >= 90, arch >= 90)


def interpreting() -> bool:
    """Tell whether kernels run under Triton's interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return triton is not None and os.environ.get("TRITON_INTERPRET", "0") == "1" and not native()


def native() -> bool:
    """Tell whether this thread's launches run the C++ kernels of the CPU."""
    return _open.native


def on_cpu() -> bool:
    """Tell whether launches run on a CPU, compiled or interpreted, which has no use for small tiles."""
    return native() or interpreting()


@contextmanager
def natively(wanted: bool = True) -> Iterator[None]:
    """Have this thread's launches within run the C++ kernels of the CPU, if `wanted`."""
    before, _open.native = _open.native, wanted or _open.native
    try:
        yield
    finally:
        _open.native = before


def precision_here(name: str) -> Precision:
    """Return a precision as this thread's launches have it: a CPU's tf32 is float32, as with torch's ops."""
    return Precision("float32" if name == "tf32" and native() else name)


def why_not(device: torch.device) -> str | None:
    """Say why kernels cannot run on this device, or return None where they can."""
    if native():
        return why_not_built() if device.type == "cpu" else "C++ kernels run on the CPU only"
    if triton is None:
        return "the package triton is not installed"
    if interpreting():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 interprets kernels on the CPU only"
    if device.type != "cuda":
        return f"Triton needs a CUDA device, this one is {device.type!r} (TRITON_INTERPRET=1 interprets on the CPU)"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, allowed: 8.0 and newer"
    return _why_no_driver()


@lru_cache
def _why_no_driver() -> str | None:
    """Say why Triton cannot launch on this machine: some versions build their launcher with a C compiler."""
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as e:  # whatever it is, it is a reason
        return f"Triton cannot launch kernels here: {reason_of(e)}"
    return None


def reason_of(e: Exception) -> str:
    """Return the kind of an error and the end of its text, in a line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[-300:]}"


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the log saw it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    samples: int = 0  # see `by_sample`

    @property
    def name(self) -> str:
        """The name of the kernel."""
        name: str = self.kernel.__name__
        return name

    @property
    def cluster(self) -> int:
        """The number of programs that wait for each other."""
        return _cluster_of(self.options)

    @property
    def programs(self) -> int:
        """The number of programs in the grid."""
        return math.prod(self.grid)

    def arguments(self) -> dict[str, Any]:
        """Return arguments, constants and compiler options by name, and so the fields of constants that are tuples."""
        names = inspect.signature(getattr(self.kernel, "fn", self.kernel)).parameters
        return dict(zip(names, self.args, strict=False)) | self.options | flat(self.options)


def flat(constants: dict[str, Any]) -> dict[str, Any]:
    """Return constants by name, the fields of a NamedTuple in its place: their names are a kernel's own."""
    found: dict[str, Any] = {}
    for name, value in constants.items():
        found |= value._asdict() if hasattr(value, "_asdict") else {name: value}
    return found


COMPILER_OPTIONS = ("num_warps", "num_stages", "launch_pdl", "enable_fp_fusion")


@dataclass(eq=False)
class _Log:
    launches: list[Any]
    dry: bool
    host: bool = False  # whether work of the host is noted, too


class _Open(threading.local):
    """Holds the logs open in this thread, and where it launches: another thread's launches are its own."""

    def __init__(self) -> None:
        self.logs: list[_Log] = []
        self.native = False
        self.samples = 0


_open = _Open()


@contextmanager
def log_launches(dry: bool = False) -> Iterator[list[Launch]]:
    """Append every launch of ours in this thread to the list given, within; `dry`: instead of executing it.

    A dry run needs no GPU: it tells which kernels a composition launches, with which arguments.
    """
    with _opened(_Log([], dry)) as launches:
        yield launches


@contextmanager
def _opened(log: _Log) -> Iterator[list[Any]]:
    _open.logs.append(log)
    try:
        yield log.launches
    finally:
        _open.logs.remove(log)


def recorded(fn: Callable[[], None]) -> list[Launch | Callable[[], None]]:
    """Return the launches that `fn` makes and the work it gives to `host`, in their order; none of it is done."""
    with _opened(_Log([], dry=True, host=True)) as steps:
        fn()
    return steps


def host(work: Callable[[], object]) -> None:
    """Do what no kernel does, between launches; where these are recorded, it is noted with them instead."""
    recording = [log for log in _open.logs if log.host]
    for log in recording:
        log.launches.append(work)
    if not recording:
        work()


@contextmanager
def by_sample(samples: int) -> Iterator[None]:
    """Note of launches within that each has a row a sample, of `samples` an environment, and mixes no two of them."""
    before, _open.samples = _open.samples, samples
    try:
        yield
    finally:
        _open.samples = before


def _cluster_of(options: dict[str, Any]) -> int:
    """Return how many programs of a kernel with these constants wait for each other: its CLUSTER, or 1."""
    found: int = flat(options).get("CLUSTER", 1)
    return found


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, pdl: bool | None = None, **options: Any) -> None:
    """Run kernel[grid](*args, **options) and note it in open logs; a grid without programs is no launch.

    pdl: programmatic dependent launch; None for a kernel that does not know of it.
    """
    if math.prod(grid) == 0:
        return
    if pdl is not None:
        options |= dict(PDL=pdl, launch_pdl=pdl)
    for log in _open.logs:
        log.launches.append(Launch(kernel, grid, args, options, _open.samples))
    if any(log.dry for log in _open.logs):
        return
    if native():
        run_on_cpu(kernel, grid, args, options)
        return
    if interpreting():
        options = {k: v for k, v in options.items() if k not in COMPILER_OPTIONS}
    else:
        # Its default differs between versions of Triton.
        options.setdefault("enable_fp_fusion", True)
    cluster = 1 if interpreting() else _cluster_of(options)
    with clusters_compiled(cluster):
        compiled = kernel[grid](*args, **options)
    if cluster > 1:
        check_clustered(compiled)


@jit
def await_producers(PDL: tl.constexpr):
    """Let the next kernel start, then wait for all before this one (programmatic dependent launch)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit
def await_neighbours(CLUSTER: tl.constexpr, INTERPRETED: tl.constexpr):
    """Wait until the programs of a cluster have come here, and see what they wrote before.

    What one wrote, another must load from L2 (`.cg`). The comment is read by cluster.py. The interpreter runs one
    program after another, so that none can wait: there a launch is right when it was run once more for each wait.
    """
    if CLUSTER == 1 or INTERPRETED:
        tl.debug_barrier()
    else:
        ARRIVE: tl.constexpr = "barrier.cluster.arrive.release.aligned; // cluster of $1, $0"
        WAIT: tl.constexpr = "barrier.cluster.wait.acquire.aligned; // $0"
        tl.inline_asm_elementwise(ARRIVE, "=r,n", [CLUSTER], dtype=tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise(WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def pow2(n: int, least: int = 1) -> int:
    """Return the least power of two that is at least n and `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def check_tensor(
    name: str,
    x: torch.Tensor,
    shape: tuple[int, ...],
    like: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    contiguous: bool = True,
) -> None:
    """Refuse another shape, type, device or layout than the kernels work on."""
    got = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
    allowed = f"{shape} {str(dtype).removeprefix('torch.')} on {like.device}"
    if got != allowed:
        raise ValueError(f"{name}: got {got}, allowed: {allowed}")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name}: got strides {x.stride()}, allowed: contiguous")
