"""The environments of a run, in this process or in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.runtime.cores import cores

from . import dmcontrol, make_env, suite_of
from .apart.held import Held
from .apart.workers import Workers
from .base import FAILURES, Actions, Array, Env, Environments, EnvState, Failures, Step, close_all, env_seed, step
from .device.base import DeviceEnvironments
from .multitask import placed, task_of


class InProcess(Environments):
    """Environments stepped one after the other by the caller of `step_wait`.

    An episode is lost only with its own environment; where failures stop a run, its error is raised as it is.

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
        own = {0: first} if first is not None else {}
        self._held = Held({i: own[i] if i in own else placed(make, cfg, i, self._anew) for i in range(cfg.num_envs)})
        self._actions: NDArray[np.float32] | None = None

    @property
    def envs(self) -> dict[int, Env]:
        """The environments by index."""
        return self._held.envs

    @property
    def _anew(self) -> int:
        return self.restarts + self.failures.dropped

    def _replaced(self, i: int) -> Env:
        return placed(self._make, self.cfg, i, self._anew, task_of(self.envs[i]))

    @override
    def reset(self, which: Sequence[int]) -> dict[int, Array]:
        found: dict[int, Array] = {}
        for i in which:
            while i not in found:
                try:
                    found[i] = self._held.begin(i)
                except FAILURES as e:
                    self.failures.replace(self.envs, i, e, self._replaced)
        return found

    @override
    def step_async(self, actions: NDArray[np.float32]) -> None:
        self._actions = actions

    @override
    def step_wait(self) -> list[Step | None]:
        assert self._actions is not None, "step_async comes first"
        found: list[Step | None] = []
        for i, action in enumerate(self._actions):
            try:
                found.append(step(self.envs[i], action))
            except FAILURES as e:
                self.failures.replace(self.envs, i, e, self._replaced)
                found.append(None)
        self.failures.count(found)
        return found

    @override
    def tasks(self) -> list[int]:
        return [task_of(env) for env in self.envs.values()]

    @override
    def states(self) -> list[EnvState | None]:
        return list(self._held.states().values())

    @override
    def restore(self, states: Sequence[EnvState], actions: Mapping[int, Actions]) -> dict[int, list[Step]]:
        return self._held.restore(dict(enumerate(states)), actions)

    @override
    def close(self) -> None:
        self._held.close()


def environments(
    cfg: Config,
    first: Env,
    note: Callable[[str], None],
    restarts: int = 0,
    dropped: int = 0,
    make: Callable[[Config, int], Env] | None = None,
) -> Environments | DeviceEnvironments:
    """Make the `num_envs` environments of a run: in the simulator of their suite, or where `env_workers` says.

    Args:
        cfg: a completed config.
        first: the environment that completed it, untouched since; it becomes the first of
            the run or is closed.
        note: told in a line when a worker process is started anew or an episode is dropped.
        restarts: times processes of the run were started anew so far.
        dropped: episodes of the run that were dropped so far.
        make: makes another one of a config and a seed; default by `cfg.task`.

    Raises:
        ConfigError: worker processes cannot make what this one could, or there are to be some beside a simulator.
    """
    make = make_env if cfg.tasks and make is None else make
    suite = suite_of(cfg.task) if make is None else None
    if suite is not None and suite.together is not None:
        if cfg.env_workers:
            raise ConfigError(
                f"config key 'env_workers': got {cfg.env_workers}, allowed: 0 or none for {cfg.task}, whose simulator "
                "steps all environments at once"
            )
        close_all([first])
        return suite.together(cfg, [env_seed(cfg.seed, i, restarts + dropped) for i in range(cfg.num_envs)])
    count, failures = cfg.env_workers, Failures(cfg, note, dropped)
    if suite is not None and suite.make is dmcontrol.make and dmcontrol.envpool_engine.wanted(cfg):
        close_all([first])
        return dmcontrol.envpool_engine.EnvPool(cfg, failures, restarts)
    if count is None:
        count = 0 if cfg.num_envs == 1 else cores()
    make = suite.make if suite is not None else make
    assert make is not None
    if count == 0:
        return InProcess(cfg, make, failures, first, restarts)
    close_all([first])
    python = suite.apart.python if suite is not None and suite.apart is not None else None
    workers = Workers(cfg, make, min(count, cfg.num_envs), failures, restarts, python)
    try:
        workers.begin()
    except BaseException:
        workers.close()
        raise
    return workers
