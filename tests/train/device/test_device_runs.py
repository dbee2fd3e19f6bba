"""Whole runs in a simulator on the device: the numbers of host environments, resumed and at size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import point_mass
import pytest
import torch
from conftest import TINY
from loop_oracle import everything
from point_mass import PointMasses

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.envs import SUITES
from tdmpc2_fast.train.run import lifecycle
from tdmpc2_fast.train.run.checkpoints import Checkpoints
from tdmpc2_fast.train.run.rollouts import DeviceRollouts, rollouts_in
from tdmpc2_fast.train.run.trainer import OnlineTrainer

QUICK = dict(
    TINY,
    task=point_mass.DEVICE,
    num_samples=16,
    iterations=1,
    num_envs=3,
    utd=0.5,
    seed_steps=60,
    steps=240,
    eval_freq=100,
    eval_episodes=2,
    device="cpu",
    tensorboard=False,
)


@pytest.fixture(autouse=True)
def point_masses() -> Iterator[None]:
    before = dict(SUITES)
    point_mass.install()
    yield
    SUITES.clear()
    SUITES.update(before)


def trainer_in(folder: Path, saved: Any = None, **changes: Any) -> OnlineTrainer:
    folder.mkdir(exist_ok=True)
    return OnlineTrainer(Config.from_dict({**QUICK, **changes}), folder, saved)


def differing(a: OnlineTrainer, b: OnlineTrainer) -> list[str]:
    one, other = everything(a), everything(b)
    assert one.keys() == other.keys()
    assert {"train.csv", "eval.csv", "replay obs", "warm start"} <= one.keys()
    return [k for k, v in one.items() if v != other[k]]


@pytest.mark.parametrize(
    "changes", [dict(), dict(episodic=True), dict(mpc=False, num_envs=1), dict(overlap=True)], ids=str
)
def test_a_run_on_the_device_is_bitwise_the_run_on_the_host(changes: dict[str, Any], tmp_path: Path) -> None:
    seed = int(np.random.default_rng().integers(2**31))
    here = trainer_in(tmp_path / "device", seed=seed, **changes)
    there = trainer_in(tmp_path / "host", task=point_mass.HOST, env_workers=0, seed=seed, **changes)
    assert isinstance(here.envs, PointMasses)
    for trainer in (here, there):
        trainer.run()
    assert not differing(here, there), f"seed {seed}"
    lengths = here.buffer._table[: here.buffer._last, 1].tolist()
    assert len({*lengths}) > 2  # staggered
    assert bool(here.buffer.steps(0, len(here.buffer))["terminated"].any()) == bool(changes.get("episodic"))
    assert here.agent.updater.steps > 60
    assert here.envs.closed


@pytest.mark.parametrize("episodic", [False, True])
def test_a_run_goes_on_bitwise_where_the_simulator_tells_its_state(episodic: bool, tmp_path: Path) -> None:
    straight = trainer_in(tmp_path / "straight", episodic=episodic)
    straight.run()
    for at in (33, 150):  # in the seed phase, and in the agent's
        stopped = trainer_in(tmp_path / f"{at}", episodic=episodic)
        while stopped.progress.decisions < at:
            if stopped._evaluation_due and stopped.rollouts.at_boundary:
                stopped._evaluate()
            stopped.step()
        assert stopped._save()
        stopped.close()
        stopped.log.close()
        saved = Checkpoints(stopped.folder, keep=1).newest(print)
        assert saved is not None
        resumed = trainer_in(stopped.folder, saved, episodic=episodic)
        resumed.run()
        assert not differing(straight, resumed), at


def test_a_run_goes_on_with_new_episodes_where_it_tells_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_in(tmp_path / "run", steps=20)
    assert isinstance(trainer.envs, PointMasses)
    trainer.envs.tells_its_state = False
    while not trainer.rollouts.any_ended:
        trainer.step()
    assert isinstance(trainer.rollouts, DeviceRollouts)
    assert len(trainer.rollouts._ended) < 3
    lengths = trainer.rollouts._lengths[sorted(trainer.rollouts._ended)].tolist()
    trainer._save()
    assert "cannot be told: a run that is stopped goes on with other episodes" in capsys.readouterr().err
    saved = Checkpoints(trainer.folder, keep=1).newest(print)
    resumed = trainer_in(trainer.folder, saved)
    assert isinstance(resumed.rollouts, DeviceRollouts)
    assert resumed.rollouts.any_ended  # what had ended is kept
    resumed.step()
    assert resumed.buffer._table[: resumed.buffer._last, 1].tolist() == [n + 1 for n in lengths]
    assert resumed.rollouts._lengths.tolist() == [1, 1, 1]
    resumed.close()
    trainer.close()


def test_a_state_of_another_simulator_is_told_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_in(tmp_path / "run")
    trainer.step()
    trainer._save()
    saved = Checkpoints(trainer.folder, keep=1).newest(print)
    assert saved is not None
    del saved.tensors["simulator/_place"]
    resumed = trainer_in(trainer.folder, saved)
    assert isinstance(resumed.rollouts, DeviceRollouts)
    assert resumed.rollouts._lengths.tolist() == [-1] * 3
    said = "a point mass has no such state; the episodes under way are dropped and new ones begun"
    assert said in capsys.readouterr().err
    resumed.close()
    trainer.close()


def test_a_thousand_environments(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", num_envs=1024, seed_steps=1, steps=40_000, utd=1 / 1024, num_samples=8)
    for _ in range(20):
        trainer.step()
    trainer.close()
    trainer.log.close()
    assert trainer.progress.decisions == 20 * 1024
    assert trainer.agent.updater.steps > 1
    kept = trainer.buffer.steps(0, trainer.buffer.written)
    assert trainer.buffer.num_eps > 1024
    for i, (start, length) in enumerate(trainer.buffer._table[:1024:97].tolist()):
        rows = slice(start, start + length)
        assert kept["reward"][rows][1:].isfinite().all(), i
        assert kept["action"][rows][0].isnan().all()


def test_the_command_trains_and_goes_on(tmp_path: Path) -> None:
    keys = {**QUICK, "steps": 120, "work_dir": str(tmp_path / "run")}
    assert lifecycle.start(keys).status == 0
    assert lifecycle.resume(tmp_path / "run", dict(steps=160)).status == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(env_workers=2), "config key 'env_workers': got 2, allowed: 0 or none for point-masses"),
        (dict(episodic=False, deadly=True), "config key 'episodic': point-masses terminated an episode"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    if changes.pop("deadly", False):
        together = SUITES[point_mass.DEVICE].together
        assert together is not None
        SUITES[point_mass.DEVICE] = dataclasses.replace(
            SUITES[point_mass.DEVICE], together=lambda cfg, seeds: together(cfg.replace(episodic=True), seeds)
        )
    with pytest.raises(ConfigError, match=why):
        trainer_in(tmp_path / "run", **changes).run()


def test_the_simulator_is_where_the_agent_is(tmp_path: Path) -> None:
    elsewhere = PointMasses([1, 2, 3], torch.device("meta"))
    cfg = Config.from_dict(QUICK).with_env({"state": (4,)}, 2, 12)
    with pytest.raises(ConfigError, match="config key 'device': got cpu, allowed: meta"):
        rollouts_in(elsewhere, cfg, torch.device("cpu"), print)
