"""Benchmarks: what is shown and what is refused, and every suite's set-up in small."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, tiny_config
from oracle import QUIET

from tdmpc2_fast.benchmarks import compare, report, run
from tdmpc2_fast.benchmarks.baselines import jax_port, official
from tdmpc2_fast.benchmarks.gpu import ceilings, learning
from tdmpc2_fast.benchmarks.gpu import parts as gpu
from tdmpc2_fast.benchmarks.harness import measure as harness
from tdmpc2_fast.benchmarks.harness import stand_in
from tdmpc2_fast.benchmarks.harness.agents import agent_of
from tdmpc2_fast.benchmarks.harness.machine import Machine, this_machine
from tdmpc2_fast.benchmarks.harness.measure import (
    CannotMeasureError,
    Case,
    Ceilings,
    Gate,
    Row,
    Variant,
    measure,
    quantiles,
)
from tdmpc2_fast.benchmarks.options import Options, parse
from tdmpc2_fast.benchmarks.suites import kernels, loop, planner, regimes, replay, update, update_kernels
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.rng import PlanNoise, generator

RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
AGREES = Gate(0.0, 1.0)


@pytest.fixture(scope="module")
def machine() -> Machine:
    return this_machine(CPU)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Options:
    """Options of models that run in milliseconds, interpreted kernels and all."""
    keys, tiny = Options.keys, {**TINY, "horizon": 2, "iterations": 2}
    monkeypatch.setattr(Options, "keys", lambda self, size, **k: keys(self, size, **{**tiny, **k}))
    return Options(size=(1,), actions=(2,), batch=(8,), device="cpu", compiled=False, repeats=3)


def sleeping(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def rows_of(case: Case, machine: Machine, ceilings: Ceilings | None = None) -> dict[str, Row]:
    return {r.variant: r for r in measure(case, machine, 5, 10.0, 0, ceilings or Ceilings())}


def test_ratios_are_of_the_product_and_count_calls_and_executions(machine: Machine) -> None:
    variants = {
        "ours": Variant(sleeping(0.004), inner=2),
        "slow": Variant(sleeping(0.012), gate=lambda: AGREES),
        "for one": Variant(sleeping(0.004), calls=8, gate=lambda: AGREES),
    }
    case = Case("suite", "work", variants, results=8, unit="plans", gflop=4.0, mbyte=2.0)
    rows = rows_of(case, machine, Ceilings({"float32": 4.0}, 10.0))
    ours, slow, one = rows["ours"], rows["slow"], rows["for one"]
    assert ours.ratio is None
    assert ours.gate == ""
    assert ours.p50 == pytest.approx(2, rel=0.3)
    assert slow.ratio == pytest.approx(6, rel=0.3)
    assert one.ratio == pytest.approx(16, rel=0.3)
    assert report.cells(one)[2].startswith("8 x ")
    assert slow.ratio_p20 == pytest.approx(6, rel=0.3)
    assert slow.ratio_p20 <= slow.ratio_p80  # type: ignore[operator]
    assert ours.per_second == pytest.approx(4000, rel=0.3)
    assert ours.tflops == pytest.approx(2, rel=0.3)
    assert ours.compute_share == pytest.approx(0.5, rel=0.3)
    assert ours.memory_share == pytest.approx(0.1, rel=0.3)
    assert ours.repeats == len(ours.samples) == 5


def test_a_ratio_is_that_of_medians_and_its_spread_that_of_rounds() -> None:
    ours, theirs = Variant(sleeping(0)), Variant(sleeping(0), calls=2)
    found = harness._against(theirs, [9.0, 3.0, 6.0, 5.0, 7.0], [3.0, 1.0, 4.0, 2.0, 2.0], ours, AGREES)
    assert found["ratio"] == pytest.approx(2 * 6 / 2)
    assert (found["ratio_p20"], found["ratio_p80"]) == pytest.approx(quantiles([6.0, 6.0, 3.0, 5.0, 7.0])[0:3:2])


@pytest.mark.parametrize("error", [2.0, math.nan, math.inf])
def test_no_ratio_is_shown_where_results_differ(error: float, machine: Machine) -> None:
    variants = {"ours": Variant(sleeping(0.001)), "other": Variant(sleeping(0.001), gate=lambda: Gate(error, 1.0))}
    row = rows_of(Case("planner", "plan", variants), machine)["other"]
    assert row.gate == "failed"
    assert row.ratio is row.ratio_p20 is row.ratio_p80 is None
    assert row.p50 is not None
    assert "not shown: results differ" in report.text_table([row])
    assert "x (" not in report.cells(row)[report.HEAD.index("ratio")]


def test_a_baseline_that_breaks_says_why_and_the_others_are_measured(machine: Machine) -> None:
    def broken() -> None:
        raise RuntimeError("no such thing\nand more")

    def raises() -> Gate:
        raise CannotMeasureError("needs a package")

    variants = {
        "ours": Variant(sleeping(0.001)),
        "broken": Variant(broken),
        "refused": Variant(sleeping(0.001), gate=raises),
        "fine": Variant(sleeping(0.001), gate=lambda: AGREES),
    }
    rows = rows_of(Case("suite", "work", variants, {"absent": "not asked for"}), machine)
    assert rows["broken"].missing == "RuntimeError: no such thing"
    assert rows["refused"].missing == "needs a package"
    assert rows["absent"].missing == "not asked for"
    assert rows["fine"].ratio is not None
    assert "not measured: needs a package" in report.text_table(list(rows.values()))
    with pytest.raises(RuntimeError, match="no such thing"):
        rows_of(Case("suite", "work", {"broken": Variant(broken)}), machine)


def test_rounds_take_turns_in_both_orders_and_end_with_the_budget(machine: Machine) -> None:
    seen: list[str] = []

    def noted(name: str) -> Callable[[], None]:
        return lambda: (seen.append(name), time.sleep(0.01))[0]

    case = Case("suite", "work", {n: Variant(noted(n)) for n in "ab"})
    rows = measure(case, machine, 1000, 0.2, 0, Ceilings())
    assert 3 <= rows[0].repeats < 30
    assert "".join(seen[-8:]) in ("abbaabba", "baabbaab")


def test_the_worst_gate_wins_and_nan_is_the_worst() -> None:
    near, far, nan = Gate(0.9, 1.0), Gate(0.2, 0.1), Gate(math.nan, 1.0)
    assert Gate.worst(near, far) is far
    assert Gate.worst(nan, far) is nan
    assert Gate.worst(far, nan) is nan
    assert not Gate.worst(AGREES, Gate(1.0, 0)).passed
    assert not Gate.of_metrics({"a": math.nan}, {"a": 1.0}, 1e9).passed
    assert not Gate.of_metrics({}, {"a": 1.0}, 1e9).passed
    assert Gate.of_metrics({"a": 1.1, "b": 5.0}, {"a": 1.0}, 1.0).error == pytest.approx(0.1)


def test_quantiles_are_torchs() -> None:
    x = torch.rand(37).tolist()
    wanted = torch.tensor(x).quantile(torch.tensor([0.2, 0.5, 0.8, 0.99])).tolist()
    assert quantiles(x) == pytest.approx(wanted, rel=1e-5)


CASES = {
    "planner": lambda o: planner.case(o, 1, 2, 2, "float32"),
    "planner, tf32": lambda o: planner.case(o, 1, 2, 1, "tf32"),
    "planner, bfloat16": lambda o: planner.case(o, 1, 2, 2, "bfloat16"),
    "update": lambda o: update.case(o, 1, 2, 8, "float32"),
    "add": replay.add,
    "sample": lambda o: replay.sample(o, 8),
}


@QUIET
@pytest.mark.parametrize("name", CASES)
def test_every_suite_is_set_up_and_its_gate_is_green(name: str, small: Options) -> None:
    case = CASES[name](small)
    product, *baselines = case.variants
    assert product == ("triton" if case.suite in ("planner", "update") else "torch")
    assert baselines
    assert not case.missing
    for variant in case.variants.values():
        variant.run()
    for baseline in baselines:
        gate = case.variants[baseline].gate
        assert gate is not None
        found = gate()
        assert found.passed, (baseline, found)
    if case.suite == "planner":
        assert case.variants[product].launches > 20  # type: ignore[operator]
        assert ("torch" in baselines) == ("bfloat16" not in name)


def test_the_loop_is_measured_and_split(small: Options, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "_DECISIONS", 12)
    monkeypatch.setattr(loop, "backend_of", lambda options: "torch")
    case = loop.case(dataclasses.replace(small, task=stand_in.NAME), 1, "float32")
    rows = rows_of(case, machine)
    assert list(rows) == ["torch", "reference"]
    assert rows["reference"].gate == "passed"
    for found in rows.values():
        assert set(found.split) == {"plan", "update", "environment", "copy", "other"}
        assert found.split["plan"] > 0 < found.split["update"]


@QUIET
@pytest.mark.parametrize("op", kernels.OPS)
@pytest.mark.parametrize(("precision", "throughput"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_every_kernel_benchmark_compares_what_it_should(
    op: str, precision: str, throughput: bool, small: Options, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "activates_once", lambda rows: throughput)
    case = getattr(kernels._Bench(small, 1, 2, precision), op)()
    rows = rows_of(case, machine)
    assert list(rows) == ["triton", "reference"]
    assert rows["reference"].gate == "passed", rows["reference"].gate_error
    assert case.name == "plan noise" or rows["reference"].gate_error < 0.02  # type: ignore[operator]


@QUIET
@pytest.mark.parametrize("op", update_kernels.OPS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_benchmark_of_an_update_op_compares_gradients(
    op: str, precision: str, small: Options, machine: Machine
) -> None:
    case = getattr(update_kernels._Bench(small, 1, 8, precision), op)()
    rows = rows_of(case, machine)
    assert list(rows) == ["triton", "reference"]
    assert rows["reference"].gate == "passed", rows["reference"].gate_error
    assert rows["reference"].batch == 8


@QUIET
def test_regimes_are_told_apart_and_agree(small: Options) -> None:
    options = dataclasses.replace(small, precision=("tf32",))
    plan, learn = (make() for make in [*regimes.plan_cases(options), *regimes.update_cases(options)])
    assert list(plan.variants) == ["chosen", "latency", "throughput"]
    assert "allowed: multiples of 16" in plan.missing["persistent"]
    assert list(learn.variants) == ["chosen", "latency", "throughput"]
    for case in (plan, learn):
        for name, variant in list(case.variants.items())[1:]:
            variant.run()
            assert variant.gate is not None
            assert variant.gate().passed, (case.suite, name)
    chosen, latency, throughput = (v.launches for v in plan.variants.values())
    assert chosen == latency < throughput  # type: ignore[operator]


@QUIET
def test_the_persistent_regime_is_compared_where_it_differs(small: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Options.keys
    wide = dict(latent_dim=32, mlp_dim=32, enc_dim=32)
    monkeypatch.setattr(Options, "keys", lambda self, size, **k: keys(self, size, **{**wide, **k}))
    case = regimes.plan_case(small, 1, 2, 1, "tf32")
    persistent = case.variants["persistent"]
    assert persistent.launches < case.variants["chosen"].launches  # type: ignore[operator]
    persistent.run()
    assert persistent.gate is not None
    assert persistent.gate().passed
    kernel = "tdmpc2_fast.kernels.experiments.persistent.PersistentRollout.run"
    with monkeypatch.context() as patched:
        patched.setattr(kernel, lambda self, iteration: None)
        assert not persistent.gate().passed


def test_regimes_of_torch_are_refused(small: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regimes, "backend_of", lambda options: "torch")
    for make in [*regimes.plan_cases(small), *regimes.update_cases(small)]:
        with pytest.raises(CannotMeasureError, match="backend=torch was asked for"):
            make()


def test_a_wrong_plan_or_update_turns_the_gate_red(small: Options, machine: Machine) -> None:
    agent = agent_of(small.config(1, 2, backend="torch", precision="float32"))
    other = agent_of(small.config(1, 2, backend="torch", precision="float32", seed=3))
    noise = PlanNoise.draw(agent.cfg, 1, generator(0, "benchmark", CPU))
    obs = torch.randn(1, 24)
    assert not planner.plan_gate(agent, planner.reference_of(other), 1, noise, obs).passed
    assert planner.plan_gate(agent, planner.reference_of(agent), 1, noise, obs).passed
    case = update.case(small, 1, 2, 8, "float32")
    reference = case.variants["reference"]
    reference.run()
    assert reference.gate is not None
    assert reference.gate().error < 1e-3
    # A gate that was never given a result is red.
    fresh = update.case(small, 1, 2, 8, "float32").variants["reference"]
    assert fresh.gate is not None
    assert not fresh.gate().passed


def test_the_command_measures_prints_and_writes(
    small: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    ],
)
def test_bad_words_are_answered_before_anything_is_measured(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(words) == 2
    assert message in capsys.readouterr().err


def test_precisions_of_a_gpu_are_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="got 'tf32', allowed on a CPU: float32"):
        parse(["precision=tf32", "device=cpu"])
    assert parse(["device=cpu"]).precisions == ("float32",)


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


def test_a_time_line_gives_launches_and_idle_time(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    def event(name: str, start: float, end: float) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=SimpleNamespace(name="CUDA"), time_range=SimpleNamespace(start=start, end=end)
        )

    events = [event("kernel", 0, 400), event("kernel", 300, 600), event("Memcpy HtoD", 1000, 1100)]

    class Profile:
        def __init__(self, **_: object) -> None:
            pass

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def events(self) -> list[SimpleNamespace]:
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(harness, "synchronise", lambda device: None)
    case = Case("loop", "task", {"ours": Variant(sleeping(0.0)), "other": Variant(sleeping(0.0), launches=7)})
    rows = [row(variant="ours", p50=2.0, split={"plan": 1.0}), row(variant="other", launches=7)]
    ours, other = harness.profiled(case, rows, torch.device("cuda"))
    assert ours.launches == 2
    assert ours.split == {"plan": 1.0, "idle": 1.3}
    assert other.launches == 7
    events.clear()
    assert harness.profiled(case, rows, torch.device("cuda")) == rows
    assert harness.profiled(case, rows, CPU) == rows


def test_the_suites_run_under_pytest_benchmark() -> None:
    words = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"BENCH": "replay size=1 device=cpu"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "4 passed" in done.stdout


def test_a_failed_gate_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {"torch": Variant(sleeping(0.001)), "reference": Variant(sleeping(0.001), gate=lambda: Gate(0.5, 0.1))}
    monkeypatch.setitem(run.SUITES, "planner", lambda options: iter([lambda: Case("planner", "plan", variants)]))
    assert run.main(["planner", "repeats=3", "threads=1", "device=cpu", f"out={tmp_path}"]) == 1
    assert "error: planner plan: torch and reference differ by 0.5, allowed 0.1" in capsys.readouterr().err


def row(**changes: Any) -> Row:
    facts = dict(device="cpu", gpu="", driver="", cpu="a cpu", threads=2, python="3", torch_version="2", cuda="")
    facts |= dict(triton_version="", version="0", commit="abc", date="2026-01-02T03:04:05+00:00")
    values: dict[str, Any] = dict.fromkeys(f.name for f in dataclasses.fields(Row))
    values |= dict(schema=1, suite="planner", case="plan", variant="torch", product="torch", precision="float32")
    values |= dict(size=5, envs=1, actions=6, shape="", seed=0, repeats=20, samples=[], unit="plans", gate="", calls=1)
    values |= dict(missing="", split={}, p20=98.0, p50=100.0, p80=102.0, p99=103.0)
    return Row(**(values | facts | changes))


def slower(by: float, **changes: Any) -> Row:
    return row(p20=98 * by, p50=100 * by, p80=102 * by, p99=103 * by, **changes)


def test_only_what_is_beyond_noise_counts_as_a_change() -> None:
    def real(new: Row, old: Row | None = None) -> list[float]:
        return [c.factor for c in compare.compare([old or row()], [new]) if c.real]

    assert real(row()) == []
    assert real(slower(1.02)) == []
    assert real(slower(1.2)) == [pytest.approx(1.2)]
    assert real(slower(0.8)) == [pytest.approx(0.8)]
    noisy = dict(p20=60.0, p80=140.0)
    assert real(row(p50=115.0, **noisy), row(**noisy)) == []
    assert real(slower(1.5, envs=4)) == []


def test_different_machines_are_compared_by_ratios() -> None:
    def pair(ratio: float, **where: Any) -> list[Row]:
        rows = [slower(5.0, **where), slower(5.0 * ratio, variant="reference", **where)]
        spread = dict(ratio=ratio, ratio_p20=ratio * 0.99, ratio_p80=ratio * 1.01)
        return [rows[0], dataclasses.replace(rows[1], **spread)]

    here, there = pair(2.0), pair(1.5, cpu="another")
    (change,) = compare.compare(here, there)
    assert change.real
    assert change.factor == pytest.approx(2 / 1.5)
    assert "torch against reference: 1.33x slower" in compare.describe(change)
    assert not any(c.real for c in compare.compare(here, pair(2.01, cpu="another")))
    (change,) = compare.compare(here, pair(1.5), by_ratios=True)
    assert change.factor == pytest.approx(2 / 1.5)


def test_compare_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (tmp_path / f"{x}.json" for x in "abc")
    report.write(a, [row()])
    report.write(b, [slower(1.5)])
    assert compare.main([str(a), str(a)]) == 0
    assert compare.main([str(a), str(b)]) == 1
    assert "plan, 5M, torch: 1.50x slower" in capsys.readouterr().out
    assert compare.main([str(b), str(a)]) == 0
    c.write_text("{}")
    assert compare.main([str(a), str(c)]) == 2
    c.write_text(json.dumps([{"schema": 99}]))
    assert compare.main([str(a), str(c)]) == 2
    assert "schema [99], allowed: 1" in capsys.readouterr().err
    assert compare.main([str(a)]) == 2


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    rows = [row(), slower(2.0, split={"plan": 1.5}, samples=[1.0, 2.0])]
    report.write(path, rows)
    assert report.read(path) == rows
    assert len(path.read_text().splitlines()) == 4


def test_pages_are_made_from_the_committed_files() -> None:
    files = sorted(RESULTS.glob("*.json"))
    assert files
    assert (ROOT / "benchmarks" / "RESULTS.md").read_text() == report.results_page(files)
    readme, shown = (ROOT / "README.md").read_text(), report.shown_in_readme(files)
    assert shown is not None
    assert report.with_table(readme, report.readme_table(report.read(shown))) == readme
    with pytest.raises(ValueError, match="got 0 tables"):
        report.with_table("no marks", "table")


def test_the_readme_shows_a_gpu_before_a_newer_cpu(tmp_path: Path) -> None:
    for name, changes in {
        "old": dict(gpu="NVIDIA H100"),
        "new": dict(date="2027-01-01"),
        "newest": dict(suite="replay", date="2028-01-01"),
    }.items():
        report.write(tmp_path / f"{name}.json", [row(**changes)])
    files = list(tmp_path.glob("*.json"))
    found = report.shown_in_readme(files)
    assert found is not None
    assert found.stem == "old"
    assert report.shown_in_readme([tmp_path / "newest.json"]) is None
    assert report.results_page(files).index("newest.json") < report.results_page(files).index("old.json")


def test_ceilings_are_the_fastest_rounds() -> None:
    rows = [row(suite="ceilings", gflop=20.0, samples=[100.0, 50.0]), row(suite="ceilings", mbyte=8.0, samples=[4.0])]
    found = ceilings.reached([*rows, row(gflop=1e9, samples=[1.0])])
    assert found.tflops == {"float32": 0.4}
    assert found.gbs == 2.0


def test_a_picture_is_drawn_where_there_is_something_to_show(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tdmpc2_fast.benchmarks.plots import draw

    ratios = dict(variant="reference", ratio=2.0, ratio_p20=1.9, ratio_p80=2.1)
    rows = [slower(e**0.5, envs=e) for e in (1, 4, 16)] + [slower(2.0, **ratios)]
    rows += [row(suite="ceilings", mbyte=3000.0, samples=[100.0]), row(suite="ceilings", gflop=20.0, samples=[100.0])]
    rows += [row(tflops=0.1, gflop=40.0, mbyte=20.0)]
    assert draw(rows, tmp_path / "x.png") == str(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert "nothing in it" in draw([row(suite="replay")], tmp_path / "y.png")


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
    wanted = {p.name for p in (ROOT / "tests").glob("test_*") if p.name.endswith(("_kernel.py", "_kernels.py"))}
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


FAKE = {
    "tdmpc2.py": "from common import helper\nDEVICE = 'cuda:0'\nADAM = dict(capturable=True)\nVALUE = helper.value()\n",
    "common/__init__.py": "",
    "common/helper.py": "def value():\n    return 'cuda:0'\n",
}


def test_official_sources_are_loaded_for_the_device_and_leave_nothing_behind(tmp_path: Path) -> None:
    for name, text in FAKE.items():
        path = tmp_path / "tdmpc2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = set(sys.modules)
    module = official.load_official(str(tmp_path), CPU)
    assert module.DEVICE == module.VALUE == "cpu"
    assert dict(capturable=False) == module.ADAM
    assert not {m for m in set(sys.modules) - before if m.split(".")[0] in ("tdmpc2", "common")}
    assert sys.meta_path[0].__class__.__name__ != "_Sources"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["__init__.py", "helper.py", "tdmpc2.py"]
    (tmp_path / "tdmpc2" / "tdmpc2.py").write_text("import no_such_package_anywhere\n")
    with pytest.raises(CannotMeasureError, match="needs no_such_package_anywhere, which is not installed"):
        official.load_official(str(tmp_path), CPU)


def test_draws_are_handed_out_in_order_and_checked() -> None:
    draws = [torch.full((2,), float(i)) for i in range(3)]
    with official._Draws(iter(draws)):
        assert torch.randn_like(torch.zeros(2))[0] == 0
        assert torch.empty(2).exponential_()[0] == 1
        with pytest.raises(RuntimeError, match=r"draws \(3,\), expected \(2,\)"):
            torch.randn_like(torch.zeros(3))
    cfg = tiny_config()
    noise = PlanNoise.draw(cfg, 1, generator(0, "x", CPU))
    count = cfg.horizon + 3 * cfg.effective_iterations + 2
    assert len(list(official.plan_draws(noise))) == count


@pytest.mark.skipif("OFFICIAL" not in os.environ, reason="OFFICIAL names no checkout of the official code")
def test_the_official_code_plans_and_learns_the_same() -> None:
    agent = agent_of(tiny_config(simnorm_dim=8))
    obs = torch.randn(5)
    noise = PlanNoise.draw(agent.cfg, 1, generator(0, "x", CPU))
    assert official.official_plan(os.environ["OFFICIAL"], agent, obs, noise)[1]().passed
    from tdmpc2_fast.benchmarks.harness.agents import batch_of

    gate = official.official_update(os.environ["OFFICIAL"], agent, batch_of(agent.cfg, CPU)).gate
    assert gate is not None
    assert gate().passed


def test_the_jax_port_says_what_it_lacks(tmp_path: Path) -> None:
    agent = agent_of(tiny_config())
    with pytest.raises(CannotMeasureError, match="one width"):
        jax_port.plan_variant(str(tmp_path), agent, torch.zeros(1, 5))
    square = agent_of(tiny_config(mlp_dim=16))
    with pytest.raises(CannotMeasureError, match=r"the JAX port needs \w+.*, which is not installed"):
        jax_port.plan_variant(str(tmp_path), square, torch.zeros(1, 5))
    assert str(tmp_path) not in sys.path


@pytest.mark.skipif("JAX_PORT" not in os.environ, reason="JAX_PORT names no checkout of the JAX port")
def test_the_jax_port_has_the_same_model() -> None:
    agent = agent_of(tiny_config(mlp_dim=16, dropout=0.0))
    variant = jax_port.plan_variant(os.environ["JAX_PORT"], agent, torch.randn(3, 5))
    variant.run()
    assert variant.gate is not None
    assert variant.gate().passed


def test_the_list_of_episodes_follows_the_buffers_law(small: Options) -> None:
    cfg = small.config(1, 2)
    plain = replay.EpisodeList(cfg, CPU)
    plain.add(
        dict(obs=torch.zeros(9, 24), action=torch.zeros(9, 2), reward=torch.arange(9.0), terminated=torch.zeros(9))
    )
    batch = plain.sample()
    assert batch.reward.shape == (cfg.horizon, cfg.batch_size, 1)
    assert (batch.reward[1:] - batch.reward[:-1] == 1).all()
    assert SimpleNamespace(**batch._asdict()).task is None
