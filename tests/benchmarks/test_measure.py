"""Measuring: turns, ratios, gates and what is left out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from bench_rows import AGREES, CPU, machine, row, rows_of, sleeping

from tdmpc2_fast.benchmarks import report
from tdmpc2_fast.benchmarks.harness import measure as harness
from tdmpc2_fast.benchmarks.harness.measure import (
    CannotMeasureError,
    Case,
    Ceilings,
    Gate,
    Variant,
    measure,
    quantiles,
)


def test_ratios_are_of_the_product_and_count_calls_and_executions() -> None:
    variants = {
        "ours": Variant(sleeping(0.004), inner=2),
        "slow": Variant(sleeping(0.012), gate=lambda: AGREES),
        "for one": Variant(sleeping(0.004), calls=8, gate=lambda: AGREES),
    }
    case = Case("suite", "work", variants, results=8, unit="plans", gflop=4.0, mbyte=2.0)
    rows = rows_of(case, Ceilings({"float32": 4.0}, 10.0))
    ours, slow, one = rows["ours"], rows["slow"], rows["for one"]
    assert ours.ratio is None
    assert ours.gate == ""
    assert ours.p50 == pytest.approx(2, rel=0.3)
    assert slow.ratio == pytest.approx(6, rel=0.3)
    assert one.ratio == pytest.approx(16, rel=0.3)
    assert report.cells(one)["p50 ms"].startswith("8 x ")
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
def test_no_ratio_is_shown_where_results_differ(error: float) -> None:
    variants = {"ours": Variant(sleeping(0.001)), "other": Variant(sleeping(0.001), gate=lambda: Gate(error, 1.0))}
    row = rows_of(Case("planner", "plan", variants))["other"]
    assert row.gate == "failed"
    assert row.ratio is row.ratio_p20 is row.ratio_p80 is None
    assert row.p50 is not None
    assert "not shown: results differ" in report.text_table([row])
    assert "x (" not in report.cells(row)["ratio"]


def test_a_baseline_that_breaks_says_why_and_the_others_are_measured() -> None:
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
    rows = rows_of(Case("suite", "work", variants, {"absent": "not asked for"}))
    assert rows["broken"].missing == "RuntimeError: no such thing"
    assert rows["refused"].missing == "needs a package"
    assert rows["absent"].missing == "not asked for"
    assert rows["fine"].ratio is not None
    assert "not measured: needs a package" in report.text_table(list(rows.values()))
    with pytest.raises(RuntimeError, match="no such thing"):
        rows_of(Case("suite", "work", {"broken": Variant(broken)}))


def test_rounds_take_turns_in_both_orders_and_end_with_the_budget() -> None:
    seen: list[str] = []

    def noted(name: str) -> Callable[[], None]:
        return lambda: (seen.append(name), time.sleep(0.01))[0]

    case = Case("suite", "work", {n: Variant(noted(n)) for n in "ab"})
    rows = measure(case, machine(), 1000, 0.2, 0, Ceilings())
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
    assert Gate.of_metrics({"a": 0.02}, {"a": 0.001}, 1.0).error == pytest.approx(1.9)


@pytest.mark.parametrize(("wanted", "error"), [(-0.12, 0.01), (-4.0, 0.0025)])
def test_a_gate_judges_an_entropy_near_0_by_its_difference(wanted: float, error: float) -> None:
    ours, theirs = {"pi_scaled_entropy": wanted + 0.01}, {"pi_scaled_entropy": wanted}
    assert Gate.of_metrics(ours, theirs, 1.0).error == pytest.approx(error)


def test_quantiles_are_torchs() -> None:
    x = torch.rand(37).tolist()
    wanted = torch.tensor(x).quantile(torch.tensor([0.2, 0.5, 0.8, 0.99])).tolist()
    assert quantiles(x) == pytest.approx(wanted, rel=1e-5)


def test_a_time_line_gives_launches_and_idle_time(monkeypatch: pytest.MonkeyPatch) -> None:
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
