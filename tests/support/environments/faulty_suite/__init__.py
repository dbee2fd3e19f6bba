"""A suite whose one environment does one thing wrong: in decision 3 of episode 2, or at its reset, of seed 1.

It imports without torch, as what steps in another interpreter must.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from tdmpc2_fast import Config
from tdmpc2_fast.train.envs.apart.remote import Apart, RemoteEnv
from tdmpc2_fast.train.envs.base import Env
from tdmpc2_fast.train.envs.gymnasium_tasks import GymnasiumTask

EPISODE, DECISION = 2, 3
Answer = tuple[Any, Any, Any, Any, Any]


def _raise(answer: Answer) -> Any:
    raise ZeroDivisionError("the physics are broken")


def _hang(answer: Answer) -> Any:
    time.sleep(3600)


def _die(answer: Answer) -> Any:
    os._exit(7)


STEPS: dict[str, Any] = {
    "raises": _raise,
    "hangs": _hang,
    "dies": _die,
    "nan observation": lambda a: (a[0] * np.nan, *a[1:]),
    "infinite observation": lambda a: (a[0] / 0.0, *a[1:]),
    "other shape": lambda a: (a[0][:2], *a[1:]),
    "no numbers": lambda a: (np.array(["a", "b", "c"]), *a[1:]),
    "no observation": lambda a: (None, *a[1:]),
    "nan reward": lambda a: (a[0], np.nan, *a[2:]),
    "two rewards": lambda a: (a[0], np.ones(2), *a[2:]),
    "no reward": lambda a: (a[0], None, *a[2:]),
    "no flag": lambda a: (a[0], a[1], None, *a[3:]),
    "four answers": lambda a: a[:4],
}
RESETS: dict[str, Any] = {
    "reset raises": _raise,
    "reset without info": lambda a: a[0],
    "reset with nan": lambda a: (a[0] * np.nan, a[1]),
}


class Faulty(gymnasium.Env):  # type: ignore[type-arg]
    """Observes seed, episode and decision."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, seed: int, fault: str = "", length: int = 5) -> None:
        self.fault, self.name, self.length = fault, seed, length
        self.episode = self.decision = 0

    def _seen(self) -> np.ndarray:
        return np.array([self.name, self.episode, self.decision], np.float32)

    @property
    def _at_fault(self) -> bool:
        return self.name == 1 and self.episode == EPISODE

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.decision = self.episode + 1, 0
        answer = self._seen(), {}
        return RESETS[self.fault](answer) if self.fault in RESETS and self._at_fault else answer

    def step(self, action: Any) -> Any:
        self.decision += 1
        over = self.decision >= self.length
        reward: Any = 1.5
        if self.fault in ("float64 reward", "integer reward", "reward in an array"):
            reward = {"f": np.float64(1.5), "i": 1, "r": np.array([1.5], np.float32)}[self.fault[0]]
        answer = self._seen(), reward, over and self.fault == "both flags", over, {}
        if self.fault in STEPS and self._at_fault and self.decision == DECISION:
            return STEPS[self.fault](answer)
        return answer


def make_here(cfg: Config, seed: int) -> Env:
    settings = dict(cfg.env_kwargs or {})
    return GymnasiumTask(Faulty(seed, **settings), cfg, seed, settings.get("length", 5))


class Elsewhere(Apart):
    """A suite whose own interpreter is this one, for want of another."""

    @property
    def python(self) -> Path | None:
        return None if Path(sys.argv[0]).name == "guest.py" else Path(sys.executable)

    def make(self, cfg: Config, seed: int) -> Env:
        return make_here(cfg, seed) if self.python is None else RemoteEnv(self.python, self.make, cfg, seed)
