"""Calls that give the same numbers whatever mode of torch they are made in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def undisturbed(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return `fn`, run outside the inference mode, autocast and default device that its caller may be in.

    Tensors made in inference mode could not be trained or written to later. Gradients are on where
    inference mode was left; `fn` turns them off itself if it needs none. Where nothing is set this costs half a
    microsecond.
    """

    @functools.wraps(fn)
    def call(*args: _P.args, **keys: _P.kwargs) -> _R:
        if not (
            torch.is_inference_mode_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.is_autocast_enabled("cuda")
            or torch._C._len_torch_function_stack()
        ):
            return fn(*args, **keys)
        with contextlib.ExitStack() as stack:
            for mode in list(_modes_to_leave()):
                stack.enter_context(mode)
            return fn(*args, **keys)

    return call


def _modes_to_leave() -> Iterator[contextlib.AbstractContextManager[object]]:
    if torch.is_inference_mode_enabled():
        yield torch.inference_mode(False)
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            yield torch.autocast(kind, enabled=False)
    # A default device is a mode on this stack; to ask for it takes longer than all of the above.
    if torch._C._len_torch_function_stack() and torch.get_default_device().type != "cpu":
        yield torch.device("cpu")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Give tensors made within, without a dtype, this one. It holds for all threads: keep it to construction."""
    before = torch.get_default_dtype()
    if before == dtype:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
