"""The environments of a run, in this process or in worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.config import Config

from . import suite_of
from .base import (
    FAILURES,
    Actions,
    Array,
    Env,
    Environments,
    EnvState,
    Failures,
    Step,
    close_all,
    env_seed,
    reset,
    restore,
    state_of,
    step,
)
from .workers import Workers


class InProcess:
    """Environments stepped one after the other by the caller of `step_wait`.

    Args:
        cfg: a completed config.
        make: makes one environment of a config and a seed.
        failures: what becomes of those that fail.
        first: the first environment, if it is there already.
        restarts: of the run so far.
    """

    def __init__(
        self,
        cfg: Config,
        make: Callable[[Config, int], Env],
        failures: Failures,
        first: Env | None = None,
        restarts: int = 0,
    ) -> None:
        self.cfg, self._make, self.failures, self.restarts = cfg, make, failures, restarts
        self.envs = [] if first is None else [first]
        self.envs += [self._made(i) for i in range(len(self.envs), cfg.num_envs)]
        self._origins: list[Any] = [None] * cfg.num_envs
        self._actions: NDArray[np.float32] | None = None

    def _made(self, i: int) -> Env:
        return self._make(self.cfg, env_seed(self.cfg.seed, i, self.restarts + self.failures.dropped))

    def _made_anew(self, i: int, error: BaseException) -> None:
        """Make environment i anew after an error, unless that is to end the run."""
        self.failures.take(i, error)
        close_all([self.envs[i]])
        self.envs[i] = self._made(i)

    def reset(self, which: Sequence[int]) -> dict[int, Array]:
        """As `Environments.reset`; the episodes of no others are ever lost."""
        found: dict[int, Array] = {}
        for i in which:
            while i not in found:
                try:
                    self._origins[i] = state_of(self.envs[i])
                    found[i] = reset(self.envs[i])
                except FAILURES as e:
                    self._made_anew(i, e)
        return found

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Keep the actions."""
        self._actions = actions

    def step_wait(self) -> list[Step | None]:
        """Step; where failures stop a run, an error of an environment is raised as it is."""
        assert self._actions is not None, "step_async comes first"
        found: list[Step | None] = []
        for i, action in enumerate(self._actions):
            try:
                found.append(step(self.envs[i], action))
            except FAILURES as e:
                self._made_anew(i, e)
                found.append(None)
        self.failures.count(found)
        return found

    def states(self) -> list[EnvState | None]:
        """As `Environments.states`."""
        return [EnvState(state_of(env), origin) for env, origin in zip(self.envs, self._origins, strict=True)]

    def restore(self, states: Sequence[EnvState], actions: Mapping[int, Actions]) -> dict[int, list[Step]]:
        """As `Environments.restore`."""
        played = {i: restore(env, states[i], actions.get(i)) for i, env in enumerate(self.envs)}
        self._origins = [state.origin for state in states]
        return {i: steps for i, steps in played.items() if steps is not None}

    def close(self) -> None:
        """Free the environments."""
        close_all(self.envs)


def environments(
    cfg: Config, first: Env, note: Callable[[str], None], restarts: int = 0, dropped: int = 0
) -> Environments:
    """The `num_envs` environments of a run, where `env_workers` says.

    Args:
        cfg: a completed config.
        first: the environment that completed it, untouched since; it becomes the first of
            the run or is closed.
        note: told in a line when a worker process had to be started anew, or an episode is dropped.
        restarts: times processes of the run were started anew so far.
        dropped: episodes of the run that were dropped so far.

    Raises:
        ConfigError: worker processes cannot make what this one could.
    """
    count, failures = cfg.env_workers, Failures(cfg, note, dropped)
    if count is None:
        count = 0 if cfg.num_envs == 1 else _cores()
    make = suite_of(cfg.task).make
    if count == 0:
        return InProcess(cfg, make, failures, first, restarts)
    close_all([first])
    workers = Workers(cfg, make, min(count, cfg.num_envs), failures, restarts)
    try:
        workers.begin()
    except BaseException:
        workers.close()
        raise
    return workers


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
