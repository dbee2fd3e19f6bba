"""What callers give, as tensors: arrays and lists of all kinds, or an `InputError` that names the argument."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import Config
from .errors import InputError, kind_of


def as_tensor(value: Any, name: str) -> Tensor:
    """Return real numbers as a tensor: a tensor as it is, without its graph; arrays (of any strides, byte order and
    write protection), numbers and nested lists of them on the CPU.

    Raises:
        InputError: anything else, by `name`.
    """
    if type(value) is np.ndarray and value.dtype is _FLOAT32 and value.flags.carray:  # as most come
        return torch.from_numpy(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, Tensor) for x in value):
        try:
            value = torch.stack(tuple(value))
        except RuntimeError as e:
            raise InputError(f"{name}: got tensors of different shapes or devices, allowed: of one") from e
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_complex() or value.is_quantized:
            what = f"{value.layout} tensor" if value.layout != torch.strided else f"tensor on {value.device}"
            raise InputError(f"{name}: got a {what} of {value.dtype}, allowed: a dense tensor of real numbers")
        found = value.detach() if value.requires_grad else value
        return found.resolve_neg() if found.is_neg() else found  # arrays know no such views
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"{name}: got {kind_of(value)} that is no array, allowed: a tensor or array of numbers") from e
    if array.dtype.kind not in "biuf":
        of = f" of {array.dtype}" if isinstance(value, np.ndarray) else ""
        raise InputError(f"{name}: got {kind_of(value)}{of}, allowed: a tensor or array of numbers")
    # Types that torch has none of, or few ops for, go to the next wider one; others only to native byte order.
    wider = {"u": "i8", "f": "f8"}.get(array.dtype.kind) if array.dtype.name not in _NATIVE else None
    return torch.from_numpy(np.require(array, wider or array.dtype.newbyteorder("="), ["C", "W"]))


_FLOAT32 = np.dtype("float32")
_NATIVE = ("uint8", "float16", "float32", "float64")


def whole(value: Any, name: str, low: int) -> int:
    """Return a whole number of at least `low`, given by Python or numpy, or raise an `InputError` with its name."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low:
        raise InputError(f"{name}: got {value!r}, allowed: an integer of at least {low}")
    return int(value)


def observation(obs: Any, cfg: Config, name: str = "obs") -> Tensor:
    """Return observations as a tensor; they may come in a dict (or TensorDict) under their kind, `cfg.obs`."""
    if isinstance(obs, Mapping):
        if cfg.obs not in obs.keys():  # noqa: SIM118 (a TensorDict refuses `in`)
            raise InputError(f"{name}: got a dict with {sorted(map(str, obs))}, allowed: {cfg.obs!r} in it")
        obs = obs[cfg.obs]
    return as_tensor(obs, name)


def finite(x: Tensor, name: str) -> Tensor:
    """Return x, or raise an `InputError` with the first entry that is not finite."""
    # The sum of numbers one of which is not finite is not finite; it takes a quarter of the time.
    if not math.isfinite(x.sum()) and not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise InputError(f"{name}: got {x[tuple(bad)].item()} at index {bad}, allowed: finite numbers")
    return x


def pixels(x: Tensor, name: str) -> Tensor:
    """Return x, or raise an `InputError` where it is surely no picture of 0..255."""
    if x.dtype == torch.uint8:
        return x
    if x.dtype == torch.bool:
        raise InputError(f"{name}: got torch.bool, allowed: pixels from 0 to 255")
    low, high = (float(v) for v in finite(x, name).aminmax())
    if low < 0 or high > 255:
        raise InputError(f"{name}: got numbers from {low:g} to {high:g}, allowed: pixels from 0 to 255")
    if high <= 1 and not bool((x == x.round()).all()):
        raise InputError(
            f"{name}: got numbers from {low:g} to {high:g}, allowed: pixels from 0 to 255; multiply by 255"
        )
    return x


def check_obs(obs: Any, cfg: Config, leading: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return observations (*leading, *obs_shape) as a tensor: states in `dtype`, pixels as they come.

    Raises:
        InputError: another shape, numbers that are not finite in `dtype`, or no pixels.
    """
    found = observation(obs, cfg)
    shape = leading + cfg.observation_shape
    if found.shape != shape:
        raise InputError(f"obs: got shape {tuple(found.shape)}, allowed: {shape}")
    if cfg.obs == "state" and found.dtype != dtype:
        found = found.to(dtype)
    # Only where it is free: on an accelerator the check would make the host wait.
    if found.device.type != "cpu":
        return found
    return finite(found, "obs") if cfg.obs == "state" else pixels(found, "obs")


def flags(value: Any, name: str, count: int) -> bool | Tensor:
    """Return a flag for all, or one for each of `count`: a bool, or (1,) or (count,) bool."""
    if isinstance(value, bool):
        return value
    flag = as_tensor(value, name)
    if flag.ndim > 1 or flag.numel() not in (1, count):
        raise InputError(f"{name}: got shape {tuple(flag.shape)}, allowed: a bool or ({count},)")
    if flag.dtype != torch.bool and flag.device.type == "cpu" and not bool(((flag == 0) | (flag == 1)).all()):
        raise InputError(f"{name}: got {flag.tolist()}, allowed: true or false")
    return flag.to(torch.bool)


def indices(value: Any, name: str, count: int) -> Tensor:
    """Return indices below `count` as an int64 tensor of at least one dimension."""
    index = as_tensor(value, name)
    index = index.view(1) if index.ndim == 0 else index
    # Only where it is free: on an accelerator the check would make the host wait.
    if index.device.type == "cpu" and not bool(((index >= 0) & (index < count) & (index == index.long())).all()):
        raise InputError(f"{name}: got {index.tolist()}, allowed: 0 to {count - 1}")
    return index.to(torch.int64)
