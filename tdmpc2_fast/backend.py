"""Which device, precision and implementation of the ops an agent uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .config import Config
from .errors import BackendError, ConfigError


def resolve_device(name: str) -> torch.device:
    """The torch device a config names; `auto` is the GPU where there is one."""
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


def resolve_backend(cfg: Config) -> str:
    """The implementation to use; raises `BackendError` with the reason if it cannot run."""
    if cfg.backend == "triton":
        raise BackendError("backend='triton': this version has no Triton kernels yet; use backend='torch' or 'auto'")
    return "torch"


@contextlib.contextmanager
def matmul_precision(cfg: Config, device: torch.device) -> Iterator[None]:
    """Within: float32 products and convolutions as the config asks, tf32 on a GPU or exact."""
    tf32 = cfg.precision in ("auto", "tf32")
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
