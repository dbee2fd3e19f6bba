"""Every task by its official name, with the official semantics of its suite."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError, nearest

from . import dmcontrol, gymnasium_tasks
from .answers import EnvError, NotHereError
from .apart.remote import Apart, installed
from .base import FAILURES, Env, Step, close_all, in_a_line, reset, step, whole_sizes
from .device import playground
from .device.base import DeviceEnvironments
from .multitask import Padded, TaskEnv

_TRY_DECISIONS, _TRY_SECONDS = 200, 1.0
_SHORTEST_TRIES = 10  # of many tasks, each has a tenth of the time


@dataclass(frozen=True)
class Suite:
    """A family of tasks: its names, the package it needs and the extra that installs it, how to make one.

    apart: the interpreter of its own that it has, where it has one.
    together: makes one for each seed in a simulator on the agent's device, where there is one.
    """

    names: tuple[str, ...]
    package: str
    extra: str
    accepts: Callable[[str], bool]
    make: Callable[[Config, int], Env]
    apart: Apart | None = None
    together: Callable[[Config, Sequence[int]], DeviceEnvironments] | None = None

    def needs(self) -> str:
        """Say what is missing to run its tasks; the text is empty where nothing is."""
        if self.apart is not None:
            return self.apart.needs()
        return "" if installed(self.package) else f"needs {self.command}"

    @property
    def command(self) -> str:
        """What installs what it needs."""
        return f"pip install 'tdmpc2-fast[{self.extra}]'" if self.apart is None else self.apart.command


APART = {
    suite.name: suite
    for suite in (
        Apart("metaworld", "Meta-World", "metaworld"),
        Apart("myosuite", "MyoSuite", "myosuite"),
        Apart("maniskill", "ManiSkill", "mani_skill"),
    )
}
"""Suites that have an interpreter of their own, by its name."""


def _apart(suite: Apart) -> Suite:
    names = suite.module.TASKS
    return Suite(names, suite.package, "", names.__contains__, suite.make, suite)


SUITES: dict[str, Suite] = {
    "DMControl": Suite(dmcontrol.TASKS, "dm_control", "train", dmcontrol.TASKS.__contains__, dmcontrol.make),
    "DMControl, more than in the paper": Suite(
        dmcontrol.MORE, "dm_control", "train", dmcontrol.MORE.__contains__, dmcontrol.make
    ),
    **{suite.title: _apart(suite) for suite in APART.values()},
    "Playground": Suite(
        playground.TASKS,
        "mujoco_playground",
        "playground",
        playground.accepts,
        playground.make,
        together=playground.together,
    ),
    "Gymnasium": Suite(gymnasium_tasks.names(), "gymnasium", "train", gymnasium_tasks.accepts, gymnasium_tasks.make),
}


def make_env(cfg: Config, seed: int) -> Env:
    """Make the environment of `cfg.task`, seeded; of several tasks, one that plays them in turn.

    Raises:
        ConfigError: an unknown task (with the nearest names and the extras that add more),
            or one that needs a package that is not installed.
    """
    return TaskEnv(cfg, seed, _one_of_several) if cfg.tasks else _make_one(cfg, seed)


def _one_of_several(cfg: Config, seed: int) -> Env:
    if suite_of(cfg.task).together is not None:
        raise ConfigError(
            f"config key 'tasks': {cfg.task} is of a simulator that steps many environments of one task at once, "
            "allowed in a multi-task model: other tasks"
        )
    return _make_one(cfg, seed)


def _make_one(cfg: Config, seed: int) -> Env:
    suite = suite_of(cfg.task)
    try:
        return suite.make(cfg, seed)
    except ImportError as e:
        raise NotHereError(f"config key 'task': {cfg.task!r} needs {e.name or e}; {suite.command}") from e


def suite_of(task: str) -> Suite:
    """Return the family a task belongs to; an unknown task raises `ConfigError`."""
    for suite in SUITES.values():
        if suite.accepts(task):
            return suite
    raise ConfigError(_unknown(task))


def complete(cfg: Config, env: Env) -> Config:
    """Complete the config with what the environment knows: shapes, episode length, seed steps.

    Raises:
        ConfigError: an `episode_length` the task does not have, or sizes of the environment that are no whole numbers.
    """
    if isinstance(env, TaskEnv):
        return env.complete(cfg)
    whole_sizes(env, cfg.task)
    length = env.max_episode_steps
    if cfg.episode_length not in (None, length):
        raise ConfigError(f"config key 'episode_length': got {cfg.episode_length}, allowed: {length} for {cfg.task}")
    return env.overrides(cfg).with_env({cfg.obs: env.obs_shape}, env.action_dim, length)


def same_form(env: Env, cfg: Config) -> Env:
    """Return an environment that the agent of this completed config can act in.

    Raises:
        ConfigError: it observes or does something else; the message says what.
    """
    found = complete(cfg.replace(episode_length=None, seed_steps=None), env)
    for key in ("obs_shape", "action_dim"):
        got, wanted = getattr(found, key), getattr(cfg, key)
        if got != wanted:
            raise ConfigError(f"env: its {key} is {got}, allowed: {wanted}, which the agent is trained with")
    return env


def beside(values: Mapping[str, Any], saved: Config) -> dict[str, Any]:
    """Return the values given for a config that was saved, with the environment's other settings as they were."""
    given = values.get("env_kwargs")
    return {**values, "env_kwargs": {**(saved.env_kwargs or {}), **given}} if given else dict(values)


def tried(
    cfg: Config,
    make: Callable[[Config], Env] | None = None,
    steps: bool = True,
    widths: dict[str, int] | None = None,
) -> Config:
    """Return the completed config of a run whose environment answered a try with random actions.

    The try is at most an episode, 200 decisions and a second long, so that mistakes are told before
    the run begins and not after an hour. Several tasks are tried one after another, each for a shorter time.

    make: makes the environment; default by `cfg.task`.
    steps: whether steps are tried; else only what the environment tells of itself is looked at.
    widths: filled with the width of each task's own observations, or the channels of its images.

    Raises:
        ConfigError: as `make_env` and `complete`; the task terminates and `episodic` is not set; a `horizon` longer
            than its episodes; or an answer in no usable form, where failures stop a run.
        Exception: what the environment raised, where failures stop a run.
    """
    env = make_env(cfg, cfg.seed) if make is None else make(cfg)
    try:
        cfg = complete(cfg, env)
        each = {cfg.task: env} if not isinstance(env, TaskEnv) else {one.name: one for one in env.each()}
        for name, one in each.items():
            if widths is not None:
                widths[name] = (one.env if isinstance(one, Padded) else one).obs_shape[0]
            if cfg.horizon > one.max_episode_steps:
                raise ConfigError(
                    f"config key 'horizon': got {cfg.horizon}, allowed: at most {one.max_episode_steps}, the decisions "
                    f"of an episode of {name}"
                )
            if steps:
                _try(cfg, one, name, _TRY_SECONDS / min(len(each), _SHORTEST_TRIES))
    finally:
        close_all([env])
    return cfg


def _try(cfg: Config, env: Env, name: str, seconds: float) -> None:
    rng, end, decisions = np.random.default_rng(cfg.seed), time.monotonic() + seconds, 0
    try:
        reset(env)
        while decisions < _TRY_DECISIONS and time.monotonic() < end:
            found = step(env, rng.uniform(-1, 1, env.action_dim).astype(np.float32))
            decisions += 1
            check_episodic(cfg, found, name)
            if found.terminated or found.truncated:
                break
    except ConfigError:
        raise
    except FAILURES as e:
        if cfg.on_env_error == "drop":
            return
        where = f"{name} failed in decision {decisions + 1} of a try with random actions"
        if isinstance(e, (EnvError, SystemExit)):
            raise ConfigError(f"config key 'task': {where}: {in_a_line(e)}") from e
        e.add_note(f"{where}, before the run; on_env_error=drop goes on without such episodes")
        raise


def check_episodic(cfg: Config, found: Step, task: str | None = None) -> None:
    """Raise `ConfigError` where an episode was terminated and the model has no part that learns that.

    task: that it was of; default `cfg.task`.
    """
    if not found.terminated or cfg.episodic:
        return
    if cfg.multitask:
        raise ConfigError(
            f"config key 'tasks': {task} terminated an episode, which a multi-task model cannot learn; allowed: tasks "
            "that end by time alone"
        )
    raise ConfigError(f"config key 'episodic': {cfg.task} terminated an episode; set episodic=true")


def _unknown(task: str) -> str:
    known = [n for suite in SUITES.values() for n in suite.names]
    close = nearest(task, known, 5)
    text = f"config key 'task': unknown task {task!r}. "
    text += f"Nearest: {', '.join(close)}. " if close else ""
    return (
        text
        + "`tdmpc2-fast tasks` lists all, by suite; any Gymnasium id whose actions are a bounded Box or discrete works."
    )
