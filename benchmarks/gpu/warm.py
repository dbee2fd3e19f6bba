"""Compile what `make gpu` will measure, on all cores, into Triton's cache on disk.

A plan has some thirty kernel configurations, an update fifty. Compiled one after the other, each at its first launch,
they would take longer than the measurements.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache

import torch

from tdmpc2_fast.kernels.device.cluster import clusters_compiled
from tdmpc2_fast.kernels.device.launch import Launch, Precision, why_not
from tdmpc2_fast.kernels.inspect.compile import specialisation
from tdmpc2_fast.kernels.inspect.plan_work import dry_plan
from tdmpc2_fast.kernels.inspect.published import plan_sizes, update_sizes
from tdmpc2_fast.kernels.inspect.update_work import dry_update

from ..options import Options, parse
from .parts import RUN, parts

Work = tuple[int, int, int, str]
"""The size, a plan's environments (0 for an update), its actions (an update's batch), and the precision."""


def measured() -> list[Work]:
    """Return the plans and updates that the parts of `make gpu` measure."""
    found: list[Work] = []
    for command in (c for part in parts() for c in part.commands if RUN in c):
        words = command[command.index(RUN) + 1 :]
        options = parse([w for w in words if "=" in w])
        if "planner" in words:
            found += itertools.product(options.size, options.envs, options.actions, options.precisions)
        if "update" in words:
            found += itertools.product(options.size, (0,), options.batch, options.precisions)
    return list(dict.fromkeys(found))


@lru_cache(maxsize=2)
def launches(work: Work, arch: int) -> list[Launch]:
    """Return the launches of a plan or an update as measured."""
    size, envs, actions, precision = work
    if not envs:
        sizes = replace(update_sizes(size, Options().actions[0]), batch=actions)
        return dry_update(sizes, Precision(precision), arch)[0]
    return dry_plan(plan_sizes(size, envs, actions), Precision(precision), arch)[1]


def distinct(works: Sequence[Work], arch: int) -> Iterator[tuple[Work, int]]:
    """Yield the work and the place of the first launch of each kind that is compiled apart."""
    seen: set[str] = set()
    for work in works:
        for i, launch in enumerate(launches(work, arch)):
            kind = str(specialisation(launch))
            if kind not in seen:
                seen.add(kind)
                yield work, i


def compile_one(work: Work, place: int, arch: int) -> str:
    """Compile a launch as its first use would; return why that failed, or nothing."""
    launch = launches(work, arch)[place]
    options = {"enable_fp_fusion": True, **launch.options}
    try:
        with clusters_compiled(launch.cluster):
            compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **options)
        # What launches it is C, which Triton compiles at first use, too.
        getattr(compiled, "_init_handles", lambda: None)()
    except Exception as e:  # the part that needs it says it in full
        return f"{launch.name} of {work}: {type(e).__name__}: {str(e)[:200]}"
    return ""


def main() -> int:
    """Compile the kernels of all plans and updates; returns the exit status."""
    start, device = time.perf_counter(), torch.device("cuda")
    if reason := why_not(device):
        print(f"error: {reason}", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability(device)
    arch = 10 * major + minor
    works = measured()
    work = list(distinct(works, arch))
    jobs = min(16, len(os.sched_getaffinity(0)), len(work))  # each holds a context of the device
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = [x for x in pool.map(compile_one, *zip(*work, strict=True), [arch] * len(work)) if x]
    plans = sum(envs > 0 for _, envs, _, _ in works)
    what = f"{len(work)} kernels of {plans} plans and {len(works) - plans} updates"
    print(*failed, f"{what} in {time.perf_counter() - start:.0f} s", sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
