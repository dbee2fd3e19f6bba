"""Short runs of the environments in `foreign_envs`, and what is said where one is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError, InputError
from tdmpc2_fast.train.envs import make_env, tried
from tdmpc2_fast.train.envs.gymnasium_tasks import GymnasiumTask
from tdmpc2_fast.train.run import lifecycle as runs

gymnasium = pytest.importorskip("gymnasium")

SMALL = dict(
    TINY,
    num_samples=16,
    num_elites=4,
    num_pi_trajs=2,
    iterations=1,
    num_q=2,
    seed_steps=45,
    steps=80,
    eval_freq=1000,
    eval_episodes=1,
    device="cpu",
    num_threads=1,
    tensorboard=False,
    display="lines",
)


def task_of(name: str) -> str:
    return f"foreign_envs:Foreign{name}-v0"


def made(name: str, **changes: Any) -> GymnasiumTask:
    env = make_env(Config(task=task_of(name), **changes), 1)
    assert isinstance(env, GymnasiumTask)
    return env


@pytest.fixture(name="train")
def train_here(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Train for a few decisions in a folder of its own; return the exit status and all that was said."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no power is cut here, and the disk is what takes longest

    def run(name: str, **changes: Any) -> tuple[int, str]:
        task = name if ":" in name else task_of(name)
        status = runs.start({**SMALL, "task": task, "work_dir": str(tmp_path / "run"), **changes}).status
        said = capfd.readouterr()
        return status, said.out + said.err

    return run


def refused(name: str, **changes: Any) -> str:
    """What is said before a run of it begins."""
    with pytest.raises((ConfigError, InputError)) as e:
        tried(Config.from_dict({**SMALL, "task": task_of(name), **changes}))
    assert "\n" not in str(e.value)
    return str(e.value)


def begun(name: str, **changes: Any) -> GymnasiumTask:
    env = made(name, **changes)
    env.reset()
    return env
