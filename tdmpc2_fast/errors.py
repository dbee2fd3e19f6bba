"""Errors a user can act on: each names the argument, what came and what is allowed."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable

_ALIKE, _PART, _ABOUT_AS_CLOSE = 0.6, 0.85, 0.1  # shares of letters in common


class ConfigError(ValueError):
    """A configuration key or value that cannot be used."""


class InputError(ValueError):
    """A tensor or argument of the wrong shape, dtype, device or value."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or of another model."""


class DataError(ValueError):
    """A data set that is missing, damaged, unsafe or of another form."""


class BackendError(RuntimeError):
    """A compute backend that cannot run here; the message says why."""


class NonFiniteError(FloatingPointError):
    """A loss or gradient became NaN or infinite; parameters were left as they were."""


class RanksError(RuntimeError):
    """The processes of a run on several cannot reach each other, or differ where they must not."""


def kind_of(value: object) -> str:
    """Return the name of a value's type, for a message."""
    return "None" if value is None else type(value).__name__


def warn(text: str) -> None:
    """Warn of what was done instead of what was asked for, where the caller gave no better place to say it."""
    warnings.warn(text, UserWarning, stacklevel=3)


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the `count` entries of `known` most like `name`, best first; there may be none.

    All of them are about as close as the first: a second one that is far off only distracts.
    """
    scores = {k: _likeness(name.lower(), k.lower()) for k in known}
    least = max(_ALIKE, max(scores.values(), default=(0.0,))[0] - _ABOUT_AS_CLOSE)
    close = [k for k, (score, _) in scores.items() if score >= least]
    return sorted(close, key=lambda k: scores[k], reverse=True)[:count]


def _likeness(name: str, known: str) -> tuple[float, float]:
    """Return the likeness from 0 to 1, high where `name` is a part of `known`, and what tells equals apart."""
    ratio = difflib.SequenceMatcher(None, known, name).ratio()
    return (max(ratio, _PART) if len(name) > 2 and name in known else ratio), ratio


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'a', 'b'?"`, or an empty string when nothing is close."""
    close = nearest(name, known)
    return f" Did you mean {', '.join(repr(k) for k in close)}?" if close else ""
