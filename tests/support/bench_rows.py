"""Rows of benchmarks: measured in small, or made up."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from tdmpc2_fast.benchmarks.harness.machine import Machine, this_machine
from tdmpc2_fast.benchmarks.harness.measure import Case, Ceilings, Gate, Row, measure

CPU = torch.device("cpu")
AGREES = Gate(0.0, 1.0)


@cache
def machine() -> Machine:
    return this_machine(CPU)


def sleeping(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def rows_of(case: Case, ceilings: Ceilings | None = None, repeats: int = 5) -> dict[str, Row]:
    return {r.variant: r for r in measure(case, machine(), repeats, 10.0, 0, ceilings or Ceilings())}


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
