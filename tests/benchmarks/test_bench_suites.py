"""Every suite's set-up in small, and its gates: green for the product, red for what computes something else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_rows import CPU, rows_of
from conftest import TINY, tiny_config, tiny_multitask
from oracle import QUIET

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.benchmarks.harness import agents, stand_in
from tdmpc2_fast.benchmarks.harness.agents import agent_of
from tdmpc2_fast.benchmarks.harness.measure import CannotMeasureError
from tdmpc2_fast.benchmarks.options import OBS_DIM, Options, parse
from tdmpc2_fast.benchmarks.suites import export, kernels, loop, planner, regimes, replay, update, update_kernels
from tdmpc2_fast.errors import CheckpointError
from tdmpc2_fast.rng import PlanNoise, generator


def set_keys(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    keys = Options.keys
    monkeypatch.setattr(Options, "keys", lambda self, size, **k: keys(self, size, **{**values, **k}))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Options:
    """Options of models that run in milliseconds, interpreted kernels and all."""
    set_keys(monkeypatch, **TINY, horizon=2, iterations=2)
    return Options(size=(1,), actions=(2,), batch=(8,), device="cpu", compiled=False, repeats=3)


CASES = {
    "planner": lambda o: planner.case(o, 1, 2, 2, "float32"),
    "planner, tf32": lambda o: planner.case(o, 1, 2, 1, "tf32"),
    "planner, bfloat16": lambda o: planner.case(o, 1, 2, 2, "bfloat16"),
    "update": lambda o: update.case(o, 1, 2, 8, "float32"),
    "add": replay.add,
    "sample": lambda o: replay.sample(o, 8),
    "sample pixels": lambda o: replay.sample_pixels(o, 8),
}


@QUIET
@pytest.mark.parametrize("name", CASES)
def test_every_suite_is_set_up_and_its_gate_is_green(
    name: str, small: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "planner" in name:
        set_keys(monkeypatch, horizon=1)
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


@QUIET
def test_a_plan_is_measured_with_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    stand_in.install(2)
    few = dict(horizon=1, iterations=1, num_samples=8, num_elites=4, num_pi_trajs=2)
    cfg = Config(task=stand_in.NAME, model_size=1, **few).with_env({"state": (OBS_DIM,)}, 2, 500)
    agent = TDMPC2(cfg)
    agents.as_trained(agent.model, 5)
    agent.save(tmp_path / "a")
    words = [f"checkpoint={tmp_path / 'a'}", "device=cpu", "compiled=false", "precision=float32", "repeats=3"]
    options = parse(words)
    assert (options.size, options.actions) == ((1,), (2,))
    (make,) = planner.cases(options)
    case = make()
    assert (case.size, case.actions) == (1, 2)
    setting = planner.Setting(options, 1, 2, 3, "float32")
    for ours, theirs in zip(agent.model.parameters(), setting.agent.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert setting.obs.shape == (3, OBS_DIM)
    assert not torch.equal(setting.obs[0], setting.obs[1])
    gate = case.variants["reference"].gate
    assert gate is not None
    assert gate().passed
    assert setting.facts["shape"] == "weights of a"
    for other, what in ((tiny_multitask(), "several tasks"), (tiny_config(OBS_DIM, 2), "dims of its own")):
        TDMPC2(other).save(tmp_path / "other")
        with pytest.raises(CheckpointError, match=f"has {what}, allowed: one of ours, of one task"):
            parse([f"checkpoint={tmp_path / 'other'}"])


def test_the_loop_is_measured_and_split(small: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "_DECISIONS", 12)
    monkeypatch.setattr(loop, "backend_of", lambda options: "torch")
    case = loop.case(dataclasses.replace(small, task=stand_in.NAME), 1, "float32")
    rows = rows_of(case)
    assert list(rows) == ["torch", "reference"]
    assert rows["reference"].gate == "passed"
    for found in rows.values():
        assert set(found.split) == {"plan", "update", "environment", "copy", "other"}
        assert found.split["plan"] > 0 < found.split["update"]


def test_exported_plans_agree_and_a_wrong_one_is_seen(small: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    monkeypatch.setattr(planner, "backend_of", lambda options: "torch")
    set_keys(monkeypatch, iterations=1)
    monkeypatch.setitem(export.RUNTIMES, "wrong", lambda *_: lambda given: [torch.zeros(1, 2), given["prev_mean"] + 1])
    monkeypatch.setitem(export.RUNTIMES, "absent", lambda *_: __import__("no_such_package"))
    case = export.case(small, 1, 2)
    assert case.missing == {"absent": "No module named 'no_such_package'"}
    rows = rows_of(case)
    assert [(name, row.gate) for name, row in rows.items() if not row.missing] == [
        ("torch", ""),
        ("onnxruntime", "passed"),
        ("openvino", "passed"),
        ("torch.export", "passed"),
        ("wrong", "failed"),
    ]
    monkeypatch.setattr(Options, "torch_device", torch.device("cuda"))
    with pytest.raises(CannotMeasureError, match="device=cpu names"):
        export.case(small, 1, 2)


@QUIET
@pytest.mark.parametrize("op", kernels.OPS)
@pytest.mark.parametrize(("precision", "once"), [("float32", True), ("bfloat16", False), ("bfloat16", True)])
def test_every_kernel_benchmark_compares_what_it_should(op: str, precision: str, once: bool, small: Options) -> None:
    bench = kernels._Bench(small, 1, 2, precision)
    bench.once = once
    case = getattr(bench, op)()
    rows = rows_of(case, repeats=1)
    assert list(rows) == ["triton", "reference"]
    assert rows["reference"].gate == "passed", rows["reference"].gate_error
    assert case.name == "plan noise" or rows["reference"].gate_error < 0.02  # type: ignore[operator]


@QUIET
@pytest.mark.parametrize("op", update_kernels.OPS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_benchmark_of_an_update_op_compares_gradients(op: str, precision: str, small: Options) -> None:
    case = getattr(update_kernels._Bench(small, 1, 8, precision), op)()
    rows = rows_of(case, repeats=1)
    assert list(rows) == ["triton", "reference"]
    assert rows["reference"].gate == "passed", rows["reference"].gate_error
    assert rows["reference"].batch == 8


@QUIET
def test_regimes_are_told_apart_and_agree(small: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    set_keys(monkeypatch, horizon=1)
    options = dataclasses.replace(small, precision=("tf32",))
    plan, learn = (make() for make in [*regimes.plan_cases(options), *regimes.update_cases(options)])
    assert list(plan.variants) == list(learn.variants) == ["chosen", "once", "by readers"]
    for case in (plan, learn):
        for name, variant in list(case.variants.items())[1:]:
            assert variant.gate is not None
            assert variant.gate().passed, (case.suite, name)
        variant.run()


def test_regimes_of_torch_are_refused(small: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regimes, "backend_of", lambda options: "torch")
    for make in [*regimes.plan_cases(small), *regimes.update_cases(small)]:
        with pytest.raises(CannotMeasureError, match="backend=torch was asked for"):
            make()


def test_a_wrong_plan_or_update_turns_the_gate_red(small: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "backend_of", lambda options: "torch")
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
