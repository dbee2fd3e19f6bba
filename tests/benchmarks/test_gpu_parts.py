"""`make gpu`: its parts, what becomes of them, and a machine that cannot run them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gpu_cases
import pytest
import torch
from bench_rows import row
from conftest import ROOT

from tdmpc2_fast.benchmarks import report, run, static
from tdmpc2_fast.benchmarks.gpu import call, predicted, processes, warm
from tdmpc2_fast.benchmarks.gpu import parts as gpu
from tdmpc2_fast.benchmarks.gpu.processes import Outcome, Part
from tdmpc2_fast.benchmarks.learning import __main__ as learning
from tdmpc2_fast.benchmarks.options import parse
from tdmpc2_fast.kernels.device.launch import PRECISIONS

H200 = dict(device="cuda", gpu="NVIDIA H200", driver="1", triton_version="3.6.0")
PYTEST = """collected 4 items

tests/test_gpu.py::test_one PASSED   [ 25%]
tests/test_gpu.py::test_two[a] FAILED   [ 50%]
tests/test_gpu.py::test_three SKIPPED (because)   [ 75%]
tests/test_gpu.py::test_four[b] """


def test_make_gpu_without_a_gpu_says_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert call.main([]) == 2
    said = capsys.readouterr().err
    assert "kernels cannot run" in said
    assert "make bench" in said
    assert call.main(["nothing"]) == 2
    assert "unknown part 'nothing', allowed: first, rest, more, compile, tests, planner" in capsys.readouterr().err
    for minutes in ("x", "0", "nan"):
        assert call.main([f"minutes={minutes}"]) == 2


def test_parts_of_make_gpu_ask_for_what_there_is() -> None:
    all_parts = gpu.parts()
    measured = [c for p in all_parts for c in p.commands if gpu.RUN in c]
    assert len(measured) > 10
    for command in measured:
        words = command[command.index(gpu.RUN) + 1 :]
        assert run._suites([w for w in words if "=" not in w])
        assert parse([w for w in words if "=" in w]).threads == gpu.THREADS
    wanted = {p.name for p in (ROOT / "tests").rglob("test_*") if p.name.endswith(("_kernel.py", "_kernels.py"))}
    assert {"test_layer_kernels.py", "test_mppi_kernel.py"} < wanted
    for name, files in (("tests", {"test_gpu.py"}), ("more-tests", {"test_gpu.py"}), ("kernel-tests", wanted)):
        commands = next(p for p in all_parts if p.name == name).commands
        assert {c[2] for c in commands} == {f"TEST_SHARD={i}/{len(commands)}" for i in range(len(commands))}
        assert all({Path(w).name for w in c if w.startswith("tests/")} == files for c in commands)
    learning_runs = [c for p in gpu.parts(wheels=True) if p.name.startswith("learning-") for c in p.commands]
    assert len(learning_runs) == 8
    for command in learning_runs:
        own = command[command.index("tdmpc2_fast.benchmarks.learning") + 1 :]
        chosen, (one,) = learning.options([w.replace("{minutes}", "4.5") for w in own])
        assert (chosen.minutes, one.model_size, one.seed in (1, 2)) == (4.5, 5, True)
    file, test = gpu.SANITIZED.split("::")
    name, case = test.removesuffix("]").split("[")
    assert f"def {name}(" in (ROOT / file).read_text()
    assert case in [x.id for x in gpu_cases.parameters(gpu_cases.PLANS)]


def test_parts_of_a_call_fit_into_it_and_what_they_run_is_compiled_before(tmp_path: Path) -> None:
    (tmp_path / "tdmpc2").mkdir()
    (tmp_path / "tdmpc2" / "tdmpc2.py").touch()
    theirs = gpu.parts([f"official={tmp_path}"])
    assert len({p.name for p in theirs}) == len(theirs)
    for group in gpu.GROUPS[:2]:
        of_group = [p for p in theirs if p.group == group]
        assert sum(p.seconds for p in of_group) <= gpu.CALL
        compiled: set[warm.Work] = set()
        for part in of_group:
            for command in part.commands:
                if gpu.WARM in command:
                    compiled |= {*warm.run_by(command[command.index(gpu.WARM) + 1 :])}
            if part.timed:
                assert {*warm.measured(part)} <= compiled, part.name
    assert {*warm.run_by(["more-tests"])}.isdisjoint(warm.run_by(["tests"]))


def test_what_comes_first_has_few_kernels() -> None:
    code = "from tdmpc2_fast.benchmarks.gpu import warm; print(len(list(warm.distinct(warm.run_by(WHAT), 90))))"
    # Not interpreted, kernels have what they are compiled with.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    parse = f"from tdmpc2_fast.benchmarks import options; options._of_this_cpu = lambda: {PRECISIONS}; "
    words = [sys.executable, "-c", parse + code.replace("WHAT", repr(["planner", "update", "tests"]))]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert 0 < int(done.stdout or 0) < 450, done.stderr


def test_what_tests_printed_is_counted_wherever_they_were_killed(tmp_path: Path) -> None:
    assert processes.test_counts(["= 7 passed, 2 skipped in 3.05s =\n"] * 2) == "14 passed, 4 skipped"
    assert processes.test_counts(["nothing"]) == ""
    counted = processes.test_counts([PYTEST, "5 passed in 1.00s"])
    assert counted == "6 passed, 1 failed, 1 skipped, 1 cut off (test_four[b])"
    file = tmp_path / "test_it.py"
    file.write_text(
        "import time\ndef test_one(): pass\ndef test_two(): assert 0, 'why'\ndef test_three(): time.sleep(60)\n"
    )
    words = (sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", str(file))
    found = processes.run(Part("tests", (words,), 20), 14, tmp_path)
    assert found.status == "too late: 1 failed, 1 passed"
    assert "why" in (tmp_path / "tests-0.log").read_text()


def python(name: str, code: str, seconds: float = 20, **changes: object) -> Part:
    return Part(name, ((sys.executable, "-c", code),), seconds, **changes)  # type: ignore[arg-type]


def test_a_part_whose_tests_were_all_skipped_has_failed(tmp_path: Path) -> None:
    said = python("tests", "print('2 skipped, 9 deselected in 0.05s')")
    assert processes.run(said, 20, tmp_path).status == "failed: 2 skipped"


def test_a_part_that_fails_hangs_or_dies_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    logs, kept = tmp_path / "logs", call.Kept(tmp_path / "out", tmp_path / "logs")
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    chosen = [
        Part("learning", ((sys.executable, "-c", "print('after {minutes} min')"),), 100),
        python("hangs", "import time; time.sleep(60)", -98.0),  # what the first has not used is gone
        python("hangs-deaf", deaf, 2.0),
        python("fails", "raise SystemExit('it broke')"),
        python("dies", f"print({PYTEST!r}, end='', flush=True); import os; os.kill(os.getpid(), 9)"),
        python("measures", "print('well')", timed=True),
    ]
    (logs / "measures").mkdir(parents=True)
    report.write(logs / "measures" / "x.json", [row(**H200), row(suite="replay", **H200)])
    start = time.monotonic()
    outcomes = list(call.perform(chosen, start + 200, logs, kept.write))
    assert time.monotonic() - start < 15
    assert [o.status for o in outcomes] == [
        *("passed", "too late", "too late", "failed"),
        *("failed: 1 passed, 1 failed, 1 skipped, 1 cut off (test_four[b])", "passed"),
    ]
    (path,) = (tmp_path / "out").glob("*.json")
    path.unlink()  # it is written again
    assert call.finish(outcomes, kept) == 1
    said = capsys.readouterr().out
    assert "it broke" in said
    assert "\nafter 1.250 min\n" in said
    assert "planner: plan, 5M, float32: torch 100 ms (p99 103)\n" in said
    assert len(said) < 10_000
    assert path.name == "h200-2026-01-02-abc.json"
    assert len(report.read(path)) == 2


def test_what_runs_beside_ends_before_the_first_that_is_timed(tmp_path: Path) -> None:
    mark = f"import pathlib, time; time.sleep(1.5); pathlib.Path({str(tmp_path / 'mark')!r}).touch()"
    there = f"import pathlib; assert pathlib.Path({str(tmp_path / 'mark')!r}).exists()"
    chosen = [python("beside", mark, 0, beside=True), python("tests", ""), python("timed", there, timed=True)]
    found = list(call.perform(chosen, time.monotonic() + 60, tmp_path, lambda: None))
    assert [(o.part.name, o.status) for o in found] == [(n, "passed") for n in ("tests", "beside", "timed")]


@pytest.fixture
def rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[Outcome]]]:
    """Runs a call of which each command is a stub and each second a fiftieth; `codes` are of other stubs, by part."""
    real, perform = gpu.parts, call.perform
    outcomes: list[Outcome] = []
    table = tmp_path / "row.json"
    report.write(table, [row(variant="triton", product="triton", precision="bfloat16", **H200)])

    def stub(part: Part, codes: dict[str, str], logs: Path) -> Part:
        measure = f"import pathlib, shutil; p = pathlib.Path({str(logs / part.name)!r}); p.mkdir(parents=True); "
        code = measure + f"shutil.copy({str(table)!r}, p / 'x.json')" if part.timed else "print('3 passed in 0.1s')"
        commands = tuple((sys.executable, "-S", "-c", code + codes.get(part.name, "")) for _ in part.commands[:2])
        return dataclasses.replace(part, commands=commands, seconds=part.seconds / 50)

    def performed(*args: object) -> list[Outcome]:
        outcomes[:] = perform(*args)  # type: ignore[arg-type]
        return outcomes

    def rehearse(*words: str, **codes: str) -> tuple[int, list[Outcome]]:
        monkeypatch.setattr(call, "parts", lambda theirs, wheels, out, logs: [
            stub(p, codes, logs) for p in real(theirs, wheels, out, logs)
        ])  # fmt: skip
        return call.main([*words, f"out={tmp_path / 'out'}", "official=somewhere"]), outcomes

    for name, value in dict(why_not_here=list, perform=performed, RESERVE=1.0, LEAST=0.2).items():
        monkeypatch.setattr(call, name, value)
    monkeypatch.setattr(processes, "GRACE", 0.1)
    return rehearse


def test_both_calls_run_to_their_ends(
    rehearsed: Callable[..., tuple[int, list[Outcome]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for group in gpu.GROUPS[:2]:
        status, outcomes = rehearsed(group, "minutes=0.5")
        assert {o.part.name for o in outcomes} == {p.name for p in gpu.parts(["x"]) if p.group == group}
        assert {o.status.partition(":")[0] for o in outcomes} == {"passed"}
        assert status == 0
        assert "| sm_90 5M plan E=1 A=6 bfloat16 |" in capsys.readouterr().out
    files = list((tmp_path / "out").glob("*.json"))
    assert sorted(len(report.read(f)) for f in files) == [5, 6]
    assert len(list((tmp_path / "out" / "logs" / "rest").glob("compile-*.log"))) == 4
    assert predicted.file_beside(files[0]).read_text().startswith("Predicted from machine code by Triton 3.")


def test_a_call_ends_in_time_and_keeps_what_it_has(
    rehearsed: Callable[..., tuple[int, list[Outcome]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    status, outcomes = rehearsed("minutes=0.13", planner="; import time; time.sleep(30)", update="; 1 / 0")
    assert time.monotonic() - start < 9
    assert status == 1
    ends = {o.part.name: o.status for o in outcomes}
    assert ends["tests"].startswith("passed: ")
    assert ends["planner"] == "too late"  # having measured
    said = capsys.readouterr().out
    (file,) = (tmp_path / "out").glob("*.json")
    assert len(report.read(file)) >= 1
    assert "results: " in said
    # What was used up is missing at the end.
    status, outcomes = rehearsed("rest", "minutes=0.035", **{"compile-rest": "; import time; time.sleep(30)"})
    assert outcomes[-1].status == "not run: no time was left"
    assert "large                not run: no time was left" in capsys.readouterr().out


CALL = """
import sys
from tdmpc2_fast.benchmarks.gpu import call
from tdmpc2_fast.benchmarks.gpu.processes import Part
code = "print('3 passed in 0.1s', flush=True); import time; time.sleep(60)"
call.why_not_here = list
call.parts = lambda *_: [Part(name, ((sys.executable, "-c", code),), 60) for name in ("one", "two")]
sys.exit(call.main([f"out={sys.argv[1]}"]))
"""


def test_a_call_that_is_to_end_says_what_it_has(tmp_path: Path) -> None:
    words = [sys.executable, "-c", CALL, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        log = tmp_path / "logs" / "first" / "one-0.log"
        while not (log.exists() and log.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        said = process.communicate()[0]
    assert process.returncode == 1
    assert "one                  too late: 3 passed " in said
    assert "two                  not run: interrupted " in said
    assert "nothing was measured" in said


def test_predictions_stand_beside_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {r.work: r for r in static.read(sorted(static.FOLDER.glob("*.json"))[-1])}
    plan = known[static.Work(90, 5, 1, 6, "tf32")]
    l2_us = plan.l2_mb / 5.5
    ours = dict(variant="triton", product="triton", precision="tf32", p50=1.0, **H200)
    rows = [
        row(**ours),
        row(**ours | dict(suite="update", envs=None, batch=256)),
        row(**ours | dict(suite="update", envs=None, batch=1024)),  # of no published size
        row(**ours | dict(variant="torch")),
        row(**ours | dict(gpu="NVIDIA L4")),
        row(**ours | dict(p50=None)),
    ]
    page = predicted.page(rows)
    lines = [line for line in page.splitlines() if line.startswith("| sm_90")]
    assert [line.split(" | ")[0] for line in lines] == ["| sm_90 5M plan E=1 A=6 tf32", "| sm_90 5M update A=6 tf32"]
    cells = [f"{plan.launches}", f"{plan.slots_us:.0f}", f"{l2_us:.0f} ({plan.l2_mb / 1e3:.2f} GB)", "1000"]
    assert lines[0].split(" | ")[1:] == [*cells, f"{1000 / max(plan.slots_us, l2_us):.2f}x |"]
    assert "there is no table of Triton 3.6.0" in page
    assert predicted.page(rows[3:]) == ""
    monkeypatch.setattr(static, "FOLDER", tmp_path)
    assert predicted.page(rows) == ""
    for version in ("3.4.0", "3.7.1", "4.0.0"):
        (tmp_path / f"triton-{version}.json").write_text(json.dumps({"rows": []}))
    names = {v: predicted.nearest(v) for v in ("3.5.0", "3.6.0", "3.7.1", "5.0")}
    assert [f.stem.removeprefix("triton-") for f in names.values() if f] == ["3.4.0", "3.7.1", "3.7.1", "4.0.0"]
