"""Measuring: several ways to do the same work take turns; ratios between different results are refused.

A `Case` is one piece of work; its variants do it in different ways, on the same inputs and weights.
Each variant is called once (compilation), then all are timed in turns, so that drift of the machine
meets them alike. A measurement is one `Row`, whose fields are the schema of every results file.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .machine import Facts, Machine

SCHEMA = 1
_WARM_UP_ROUNDS = 2
_LEAST_ROUNDS = 3
_KEPT_SAMPLES = 400


class CannotMeasureError(Exception):
    """A variant or a suite that cannot run here; the text says why."""


@dataclass(frozen=True)
class Gate:
    """The distance of the product's result from a baseline's, and the largest that is allowed."""

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether a ratio between the two means anything; NaN never passes."""
        return self.error <= self.limit

    @classmethod
    def worst(cls, *gates: Gate) -> Gate:
        """Return the gate nearest to its limit or furthest beyond it; NaN is beyond all."""
        return max(gates, key=lambda g: math.inf if math.isnan(g.error) else g.error / g.limit if g.limit else g.error)

    @classmethod
    def of_metrics(cls, ours: Mapping[str, float], theirs: Mapping[str, float], limit: float) -> Gate:
        """Return the gate of what both report: its largest difference, relative to its size or 0.01.

        An entropy is a mean of logarithms of both signs, 0 by chance; in one a difference is relative already, of a
        density. Its least size is 1.
        """
        both = ours.keys() & theirs.keys()
        errors = [abs(ours[k] - theirs[k]) / max(abs(theirs[k]), 1.0 if "entropy" in k else 0.01) for k in both]
        return cls(max(errors) if all(map(math.isfinite, errors)) and errors else math.nan, limit)

    @classmethod
    def of_values(cls, ours: Tensor, theirs: Tensor, limit: float) -> Gate:
        """Return the gate of two results: the RMS of their difference by the baseline's standard deviation."""
        ours, theirs = ours.double(), theirs.double()
        return cls(float((ours - theirs).square().mean().sqrt() / theirs.std()), limit)


@dataclass(frozen=True)
class Variant:
    """One way to do a case's work.

    Attributes:
        run: does it `inner` times, without waiting for the device.
        calls: how often the product's one call needs this one; E for what plans one environment.
        inner: executions in one `run`.
        gate: compares the product's result with this one's; None for the product itself.
        launches: kernels launched by one execution, where known.
        split: milliseconds of one execution by part, measured apart from the rounds.
        precision: that of its products, where it is not the case's.
    """

    run: Callable[[], object]
    calls: int = 1
    inner: int = 1
    gate: Callable[[], Gate] | None = None
    launches: int | None = None
    split: Callable[[], dict[str, float]] | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Case:
    """Work to measure.

    Attributes:
        suite, name: what it is called in tables.
        variants: by name; the first is the product, all others are baselines.
        missing: what was asked for and cannot be measured, with the reason.
        size, envs, actions, batch, precision, shape: what it was measured at.
        results: what one call of the product yields (actions, updates, ...), `unit` their name.
        gflop, mbyte: what the work needs at least; None where it is not counted.
    """

    suite: str
    name: str
    variants: Mapping[str, Variant]
    missing: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None
    envs: int | None = None
    actions: int | None = None
    batch: int | None = None
    precision: str = "float32"
    shape: str = ""
    results: int = 1
    unit: str = "calls"
    gflop: float | None = None
    mbyte: float | None = None


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches, measured in the same run; None where it was not."""

    tflops: Mapping[str, float] = field(default_factory=dict)  # by precision
    gbs: float | None = None


@dataclass(frozen=True)
class Row(Facts):
    """One measurement, with the machine's facts. Times are of one execution, in ms."""

    schema: int
    suite: str
    case: str
    variant: str
    product: str  # the variant whose ratio to this one is shown
    size: int | None
    envs: int | None
    actions: int | None
    batch: int | None
    precision: str
    shape: str
    seed: int
    repeats: int
    calls: int  # executions that come to one of the product's
    p20: float | None
    p50: float | None
    p80: float | None
    p99: float | None
    samples: list[float]
    first_call_s: float | None  # with what is compiled on the way; a planner captures when it is built
    per_second: float | None
    unit: str
    ratio: float | None  # time of this variant by time of the product; None where the gate is red
    ratio_p20: float | None
    ratio_p80: float | None
    gate: str  # passed, failed; empty for the product and for what has none
    gate_error: float | None
    gate_limit: float | None
    gflop: float | None
    mbyte: float | None
    tflops: float | None
    gbs: float | None
    compute_share: float | None  # of the rate measured for this precision
    memory_share: float | None  # of the bandwidth measured
    launches: int | None
    peak_mb: float | None  # beyond weights, buffers and graphs, which lie there before
    split: dict[str, float]  # ms by part; `idle`: the device's
    missing: str  # why there is no time


_FACTS = tuple(f.name for f in dataclasses.fields(Facts))
COLUMNS = (*(f.name for f in dataclasses.fields(Row) if f.name not in _FACTS), *_FACTS)
"""The schema of a results file: names of its columns, in its order."""


class Lineup:
    """The variants of a case as they are made, and why some cannot be.

    note: stands behind the names of baselines, unless they compute as the product does (`alike`).
    """

    def __init__(self, product: str, variant: Variant, note: str = "") -> None:
        self.variants, self.missing, self._note = {product: variant}, dict[str, str](), note

    def add(self, name: str, variant: Variant, alike: bool = False) -> None:
        """Add a baseline."""
        self.variants[name if alike else name + self._note] = variant

    def attempt(self, name: str, make: Callable[[], Variant], alike: bool = False) -> None:
        """Make a baseline and add it; one that cannot be measured here is missing."""
        try:
            self.add(name, make(), alike)
        except CannotMeasureError as e:
            self.missing[name] = str(e)


def measure(case: Case, machine: Machine, repeats: int, budget: float, seed: int, ceilings: Ceilings) -> list[Row]:
    """Return a row for each variant: of `repeats` rounds, or of fewer (but three) once `budget` seconds are over."""
    missing = dict(case.missing)
    first_call: dict[str, float] = {}
    peak: dict[str, float | None] = {}
    gates: dict[str, Gate] = {}
    product = next(iter(case.variants))
    for name, variant in case.variants.items():
        try:
            first_call[name] = _timed(variant, machine.where)
            gates |= {} if variant.gate is None else {name: variant.gate()}
            peak[name] = _peak(variant, machine.where)
        except Exception as e:  # whatever a compiler or a stranger's code raises: the others are still measured
            if name == product:
                raise
            missing[name] = _reason(e)
    running = {n: v for n, v in case.variants.items() if n not in missing}
    times = _in_turns(running, machine.where, repeats, budget)
    rows = []
    for name in [*case.variants, *(n for n in missing if n not in case.variants)]:
        if name in missing:
            rows.append(_row(case, machine, seed, name, product, missing=missing[name]))
            continue
        variant = case.variants[name]
        one = [t / variant.inner for t in times[name]]
        rows.append(
            _row(
                case,
                machine,
                seed,
                name,
                product,
                repeats=len(one),
                calls=variant.calls,
                samples=[float(f"{t:.5g}") for t in one[:_KEPT_SAMPLES]],
                first_call_s=round(first_call[name], 3),
                launches=variant.launches,
                peak_mb=peak[name],
                split={} if variant.split is None else variant.split(),
                **dict(zip(("p20", "p50", "p80", "p99"), quantiles(one), strict=True)),
                **_rates(case, variant, quantiles(one)[1], ceilings),
                **_against(variant, times[name], times[product], case.variants[product], gates.get(name)),
            )
        )
    return rows


def quantiles(x: list[float]) -> tuple[float, float, float, float]:
    """Return the 20th, 50th, 80th and 99th percentile."""
    ordered = sorted(x)

    def at(p: float) -> float:
        position = p * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    return at(0.2), at(0.5), at(0.8), at(0.99)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(variant: Variant, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    variant.run()
    synchronise(device)
    return time.perf_counter() - start


def _in_turns(variants: Mapping[str, Variant], device: torch.device, repeats: int, budget: float) -> dict[str, Any]:
    """Return the milliseconds of each variant's rounds; every other round goes through them backwards."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(_WARM_UP_ROUNDS):
        for name in order:
            _timed(variants[name], device)
    end = time.perf_counter() + budget
    for done in range(repeats):
        if done >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name in order:
            times[name].append(1e3 * _timed(variants[name], device))
        order.reverse()
    return times


def _peak(variant: Variant, device: torch.device) -> float | None:
    """Return the most MB a GPU held while the variant ran once, beyond what it held before; None on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _timed(variant, device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 1e6, 1)


def profiled(case: Case, rows: Sequence[Row], device: torch.device) -> list[Row]:
    """Return a case's rows with launches, and in a split the device's idle time, from a GPU's time line.

    This is for the last case of a process: a profiler, once attached, slows down what is timed after it.
    """
    if device.type != "cuda":
        return list(rows)
    found = []
    for row in rows:
        if row.p50 is not None:
            variant = case.variants[row.variant]
            try:
                kernels, busy = _on_device(partial(_timed, variant, device))
            except (RuntimeError, AssertionError):  # a profiler that may not look at the device
                kernels, busy = 0, 0.0
            if kernels:
                launches = row.launches or kernels // variant.inner
                idle = dict(idle=round(row.p50 - busy / variant.inner, 4)) if row.split else {}
                row = dataclasses.replace(row, launches=launches, split=row.split | idle)
        found.append(row)
    return found


def _on_device(run: Callable[[], object]) -> tuple[int, float]:
    """Return the kernels on a GPU's time line during `run`, and the milliseconds in which any of them or a copy ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    events = [e for e in profile.events() or [] if e.device_type.name == "CUDA"]
    kernels = sum(not e.name.startswith(("Memcpy", "Memset")) for e in events)
    busy, end = 0.0, 0.0
    for start, stop in sorted((e.time_range.start, e.time_range.end) for e in events):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return kernels, busy / 1e3


def _rates(case: Case, variant: Variant, one: float, ceilings: Ceilings) -> dict[str, float | None]:
    """Return the rates of a case's work where one execution takes `one` ms."""
    p50 = one * variant.calls
    tflops = None if case.gflop is None else case.gflop / p50
    gbs = None if case.mbyte is None else case.mbyte / p50
    most = ceilings.tflops.get(variant.precision or case.precision)
    return dict(
        per_second=1e3 * case.results / p50,
        tflops=tflops,
        gbs=gbs,
        compute_share=None if tflops is None or most is None else tflops / most,
        memory_share=None if gbs is None or ceilings.gbs is None else gbs / ceilings.gbs,
    )


def _against(
    variant: Variant, own: list[float], product: list[float], ours: Variant, gate: Gate | None
) -> dict[str, Any]:
    """Return the ratio of medians and the spread of the rounds' own ratios, where the results agree."""
    if gate is None:
        return {}
    found: dict[str, Any] = dict(
        gate="passed" if gate.passed else "failed",
        gate_error=gate.error if math.isfinite(gate.error) else None,
        gate_limit=gate.limit,
    )
    if gate.passed:
        scale = variant.calls * ours.inner / variant.inner
        rounds = [scale * a / b for a, b in zip(own, product, strict=True)]
        p20, _, p80, _ = quantiles(rounds)
        ratio = scale * statistics.median(own) / statistics.median(product)
        found |= dict(ratio=ratio, ratio_p20=p20, ratio_p80=p80)
    return found


def _row(case: Case, machine: Machine, seed: int, variant: str, product: str, **found: Any) -> Row:
    """Return a row of what the case and the machine say, and `found`."""
    values: dict[str, Any] = dict.fromkeys(COLUMNS)
    values |= {f.name: getattr(case, f.name) for f in dataclasses.fields(Case) if f.name in COLUMNS}
    values |= dict(schema=SCHEMA, case=case.name, variant=variant, product=product, seed=seed)
    values |= dict(repeats=0, calls=1, samples=[], gate="", missing="", split={})
    return Row(**(values | machine.facts() | found))


def _reason(e: Exception) -> str:
    if isinstance(e, CannotMeasureError):
        return str(e)
    lines = str(e).strip().splitlines() or [""]
    return f"{type(e).__name__}: {lines[0][:200]}"
