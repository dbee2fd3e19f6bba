"""Lets an op's plain-torch reference take what the op takes, without stating it twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def reference_of(op: Callable[P, R]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a reference the signature of its op; the function decorated names those arguments it reads."""
    signature = inspect.signature(op)

    def decorate(body: Callable[..., R]) -> Callable[P, R]:
        read = inspect.signature(body).parameters

        @wraps(body)
        def reference(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            return body(**{name: given.arguments[name] for name in read})

        reference.__signature__ = signature  # type: ignore[attr-defined]
        return reference

    return decorate
