"""Tasks of Gymnasium that differ in width and length and run in microseconds, for models of several; by name."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

WIDE, NARROW, TALL, ENDING, FAILING = (f"task_suite:{n}-v0" for n in ("Wide", "Narrow", "Tall", "Ending", "Failing"))
SIZES = {WIDE: (3, 2, 7), NARROW: (2, 1, 5), TALL: (4, 1, 6), ENDING: (2, 1, 9), FAILING: (2, 1, 5)}
"""Widths of observation and action, and decisions per episode."""


class Drift(gym.Env[NDArray[np.float64], NDArray[np.float64]]):
    """A point that actions push; what it earns tells apart tasks, places and actions."""

    def __init__(self, obs: int, act: int, ends: bool = False, fails_after: int = 0) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs,))
        self.action_space = gym.spaces.Box(-1.0, 1.0, (act,), np.float64)
        self._ends, self._fails_after, self._begun = ends, fails_after, 0
        self.at = np.zeros(obs)

    @override
    def reset(self, **given: Any) -> tuple[NDArray[np.float64], dict[str, Any]]:
        super().reset(seed=given.get("seed"))
        self._begun += 1
        self.at = self.np_random.uniform(0.5, 1.0, len(self.at))
        return self.at.copy(), {}

    @override
    def step(self, action: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        if self._fails_after and self._begun > self._fails_after:
            raise ZeroDivisionError("the physics are broken")
        assert action.shape == self.action_space.shape
        self.at = 0.9 * self.at + 0.1 * action.sum() + self.np_random.normal(0, 0.01, len(self.at))
        return self.at.copy(), float(self.at.sum()), self._ends, False, {"success": float(self.at[0] > 0.5)}


for _name, (_obs, _act, _length) in SIZES.items():
    gym.register(
        _name.partition(":")[2],
        f"{__name__}:Drift",
        max_episode_steps=_length,
        kwargs=dict(obs=_obs, act=_act, ends=_name == ENDING, fails_after=2 * (_name == FAILING)),
    )
