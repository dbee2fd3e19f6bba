"""An environment that does what its action says, for tests of worker processes, which import it by name."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast import Config

NORMAL, DIE, HANG, RAISE, SYSTEM_EXIT = 0.0, 0.25, 0.5, 0.75, 1.0


class Scripted:
    """Observations tell seed, episode and decision; `action[0]` tells what goes wrong."""

    obs_shape: tuple[int, ...] = (4,)
    action_dim = 2
    max_episode_steps = 5
    action_repeat = 1
    frames_per_second = 10.0

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._name = seed % 1000
        self._episode = self._decisions = 0

    def _observe(self) -> NDArray[np.float32]:
        return np.array([self._name, self._episode, self._decisions, self._random.random()], np.float32)

    def reset(self) -> NDArray[np.float32]:
        self._episode += 1
        self._decisions = 0
        return self._observe()

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        if action[0] == DIE:
            os._exit(7)
        if action[0] == HANG:
            time.sleep(3600)
        if action[0] == RAISE:
            raise ZeroDivisionError("the physics are broken")
        if action[0] == SYSTEM_EXIT:
            sys.exit(3)
        self._decisions += 1
        reward = self._random.standard_normal() + float(action[1])
        return self._observe(), reward, reward > 2.5, self._decisions >= 5, {"success": self._random.random()}

    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        return np.zeros((height, width, 3), np.uint8)

    def overrides(self, cfg: Config) -> Config:
        return cfg

    def random_state(self) -> Any:
        return [self._name, self._episode, self._random.bit_generator.state]

    def set_random_state(self, state: Any) -> None:
        self._name, self._episode, self._random.bit_generator.state = state

    def close(self) -> None:
        pass


def config(count: int, seed: int = 1, **changes: Any) -> Config:
    """For so many of them."""
    return Config(num_envs=count, seed=seed, **changes).with_env({"state": (4,)}, 2, 5)


def make(cfg: Config, seed: int) -> Scripted:
    return Scripted(seed)


class Computing(Scripted):
    """An environment that computes with torch; observations tell in how many threads."""

    def _observe(self) -> NDArray[np.float32]:
        import torch

        return np.full(4, torch.get_num_threads(), np.float32)


def make_computing(cfg: Config, seed: int) -> Scripted:
    return Computing(seed)


def make_dying(cfg: Config, seed: int) -> Scripted:
    os._exit(9)


def make_raising(cfg: Config, seed: int) -> Scripted:
    raise FileNotFoundError("no such scene")
