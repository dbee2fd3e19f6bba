"""The suites under pytest-benchmark, for its options, histograms and saved runs.

    pytest benchmarks [--benchmark-compare ...]
    BENCH="planner kernels size=5 envs=1,16" pytest benchmarks

Product and reference of each case; what takes turns, and prints ratios, is `tdmpc2-fast bench`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from tdmpc2_fast.benchmarks.harness.measure import CannotMeasureError, Case, synchronise
from tdmpc2_fast.benchmarks.options import parse
from tdmpc2_fast.benchmarks.run import SUITES

WORDS = os.environ.get("BENCH", "planner update kernels replay size=1").split()
OPTIONS = parse([*(w for w in WORDS if "=" in w), "compiled=false"])
CASES = [(s, make) for s in WORDS if "=" not in s for make in SUITES[s](OPTIONS)]


@lru_cache(maxsize=1)
def case_of(make: Callable[[], Case]) -> Case:
    """One case at a time: those of large models do not fit side by side."""
    return make()


@pytest.mark.parametrize("which", ["product", "reference"])
@pytest.mark.parametrize(("suite", "make"), CASES, ids=[f"{s}{i}" for i, (s, _) in enumerate(CASES)])
def test_speed(suite: str, make: Callable[[], Case], which: str, benchmark: Any) -> None:
    """Times one variant, after the comparison of results."""
    try:
        case = case_of(make)
    except CannotMeasureError as e:
        pytest.skip(str(e))
    product, baseline, *_ = case.variants
    variant = case.variants[product if which == "product" else baseline]
    variant.run()
    if variant.gate is not None:
        gate = variant.gate()
        assert gate.passed, f"{product} and {baseline} differ by {gate.error:.2g}, allowed {gate.limit:.2g}"

    def run() -> None:
        variant.run()
        synchronise(OPTIONS.torch_device)

    benchmark.group = f"{suite}: {case.name} {case.shape}".strip()
    benchmark.extra_info |= dict(variant=product if which == "product" else baseline, inner=variant.inner)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
