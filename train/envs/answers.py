"""What environments answer, in one form: a number, a flag, an array; or an `EnvError` that names the field."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.errors import ConfigError


class NotHereError(ConfigError):
    """A task that lacks something on this machine; the message says what, and how to get it."""


class EnvError(RuntimeError):
    """An environment failed; the message says how."""


def number(value: Any, field: str) -> float:
    """Return the one number that `value` is or holds: an array, a list or a tensor of one is that number."""
    if type(value) is float:
        return value
    found = _plain(value, field)
    if found.size == 1:
        only = found.item()
        if isinstance(only, numbers.Real):
            try:
                return float(only)
            except OverflowError:
                return float("inf")
    raise unusable(field, value, "a number")


def flag(value: Any, field: str) -> bool:
    """Tell whether `value`, one number as for `number`, is not zero; NaN is no flag."""
    if value is True or value is False:
        return value
    with contextlib.suppress(EnvError):
        found = number(value, field)
        if found == found:
            return found != 0
    raise unusable(field, value, "true or false")


def success(info: Any) -> float:
    """Return the success that a step's `info` tells; 0 where it tells none."""
    if info is None:
        return 0.0
    if not isinstance(info, Mapping):
        raise unusable("info", info, "a dict")
    key = "success" if "success" in info else "is_success"
    value = info.get(key)
    found = 0.0 if value is None else number(value, f"info[{key!r}]")
    finite(found, f"info[{key!r}]")
    return found


def array(value: Any, shape: tuple[int, ...], dtype: Any, field: str) -> NDArray[Any]:
    """Return a new array of this shape and dtype; a batch of one, or a column for a row, is taken for what it holds.

    dtype: None keeps that of the value. Numbers that it cannot hold become infinite, which `finite` finds.
    """
    found = _plain(value, field)
    same = [n for n in found.shape if n != 1] == [n for n in shape if n != 1]
    if found.dtype.kind not in "biuf" or not same:
        raise unusable(field, value, f"numbers of shape {shape}")
    with np.errstate(over="ignore"):
        return np.array(found.reshape(shape), dtype)


def finite(value: float | NDArray[Any], field: str) -> None:
    """Raise unless every number is finite in float32, in which models learn and replays keep."""
    with np.errstate(over="ignore"):
        ok = np.isfinite(np.asarray(value, np.float32))
    if not ok.all():
        where = f" at {np.argwhere(~ok)[0].tolist()}" if np.ndim(value) else ""
        raise EnvError(f"{field}: got {np.asarray(value)[~ok].flat[0]}{where}, allowed: finite numbers (float32)")


def unusable(field: str, value: Any, allowed: str) -> EnvError:
    """Return the error of a field whose value is none of what is allowed."""
    shape = getattr(value, "shape", ())
    if isinstance(shape, tuple) and any(n != 1 for n in shape):
        got = f"{getattr(value, 'dtype', type(value).__name__)} of shape {shape}"
    else:
        got = repr(value)
    return EnvError(f"{field}: got {got if len(got) <= 80 else got[:77] + '...'}, allowed: {allowed}")


def _plain(value: Any, field: str) -> NDArray[Any]:
    """Return an array of what a list, scalar or tensor holds, wherever that lies."""
    try:
        if hasattr(value, "detach"):  # of torch
            value = value.detach().cpu()
            value = value.double() if value.is_floating_point() else value  # numpy has no bfloat16
        return np.asarray(value)
    except (TypeError, ValueError) as e:  # ragged
        raise unusable(field, value, "numbers") from e
