"""The command `bench`: its words, its results file, its exit status; and the suites under pytest-benchmark."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_rows import sleeping
from conftest import ROOT

from tdmpc2_fast.benchmarks import compare, report, run
from tdmpc2_fast.benchmarks.harness.measure import CannotMeasureError, Case, Gate, Variant
from tdmpc2_fast.benchmarks.options import parse
from tdmpc2_fast.benchmarks.suites import ceilings
from tdmpc2_fast.errors import ConfigError

WALKS = ROOT / "examples" / "walker-walk"


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_FLOATS", dict(cpu=2**16))
    monkeypatch.setattr(ceilings, "_SIDE", dict(cpu=64))


def test_the_command_measures_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["replay", "actions=2", "batch=8", "repeats=3", "device=cpu", "threads=1", f"out={tmp_path}"]
    assert run.main(words) == 0
    assert run.main(words) == 0
    shown = capsys.readouterr().out
    assert "sample a batch" in shown
    assert "list of episodes" in shown
    first, second = sorted(tmp_path.glob("*.json"))
    rows = report.read(first)
    assert {r.suite for r in rows} == {"ceilings", "replay"}
    assert rows[0].torch_version == torch.__version__
    assert compare.key(rows[-1]) == compare.key(report.read(second)[-1])
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plannr"], "unknown suite 'plannr'. Did you mean 'planner'"),
        (["siz=5"], "unknown bench key 'siz'. Did you mean 'size'"),
        (["size=7"], "bench key 'size': got 7, allowed: 1, 5, 19, 48, 317"),
        (["size=a"], "bench key 'size': got 'a', allowed: integers separated by commas"),
        (["envs=0"], "bench key 'envs'"),
        (["precision=fp8"], "bench key 'precision': got 'fp8', allowed: float32, tf32, bfloat16"),
        (["repeats=1"], "bench keys 'repeats' and 'budget'"),
        (["compiled=maybe"], "bench key 'compiled': got 'maybe', allowed: true or false"),
        (["official=/nowhere"], "bench key 'official': got '/nowhere', allowed: a checkout"),
        (["jax=/nowhere"], "bench key 'jax': got '/nowhere', allowed: a checkout of tdmpc2-jax"),
        (["device=cuda:99"], "config key 'device'"),
        (["planner", "checkpoint=/nowhere"], "checkpoint '/nowhere': no such file"),
        (["planner", f"checkpoint={WALKS}", "size=1"], "bench key 'size': got (1,), allowed: none beside checkpoint="),
        (["loop", f"checkpoint={WALKS}"], f"bench key 'checkpoint': got '{WALKS}' for loop, allowed: for planner"),
    ],
)
def test_bad_words_are_answered_before_anything_is_measured(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(words) == 2
    assert message in capsys.readouterr().err


def test_precisions_of_a_gpu_are_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="got 'tf32', allowed on this CPU: float32"):
        parse(["precision=tf32", "device=cpu"])
    for instructions, precisions in (("", ("float32",)), ("AMX", ("float32", "bfloat16"))):
        monkeypatch.setattr("tdmpc2_fast.benchmarks.options.bfloat16", lambda said=instructions: said)
        assert parse(["device=cpu"]).precisions == precisions


def test_a_case_that_breaks_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks() -> Case:
        raise RuntimeError("out of memory")

    def refused() -> Case:
        raise CannotMeasureError("needs a GPU")

    def fine() -> Case:
        return Case("planner", "plan", {"torch": Variant(sleeping(0.001))})

    monkeypatch.setitem(run.SUITES, "planner", lambda options: iter([breaks, refused, fine]))
    assert run.main(["planner", "repeats=3", "threads=1", "device=cpu", f"out={tmp_path}"]) == 1
    said = capsys.readouterr()
    assert "error: planner: RuntimeError: out of memory" in said.err
    assert "planner: not measured: needs a GPU" in said.out
    (path,) = tmp_path.glob("*.json")
    assert [r.case for r in report.read(path)][-1] == "plan"


def test_a_failed_gate_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {"torch": Variant(sleeping(0.001)), "reference": Variant(sleeping(0.001), gate=lambda: Gate(0.5, 0.1))}
    monkeypatch.setitem(run.SUITES, "planner", lambda options: iter([lambda: Case("planner", "plan", variants)]))
    assert run.main(["planner", "repeats=3", "threads=1", "device=cpu", f"out={tmp_path}"]) == 1
    assert "error: planner plan: torch and reference differ by 0.5, allowed 0.1" in capsys.readouterr().err


def test_the_suites_run_under_pytest_benchmark() -> None:
    words = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"BENCH": "replay batch=8 device=cpu"}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "6 passed" in done.stdout
