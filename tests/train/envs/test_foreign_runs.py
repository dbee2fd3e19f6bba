"""Runs of other people's environments: whether they learn, and what becomes of episodes that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_runs import (
    refused,
    train_here,  # noqa: F401
)

from tdmpc2_fast import Config
from tdmpc2_fast.train.envs.answers import EnvError
from tdmpc2_fast.train.envs.base import Failures, Step

gymnasium = pytest.importorskip("gymnasium")
import foreign_envs  # noqa: E402


@pytest.mark.parametrize(
    ("name", "changes", "early", "late"),
    [
        ("OneStep", dict(episodic=True), "no episode was as long as horizon=3", "no episode was as long as horizon=3"),
        ("Plain", dict(steps=40), "the first update comes after seed_steps=45", "nothing was learned: steps=40"),
        ("Plain", dict(steps=20, seed_steps=10), "the end of an episode, 20 decisions", "allowed: steps above 20"),
        ("Ends", dict(episodic=True, horizon=8), "horizon=7 fits the longest one", "horizon=8 decisions"),
    ],
)
def test_a_run_that_learns_nothing_says_so_and_fails(
    name: str, changes: Any, early: str, late: str, train: Any
) -> None:
    status, said = train(name, **changes)
    assert status == 1
    _, _, end = said.partition("done, but nothing was learned")
    assert end
    warnings = [line for line in said.splitlines() if line.startswith("warning: ") and "learned" in line]
    assert len(warnings) == 1
    assert early in warnings[0]
    assert late in "nothing was learned" + end.splitlines()[0]


def test_what_is_advised_learns(train: Any) -> None:
    assert train("OneStep", episodic=True, horizon=1)[0] == 0


def test_more_steps_than_the_least_learn(train: Any) -> None:
    assert train("Plain", steps=21, seed_steps=10)[0] == 0


def test_several_environments_count_their_decisions_together(train: Any) -> None:
    status, said = train("Plain", num_envs=2, env_workers=0, steps=40, seed_steps=10)
    assert status == 1
    assert "allowed: steps above 40" in said


def test_a_horizon_longer_than_all_episodes_is_refused() -> None:
    assert "config key 'horizon': got 21, allowed: at most 20" in refused("Plain", horizon=21)


@pytest.mark.parametrize(
    ("name", "words"),
    [("Huge", "a reward of 1e+06"), ("Piling", "a discounted return of "), ("Slow", "return of 30,000")],
)
def test_rewards_beyond_the_bins_are_said_once_with_a_remedy_that_works(
    name: str, words: str, train: Any, tmp_path: Path
) -> None:
    status, said = train(name)
    assert status == 0
    warnings = [line for line in said.splitlines() if "beyond the bins" in line]
    assert len(warnings) == 1
    assert words in warnings[0]
    assert "-22,025 and 22,025" in warnings[0]
    vmax = int(warnings[0].rpartition("vmax=")[2].split()[0])
    _, said = train(name, vmax=vmax, work_dir=str(tmp_path / "again"))
    assert "beyond the bins" not in said


@pytest.mark.parametrize(
    ("name", "why", "workers"),
    [
        ("Diverges", "FloatingPointError: the simulation diverged", 0),
        ("Diverges", "FloatingPointError: the simulation diverged", 1),
        ("DivergesSilently", "reward: got nan", 0),
        ("FailsAtReset", "OSError: no scene", 0),
        ("Exits", "it called sys.exit(0)", 0),
    ],
)
def test_episodes_that_fail_are_dropped_and_counted(
    name: str, why: str, workers: int, train: Any, tmp_path: Path
) -> None:
    status, said = train(name, on_env_error="drop", env_workers=workers, steps=120)
    assert status == 0, said
    assert f"Foreign{name}-v0, environment 0: {why}" in said
    dropped = int(said.partition(" training episodes were dropped")[0].rpartition(" ")[2])
    assert 1 <= dropped <= 4
    rewards = [float(row.split(",")[3]) for row in (tmp_path / "run/train.csv").read_text().splitlines()[1:]]
    assert np.isfinite(rewards).all()
    saved = json.loads(max((tmp_path / "run/checkpoints").glob("0*/manifest.json")).read_text())
    assert saved["values"]["dropped"] == dropped


def test_failures_stop_a_run_unless_they_are_to_be_dropped(train: Any) -> None:
    foreign_envs.Diverges.steps = 0
    with pytest.raises(FloatingPointError, match="the simulation diverged") as e:
        train("Diverges", seed_steps=1000, steps=1000)
    assert any("on_env_error=drop" in note for note in e.value.__notes__)


def test_one_in_ten_of_those_that_ended_may_fail_beyond_ten() -> None:
    said: list[str] = []
    failures = Failures(Config(on_env_error="drop"), said.append, dropped=9)
    ended = Step(np.zeros(1, np.float32), 0.0, False, True, 0.0)
    failures.count([ended, None, ended._replace(truncated=False), ended._replace(terminated=True)] * 5)
    assert failures.ended == 10
    for _ in range(2):
        failures.take(0, OSError("no scene"))
    assert failures.dropped == 11
    assert len(said) == 1  # of the tenth; of more, every hundredth
    with pytest.raises(EnvError, match="got 12 episodes that failed, allowed: 11 beside 10 that ended"):
        failures.take(0, OSError("no scene"))


def test_dropped_episodes_are_bounded(train: Any) -> None:
    with pytest.raises(EnvError, match="got 11 episodes that failed, allowed: 10 beside 0 that ended"):
        train("AlwaysFails", on_env_error="drop")
