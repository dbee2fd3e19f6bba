"""Learning runs that end by the clock."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from tdmpc2_fast.benchmarks.gpu import learning
from tdmpc2_fast.benchmarks.harness import stand_in

SMALL = [f"{k}={v}" for k, v in dict(TINY, iterations=1, eval_episodes=1).items()]
SMALL += [f"task={stand_in.NAME}", "device=cpu", "seed_steps=20", "eval_freq=30"]


@pytest.fixture(autouse=True)
def short_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "_DECISIONS", 20)
    stand_in.install(2)


def returns(folder: Path) -> list[tuple[int, float]]:
    with (folder / "eval.csv").open() as f:
        return [(int(r["step"]), float(r["reward"])) for r in csv.DictReader(f)]


def test_a_run_that_comes_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "seconds=600", f"out={tmp_path}", "steps=50", "seed=3"]
    assert learning.main(words) == 0
    folder = tmp_path / "stand-in-auto-seed3"
    about = json.loads((folder / "about.json").read_text())
    rows = returns(folder)
    assert [step for step, _ in rows] == [0, 40, 50]
    assert about["finished"]
    assert about["decisions"] == about["step"] == about["evaluated_at"] == 50
    assert about["mean_return"] == pytest.approx(rows[-1][1], abs=0.051)
    assert about["torch_version"]
    assert {p.name for p in folder.iterdir()} >= {"config.json", "train.csv", "eval.csv", "about.json"}
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("stand-in auto seed 3: 50 steps in")
    assert "to its end" in last
    # Again: what is there stays.
    kept = (folder / "eval.csv").read_bytes()
    assert learning.main(words) == 0
    assert (folder / "eval.csv").read_bytes() == kept
    assert returns(tmp_path / "stand-in-auto-seed3-2") == rows


def test_a_run_whose_time_is_over_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, step = threading.Event(), stand_in.StandIn.step

    class Timer(threading.Timer):
        """Starts once the run is past its seed phase, however busy the machine is."""

        def run(self) -> None:
            begun.wait(100)
            super().run()

    def counted(self: stand_in.StandIn, action: Any) -> Any:
        steps.append(1)
        if len(steps) > 50:
            begun.set()
        return step(self, action)

    steps: list[int] = []
    monkeypatch.setattr(threading, "Timer", Timer)
    monkeypatch.setattr(stand_in.StandIn, "step", counted)
    assert learning.main([*SMALL, "seconds=2", f"out={tmp_path}", "steps=10_000_000"]) == 0
    (folder,) = tmp_path.iterdir()
    about = json.loads((folder / "about.json").read_text())
    assert not about["finished"]
    assert 0 < about["decisions"] < 10_000_000
    assert 2 <= about["seconds"] < 100
    assert about["evaluated_at"] == returns(folder)[-1][0] <= about["decisions"]
    assert "until the time was over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seconds=0", "learning key 'seconds': got '0', allowed: a number above 0"),
        ("seconds=soon", "learning key 'seconds': got 'soon'"),
        ("task=walker-wlak", "walker-walk"),
        ("sed=1", "unknown config key 'sed'"),
    ],
)
def test_bad_words_are_named_and_leave_no_folder(
    word: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [w for w in SMALL if not w.startswith(word.partition("=")[0] + "=")]
    assert learning.main([*words, f"out={tmp_path}", word]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
