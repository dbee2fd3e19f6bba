"""States of random generators as JSON holds them, for every kind that tells its state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np


def told(generator: Any) -> Any:
    """Return the state of a generator, JSON-ready; None for a kind that does not tell it."""
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return _plain(generator.getstate())
    return None


def take(generator: Any, state: Any) -> None:
    """Let a generator go on from a state that one of its kind told.

    Raises:
        TypeError, ValueError: it is of another kind.
    """
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _arrays(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_arrays(state))
    elif isinstance(generator, random.Random):
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
    else:
        raise TypeError(f"got a generator {type(generator).__name__}, whose state nobody told")


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    return x.tolist() if isinstance(x, (np.ndarray, np.generic)) else x


def _arrays(x: Any) -> Any:
    """Return a state with its words in arrays again, as some generators insist on."""
    if isinstance(x, dict):
        return {k: _arrays(v) for k, v in x.items()}
    return np.array(x, np.uint64) if isinstance(x, list) else x
