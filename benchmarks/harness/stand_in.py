"""An environment without physics, for loops where no simulator is installed and for tests."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.train.envs import SUITES, Suite
from tdmpc2_fast.train.envs.base import Env

from ..options import OBS_DIM

NAME = "stand-in"
_DECISIONS = 500


class StandIn(Env):
    """A damped linear system driven by the action; it takes no time worth speaking of."""

    def __init__(self, action_dim: int, decisions: int, seed: int) -> None:
        self.obs_shape, self.action_dim, self.max_episode_steps = (OBS_DIM,), action_dim, decisions
        self.action_repeat, self.frames_per_second = 1, 50.0
        self._random = np.random.default_rng(seed)
        self._drive = self._random.standard_normal((OBS_DIM, action_dim)) / action_dim**0.5
        self._state = np.zeros(OBS_DIM)
        self._decisions = 0

    @override
    def reset(self) -> NDArray[np.float32]:
        self._decisions = 0
        self._state = self._random.standard_normal(OBS_DIM)
        return self._state.astype(np.float32)

    @override
    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self._state = 0.9 * self._state + 0.3 * self._drive @ action
        self._decisions += 1
        reward = float(np.exp(-np.square(self._state).mean()))  # for being near zero
        over = self._decisions >= self.max_episode_steps
        return self._state.astype(np.float32), reward, False, over, {"success": 0.0}

    @override
    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        return np.zeros((height, width, 3), np.uint8)

    @override
    def overrides(self, cfg: Config) -> Config:
        return cfg

    @override
    def random_state(self) -> Any:
        return [self._drive.tolist(), self._random.bit_generator.state]

    @override
    def set_random_state(self, state: Any) -> None:
        self._drive = np.asarray(state[0])
        self._random.bit_generator.state = state[1]

    @override
    def close(self) -> None:
        pass


def install(action_dim: int) -> None:
    """Make the task known under its name."""
    make = partial(_make, action_dim, _DECISIONS)  # picklable: worker processes make it, too
    SUITES[NAME] = Suite((NAME,), "numpy", "train", lambda n: n == NAME, make)


def _make(action_dim: int, decisions: int, cfg: Config, seed: int) -> Env:
    return StandIn(action_dim, decisions, seed)
