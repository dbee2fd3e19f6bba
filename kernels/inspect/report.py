"""Compiles every kernel configuration of plans and updates, for chips that need not be there.

    python -m tdmpc2_fast.kernels.report [--precision ...] [--arch ...] [--size ...] [--envs ...] [--json FILE]

Prints registers, spills, shared memory, tensor-core instruction and code size of each. Exit code
1: a configuration spills, needs more shared memory than the chip has, lacks a tensor-core
instruction where one is meant, or does not compile. 2: nothing can be compiled here.

Configurations come from dry plans and updates, so they are those that are launched. Launches that differ only
in what Triton derives from their arguments (alignment, strides of 1) count as one configuration,
of which the first is compiled; `--variants` compiles them all. The defaults are what CI has time for.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from ..device.launch import PRECISIONS, Launch, Precision, interpreting, triton
from ..layers.sizes import MODEL_SIZES
from ..plan.buffers import PlanSizes
from ..update.buffers import UpdateSizes
from .compile import SHARED_LIMIT, Compiled, Specialisation, specialisation, try_compile
from .plan_work import dry_plan
from .published import FORMS, plan_sizes, update_sizes
from .update_work import dry_update
from .work import KERNELS

# What is compiled unless other sizes are asked for. Updates of wide layers take kernels of their own.
_PLANS, _UPDATES = (1, 5), (1, 5, 19)

Row = tuple[str, Compiled, list[str]]
"""Precision, what came out, faults."""


def configurations(
    sizes: Iterable[PlanSizes],
    precision: Precision,
    arch: int,
    variants: bool = False,
    updates: Iterable[UpdateSizes] = (),
) -> list[Specialisation]:
    """List the distinct configurations of plans and updates on a chip, in the order they are first launched."""
    found: dict[str, Specialisation] = {}

    def take(log: list[Launch]) -> None:
        for spec in map(specialisation, log):
            found.setdefault(str(spec) if variants else spec.configuration, spec)

    for s in sizes:
        take(dry_plan(s, precision, arch)[1])
    for u in updates:
        take(dry_update(u, precision, arch)[0])
    return list(found.values())


def compile_all(work: list[tuple[Specialisation, int]], jobs: int) -> Iterator[Row]:
    """Yield rows of configurations and chips, compiled in `jobs` processes; one job is this process."""
    with ExitStack() as stack:
        run: Callable[..., Iterator[Compiled | str]] = map
        if min(jobs, len(work)) > 1:
            # Forked, a process would share the locks of threads it does not have.
            context = multiprocessing.get_context("spawn")
            run = stack.enter_context(ProcessPoolExecutor(min(jobs, len(work)), mp_context=context)).map
        results = run(try_compile, [spec for spec, _ in work], [arch for _, arch in work])
        for (spec, arch), done in zip(work, results, strict=True):
            if isinstance(done, str):
                failed = Compiled(spec.name, arch, spec.label, spec.options.get("num_warps", 4), 0, 0, 0, "-", 0)
                yield spec.precision, failed, [done]
            else:
                yield spec.precision, done, done.faults(spec.needs_tensor)


HEAD = ("kernel", "configuration", "precision", "arch", "warps", "registers", "spills", "shared", "tensor", "code")


def table(rows: list[Row]) -> str:
    """Format one line a configuration and chip; spills in bytes a thread, shared memory and code in bytes."""
    lines: list[tuple[str, ...]] = [HEAD]
    for precision, c, _ in rows:
        numbers = (c.arch, c.warps, c.registers, c.spills, c.shared, c.tensor, c.size)
        lines.append((c.name.removesuffix("_kernel"), c.config, precision, *map(str, numbers)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def summary(rows: list[Row]) -> str:
    """Format the most registers and shared memory of each chip."""
    lines = []
    for arch in sorted({c.arch for _, c, _ in rows}):
        here = [c for _, c, _ in rows if c.arch == arch]
        most, largest = max(here, key=lambda c: c.registers), max(here, key=lambda c: c.shared)
        lines.append(
            f"sm_{arch}: {len(here)} configurations, at most {most.registers} registers ({most.name} {most.config})"
            f" and {largest.shared} of {SHARED_LIMIT[arch]} bytes of shared memory ({largest.name} {largest.config})"
        )
    return "\n".join(lines)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tdmpc2_fast.kernels.report", description=__doc__.split("\n")[0])
    many: dict[str, Any] = dict(nargs="+", metavar="X")
    parser.add_argument("--precision", **many, choices=PRECISIONS, default=["bfloat16", "tf32", "float32"])
    parser.add_argument("--arch", **many, type=int, choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument(
        "--size", **many, type=int, choices=MODEL_SIZES, help=f"default: {_PLANS}, and {_UPDATES} of updates"
    )
    parser.add_argument("--envs", **many, type=int, default=[1, 64], help="environments at once")
    parser.add_argument("--actions", **many, type=int, default=[6], help="action dimensions")
    parser.add_argument("--form", **many, choices=FORMS, default=["single"], help="single, multi (task), episodic")
    parser.add_argument("--kernel", **many, choices=[*KERNELS], help="these alone, by name")
    parser.add_argument("--variants", action="store_true", help="every alignment, not one of each configuration")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes, default all processors"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the rows, too")
    return parser.parse_args(argv)


def why_not() -> str | None:
    """Say why nothing can be compiled here, or return None where it can."""
    if triton is None:
        return "the package triton is not installed, so nothing can be compiled"
    return "TRITON_INTERPRET=1 interprets kernels, unset it to compile them" if interpreting() else None


def main(argv: list[str] | None = None) -> int:
    """Compile, print, and judge; returns the exit code."""
    args = _arguments(argv)
    if reason := why_not():
        print(f"report: {reason}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    sizes = [plan_sizes(*x) for x in product(args.size or _PLANS, args.envs, args.actions, args.form)]
    updates = [update_sizes(*x) for x in product(args.size or _UPDATES, args.actions, args.form)]
    work: dict[tuple[str, int], tuple[Specialisation, int]] = {}
    for arch, precision in product(args.arch, args.precision):
        for spec in configurations(sizes, Precision(precision), arch, args.variants, updates):
            if args.kernel is None or spec.name in args.kernel:
                work.setdefault((str(spec), arch), (spec, arch))
    rows = list(compile_all(list(work.values()), args.jobs))
    print(table(rows))
    print()
    print(summary(rows))
    print(f"{len(rows)} compiled in {time.perf_counter() - start:.0f} s")
    if args.json:
        listed = [{"precision": p, **asdict(c), "faults": f} for p, c, f in rows]
        args.json.write_text(json.dumps({"triton": triton.__version__, "rows": listed}, indent=1) + "\n")
    faults = [(p, c, fault) for p, c, found in rows for fault in found]
    for p, c, fault in faults:
        print(f"fault: sm_{c.arch} {p} {c.name} {c.config}: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
