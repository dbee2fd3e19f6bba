"""A learning run by the official code itself: its agent, trainer, replay and environments, from a checkout.

It needs what that code needs beside torch and physics: tensordict, torchrl and gymnasium 0.29. It keeps no
checkpoints, so a run that is stopped begins anew.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.runtime.backend import resolve_device
from tdmpc2_fast.train.envs import make_env
from tdmpc2_fast.train.envs.base import close_all
from tdmpc2_fast.train.run.folder import locked
from tdmpc2_fast.train.run.threads import choose_threads

from ..baselines.official import OfficialConfig, import_official

OFFICIAL = "official"
_MODULES = ("tdmpc2", "common.buffer", "common.seed", "envs", "trainer.online_trainer")
_EPISODE = ("episode_reward", "episode_success", "episode_length", "elapsed_time")


class Noted(Protocol):
    """What is told that an episode or an evaluation is over."""

    folder: Path

    def note(self) -> None:
        """Write how far the run came."""
        ...


class _Logger:
    """In place of the official one: the files of our runs, with the columns that both have."""

    def __init__(self, sitting: Noted, repeat: int, seed: int) -> None:
        self._sitting, self._repeat, self._seed = sitting, repeat, seed

    def log(self, values: Mapping[str, Any], category: str) -> None:
        """Write an episode of training or an evaluation."""
        decisions = int(values["step"])
        step = self._repeat * decisions
        if category == "eval":
            row: dict[str, Any] = dict(step=step, reward=round(float(values["episode_reward"]), 1), seed=self._seed)
            _append(self._sitting.folder / "success.csv", row | dict(reward=round(float(values["episode_success"]), 4)))
        else:
            row = dict(step=step, decisions=decisions, episode=int(values["episode"]))
            row |= {k: round(float(values[k]), 3) for k in _EPISODE}
        _append(self._sitting.folder / f"{category}.csv", row)
        print(category, json.dumps(row), flush=True)
        self._sitting.note()

    def finish(self, agent: Any) -> None:
        """Do nothing: every row is written already."""


def _append(file: Path, row: Mapping[str, Any]) -> None:
    new = not file.exists()
    with file.open("a", newline="") as f:
        writer = csv.DictWriter(f, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def check_checkout(checkout: str | None) -> str:
    """Return the checkout; what is none is a `ConfigError`."""
    if checkout is None or not Path(checkout, "tdmpc2", "tdmpc2.py").is_file():
        allowed = "a checkout of the official repository, with tdmpc2/tdmpc2.py in it"
        raise ConfigError(f"learning key 'official': got {checkout!r}, allowed: {allowed}")
    return checkout


def train_official(cfg: Config, checkout: str | None, sitting: Noted) -> int:
    """Make the run in the folder of `sitting`; returns 0.

    Raises:
        ConfigError: no checkout, or another process is at the run.
        CannotMeasureError: a package it needs is missing.
    """
    checkout = check_checkout(checkout)
    cfg = cfg.replace(num_threads=choose_threads(cfg))
    device = resolve_device(cfg.device)
    agent, buffer, seed, envs, trainer = import_official(checkout, device, *_MODULES)
    ours = make_env(cfg, cfg.seed)
    repeat = ours.action_repeat
    close_all([ours])
    theirs = OfficialConfig(**cfg.to_dict())
    theirs.compile, theirs.bin_size = device.type == "cuda", cfg.bin_size
    seed.set_seed(cfg.seed)
    env = envs.make_env(theirs)
    logger = _Logger(sitting, repeat, cfg.seed)
    sitting.folder.mkdir(parents=True, exist_ok=True)
    with locked(sitting.folder):
        (sitting.folder / "config.json").write_text(json.dumps(_plain(vars(theirs)), indent=1) + "\n")
        parts = dict(cfg=theirs, env=env, agent=agent.TDMPC2(theirs), buffer=buffer.Buffer(theirs), logger=logger)
        with contextlib.redirect_stdout(None):
            made = trainer.OnlineTrainer(**parts)
        made.train()
    return 0


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if isinstance(v, (str, int, float, bool, list, tuple, dict, type(None)))}
