"""Learning runs of the list: sittings that end by the clock and go on, several side by side, the official code's."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from tdmpc2_fast import Config
from tdmpc2_fast.benchmarks.harness import stand_in
from tdmpc2_fast.benchmarks.learning import __main__ as learning
from tdmpc2_fast.benchmarks.learning import runs, sitting

SMALL = [f"{k}={v}" for k, v in dict(TINY, iterations=1, eval_episodes=1).items()]
SMALL += [f"task={stand_in.NAME}", "precision=float32", "device=cpu", "seed_steps=20", "eval_freq=30", "num_threads=1"]
NAME = f"{stand_in.NAME}-5m-float32-seed3"
SHORT = f"{NAME}-0.05k"


@pytest.fixture(autouse=True)
def short_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "_DECISIONS", 20)
    stand_in.install(2)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as f:
        return list(csv.DictReader(f))


def returns(folder: Path) -> list[tuple[int, float]]:
    return [(int(r["step"]), float(r["reward"])) for r in rows(folder / "eval.csv")]


def test_a_run_that_comes_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "minutes=10", f"out={tmp_path}", "steps=50", "seed=3"]
    assert learning.main(words) == 0
    folder = tmp_path / SHORT
    about = json.loads((folder / "about.json").read_text())
    assert [step for step, _ in returns(folder)] == [0, 40, 50]
    (only,) = about["sittings"]
    assert about["finished"]
    assert (only["began"], only["decisions"], only["threads"]) == (0, 50, 1)
    assert only["torch_version"]
    assert only["seconds"] > 0
    assert {p.name for p in folder.iterdir()} >= {"config.json", "train.csv", "eval.csv", "checkpoints"}
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"{SHORT}: ")
    assert f"to its end: 50 decisions; return {returns(folder)[-1][1]:.1f} at 50 steps" in last
    # Again: there is nothing to go on with.
    kept = {p: p.read_bytes() for p in folder.glob("*.*")}
    assert learning.main(words) == 0
    assert "finished before" in capsys.readouterr().out
    assert kept == {p: p.read_bytes() for p in folder.glob("*.*")}


class _Rings(threading.Timer):
    """A clock that begins to run when a run is past its seed phase, however busy the machine is."""

    begun = threading.Event()

    def run(self) -> None:
        self.begun.wait(100)
        super().run()


def ring_after(decisions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the clock ring at that decision."""
    steps, step = [0], stand_in.StandIn.step
    monkeypatch.setattr(_Rings, "begun", threading.Event())

    def counted(self: stand_in.StandIn, action: Any) -> Any:
        steps[0] += 1
        if steps[0] > decisions:
            _Rings.begun.set()
        return step(self, action)

    monkeypatch.setattr(threading, "Timer", _Rings)
    monkeypatch.setattr(stand_in.StandIn, "step", counted)


def test_a_run_whose_time_is_over_goes_on_in_the_next_sitting_as_if_it_had_not_been(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "seed=3", "steps=200"]
    with pytest.MonkeyPatch.context() as patch:
        ring_after(60, patch)
        assert learning.main([*words, f"out={tmp_path}", "minutes=0.001"]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / f"{NAME}-0.2k"
    first = sitting.about(folder)
    assert not first["finished"]
    assert 20 < first["sittings"][0]["decisions"] < 200
    assert "until the time was over" in said
    assert learning.main([*words, f"out={tmp_path}"]) == 0
    found = sitting.about(folder)
    assert found["finished"]
    assert found["sittings"][0] == first["sittings"][0]
    assert found["sittings"][1]["began"] == first["sittings"][0]["decisions"]
    assert learning.main([*words, f"out={tmp_path / 'at once'}"]) == 0
    at_once = tmp_path / "at once" / folder.name
    assert returns(folder) == returns(at_once)
    timed = {"elapsed_time", "decisions_per_second"}
    cut = [[{k: v for k, v in r.items() if k not in timed} for r in rows(f / "train.csv")] for f in (folder, at_once)]
    assert cut[0] == cut[1]


def test_a_run_that_cannot_go_on_is_kept_aside(tmp_path: Path) -> None:
    words = [*SMALL, f"out={tmp_path}", "steps=50_000", "seed=3", "minutes=0.001", "save_agent=false"]
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            ring_after(60, patch)
            assert learning.main(words) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [NAME, f"{NAME}-stopped-1"]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    words = [*SMALL, f"out={tmp_path}", "steps=50", "seed=3"]
    assert learning.main(words) == 0
    folder = tmp_path / SHORT
    for gone in ("checkpoints", "replay"):
        shutil.rmtree(folder / gone)
    for gone in ("about.json", "train.csv"):
        (folder / gone).unlink()
    first = (folder / "eval.csv").read_bytes()
    assert learning.main(words) == 0
    assert (tmp_path / f"{SHORT}-stopped-1" / "eval.csv").read_bytes() == first
    assert sitting.about(folder)["finished"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "about.json").write_text("[]"), "about.json: got TypeError"),
        (lambda folder: (folder / "about.json").write_text('{"finished": 1, "sittings": [{}]}'), "KeyError ('began')"),
        (lambda folder: (folder / "eval.csv").write_bytes(b"step,reward,seed\n\xff,1,1\n"), "eval.csv: got Unicode"),
        (lambda folder: (folder / "checkpoints" / "latest.json").write_text("{"), "latest.json: got JSONDecodeError"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json of a run"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named(
    change: Callable[[Path], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, f"out={tmp_path}", "steps=50", "seed=3"]
    assert learning.main(words) == 0
    change(tmp_path / SHORT)
    assert learning.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_folder_has_one_run_whatever_the_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, f"out={tmp_path}", "steps=50", "seed=3"]
    assert learning.main(words) == 0
    others = [w for w in words if not w.startswith("batch_size")]
    assert learning.main(others) == 2
    said = capsys.readouterr().err
    assert f"{SHORT}': made with other keys: batch_size is {TINY['batch_size']} in it and 256 here" in said
    # What may change, may: more evaluations do not make it another run.
    assert learning.main([w for w in words if not w.startswith("eval_episodes")] + ["eval_episodes=2"]) == 0
    (tmp_path / "file").touch()
    assert learning.main([*words[:-3], f"out={tmp_path / 'file'}", "steps=50", "seed=3"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["minutes=0"], "learning key 'minutes': got '0', allowed: a number above 0"),
        (["minutes=soon"], "learning key 'minutes': got 'soon'"),
        (["together=1.5"], "learning key 'together': got '1.5', allowed: an integer above 0"),
        (["task=walker-wlak"], "walker-walk"),
        (["sed=1"], "unknown config key 'sed'"),
        (["walker-wlak"], "unknown learning run 'walker-wlak'. Did you mean 'walker-walk'"),
        (["walker-walk", "task=cup-catch"], "config key 'task': got 'cup-catch' beside 'walker-walk'"),
        (["seed=2"], "argument 'seed=2': allowed: beside a RUN or task=NAME"),
        (["walker-walk", "by=official"], "learning key 'official': got None, allowed: a checkout"),
        (["walker-walk", "by=me"], "learning key 'by': got 'me', allowed: official"),
        (["walker-walk", "minutes=1", "minutes=2"], "learning key 'minutes': given twice, allowed: once"),
        (["walker-walk", "minutes="], "learning key 'minutes': got nothing"),
        (["walker-walk", "work_dir=x"], "config key 'work_dir': got 'x', allowed: none in a learning run"),
        (["walker-walk", "data_dir=x"], "config key 'data_dir': got 'x', allowed: none in a learning run"),
        (["task=mt30"], "config key 'task': got 'mt30', allowed: one task"),
        (["all", "device=cuda:99"], "config key 'device'"),
    ],
)
def test_bad_words_are_named_and_leave_no_folder(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[0].startswith(("minutes", "together", "sed=")):
        words = [*SMALL, *words]
    assert learning.main([*words, f"out={tmp_path}"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_mean_runs_of_the_list_in_its_order() -> None:
    names = [r.name for r in runs.RUNS]
    assert len({*names}) == len(names)
    assert [r.name for r in runs.named(["all"])] == names
    assert [r.name for r in runs.named(["cup-catch", "walker-walk"])] == [
        "walker-walk-5m-bfloat16-seed1", "cup-catch-5m-bfloat16-seed1",
    ]  # fmt: skip
    assert [r.label for r in runs.named(["walker-walk-*"])] == ["bfloat16", "float32", "official"]
    assert [r.name for r in runs.named(["walker-walk-*"])][1:] == [
        "walker-walk-5m-float32-seed1-10k", "walker-walk-5m-official-seed1-10k",
    ]  # fmt: skip
    for run in runs.RUNS:
        cfg = Config.from_dict(run.values())
        assert (cfg.model_size, cfg.batch_size, cfg.utd) == (5, 256, 1.0)
        assert cfg.eval_episodes == (10 if run.steps == runs.WHOLE else 3)
    _, (changed,) = learning.options(["cup-catch", "seed=2", "model_size=1", "batch_size=8"])
    assert changed.name == "cup-catch-1m-bfloat16-seed2"
    assert Config.from_dict(changed.values()).batch_size == 8


def test_without_words_the_list_says_how_far_each_has_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / runs.RUNS[0].name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "train.csv").write_text("step,decisions\n1000,500\n")
    (folder / "eval.csv").write_text("step,reward,seed\n0,29.7,1\n")
    (folder / "checkpoints" / "latest.json").write_text(json.dumps(dict(trained=dict(decisions=730))))
    assert learning.main([f"out={tmp_path}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{folder.name} 50,000 730 decisions; return 29.7 at 0 steps" in said
    assert said.count("not begun") == len(runs.RUNS) - 1


def test_several_runs_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    words = ["cup-catch", "finger-spin", "together=2", "seed=2"]
    two, one = learning.Options(together=2), learning.Options()
    found = [*learning.commands(words, two)]
    assert [c[c.index("-m") + 1 :] for c in found] == [
        ["tdmpc2_fast.benchmarks.learning", f"{task}-5m-bfloat16-seed1", "seed=2", "num_threads=3"]
        for task in ("cup-catch", "finger-spin")
    ]
    assert all("num_threads=3" not in c for c in learning.commands(words, one))
    assert all(c[-1] == "num_threads=1" for c in learning.commands([*words, "num_threads=1"], two))
    # Runs of the official code need its checkout.
    assert len([*learning.commands(["all"], one)]) == len([r for r in runs.RUNS if not r.by_official])
    assert len([*learning.commands(["all"], learning.Options(official="x"))]) == len(runs.RUNS)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_processes_run_side_by_side_and_one_that_fails_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meet = """
import time
from pathlib import Path

Path({!r}).touch()
while not Path({!r}).exists():
    time.sleep(0.01)
"""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    commands = [python(meet.format(a, b)), python(meet.format(b, a) + "\nprint('well')"), python("raise SystemExit(3)")]
    logs = [tmp_path / "logs" / f"{n}.log" for n in range(3)]
    assert learning.Several(commands[:2], logs[:2], 2).run() == 0
    assert "well" in capsys.readouterr().out
    assert learning.Several(commands[1:], logs[1:], 1).run() == 1
    assert "2: status 3: \n" in capsys.readouterr().out
    # A log is added to, and what an earlier sitting said is not said again.
    assert learning.Several([python("")], logs[1:2], 1).run() == 0
    assert "well" not in capsys.readouterr().out


def test_a_signal_goes_to_all_of_them_and_no_other_is_begun(tmp_path: Path) -> None:
    code = "import pathlib, time; pathlib.Path({!r}).touch(); time.sleep(60)"
    marks = [tmp_path / str(n) for n in range(3)]
    several = learning.Several([python(code.format(str(m))) for m in marks], [m.with_suffix(".log") for m in marks], 2)

    def interrupt() -> None:
        while not all(m.exists() for m in marks[:2]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    start = time.monotonic()
    assert several.run() == 128 + signal.SIGTERM
    thread.join()
    assert time.monotonic() - start < 30
    assert not marks[2].exists()


def test_what_nohup_ignores_is_ignored(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"import pathlib, time; pathlib.Path({str(mark)!r}).touch(); time.sleep(0.3)"
    several = learning.Several([python(code)], [tmp_path / "log"], 1)

    def hang_up() -> None:
        while not mark.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    thread = threading.Thread(target=hang_up)
    try:
        thread.start()
        assert several.run() == 0
    finally:
        thread.join()
        signal.signal(signal.SIGHUP, before)


def test_the_clock_is_heard_where_sigterm_is_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit), sitting._alarm(0.001):
            time.sleep(30)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


OFFICIAL = {
    "tdmpc2.py": "class TDMPC2:\n    def __init__(self, cfg):\n        assert cfg.compile is False\n",
    "common/__init__.py": "",
    "common/buffer.py": """
import torch
class Buffer:
    def __init__(self, cfg):
        self.free, _ = torch.cuda.mem_get_info()
""",
    "common/seed.py": "def set_seed(seed):\n    assert seed == 3\n",
    "envs/__init__.py": "def make_env(cfg):\n    return object()\n",
    "trainer/__init__.py": "",
    "trainer/online_trainer.py": """
class OnlineTrainer:
    def __init__(self, cfg, env, agent, buffer, logger):
        self.cfg, self.logger, self.agent = cfg, logger, agent
    def train(self):
        common = dict(step=0, episode=0, elapsed_time=1.0, episode_reward=2.5, episode_success=0.0, episode_length=20)
        self.logger.log(common, "eval")
        for n in (1, 2):
            self.logger.log(common | dict(step=20 * n, episode=n), "train")
        self.logger.finish(self.agent)
""",
}


def test_the_official_code_makes_a_run_with_its_own_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in OFFICIAL.items():
        path = tmp_path / "checkout" / "tdmpc2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    words = [*SMALL, "by=official", "seed=3", "steps=40"]
    assert learning.main([*words, f"out={tmp_path / 'runs'}", f"official={tmp_path / 'checkout'}"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == f"{stand_in.NAME}-5m-official-seed3-0.04k"
    assert returns(folder) == [(0, 2.5)]
    assert [int(r["decisions"]) for r in rows(folder / "train.csv")] == [20, 40]
    assert sitting.about(folder)["finished"]
    assert [r["reward"] for r in rows(folder / "success.csv")] == ["0.0"]
    assert json.loads((folder / "config.json").read_text())["seed"] == 3
    assert learning.main([*words, f"out={tmp_path / 'runs'}", f"official={tmp_path / 'checkout'}"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert learning.main([*words, f"out={tmp_path}", f"official={tmp_path}"]) == 2
    assert "allowed: a checkout of the official repository" in capsys.readouterr().err
