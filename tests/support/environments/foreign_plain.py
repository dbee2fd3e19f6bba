"""The environment that all foreign ones are made of."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Plain(gym.Env[Any, Any]):
    """Three numbers that decay; its constructor takes nothing, as in most tutorials."""

    observation_space: Any = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space: Any = spaces.Box(-1, 1, (1,), np.float32)
    seen: ClassVar[list[Any]] = []  # the actions of the last episode

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        self.x = self.draw(seed)
        self.seen.clear()
        return self.observe(), {}

    def draw(self, seed: int | None) -> Any:
        return self.np_random.normal(size=3)

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), (action, self.action_space)
        self.seen.append(action)
        self.t += 1
        self.x = 0.9 * self.x + 0.1 * float(np.asarray(action, np.float64).ravel()[0])
        return self.observe(), self.reward(), self.ends(), False, self.info()

    def observe(self) -> Any:
        return self.x.astype(np.float32)

    def reward(self) -> Any:
        return -float(np.square(self.x).sum())

    def ends(self) -> Any:
        return False

    def info(self) -> Any:
        return {}
