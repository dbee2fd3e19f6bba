"""Find what got slower or faster between two results files, beyond their noise.

    python benchmarks/compare.py A.json B.json [by=ratios]

Files of one machine are compared by their medians. Those of different machines, or of a machine that others use, too
(`by=ratios`), are compared by ratios to the baselines of their own runs. A difference counts if it is larger than three
standard errors of the two medians together, and than 3%. Exit status: 1 where something got slower, 2 where nothing can
be compared.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tdmpc2_fast.benchmarks.harness.measure import Row
from tdmpc2_fast.benchmarks.report import machine_of, read, what

LEAST, ERRORS = 0.03, 3.0
# Between the 20th and the 80th percentile of a normal law lie 1.683 standard deviations; its median
# errs 1.253 times as much as its mean.
_SPREAD, _MEDIAN = 1.683, 1.253

Key = tuple[object, ...]


@dataclass(frozen=True)
class Change:
    """One measurement in both files; `factor` above 1: slower in the second."""

    row: Row
    by_ratio: bool  # to the row's variant; else times are compared
    factor: float
    noise: float  # relative standard error of the factor

    @property
    def real(self) -> bool:
        """Whether the change is beyond noise."""
        return abs(math.log(self.factor)) > max(ERRORS * self.noise, math.log1p(LEAST))


def key(row: Row) -> Key:
    """Return what two files' rows have in common if they measure the same."""
    return (row.suite, row.case, row.variant, row.size, row.envs, row.actions, row.batch, row.precision, row.shape)


def machine(row: Row) -> Key:
    """Return what rows have in common if their times compare."""
    return row.device, row.gpu, row.cpu, 0 if row.gpu else row.threads


def compare(old: Sequence[Row], new: Sequence[Row], by_ratios: bool = False) -> list[Change]:
    """Return the change of each measurement in both files; one machine's times are compared, unless `by_ratios`."""
    times = machine(old[0]) == machine(new[0]) and not by_ratios
    before = {key(r): r for r in old}
    changes = []
    for b in new:
        a = before.get(key(b))
        if a is None or a.p50 is None or b.p50 is None:
            continue
        if times:
            changes.append(Change(b, False, b.p50 / a.p50, math.hypot(_error(a), _error(b))))
        elif a.ratio and b.ratio and a.product == b.product:
            # A product that got slower is nearer to its baseline.
            changes.append(Change(b, True, a.ratio / b.ratio, math.hypot(_ratio_error(a), _ratio_error(b))))
    return changes


def _error(row: Row) -> float:
    """Return the relative standard error of the median."""
    return _of(row.p20, row.p50, row.p80, row.repeats)


def _ratio_error(row: Row) -> float:
    return _of(row.ratio_p20, row.ratio, row.ratio_p80, row.repeats)


def _of(low: float | None, middle: float | None, high: float | None, count: int) -> float:
    assert low is not None
    assert middle is not None
    assert high is not None
    return _MEDIAN * (high - low) / _SPREAD / middle / math.sqrt(max(count, 1))


def describe(change: Change) -> str:
    """Return the change in one line."""
    r = change.row
    by = f"{r.product} against {r.variant}" if change.by_ratio else r.variant
    factor, word = (change.factor, "slower") if change.factor > 1 else (1 / change.factor, "faster")
    return f"{r.suite}: {what(r)}, {by}: {factor:.2f}x {word} (noise {100 * change.noise:.1f}%)"


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two files; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    by_ratios = "by=ratios" in args
    args = [a for a in args if a != "by=ratios"]
    if len(args) != 2 or args[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        old, new = (read(Path(a)) for a in args)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    changes = compare(old, new, by_ratios) if old and new else []
    if not changes:
        print("error: the files have no measurement in common", file=sys.stderr)
        return 2
    print(f"A: {machine_of(old)}\nB: {machine_of(new)}\ncompared by {'ratios' if changes[0].by_ratio else 'medians'}\n")
    real = [c for c in changes if c.real]
    for change in sorted(real, key=lambda c: -c.factor):
        print(describe(change))
    slower = sum(c.factor > 1 for c in real)
    faster, same = len(real) - slower, len(changes) - len(real)
    print(f"{len(changes)} compared: {slower} slower, {faster} faster, {same} within noise")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
