"""Random generators of every kind go on from a state that went through JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tdmpc2_fast.train.envs.random_state import take, told

KINDS: dict[str, tuple[Callable[[int], Any], Callable[[Any], list[float]]]] = {
    "PCG64": (np.random.default_rng, lambda g: g.random(3).tolist()),
    "MT19937": (lambda seed: np.random.Generator(np.random.MT19937(seed)), lambda g: g.random(3).tolist()),
    "Philox": (lambda seed: np.random.Generator(np.random.Philox(seed)), lambda g: g.random(3).tolist()),
    "RandomState": (np.random.RandomState, lambda g: g.standard_normal(3).tolist()),
    "random": (random.Random, lambda g: [g.gauss(0, 1) for _ in range(3)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_goes_on_from_what_it_told(kind: str) -> None:
    make, draw = KINDS[kind]
    one, other = make(1), make(2)
    draw(one)
    state = json.loads(json.dumps(told(one)))
    following = draw(one)
    assert draw(other) != following
    take(other, state)
    assert draw(other) == following


def test_what_tells_no_state_takes_none() -> None:
    for silent in (random.SystemRandom(), object()):
        assert told(silent) is None
    with pytest.raises(TypeError, match="got a generator object, whose state nobody told"):
        take(object(), {})
