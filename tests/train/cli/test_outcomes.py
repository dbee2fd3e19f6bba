"""What a sweep says of its runs when they are over."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from tdmpc2_fast.train.cli.sweep import Run, Sweep
from tdmpc2_fast.train.run import lifecycle
from tdmpc2_fast.train.signals import Children


def test_every_run_has_a_row() -> None:
    sweep = Sweep([Run(("task=a", f"seed={n}"), f"seed={n}") for n in range(1, 7)])
    told = dict(mean_return=12.34, std_return=5.06, folder="runs/a/1")
    ends = [
        (0, 3725.9, told),
        (1, 59.9, dict(folder="runs/a/2", error="it broke")),
        (2, 60.0, dict(error="no folder")),
        (128 + signal.SIGTERM, 36000.0, dict(folder="runs/a/4")),
        (-signal.SIGHUP, 0.0, {}),
    ]
    for outcome, (status, seconds, facts) in zip(sweep.outcomes, ends, strict=False):
        outcome.status, outcome.seconds, outcome.told = status, seconds, dict(facts)
    assert sweep.rows() == [
        ("seed=1", "return 12.3 ± 5.1", "1:02:05", "runs/a/1"),
        ("seed=2", "failed (1)", "0:00:59", "runs/a/2\nit broke"),
        ("seed=3", "failed (2)", "0:01:00", "no folder"),
        ("seed=4", "interrupted", "10:00:00", "runs/a/4"),
        ("seed=5", "interrupted", "0:00:00", ""),
        ("seed=6", "not started", "", ""),
    ]


@pytest.mark.parametrize("ignored", [True, False])
def test_a_sweep_outlives_its_terminal_under_nohup_only(ignored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def run(children: Children, command: list[str], **options: Any) -> int:
        begun.append(command[-1])
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    monkeypatch.setattr(Children, "run", run)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        status = Sweep([Run((f"seed={n}",), "") for n in (1, 2)]).run()
        after = signal.getsignal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert after is (signal.SIG_IGN if ignored else signal.SIG_DFL)
    assert (status, begun) == ((0, ["seed=1", "seed=2"]) if ignored else (128 + signal.SIGHUP, ["seed=1"]))


def told(folder: Path, **changes: Any) -> tuple[int, dict[str, Any]]:
    """Exit status of a run of a few decisions, and what it told its sweep."""
    facts: dict[str, Any] = {}
    keys = dict(task="Pendulum-v1", episode_length=5, seed_steps=5, eval_episodes=1, mpc=False, work_dir=str(folder))
    keys |= dict(device="cpu", num_threads=1, save_csv=False, tensorboard=False)
    return lifecycle.start({**TINY, **keys, **changes}, lifecycle.Given(facts.update)).status, facts


def test_a_run_tells_its_sweep_what_came_of_it(tmp_path: Path) -> None:
    status, facts = told(tmp_path / "a", steps=8)
    assert status == 0
    assert facts.keys() == {"folder", "mean_return", "std_return"}
    assert facts["folder"] == str(tmp_path / "a")
    assert facts["mean_return"] < 0 == facts["std_return"]
    status, facts = told(tmp_path / "b", steps=4)
    assert status == 1
    assert facts["error"].startswith("nothing was learned: steps=4, and the first update comes after")
