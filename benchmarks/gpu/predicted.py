"""What the machine code of plans and updates said of their time (benchmarks/static.py), beside what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tdmpc2_fast.kernels.inspect.published import update_sizes
from tdmpc2_fast.kernels.inspect.slots import CHIPS

from .. import static
from ..harness.measure import Row

L2_RATE = 5.5e12
"""Bytes a second that the L2 of an H100 or H200 gives."""


def file_beside(results: Path) -> Path:
    """Return where the page of a results file is."""
    return results.with_name(f"{results.stem}-predicted.md")


def nearest(version: str) -> Path | None:
    """Return the table of a version of Triton, or of the nearest that has one; None where there are none."""

    def numbers(text: str) -> list[int]:
        return [*map(int, re.findall(r"\d+", text)), 0, 0, 0][:3]

    wanted = numbers(version)

    def distance(file: Path) -> list[int]:
        return [abs(a - b) for a, b in zip(numbers(file.stem), wanted, strict=True)]

    return min(static.FOLDER.glob("triton-*.json"), key=distance, default=None)


def arch_of(gpu: str) -> int | None:
    """Return the compute capability of a GPU's family, where it is one of those predicted."""
    return next((arch for arch, chip in CHIPS.items() if any(name in gpu for name in chip.name.split(", "))), None)


def work_of(row: Row) -> static.Work | None:
    """Return the work that a row measured, if it is one that is predicted; baselines are not."""
    arch = arch_of(row.gpu)
    if row.variant != row.product or row.p50 is None or arch is None or row.size is None or row.actions is None:
        return None
    if row.suite == "planner" and row.envs is not None:
        return static.Work(arch, row.size, row.envs, row.actions, row.precision)
    if row.suite == "update" and row.batch == update_sizes(row.size, row.actions).batch:
        return static.Work(arch, row.size, 0, row.actions, row.precision)
    return None


def page(rows: Sequence[Row]) -> str:
    """Return a table, a line for each row that was predicted; nothing where none was."""
    version = next((r.triton_version for r in rows if r.gpu), "")
    table = nearest(version)
    known = {} if table is None else {r.work: r for r in static.read(table)}
    lines = []
    for row in rows:
        work = work_of(row)
        if work not in known or row.p50 is None:
            continue
        cost, measured = known[work], 1e3 * row.p50
        l2_us = cost.l2_mb / L2_RATE * 1e12
        bound = max(cost.slots_us, l2_us)
        l2 = f"{l2_us:.0f} ({cost.l2_mb / 1e3:.2f} GB)" if cost.l2_mb else "-"
        cells = [work.name, cost.launches, f"{cost.slots_us:.0f}", l2, f"{measured:.0f}", f"{measured / bound:.2f}x"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if table is None or not lines:
        return ""
    of = table.stem.removeprefix("triton-")
    other = "" if of == version else f"; there is no table of Triton {version}, which was measured"
    return "\n".join([
        f"Predicted from machine code by Triton {of}{other}. Slots, and L2 traffic at {L2_RATE / 1e12} TB/s,",
        "are lower bounds of the device's time; measured is the median of the wall clock, for plans from host to host.",
        "The ratio is to the larger bound.",
        "",
        "| work | launches | slots, µs | L2, µs | measured, µs | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *lines,
        "",
    ])  # fmt: skip
