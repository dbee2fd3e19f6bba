"""Calls the C++ twin of a kernel: its arguments as words, one call, or a tape of many that is replayed.

A kernel's arguments and constants go in the order of its Python signature, nested tuples and all, each
word behind a tag of its kind; the C++ side (src/core.h, `Reader`) reads them in the same order and
refuses anything else. So a kernel's signature in Python is its signature in C++.
"""

from __future__ import annotations

import ctypes
import inspect
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .build import kernels

_NONE, _INT, _FLOAT, _TENSOR, _TUPLE = range(5)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int64: 2, torch.uint8: 3, torch.bool: 3}

Grid = tuple[int, ...]


def _parameters(kernel: Any) -> tuple[str, ...]:
    """Return the names of a kernel's parameters in their order, without programmatic dependent launch."""
    return _named(getattr(kernel, "fn", kernel))


@cache
def _named(function: Callable[..., None]) -> tuple[str, ...]:
    # Not of the kernel itself: Triton makes the hash of one from its source and all that this refers to.
    return tuple(name for name in inspect.signature(function).parameters if name != "PDL")


def _words(value: Any, out: list[int]) -> None:
    if isinstance(value, Tensor):
        if value.dtype not in _TYPES or value.device.type != "cpu":
            allowed = ", ".join(str(x).removeprefix("torch.") for x in _TYPES)
            raise ValueError(f"tensor: got {value.dtype} on {value.device}, allowed on a CPU: {allowed}")
        out += (_TENSOR, value.data_ptr(), _TYPES[value.dtype])
    elif isinstance(value, tuple):
        out += (_TUPLE, len(value))
        for entry in value:
            _words(entry, out)
    elif isinstance(value, float):
        out += (_FLOAT, struct.unpack("q", struct.pack("d", value))[0])
    elif isinstance(value, (int, str)):
        # Names, as of a precision, are for compilers: which products there are shows in types.
        out += (_INT, 0 if isinstance(value, str) else int(value))
    elif value is None:
        out.append(_NONE)
    else:
        raise TypeError(f"argument: got {type(value).__name__}, allowed: tensors, numbers, tuples of these, None")


def _arguments(kernel: Any, grid: Grid, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """Return name, grid, words and their number as the library takes them."""
    words: list[int] = []
    names = _parameters(kernel)
    for value in args:
        _words(value, words)
    for name in names[len(args) :]:
        _words(options[name], words)
    sizes = (ctypes.c_int64 * 3)(*grid, *[1] * (3 - len(grid)))
    return kernel.__name__.encode(), sizes, (ctypes.c_int64 * len(words))(*words), ctypes.c_long(len(words))


def _check(said: bytes | None, name: str) -> None:
    if said is not None:
        raise RuntimeError(f"{name} on the CPU: {said.decode()}")


def run(kernel: Any, grid: Grid, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Run a kernel's twin now, on as many threads as torch is set to use."""
    given = _arguments(kernel, grid, args, options)
    _check(kernels().library.cpu_run(*given, torch.get_num_threads()), kernel.__name__)


class Tape:
    """Kernels whose arguments were read once, replayed in one call: what a CUDA graph is on a GPU.

    Tensors of the launches must stay where they are; the tape holds them.
    """

    def __init__(self) -> None:
        self._library = kernels().library
        self._tape = ctypes.c_void_p(self._library.cpu_tape())
        self._held: list[Any] = []

    def __del__(self) -> None:
        self._library.cpu_tape_free(self._tape)

    def add(self, kernel: Any, grid: Grid, args: tuple[Any, ...], options: dict[str, Any], samples: int = 0) -> None:
        """Add one launch.

        samples: where rows of each environment are samples, and what a launch does with one row depends on
        that row alone, how many there are. Such neighbours are walked a block of samples at a time.
        """
        envs, first = 1, 0
        if samples:
            named = dict(zip(_parameters(kernel), args, strict=False))
            envs, out = named["M"] // named["n"], named["y"]
            first = out.ptr.storage_offset() // out.r % samples
        given = _arguments(kernel, grid, args, options)
        said = self._library.cpu_tape_add(
            self._tape, *given, ctypes.c_long(envs), ctypes.c_long(samples), ctypes.c_long(first)
        )
        _check(said, kernel.__name__)
        self._held.append((args, options))

    def run(self, stale: bool) -> None:
        """Replay all; stale: a weight was written by others since the last time."""
        _check(self._library.cpu_tape_run(self._tape, stale, torch.get_num_threads()), "a tape")
