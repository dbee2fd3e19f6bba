"""An evaluation of episodes whose rewards are known, one after another and side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scripted_env
import torch
from conftest import ROOT, TINY
from torch import Tensor

import tdmpc2_fast
from tdmpc2_fast import TDMPC2, Planner
from tdmpc2_fast.train.envs import make_env
from tdmpc2_fast.train.run.checkpoints import trained
from tdmpc2_fast.train.run.evaluate import Evaluation, Evaluator


class Known(scripted_env.Scripted):
    """Decision n gives 10**n; environment k ends after k + 1 decisions, or 5, and tells its success then."""

    def __init__(self, k: int) -> None:
        super().__init__(k)
        self.k, self.begun = k, 0

    def reset(self) -> Any:
        self.begun += 1
        return super().reset()

    def step(self, action: Any) -> Any:
        obs, *_ = super().step(np.full(2, 0.1, np.float32))
        last = self._decisions > self.k
        ends = (last, False) if self.k % 2 else (False, last)
        return obs, 10.0**self._decisions, *ends, {"success": self.begun / 8 if last or self._decisions == 5 else 0.5}


def evaluator(episodes: int, width: int = 1, **changes: Any) -> Evaluator:
    changes = dict(mpc=False, task="Pendulum-v1") | TINY | changes
    cfg = scripted_env.config(1, eval_episodes=episodes, device="cpu", **changes)
    agent = TDMPC2(cfg)
    made = Evaluator(agent)
    made.close()
    made.envs = [Known(k) for k in range(min(episodes, 16))]
    made.planner = Planner(agent.model, width)
    return made


RETURNS = [10.0, 110.0, 1110.0, 11110.0, 111110.0, 111110.0]


@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_returns_lengths_and_successes_are_those_of_the_episodes(width: int) -> None:
    told: list[tuple[int, int]] = []
    evaluation = evaluator(6, width)
    found = evaluation.run(busy=lambda done, total: told.append((done, total)))
    assert found == Evaluation(RETURNS, [1 / 8] * 6, [1, 2, 3, 4, 5, 5])
    assert [env.begun for env in evaluation.envs] == [1] * 6  # type: ignore[attr-defined]
    rounds, longest = 6 // width, [[1, 2, 3, 4, 5, 5][i : i + width][-1] for i in range(0, 6, width)]
    assert told == [(5 * i + n, 5 * rounds) for i in range(rounds) for n in range(1, longest[i] + 1)]


def test_plans_are_begun_anew_and_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation, asked = evaluator(2, mpc=True), []

    def plan(obs: Tensor, t0: bool, eval_mode: bool) -> Tensor:
        asked.append((t0, eval_mode))
        return torch.zeros(len(obs), 2)

    monkeypatch.setattr(evaluation.planner, "plan", plan)
    evaluation.run()
    assert asked == [(True, True), (True, True), (False, True)]


def test_the_seventeenth_episode_is_the_first_environments_again() -> None:
    evaluation = evaluator(18)
    found = evaluation.run()
    assert found.lengths == [1, 2, 3, 4, *[5] * 12, 1, 2]
    assert found.successes == [1 / 8] * 16 + [2 / 8] * 2


@pytest.mark.parametrize("width", [1, 2])
def test_an_episode_that_fails_is_played_again_in_another_environment(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = evaluator(6, width, on_env_error="drop")
    before, notes = list(evaluation.envs), []
    monkeypatch.setattr(before[3], "step", lambda action: 1 / 0)
    monkeypatch.setattr(evaluation._source, "make", lambda cfg, seed: Known(0))
    found = evaluation.run(warn=notes.append)
    # Two side by side: the fourth is missing, and the first two are played again to make up for it.
    assert found.lengths == [1, 2, 3, 5, 5, 1]
    assert [a is b for a, b in zip(evaluation.envs, before, strict=True)] == [True] * 3 + [False] + [True] * 2
    assert len(notes) == 1
    assert "environment 3: ZeroDivisionError" in notes[0]


@pytest.mark.parametrize("count", [2, 6])
def test_more_or_fewer_episodes_go_on_from_the_states_there_are(count: int) -> None:
    before, after = evaluator(4), evaluator(count)
    before.run()
    after.restore(before.states(), before.planner.state())
    fresh = evaluator(count).states()
    assert after.states() == [*before.states()[:count], *fresh[4:]]


def test_mean_and_standard_deviation() -> None:
    found = Evaluation([1.0, 2.0, 6.0], [0.0] * 3, [5] * 3)
    assert found.mean_return == pytest.approx(3.0)
    assert found.std_return == pytest.approx((14 / 3) ** 0.5)


def test_the_agent_that_comes_with_the_project_walks() -> None:
    """Once it is on its feet it gets nearly all of the reward of each decision, which is 2."""
    folder = ROOT / "examples" / "walker-walk"
    weights = folder / "agent.safetensors"
    assert weights.stat().st_size < 3e6
    assert trained(weights).startswith("step 50,000 (25,000 decisions, 24,999 updates), return 9")
    agent = tdmpc2_fast.load(folder, device="cpu")
    assert agent.cfg.task == "walker-walk"
    env = make_env(agent.cfg, seed=3)
    obs, rewards = env.reset(), []
    for t in range(90):
        action = agent.act(torch.from_numpy(obs), t0=t == 0, eval_mode=True)
        obs, reward, *_ = env.step(action.numpy())
        rewards.append(reward)
    assert np.mean(rewards[-40:]) > 1.7
