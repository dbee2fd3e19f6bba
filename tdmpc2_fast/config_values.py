"""A value of a config in the type and range of its key, as Python has it, and those in words."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import ConfigError

_BITS = 63  # of an integer, as files and kernels have them


def _type_name(annotation: str) -> str:
    return annotation.replace(" | None", "")


def checked(f: dataclasses.Field[Any], value: Any) -> Any:
    """Return the value in the field's type, or raise a `ConfigError` that names key and range."""
    kind, meta = _type_name(str(f.type)), f.metadata
    optional = "None" in str(f.type)
    value = plain(value)
    if value is None and optional:
        return None
    allowed = describe_range(f)

    def fail() -> ConfigError:
        return ConfigError(f"config key {f.name!r}: got {value!r}, allowed: {allowed}")

    if kind == "bool":
        if not isinstance(value, bool):
            raise fail()
    elif kind in ("int", "float"):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise fail()
        if isinstance(value, float) and (not math.isfinite(value) or (kind == "int" and value != int(value))):
            raise fail()
        value = int(value) if kind == "int" else value
        if isinstance(value, int) and value.bit_length() > _BITS:
            bits = value.bit_length()
            raise ConfigError(
                f"config key {f.name!r}: got an integer of {bits} bits, allowed: {allowed}, of {_BITS} bits"
            )
        low, high = meta["low"], meta["high"]
        if low is not None and (value < low or (meta["open_low"] and value == low)):
            raise fail()
        if high is not None and value > high:
            raise fail()
    elif kind == "str":
        if not isinstance(value, str) or not value:
            raise fail()
    elif kind.startswith("tuple"):
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise fail()
        value = tuple(map(plain, value))
    elif kind == "Mapping[str, Any]":
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise fail()
        try:  # kept as files keep it, so that a run that goes on has the same
            value = json.loads(json.dumps(dict(value), allow_nan=False, default=_listed)) or None
        except (TypeError, ValueError) as e:
            raise ConfigError(f"config key {f.name!r}: got {value!r}, allowed: {allowed}") from e
    elif kind.startswith("Mapping"):
        if not isinstance(value, Mapping) or not value or not {*value} <= {"state", "rgb"}:
            raise fail()
        shapes = {str(k): _shape(shape) for k, shape in value.items()}
        if None in shapes.values():
            raise fail()
        value = shapes
    if meta["choices"] is not None and value not in meta["choices"]:
        raise fail()
    return value


def _shape(shape: Any) -> tuple[int, ...] | None:
    """Return the sizes of an array, or None where these are none."""
    sizes = tuple(map(plain, shape)) if isinstance(shape, Iterable) else ()
    return sizes if sizes and all(type(n) is int and n > 0 for n in sizes) else None


def _listed(value: Any) -> Any:
    """Return arrays and numbers of numpy and torch, and paths, in types that JSON has."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError


def plain(value: Any) -> Any:
    """Return numbers of numpy, paths, and devices of torch (which is not imported here) as plain Python values."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if (type(value).__module__, type(value).__name__) == ("torch", "device"):
        return str(value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def describe_range(f: dataclasses.Field[Any]) -> str:
    """Say in words what a field may hold."""
    kind, meta = _type_name(str(f.type)), f.metadata
    if meta["choices"] is not None:
        return "one of " + ", ".join(str(c) for c in meta["choices"] if c is not None)
    names = {
        "int": "an integer",
        "float": "a number",
        "bool": "true or false",
        "str": "a non-empty text",
        "Mapping[str, tuple[int, ...]]": "the sizes, each at least 1, of 'state' or 'rgb', as in {'state': (24,)}",
        "Mapping[str, Any]": "names with numbers, texts, lists or none, as JSON holds them",
    }
    text = names.get(kind, kind)
    if meta["low"] is not None:
        text += f" {'above' if meta['open_low'] else 'of at least'} {meta['low']}"
    if meta["high"] is not None:
        text += f"{' and' if meta['low'] is not None else ''} at most {meta['high']}"
    return text
