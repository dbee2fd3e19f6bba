"""Environments that this process holds: what each is made with, and that a run's are restored as they stood."""

from __future__ import annotations

import numpy as np
from scripted_env import Scripted, config

from tdmpc2_fast.train.envs.apart.held import Held
from tdmpc2_fast.train.envs.base import Failures, env_seed, step
from tdmpc2_fast.train.envs.together import InProcess


def test_environments_stand_where_they_stood() -> None:
    """One in the middle of an episode, one before its first, one behind an episode that no one goes on with."""
    actions = np.random.default_rng().uniform(-1, 1, (3, 2)).astype(np.float32) * 0.1
    held = Held({i: Scripted(10 + i) for i in range(3)})
    first = {i: held.begin(i) for i in (0, 2)}
    taken = {i: [step(held.envs[i], a) for a in actions] for i in (0, 2)}
    states = held.states()
    other = Held({i: Scripted(90) for i in range(3)})
    played = other.restore(states, {0: list(actions)})
    assert list(played) == [0]
    assert np.array_equal(played[0][0].obs, first[0])
    for again, once in zip(played[0][1:], taken[0], strict=True):
        assert np.array_equal(again.obs, once.obs)
        assert again[1:] == once[1:]
    assert other.states() == states
    for envs in (held, other):
        envs.begin(2)
    assert other.states() == held.states()
    assert other.states()[2] != states[2]


def test_what_is_made_anew_has_another_seed() -> None:
    cfg, seeds = config(2, seed=5), []

    def made(_: object, seed: int) -> Scripted:
        seeds.append(seed)
        return Scripted(seed)

    InProcess(cfg, made, Failures(cfg, print, 1), restarts=2)
    assert seeds == [env_seed(5, i, 3) for i in range(2)]
