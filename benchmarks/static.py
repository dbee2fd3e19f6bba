"""What plans and updates cost by their machine code, on chips that need not be there, held against a table.

    python -m tdmpc2_fast.benchmarks.static [write] [all] [jobs=N]

Without `write` it compares with the table in benchmarks/results/static/ that belongs to this Triton: exit code 1
where anything takes more than 3% more slots, more launches or more bytes, or where machine code has a fault
(kernels/inspect/slots.py). With it, it writes that table, and those of docs/performance.md. `all`: every row, not the
ones that CI has time for.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from tdmpc2_fast.kernels.device.launch import Launch, Precision, triton
from tdmpc2_fast.kernels.inspect.compile import Specialisation, specialisation
from tdmpc2_fast.kernels.inspect.plan_work import dry_plan
from tdmpc2_fast.kernels.inspect.published import plan_sizes, update_sizes
from tdmpc2_fast.kernels.inspect.report import why_not
from tdmpc2_fast.kernels.inspect.slots import CHIPS, Call, Examined, call_of, examine, slots
from tdmpc2_fast.kernels.inspect.update_work import dry_update
from tdmpc2_fast.kernels.inspect.work import launch_work

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results" / "static"
PAGE = ROOT / "docs" / "performance.md"
_WORSE = 1.03


class Work(NamedTuple):
    """A plan, or where `envs` is 0 an update, on a chip."""

    arch: int
    size: int
    envs: int
    actions: int
    precision: str

    @property
    def name(self) -> str:
        """What the work is called in a message."""
        what = f"plan E={self.envs}" if self.envs else "update"
        return f"sm_{self.arch} {self.size}M {what} A={self.actions} {self.precision}"


def works(everything: bool) -> list[Work]:
    """Return what is examined, what matters most first."""
    tensor = ("bfloat16", "tf32")
    found = [Work(*x) for x in product(CHIPS, (5, 1), (1, 0), (6,), tensor)]
    if everything:
        found += [Work(90, *x) for x in product((19, 48, 317), (1, 0), (6,), tensor)]
        found += [Work(90, *x) for x in product((5,), (16, 64, 256), (6,), tensor[:1])]
        found += [Work(90, *x) for x in product((5,), (1,), (38,), tensor)]
    return found


class Row(NamedTuple):
    """What a work costs, and what is wrong with its kernels."""

    work: Work
    launches: int
    slots_us: float
    l2_mb: float  # 0 for updates: of their kernels products are counted alone
    gflop: float
    registers: int  # the most
    kernels: dict[str, tuple[int, float]]  # launches and slots of each
    faults: list[str]


def rows(wanted: list[Work], jobs: int) -> Iterator[Row]:
    """Yield a row for each work; compiles in processes of their own."""
    logs = [(work, [(launch, specialisation(launch)) for launch in _launches(work)]) for work in wanted]
    specs: dict[tuple[int, str], Specialisation] = {}
    calls: dict[tuple[int, str], dict[Call, None]] = defaultdict(dict)
    for work, log in logs:
        for launch, spec in log:
            specs.setdefault((work.arch, str(spec)), spec)
            calls[work.arch, str(spec)][call_of(launch, spec)] = None
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {key: pool.submit(examine, spec, key[0], tuple(calls[key])) for key, spec in specs.items()}
        for work, log in logs:
            yield _row(work, log, {str(spec): futures[work.arch, str(spec)].result() for _, spec in log})


def _launches(work: Work) -> list[Launch]:
    precision = Precision(work.precision)
    if work.envs:
        return dry_plan(plan_sizes(work.size, work.envs, work.actions), precision, work.arch)[1]
    return dry_update(update_sizes(work.size, work.actions), precision, work.arch)[0]


def _row(work: Work, log: list[tuple[Launch, Specialisation]], done: dict[str, Examined]) -> Row:
    counts, times, faults = Counter[str](), Counter[str](), dict[str, None]()
    cost = [launch_work(launch) for launch, _ in log]
    for launch, spec in log:
        found = done[str(spec)]
        name = spec.name.removesuffix("_kernel")
        counts[name] += 1
        times[name] += slots(launch, spec, found)  # type: ignore[assignment]
        faults |= {f"{name} {found.label}: {fault}": None for fault in found.faults}
    return Row(
        work,
        len(log),
        round(sum(times.values()), 1),
        round(sum(x.bytes for x in cost) / 1e6, 1) if work.envs else 0.0,
        round(sum(x.flops for x in cost) / 1e9, 1),
        max(found.registers for found in done.values()),
        {name: (counts[name], round(time, 1)) for name, time in times.most_common()},
        list(faults),
    )


def table_file() -> Path:
    """Return where the table of this Triton is."""
    return FOLDER / f"triton-{triton.__version__}.json"


def read(file: Path) -> list[Row]:
    """Read a table."""
    found = json.loads(file.read_text())["rows"]
    return [Row(**{**row, "work": Work(**row["work"]), "kernels": {k: tuple(v) for k, v in row["kernels"].items()}})
            for row in found]  # fmt: skip


def write(found: list[Row]) -> None:
    """Write the table of this Triton, and the page, which shows that of the newest."""
    listed = [{**row._asdict(), "work": row.work._asdict()} for row in found]
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(" " + json.dumps(row) for row in listed)
    table_file().write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
    if tables()[-1] == table_file():
        PAGE.write_text(with_tables(PAGE.read_text(), found))


def tables() -> list[Path]:
    """List all tables, by the version of Triton they are of."""
    return sorted(FOLDER.glob("*.json"), key=lambda x: [int(n) for n in re.findall(r"\d+", x.stem)])


def compare(found: list[Row], table: list[Row]) -> list[str]:
    """Say what is worse than in the table, and what is wrong."""
    known, said = {row.work: row for row in table}, []
    for row in found:
        said += [f"{row.work.name}: {fault}" for fault in row.faults]
        if row.work not in known:
            said.append(f"{row.work.name}: not in the table, write it anew")
            continue
        before = known[row.work]
        for what in ("slots_us", "l2_mb", "launches"):
            now, then = getattr(row, what), getattr(before, what)
            if now > (then if what == "launches" else _WORSE * then):
                said.append(f"{row.work.name}: {what} {now}, in the table {then}")
    return said


def with_tables(page: str, found: list[Row]) -> str:
    """Return the page with its tables made of these rows; each stands between two comments."""
    for part, table in (("plans", _plans(found)), ("updates", _updates(found)), ("kernels", _kernels(found))):
        begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
        page, count = re.subn(rf"{begin}.*?{end}", f"{begin}\n{table}\n{end}", page, flags=re.DOTALL)
        if count != 1:
            allowed = f"one, between {begin} and {end}"
            raise ValueError(f"page: got {count} places for the table of {part}, allowed: {allowed}")
    return page


def _lines(head: str, body: list[list[Any]]) -> str:
    columns = head.split(" | ")
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(map(str, x))} |" for x in [columns, rule, *body])


def _plans(found: list[Row]) -> str:
    body = [
        [f"{CHIPS[r.work.arch].name} {r.work.size}M", r.work.envs, r.work.actions, r.work.precision, r.launches,
         f"{r.slots_us:.0f}", f"{r.l2_mb / 1000:.2f}", f"{r.gflop:.0f}"]
        for r in found if r.work.envs
    ]  # fmt: skip
    return _lines("chip and model | E | A | precision | launches | slots, µs | L2, GB | GFLOP", body)


def _updates(found: list[Row]) -> str:
    body = [
        [f"{CHIPS[r.work.arch].name} {r.work.size}M", r.work.precision, r.launches,
         f"{r.slots_us:.0f}", f"{r.gflop:.0f}"]
        for r in found if not r.work.envs
    ]  # fmt: skip
    return _lines("chip and model | precision | launches | slots, µs | GFLOP", body)


def _kernels(found: list[Row]) -> str:
    chosen = [r for r in found if (r.work.arch, r.work.size, r.work.precision, r.work.actions) == (90, 5, "bfloat16", 6)
              and r.work.envs < 2]  # fmt: skip
    body = [
        ["plan" if r.work.envs else "update", name, count, time]
        for r in chosen for name, (count, time) in r.kernels.items() if time >= 1
    ]  # fmt: skip
    return _lines("5M on H100, bfloat16 | kernel | launches | slots, µs", body)


def main(argv: list[str]) -> int:
    """Examine, and compare or write; returns the exit code."""
    jobs = len(os.sched_getaffinity(0))
    for word in argv:
        if word.startswith("jobs="):
            jobs = int(word.removeprefix("jobs="))
        elif word not in ("write", "all"):
            print(f"static: got {word!r}, allowed: write, all, jobs=N", file=sys.stderr)
            return 2
    if reason := why_not():
        print(f"static: {reason}", file=sys.stderr)
        return 2
    if "write" not in argv and not table_file().exists():
        there = ", ".join(x.stem for x in tables()) or "none"
        print(f"static: no table for Triton {triton.__version__}, there are: {there}; nothing is compared")
        return 0
    found = []
    for row in rows(works("all" in argv), jobs):
        print(f"{row.work.name}: {row.launches} launches, {row.slots_us} µs of slots, {row.l2_mb} MB, "
              f"at most {row.registers} registers", flush=True)  # fmt: skip
        found.append(row)
    if "write" in argv:
        write(found)
        said = [f"{row.work.name}: {fault}" for row in found for fault in row.faults]
    else:
        said = compare(found, read(table_file()))
    for line in said:
        print(f"fault: {line}", file=sys.stderr)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
