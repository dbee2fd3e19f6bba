"""Runs whose environments are in worker processes: the same numbers, and orderly ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PYTHONPATH, TINY
from loop_oracle import everything

from tdmpc2_fast import Config
from tdmpc2_fast.benchmarks.harness import stand_in
from tdmpc2_fast.train.envs.apart.workers import EnvError, Workers
from tdmpc2_fast.train.run.episode import Episode
from tdmpc2_fast.train.run.rollouts import HostRollouts
from tdmpc2_fast.train.run.trainer import OnlineTrainer

QUICK = dict(
    TINY,
    task=stand_in.NAME,
    num_samples=16,
    iterations=1,
    seed_steps=30,
    steps=92,
    eval_freq=1000,
    eval_episodes=1,
    device="cpu",
    num_envs=2,
)


def train(folder: Path, **changes: Any) -> OnlineTrainer:
    folder.mkdir()
    return OnlineTrainer(Config.from_dict({**QUICK, **changes}), folder)


def episodes_of(trainer: OnlineTrainer) -> list[Episode | None]:
    assert isinstance(trainer.rollouts, HostRollouts)
    return trainer.rollouts.episodes


def test_a_run_is_bitwise_the_same_wherever_its_environments_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "_DECISIONS", 10)
    stand_in.install(2)
    seed = int(np.random.default_rng().integers(2**31))
    found = []
    for name, keys in dict(here=dict(env_workers=0), there=dict(env_workers=2, overlap=True)).items():
        trainer = train(tmp_path / name, seed=seed, **keys)
        trainer.run()
        found.append(everything(trainer))
    assert isinstance(trainer.envs, Workers)
    assert trainer.envs._workers == []
    assert trainer.agent.updater.steps == 30 + (92 - 32)
    assert not [k for k, v in found[0].items() if v != found[1][k]], f"seed {seed}"


def test_the_episode_of_a_killed_process_never_reaches_the_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stand_in, "_DECISIONS", 20)
    stand_in.install(2)
    trainer = train(tmp_path / "run", seed_steps=100_000, steps=80)
    lost: list[Any] = []
    step = trainer.step

    def step_and_kill() -> None:
        if trainer.progress.decisions == 10:
            episode = episodes_of(trainer)[1]
            assert episode is not None
            assert len(episode) == 5
            lost.extend(episode.obs)
            assert isinstance(trainer.envs, Workers)
            os.kill(trainer.envs._workers[1].process.pid or 0, signal.SIGKILL)
        step()

    monkeypatch.setattr(trainer, "step", step_and_kill)
    trainer.run()
    # 40 decisions each: two episodes of the one that went on; one of the other, and 14 steps of its next
    assert trainer.buffer.num_eps == 3
    assert trainer.buffer._table[:3, 1].tolist() == [21] * 3
    held = {row.tobytes() for row in trainer.buffer.steps(0, len(trainer.buffer))["obs"].numpy()}
    assert not held & {obs.tobytes() for obs in lost}
    episode = episodes_of(trainer)[1]
    assert episode is not None
    assert len(episode) == 14
    assert "environment 1: the process died (exit code -9)" in capsys.readouterr().err
    assert len((tmp_path / "run/train.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize("what", ["obs", "reward"])
def test_numbers_that_are_none_end_the_run_and_name_the_environment(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.install(2)
    step = stand_in.StandIn.step

    def broken(self: stand_in.StandIn, action: Any) -> Any:
        obs, reward, *rest = step(self, action)
        return (obs * np.nan, reward, *rest) if what == "obs" else (obs, np.nan, *rest)

    monkeypatch.setattr(stand_in.StandIn, "step", broken)
    trainer = train(tmp_path / "run", env_workers=0)
    field = {"obs": "observation", "reward": "reward"}[what]
    with pytest.raises(EnvError, match=f"{stand_in.NAME}, environment 0: {field}: got nan"):
        trainer.run()  # already in the first evaluation
    saved = [p.name for p in (tmp_path / "run/checkpoints").glob("0*")]
    assert saved == ["0001-at-0"]  # it is the one before the evaluation, with all that belongs to it


PROGRAM = """
import sys
import gymnasium, foreign_envs
from tdmpc2_fast.train.cli import main
{register}
{guard}
    {register_late}
    sys.exit(main({words}))
"""
REGISTER = "gymnasium.register('OfTheProgram-v0', foreign_envs.Plain, max_episode_steps=20)"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("without a guard", "a worker process ended (exit code 1) when it imported"),
        ("registered under the guard", "worker processes cannot make what this one could"),
        ("from standard input", "a worker process cannot import <stdin> anew"),
        ("well", ""),
    ],
)
def test_what_workers_cannot_import_is_explained_in_a_line_and_not_tried_again(
    how: str, words: str, tmp_path: Path
) -> None:
    late = how == "registered under the guard"
    workers = f"env_workers={2 if how == 'without a guard' else 1}"
    program = PROGRAM.format(
        register="" if late else REGISTER,
        guard="if True:" if how == "without a guard" else "if __name__ == '__main__':",
        register_late=REGISTER if late else "pass",
        words=["train", "task=OfTheProgram-v0", "num_envs=2", workers, *(f"{k}={v}" for k, v in FEW.items())],
    )
    (tmp_path / "program.py").write_text(program)
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-" if how == "from standard input" else "program.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, input=program, capture_output=True, text=True, check=False, timeout=300
    )
    assert "Traceback" not in done.stderr
    if how == "well":
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: config key 'env_workers': ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert "env_workers=0" in errors[0]
    assert "restart" not in done.stderr
    assert not list(tmp_path.glob("runs/OfTheProgram-v0/*/*"))  # nothing came of it


FEW = dict(
    TINY,
    iterations=1,
    num_samples=16,
    num_elites=4,
    seed_steps=45,
    steps=60,
    eval_episodes=1,
    device="cpu",
    num_threads=1,
)
