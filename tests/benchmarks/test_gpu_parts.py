"""`make gpu`: its parts, what becomes of them, and a machine that cannot run them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from bench_rows import row
from conftest import ROOT

from tdmpc2_fast.benchmarks import report, run
from tdmpc2_fast.benchmarks.gpu import learning
from tdmpc2_fast.benchmarks.gpu import parts as gpu
from tdmpc2_fast.benchmarks.options import parse


def test_make_gpu_without_a_gpu_says_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2
    said = capsys.readouterr().err
    assert "kernels cannot run" in said
    assert "make bench" in said
    assert gpu.main(["nothing"]) == 2
    assert "unknown part 'nothing', allowed: compile, tests, planner" in capsys.readouterr().err
    assert gpu.main(["minutes=x"]) == 2


def test_parts_of_make_gpu_ask_for_what_there_is() -> None:
    all_parts = gpu.parts()
    measured = [c for p in all_parts for c in p.commands if "tdmpc2_fast.benchmarks.run" in c]
    assert len(measured) > 10
    for command in measured:
        words = command[command.index("tdmpc2_fast.benchmarks.run") + 1 :]
        assert run._suites([w for w in words if "=" not in w])
        assert parse([w for w in words if "=" in w]).threads == gpu.THREADS
    tests = next(p for p in all_parts if p.name == "tests")
    wanted = {p.name for p in (ROOT / "tests").rglob("test_*") if p.name.endswith(("_kernel.py", "_kernels.py"))}
    assert {"test_layer_kernels.py", "test_mppi_kernel.py"} < wanted
    shards = {c[1] for c in tests.commands}
    assert shards == {f"TEST_SHARD={i}/{len(shards)}" for i in range(len(shards))}
    for command in tests.commands:
        assert {Path(w).name for w in command if w.startswith("tests/")} == wanted | {"test_gpu.py"}
    learning_runs = [c for p in gpu.parts(wheels=True) if p.name.startswith("learning-") for c in p.commands]
    assert len(learning_runs) == 8
    for command in learning_runs:
        words = [
            w.replace("{seconds}", "9") for w in command[command.index("tdmpc2_fast.benchmarks.gpu.learning") + 1 :]
        ]
        assert learning.options(words)[0] == 9
    file, name = gpu.SANITIZED.split("::")
    assert f"def {name}(" in (ROOT / file).read_text()


def test_a_part_whose_tests_were_all_skipped_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LOGS", tmp_path)

    def closing(line: str) -> gpu.Part:
        return gpu.Part("tests", ((sys.executable, "-c", f"print({line!r})"),) * 2, 20)

    assert gpu.run(closing("7 passed, 2 skipped in 3.05s"), 20).status == "passed: 14 passed, 4 skipped"
    assert gpu.run(closing("2 skipped, 9 deselected in 0.05s"), 20).status == "failed: 4 skipped"
    assert gpu.run(closing("nothing"), 20).status == "passed"


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")

    def part(name: str, code: str) -> gpu.Part:
        return gpu.Part(name, ((sys.executable, "-c", code),), 20)

    fine = part("fine", "print('well')")
    ends_itself = gpu.Part("learning", ((sys.executable, "-c", "print('after {seconds} s')"),), 20)
    outcomes = [
        gpu.run(ends_itself, 100),
        gpu.run(part("hangs", "import time; time.sleep(60)"), 1.0),
        gpu.run(part("fails", "raise SystemExit('it broke')"), 20),
        gpu.run(fine, 20),
    ]
    assert [o.status for o in outcomes] == ["passed", "too late", "failed", "passed"]
    assert outcomes[1].seconds < 10
    (tmp_path / "logs" / "fine").mkdir()
    report.write(tmp_path / "logs" / "fine" / "x.json", [row(gpu="NVIDIA H200", driver="1"), row(suite="replay")])
    assert gpu.finish(outcomes, tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "it broke" in said
    assert "\nafter 75 s\n" in said
    assert "planner: plan, 5M, float32: torch 100 ms (p99 103)\n" in said
    assert len(said) < 10_000
    (path,) = (tmp_path / "out").glob("h200-2026-01-02-abc.json")
    assert len(report.read(path)) == 2
