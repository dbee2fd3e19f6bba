"""The environments of a run, in this process or in worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.config import Config

from . import make_env, suite_of
from .base import Array, Env, Environments, Step, env_seed
from .workers import Workers


class InProcess:
    """Environments stepped one after the other by the caller of `step_wait`.

    Args:
        envs: in the order of their indices.
    """

    def __init__(self, envs: list[Env]) -> None:
        self.envs = envs
        self._actions: NDArray[np.float32] | None = None

    def reset(self, which: Sequence[int]) -> dict[int, Array]:
        """As `Environments.reset`; none is ever lost."""
        return {i: self.envs[i].reset() for i in which}

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Keep the actions."""
        self._actions = actions

    def step_wait(self) -> list[Step | None]:
        """Step; an error of an environment is raised as it is."""
        assert self._actions is not None, "step_async comes first"
        return [_step(env, action) for env, action in zip(self.envs, self._actions, strict=True)]

    def close(self) -> None:
        """Free the environments."""
        for env in self.envs:
            env.close()


def _step(env: Env, action: NDArray[np.float32]) -> Step:
    obs, reward, terminated, truncated, info = env.step(action)
    return Step(obs, float(reward), bool(terminated), bool(truncated), float(info["success"]))


def environments(cfg: Config, first: Env, note: Callable[[str], None]) -> Environments:
    """The `num_envs` environments of a run, where `env_workers` says.

    Args:
        cfg: a completed config.
        first: the environment that completed it, untouched since; it becomes the first of
            the run or is closed.
        note: told in a line when a worker process had to be started anew.
    """
    count = cfg.env_workers
    if count is None:
        count = 0 if cfg.num_envs == 1 else _cores()
    if count == 0:
        return InProcess([first, *(make_env(cfg, env_seed(cfg.seed, i)) for i in range(1, cfg.num_envs))])
    first.close()
    return Workers(cfg, suite_of(cfg.task).make, min(count, cfg.num_envs), note)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
