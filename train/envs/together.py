"""The environments of a run, in this process or in worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.config import Config

from . import make_env, suite_of
from .base import Actions, Array, Env, Environments, EnvState, Step, env_seed, restore, step
from .workers import Workers


class InProcess:
    """Environments stepped one after the other by the caller of `step_wait`.

    Args:
        envs: in the order of their indices.
        restarts: of the run so far.
    """

    def __init__(self, envs: list[Env], restarts: int = 0) -> None:
        self.envs, self.restarts = envs, restarts
        self._origins: list[Any] = [None] * len(envs)
        self._actions: NDArray[np.float32] | None = None

    def reset(self, which: Sequence[int]) -> dict[int, Array]:
        """As `Environments.reset`; none is ever lost."""
        found = {}
        for i in which:
            self._origins[i] = self.envs[i].random_state()
            found[i] = self.envs[i].reset()
        return found

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Keep the actions."""
        self._actions = actions

    def step_wait(self) -> list[Step | None]:
        """Step; an error of an environment is raised as it is."""
        assert self._actions is not None, "step_async comes first"
        return [step(env, action) for env, action in zip(self.envs, self._actions, strict=True)]

    def states(self) -> list[EnvState | None]:
        """As `Environments.states`."""
        return [EnvState(env.random_state(), origin) for env, origin in zip(self.envs, self._origins, strict=True)]

    def restore(self, states: Sequence[EnvState], actions: Mapping[int, Actions]) -> dict[int, list[Step]]:
        """As `Environments.restore`."""
        played = {i: restore(env, states[i], actions.get(i)) for i, env in enumerate(self.envs)}
        self._origins = [state.origin for state in states]
        return {i: steps for i, steps in played.items() if steps is not None}

    def close(self) -> None:
        """Free the environments."""
        for env in self.envs:
            env.close()


def environments(cfg: Config, first: Env, note: Callable[[str], None], restarts: int = 0) -> Environments:
    """The `num_envs` environments of a run, where `env_workers` says.

    Args:
        cfg: a completed config.
        first: the environment that completed it, untouched since; it becomes the first of
            the run or is closed.
        note: told in a line when a worker process had to be started anew.
        restarts: times environments of the run were made anew so far.
    """
    count = cfg.env_workers
    if count is None:
        count = 0 if cfg.num_envs == 1 else _cores()
    if count == 0:
        return InProcess([first, *(make_env(cfg, env_seed(cfg.seed, i)) for i in range(1, cfg.num_envs))], restarts)
    first.close()
    return Workers(cfg, suite_of(cfg.task).make, min(count, cfg.num_envs), note, restarts)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
