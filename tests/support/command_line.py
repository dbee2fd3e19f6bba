"""What the tests of the commands share: the words of a quick run, and a folder of its own for each test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from tdmpc2_fast import TDMPC2, Config

QUICK = dict(
    TINY,
    task="Pendulum-v1",
    episode_length=40,
    seed_steps=50,
    steps=60,
    eval_freq=40,
    eval_episodes=1,
    iterations=1,
    device="cpu",
    num_threads=1,
)
Capture = pytest.CaptureFixture[str]


def words(**values: Any) -> list[str]:
    return [f"{k}={v}" for k, v in {**QUICK, **values}.items()]


def save_untrained(path: str | Path) -> None:
    """Write a checkpoint of the task that nothing was learned about."""
    TDMPC2(Config.from_dict(dict(QUICK)).with_env({"state": (3,)}, 1, 40)).save(path)


def start(*args: str, **env: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-P", "-m", "tdmpc2_fast.train", *args]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env}
    )


@pytest.fixture(autouse=True, name="empty_folder")
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run a test in a folder of its own, without Triton's interpreter, in which the kernels would run for days."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no power is cut here, and the disk is what takes longest
    return tmp_path
