"""What a run is told of its learning: the exact point from which it is said, and the numbers in it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from conftest import random_episode, tiny_config

from tdmpc2_fast import Config, ReplayBuffer
from tdmpc2_fast.train.envs.base import Step
from tdmpc2_fast.train.run.doubts import Doubts
from tdmpc2_fast.train.run.episode import Episode

END = math.expm1(10)  # of the bins: symexp of vmax


def config(**changes: Any) -> Config:
    return tiny_config(episode_length=40, **{**dict(steps=1000, seed_steps=50), **changes})


def doubts_of(cfg: Config) -> tuple[Doubts, list[str]]:
    said: list[str] = []
    return Doubts(cfg, lambda *words: said.append(words[0])), said


def played(rewards: list[float], terminated: bool = False) -> Episode:
    episode = Episode(np.zeros(5, np.float32), 2)
    for i, reward in enumerate(rewards):
        last = i == len(rewards) - 1
        step = Step(np.zeros(5, np.float32), reward, last and terminated, last and not terminated, 0.0)
        episode.append(np.zeros(2, np.float32), step)
    return episode


@pytest.mark.parametrize(
    ("changes", "after", "why"),
    [
        ({}, 50, "seed_steps=50 random decisions"),
        (dict(seed_steps=30), 40, "the end of an episode, 40 decisions"),
        (dict(num_envs=3), 120, "the end of an episode, 120 decisions"),
        (dict(num_envs=3, seed_steps=500), 498, "seed_steps=500 random decisions"),  # three at a time
        (dict(episodic=True, seed_steps=2), 3, "the end of an episode, 3 decisions"),  # as long as horizon
    ],
)
def test_a_run_that_ends_before_it_learns(changes: dict[str, Any], after: int, why: str) -> None:
    cfg = config(**changes)
    doubts, said = doubts_of(cfg.replace(steps=after))
    reason = f"steps={after}, and the first update comes after {why}; allowed: steps above {after}"
    assert said == [f"nothing will be learned: {reason}"]
    assert doubts.why_nothing_learned(ReplayBuffer(cfg)) == reason
    assert doubts_of(cfg.replace(steps=after + 1))[1] == []


@pytest.mark.parametrize(
    ("rewards", "terminated", "says"),
    [
        ([0.0, 0.999 * END, 0.0], True, None),
        ([0.0, 1.001 * END, 0.0], True, ("a reward of 22,047.5", "vmax=12")),
        ([0.0, -1.001 * END, 0.0], True, ("a reward of -22,047.5", "vmin=-12")),
        ([-1.001 * END, 3.0 * END], True, ("a reward of -22,047.5", "vmin=-12 vmax=13")),
        ([0.6 * END, 0.6 * END], True, ("a discounted return of", "vmax=12")),
        # What does not terminate goes on as it was.
        ([0.02 * END] * 40, True, None),
        ([0.1 * END] * 3, True, None),
        ([0.1 * END] * 3, False, ("a discounted return of 44,", "vmax=12")),
    ],
)
def test_rewards_beyond_the_bins(rewards: list[float], terminated: bool, says: tuple[str, str] | None) -> None:
    cfg = config()
    assert cfg.discounts[0] == pytest.approx(0.95)
    doubts, said = doubts_of(cfg)
    doubts.episode(played(rewards, terminated))
    if says is None:
        assert said == []
    else:
        assert f"got {says[0]}" in said[0]
        assert "end at -22,025 and 22,025" in said[0]
        assert said[0].endswith(f"or train with {says[1]}")
    plain, nothing = doubts_of(cfg.replace(num_bins=1))
    plain.episode(played(rewards, terminated))
    assert nothing == []


def test_the_return_is_discounted_from_its_end() -> None:
    gamma = config().discounts[0]
    doubts, said = doubts_of(config())
    doubts.episode(played([1000.0, 0.9 * END, 0.9 * END], terminated=True))
    first = 1000 + gamma * 0.9 * END * (1 + gamma)
    assert f"got a discounted return of {first:,.6g}" in said[0]


def test_episodes_too_short_for_a_slice() -> None:
    cfg = config(horizon=4)
    doubts, said = doubts_of(cfg)
    buffer = ReplayBuffer(cfg)
    doubts.seeded(51, buffer)  # none has ended yet
    assert doubts.why_nothing_learned(buffer) == "no episode ended before the run did"
    for length in (2, 1):
        doubts.episode(played([0.0] * length))
    buffer.add(random_episode(cfg, 3))
    doubts.seeded(50, buffer)
    assert said == []
    doubts.seeded(51, buffer)
    assert "no episode was as long as horizon=4 decisions" in said[0]
    assert said[0].endswith("horizon=2 fits the longest one")
    assert doubts.why_nothing_learned(buffer) == "no episode was as long as horizon=4 decisions"
    buffer.add(random_episode(cfg, 5))
    another, nothing = doubts_of(cfg)
    another.seeded(51, buffer)
    assert nothing == []
    assert doubts.why_nothing_learned(buffer) == f"utd={cfg.utd}"
