"""Which device, precision and implementation of the ops an agent uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch

from tdmpc2_fast.kernels.cpu.build import bfloat16, kernels
from tdmpc2_fast.kernels.device.launch import Precision, natively, precision_here, why_not

from ..config import Config
from ..errors import BackendError, ConfigError, warn
from .cores import cores

_WIDEST_SIMNORM = 16


class Backend(NamedTuple):
    """An implementation of planning or learning, and why it is this one."""

    name: str  # torch, triton or cpu
    why: str


def resolve_device(name: str) -> torch.device:
    """Return the torch device a config names; `auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"config key 'device': got {name!r}, allowed: auto, cpu, cuda, cuda:N") from e
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"config key 'device': got {name!r}, allowed: cpu or one of {count} CUDA devices")
    elif device.type != "cpu":
        raise ConfigError(f"config key 'device': got {name!r}, allowed: auto, cpu, cuda, cuda:N")
    return device


def resolve_backend(cfg: Config, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """Return the implementation of planning and learning to use, and why.

    `auto` takes the Triton kernels on a GPU and the C++ kernels on a CPU that can run them, else torch.

    Raises:
        BackendError: `triton` or `cpu` was asked for and cannot run; the message has the reason.
    """
    if cfg.backend == "torch":
        return _torch("backend=torch was asked for", cfg)
    name = _kernels_of(cfg.backend, device)
    reason = _why_no_kernels(name, cfg, device, dtype)
    if reason is None:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else _instructions(cfg)
        why = f"the kernels run on {where}" if cfg.backend == "auto" else f"backend={name} was asked for"
        return Backend(name, why)
    if cfg.backend != "auto":
        raise BackendError(f"backend={name!r} cannot run: {reason}; use backend='torch' or 'auto'")
    return _torch(reason, cfg)


def _kernels_of(backend: str, device: torch.device) -> str:
    """Return the backend asked for; of `auto` the one whose kernels are this device's."""
    if backend != "auto":
        return backend
    return "triton" if device.type == "cuda" else "cpu"


def on_this_machine(cfg: Config, given: Collection[str], note: Callable[[str], object] = warn) -> Config:
    """Return a config from elsewhere with defaults for keys of its machine that this one cannot serve.

    given: keys that were asked for here; they stay, to be honoured or refused.
    note: is told, once, which keys could not be served, why, and what is used instead.
    """
    changes: dict[str, Any] = {}
    reasons = []

    def leave(key: str, why: str, default: Any = "auto") -> None:
        if key not in given:
            changes[key] = default
            reasons.append(why)

    try:
        device = resolve_device(cfg.device)
    except ConfigError:
        if "device" in given:
            raise
        device = resolve_device("auto")
        leave("device", f"this machine has {torch.cuda.device_count()} CUDA devices")
    asked = _kernels_of(cfg.backend, device)
    no_kernels = None if asked == "torch" else _why_no_kernels(asked, cfg, device, torch.float32)
    if cfg.backend in ("triton", "cpu") and no_kernels is not None:
        leave("backend", no_kernels)
        if "backend" in changes:
            no_kernels = _why_no_kernels(_kernels_of("auto", device), cfg, device, torch.float32)
    if cfg.precision == "bfloat16" and (no_kernels is not None or asked == "torch"):
        leave("precision", no_kernels or "bfloat16 needs kernels")
    for key in ("num_threads", "env_workers"):
        if (getattr(cfg, key) or 0) > cores():
            leave(key, f"{cores()} cores", None)
    if not changes:
        return cfg
    found = cfg.replace(**changes)
    saved, used = (" ".join(f"{k}={str(getattr(c, k)).lower()}" for k in changes) for c in (cfg, found))
    note(
        f"the checkpoint's {saved} cannot be had here ({'; '.join(dict.fromkeys(reasons))}); "
        f"used: {used.replace('device=auto', f'device={device}')}"
    )
    return found


def _instructions(cfg: Config) -> str:
    """Name the CPU's instructions that kernels are compiled to."""
    found = kernels()
    products = f", bfloat16 by {found.bfloat16}" if cfg.precision == "bfloat16" else ""
    one = "" if found.threads else ", on one thread: torch's OpenMP runtime has no GOMP_parallel"
    return f"this CPU with vectors of {found.lanes} floats{products}{one}"


def _torch(why: str, cfg: Config) -> Backend:
    if cfg.precision == "bfloat16":
        raise BackendError(f"precision='bfloat16' needs kernels, and torch plans and learns here: {why}")
    return Backend("torch", why)


def _why_no_kernels(name: str, cfg: Config, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the kernels of backend `name` cannot run for this config on this device; None where they can."""
    v = cfg.simnorm_dim
    if v & (v - 1) or v > _WIDEST_SIMNORM:
        return f"simnorm_dim is {v}, allowed: a power of two up to {_WIDEST_SIMNORM}"
    if dtype != torch.float32:
        return f"the model is {dtype}, allowed: torch.float32"
    if name != "cpu":
        return why_not(device)
    with natively():
        reason = why_not(device)
    if reason is None and cfg.precision == "bfloat16" and not bfloat16():
        return "precision='bfloat16' needs a CPU with AMX or AVX512-BF16, and this one has neither"
    return reason


def plan_precision(cfg: Config, device: torch.device) -> Precision:
    """Return how the kernels compute products: `auto` is tf32 on a GPU and exact elsewhere; a CPU has no tf32."""
    if cfg.precision == "auto":
        return Precision("tf32" if device.type == "cuda" else "float32")
    return precision_here(cfg.precision)


@contextlib.contextmanager
def matmul_precision(cfg: Config, device: torch.device) -> Iterator[None]:
    """Have torch compute float32 products and convolutions within as the config asks.

    tf32 on a GPU, or exact. `bfloat16` is for kernels: what torch computes beside them is tf32.
    Gradients of convolutions repeat bit for bit.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic
    cudnn.deterministic = True
    try:
        with torch_products(tf32=cfg.precision != "float32"):
            yield
    finally:
        cudnn.deterministic = before


@contextlib.contextmanager
def torch_products(tf32: bool) -> Iterator[None]:
    """Have torch compute float32 products and convolutions within in tf32, where a device has it, or exactly.

    torch keeps this twice, by `set_float32_matmul_precision` and `allow_tf32`, and for each kind of op by
    `fp32_precision`; it refuses to read the first where they disagree, and code that mixes them is common.
    """
    backends: Any = torch.backends
    ops = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [op.fp32_precision for op in ops]
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:
        named = "high" if before[0] == "tf32" else "highest"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(named)
        backends.cudnn.allow_tf32 = before[2] == "tf32"
        for op, precision in zip(ops, before, strict=True):
            op.fp32_precision = precision
