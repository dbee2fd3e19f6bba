"""Errors a user can act on: each names the argument, what came and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration key or value that cannot be used."""


class InputError(ValueError):
    """A tensor or argument of the wrong shape, dtype, device or value."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or of another model."""


class BackendError(RuntimeError):
    """A compute backend that cannot run here; the message says why."""


class NonFiniteError(FloatingPointError):
    """A loss or gradient became NaN or infinite; parameters were left as they were."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` entries of `known` most like `name`, best first; may be empty."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'a', 'b'?"`, or an empty string when nothing is close."""
    close = nearest(name, known)
    return f" Did you mean {', '.join(repr(k) for k in close)}?" if close else ""
