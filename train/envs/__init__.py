"""Every task by its official name, with the official semantics of its suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError, nearest

from . import dmcontrol, gymnasium_tasks
from .base import Env
from .catalogue import PLANNED


@dataclass(frozen=True)
class Suite:
    """A family of tasks: its names, the package it needs and the extra that installs it, how to make one."""

    names: tuple[str, ...]
    package: str
    extra: str
    accepts: Callable[[str], bool]
    make: Callable[[Config, int], Env]


SUITES: dict[str, Suite] = {
    "DMControl": Suite(dmcontrol.TASKS, "dm_control", "train", lambda n: n in dmcontrol.TASKS, dmcontrol.make),
    "Gymnasium": Suite(gymnasium_tasks.names(), "gymnasium", "train", gymnasium_tasks.accepts, gymnasium_tasks.make),
}


def make_env(cfg: Config, seed: int) -> Env:
    """The environment of `cfg.task`, seeded.

    Raises:
        ConfigError: an unknown task (with the nearest names and the extras that add more),
            or one that needs a package that is not installed.
    """
    suite = suite_of(cfg.task)
    try:
        return suite.make(cfg, seed)
    except ImportError as e:
        raise ConfigError(
            f"config key 'task': {cfg.task!r} needs {e.name or e}; pip install 'tdmpc2-fast[{suite.extra}]'"
        ) from e


def suite_of(task: str) -> Suite:
    """The family a task belongs to; an unknown task raises `ConfigError`."""
    for suite in SUITES.values():
        if suite.accepts(task):
            return suite
    raise ConfigError(_unknown(task))


def complete(cfg: Config, env: Env) -> Config:
    """The config with what the environment knows: shapes, episode length, seed steps."""
    return env.overrides(cfg).with_env({cfg.obs: env.obs_shape}, env.action_dim, env.max_episode_steps)


def _unknown(task: str) -> str:
    if task in PLANNED:
        return f"config key 'task': {task!r} belongs to {PLANNED[task]}, which this version does not have yet"
    known = [n for suite in SUITES.values() for n in suite.names]
    close = nearest(task, known, 5)
    text = f"config key 'task': unknown task {task!r}. "
    text += f"Nearest: {', '.join(close)}. " if close else ""
    extras = "; ".join(f"{name} ({len(s.names)} tasks) by the extra [{s.extra}]" for name, s in SUITES.items())
    return text + f"Installed by extras: {extras}; any Gymnasium id with a Box action space works."
