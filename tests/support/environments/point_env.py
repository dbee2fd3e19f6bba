"""An environment whose spaces say more than numbers: a Dict with a Discrete part, a Box of actions with odd bounds."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Point(gymnasium.Env[Any, Any]):
    """It terminates, or ends after 10 decisions."""

    metadata: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, parts: bool = False, discrete: bool = False) -> None:
        self.parts = parts
        box = spaces.Box(-10, 10, (2,), np.float64)
        several = spaces.Dict(observation=box, goal=spaces.Box(-1, 1, (1,), np.float32), kind=spaces.Discrete(3))
        self.observation_space = several if parts else box
        bounded = spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32))
        self.action_space = spaces.Discrete(3) if discrete else bounded

    def _seen(self) -> Any:
        if not self.parts:
            return self.x.copy()
        return dict(observation=self.x.copy(), goal=np.array([0.5], np.float32), kind=np.int64(self.t % 3))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-1, 1, 2), 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.x = self.x + 0.1 * np.mean(action)
        return self._seen(), float(-abs(self.x).sum()), bool(self.t >= 7 and self.x[0] > 0), self.t >= 10, {}
