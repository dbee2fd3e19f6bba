"""What a person sees of a run, with a clock that stands still unless told."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config

from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.log import display
from tdmpc2_fast.train.log.display import Lines, Live, Quiet, choose
from tdmpc2_fast.train.log.run_log import RunLog
from tdmpc2_fast.train.log.status import Clock, Status

pytest.importorskip("rich")
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

ABOUT = {
    "model": "5,012,345 parameters",
    "device": "cuda:0",
    "backend": "triton (a GPU of compute capability 9.0; kernels from the cache, 109 launches a plan)",
}
ROW = dict(
    episode_reward=812.345,
    consistency_loss=0.0123,
    reward_loss=1.2345,
    value_loss=123.4567,
    pi_loss=-4.5678,
    termination_loss=0.0,  # as it is where tasks do not terminate
    grad_norm=12.3456,
    pi_grad_norm=0.0456,
)


class Time:
    """Stands in for `perf_counter`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    for module in ("display", "status"):
        monkeypatch.setattr(f"tdmpc2_fast.train.log.{module}.perf_counter", found)
    return found


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def status(**changes: Any) -> Status:
    cfg = tiny_config(task="walker-walk", exp_name="default", **{"seed_steps": 50, "steps": 1_000_000, **changes})
    return Status(cfg, Path("runs/walker-walk/default/1"), 2, ABOUT, Clock())


def live(s: Status, width: int = 80, height: int = 24) -> tuple[Live, io.StringIO]:
    out = io.StringIO()
    return Live(s, Console(file=out, force_terminal=True, width=width, height=height, color_system=None)), out


def run_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: Quiet | None = None, **changes: Any) -> RunLog:
    if shown is not None:
        monkeypatch.setattr("tdmpc2_fast.train.log.run_log.choose", lambda s: setattr(shown, "status", s) or shown)
    cfg = tiny_config(**{"tensorboard": False, "save_csv": False, "seed_steps": 50, "steps": 100_000, **changes})
    return RunLog(cfg, tmp_path, 2, ABOUT)


def lines_of(s: Status, width: int = 80, height: int = 24) -> list[str]:
    """The table's lines, without control sequences."""
    shown, out = live(s, width, height)
    shown.console.print(shown._table())
    return Text.from_ansi(out.getvalue()).plain.splitlines()


@pytest.mark.parametrize("height", [24, 50])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_fits_and_breaks_no_number(width: int, height: int) -> None:
    s = status(eval_freq=100_000)
    s.decisions, s.replay, s.row, s.before = 123_456, 0.123, ROW, 45_296.0
    s.last_eval, s.best_eval = 823.17, 850.26
    s.clock.seconds = dict(environment=4529.6, plan=22648.0, update=13588.8, evaluation=1358.9)
    s.doing = ("evaluating", 3, 10)
    for n in range(8):
        s.notes.append((f"0:0{n}:00", f"worker {n} died in environment {n}; it was started anew " * 2, n % 2 == 1))
    lines = lines_of(s, width, height)
    assert {cell_len(line) for line in lines} == {min(width, 120)}
    assert len(lines) < height or width == 60
    whole = (
        *("123,456 / 1,000,000 decisions", "12%", "evaluating 3 of 10", "elapsed 12:34:56", "walker-walk · default"),
        *("episode 812.3", "evaluation 823.2", "best 850.3", "consistency 0.0123", "reward 1.234", "value 123.5"),
        *("pi -4.568", "norm 12.35", "policy norm 0.0456", "environment 10%", "plan 50%", "update 30%", "other 7%"),
        *("12% full", "device cuda:0", "model 5,012,345 parameters", "0:07:00 warning: worker 7 died"),
    )
    for words in whole:
        assert any(words in line for line in lines), words
    assert not any("…" in line or "termination" in line for line in lines)


def test_the_newest_note_shows_in_the_lowest_terminal() -> None:
    s = status()
    for n in range(5):
        s.notes.append(("0:00:01", f"note {n}", False))
    shown = " ".join(lines_of(s, 80, 5))
    assert "note 4" in shown
    assert "note 3" not in shown


def drawn_in(
    decisions: int, seconds: float, slow: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Time
) -> list[float]:
    """When the table was drawn in decisions that take so long each; to draw it takes `slow` seconds."""
    shown, _ = live(status())
    drawn: list[float] = []
    table = shown._table

    def draw() -> Any:
        clock.now += slow
        drawn.append(clock.now)
        return table()

    monkeypatch.setattr(shown, "_table", draw)
    log = run_log(tmp_path, monkeypatch, shown)
    for n in range(1, decisions + 1):
        clock.now += seconds
        log.step(n, 0.5)
    found = list(drawn)
    log.close()
    return found


def test_two_refreshes_a_second_however_many_decisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Time
) -> None:
    # rich draws twice where it begins
    drawn = sorted({*drawn_in(10_000, 0.001, 0.0, tmp_path, monkeypatch, clock)})
    assert 18 <= len(drawn) <= 21
    assert min(b - a for a, b in itertools.pairwise(drawn)) >= 0.499


def test_a_slow_terminal_gets_less_than_a_hundredth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Time
) -> None:
    start = clock.now
    drawn = drawn_in(20_000, 0.005, 0.05, tmp_path, monkeypatch, clock)
    assert 0 < 0.05 * len(drawn[2:]) < 0.01 * (clock.now - start)


def test_a_decision_costs_microseconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = run_log(tmp_path, monkeypatch, display="none")
    rounds = []
    for _ in range(10):
        start = time.perf_counter()
        for n in range(1000):
            log.step(n, 0.5)
            with log.clock.part("plan"):
                pass
        rounds.append((time.perf_counter() - start) / 1000)
    assert min(rounds) < 20e-6


def test_lines_for_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Time, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run_log(tmp_path, monkeypatch, display="lines", seed=3)
    head = capsys.readouterr().out
    assert "device cuda:0" in head
    assert "seed 3" in head
    assert str(tmp_path) in head
    when: list[float] = []
    for n in range(1, 1001):
        clock.now += 0.125
        log.step(n, 0.5)
        if n == 20:
            log.episode(n, ROW)
        out = capsys.readouterr().out
        if out:
            when.append(clock.now - 1000)
    assert when == [5.0, 35.0, 65.0, 95.0, 125.0]
    clock.now += 40
    log.step(1001, 0.5)
    line = capsys.readouterr().out
    for words in ("step     2,002", "  1%", "return    812.3", "decisions/s", "value 123.5", "0:02:45", "left "):
        assert words in line, words
    assert "\x1b" not in head + line
    log.evaluation(1001, 12.34, 5.0, 10, success=0.4)
    assert "return     12.3 ± 5.0  success 0.40  (10 episodes)" in capsys.readouterr().out
    log.note("something new")
    log.warn("something broke")
    captured = capsys.readouterr()
    assert "something new" in captured.out
    assert "warning: something broke" in captured.err


def test_a_log_never_looks_dead_in_a_long_stretch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Time, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run_log(tmp_path, monkeypatch, display="lines")
    capsys.readouterr()
    for n in range(1200):
        clock.now += 0.125
        log.busy("pretraining", n, 1200)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "pretraining 279 of 1,200  0:00:35" in lines[1]


def test_none_shows_warnings_and_the_summary_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Time, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run_log(tmp_path, monkeypatch, display="none")
    for n in range(1000):
        clock.now += 1
        log.step(n, 0.5)
    log.evaluation(1000, 1.0, 1.0, 1)
    log.note("quiet")
    log.warn("loud")
    log.close(["the end"])
    captured = capsys.readouterr()
    assert captured.out == "the end\n"
    assert captured.err.startswith("warning: loud")


def test_speed_and_time_left_count_evaluations_apart(clock: Time) -> None:
    s = status(steps=10_000, eval_freq=1000, seed_steps=100)
    for n in range(1, 2001):
        clock.now += 0.1
        s.step(n, 0.0)
        if n == 100:  # pretraining
            for i in range(50):
                clock.now += 1.0
                s.busy("pretraining", i, 50)
        if n % 1000 == 0:
            s.busy("evaluating", 0, 10)
            clock.now += 20.0
            s.evaluated(1.0)
    assert s.rate == pytest.approx(10.0)
    # 8000 decisions, evaluations at 3000, 4000, ... 9000 and at the end
    assert s.left == pytest.approx(800.0 + 8 * 20.0)
    clock.now += 1.0
    assert s.elapsed == pytest.approx(200 + 50 + 40 + 1.0)


@pytest.mark.parametrize(
    ("changes", "pace", "expected"),
    [
        (
            dict(steps=2000, seed_steps=1000, eval_freq=50_000),
            2.0,
            "an evaluation takes about 0:01:40: 10 episodes of up to 50 decisions; this run has 2  0:00:06",
        ),
        (
            dict(steps=500, seed_steps=250, eval_freq=100, eval_episodes=2),
            2.0,
            "2 episodes of up to 50 decisions; this run has 6",
        ),
        (
            dict(steps=500, seed_steps=250, eval_freq=250),
            0.5,
            "0:00:25: 10 episodes of up to 50 decisions; this run has 3, probably most of its time. "
            "What shortens it: a smaller eval_episodes or a larger eval_freq",
        ),
        (
            dict(steps=100, seed_steps=50, eval_freq=1000),
            0.5,
            "this run has 2, probably most of its time. What shortens it: a smaller eval_episodes  ",
        ),
        (dict(steps=500, eval_freq=10, eval_episodes=1), 0.5, "1 episode of up to 50 decisions; this run has 11"),
        (dict(steps=500, eval_freq=10, mpc=False), 0.5, "10 episodes of up to 50 decisions; this run has 11  "),
        (dict(steps=100), 0.1, ""),  # over before it is worth a line
    ],
)
def test_what_evaluations_take_is_said_early_and_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: Time,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    pace: float,
    expected: str,
) -> None:
    log = run_log(tmp_path, monkeypatch, display="lines", **changes)
    capsys.readouterr()
    said = ""
    for start in (0, 50):
        clock.now += 2.0  # the first plan is slower
        for done in range(1, 51):
            log.busy("evaluating", done, 50)
            found = "".join(x for x in capsys.readouterr().out.splitlines(True) if x.startswith("an evaluation"))
            assert not found or (not said and start == 0 and 3 <= clock.now - 1002 < 3 + pace)
            said += found
            clock.now += pace
        log.evaluation(start, 1.0, 0.0, 1)
        log.step(start + 50, 0.0)
        capsys.readouterr()
    assert expected in said
    assert bool(expected) == bool(said)
    state = log.state()
    log = RunLog(log.cfg, tmp_path, 2, ABOUT, state)
    capsys.readouterr()
    for done in range(1, 51):  # a later session knows it
        log.busy("evaluating", done, 50)
        clock.now += pace
    assert "an evaluation takes" not in capsys.readouterr().out


def test_a_warning_is_said_once_where_that_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run_log(tmp_path, monkeypatch, display="none")
    for text in ("no video: paint is missing", "no video: paint is missing", "no video: no paint"):
        log.warn_once(text)
    assert [line.rsplit("  ", 1)[0] for line in capsys.readouterr().err.splitlines()] == [
        "warning: no video: paint is missing",
        "warning: no video: no paint",
    ]


@pytest.mark.parametrize(("begins", "now"), [({}, "random actions"), (dict(init="x"), "playing")])
def test_nothing_is_foretold_from_decisions_without_updates(begins: dict[str, str], now: str, clock: Time) -> None:
    s = status(seed_steps=100, **begins)
    for n in range(1, 101):
        clock.now += 0.01
        s.step(n, 0.0)
    assert (s.rate, s.left) == (pytest.approx(100.0), None)
    assert now in " ".join(lines_of(s))
    for n in range(101, 106):
        clock.now += 1.0
        s.step(n, 0.0)
    assert s.rate == pytest.approx(1.0)


def test_a_clock_adds_up(clock: Time) -> None:
    parts = Clock()
    for _ in range(3):
        with parts.part("plan"):
            clock.now += 0.5
    with contextlib.suppress(KeyError), parts.part("update"):
        clock.now += 0.25
        raise KeyError
    assert parts.seconds == {"plan": 1.5, "update": 0.25}
    with parts.part("environment"):
        clock.now += 2.0
        assert list(parts.so_far().items()) == [("environment", 2.0), ("plan", 1.5), ("update", 0.25)]


@pytest.mark.parametrize(
    ("terminal", "term", "ci", "kind"),
    [
        (True, "xterm-256color", "", Live),
        (True, "xterm-256color", "true", Lines),
        (True, "dumb", "", Lines),
        (False, "xterm-256color", "", Lines),
    ],
)
def test_auto(monkeypatch: pytest.MonkeyPatch, terminal: bool, term: str, ci: str, kind: type[Quiet]) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal() if terminal else io.StringIO())
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("CI", ci)
    assert type(choose(status(display="auto"))) is kind


def test_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    monkeypatch.setattr(display, "find_spec", lambda name: None)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("CI", "")
    with pytest.raises(ConfigError, match=r"pip install 'tdmpc2-fast\[train\]'"):
        choose(status(display="live"))
    assert type(choose(status(display="auto"))) is Lines
    assert "pip install" in out.getvalue()


def test_what_others_print_and_log_appears_above_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Time
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger("tdmpc2_fast.test_display")
    logger.addHandler(handler)
    monkeypatch.setenv("COLUMNS", "80")
    log = run_log(tmp_path, monkeypatch, display="live")
    try:
        log.step(1, 0.5)
        before = len(terminal.getvalue())
        logger.warning("from a logger")
        print("from a print")
        drawn = terminal.getvalue()[before:]
        for words in ("from a logger", "from a print"):
            # the table's lines are taken away, the words come, the table follows
            ahead, _, behind = drawn.partition(words)
            assert "\x1b[1A" in ahead
            assert "╭" in behind
        log.warn("the disk is full")
        clock.now += 0.01
        log.step(2, 0.5)
        assert "warning: the disk is full" in terminal.getvalue()
    finally:
        log.close(["files in there"])
        logger.removeHandler(handler)
    assert handler.stream is sys.stdout is terminal
    assert terminal.getvalue().endswith("files in there\n")
    assert terminal.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_every_note_stays_on_the_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Time) -> None:
    shown, out = live(status(), 80, 24)
    log = run_log(tmp_path, monkeypatch, shown)
    log.step(1, 0.5)
    for n in range(20):
        log.note(f"note {n:02}: {'words ' * 20}")
    above = out.getvalue()
    log.close()
    last = out.getvalue()[len(above) :]
    for n in range(20):
        assert (f"note {n:02}" in above) if n < 12 else (f"note {n:02}" in last), n


def test_a_terminal_that_goes_away_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Time) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    for kind in ("lines", "live"):
        log = run_log(tmp_path, monkeypatch, display=kind)
        for n in range(100):
            clock.now += 1
            log.step(n, 0.5)
        log.note("nobody reads this")
        log.close(["nor this"])
