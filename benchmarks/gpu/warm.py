"""Compiles what `make gpu` will measure, on all cores, into Triton's cache on disk.

A plan has some thirty kernel configurations, an update fifty; compiled where each is first launched,
one after the other, those of all that is measured would take longer than the measurements.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache

import torch

from tdmpc2_fast.kernels.device.launch import Launch, Precision, has_dependent_launch, why_not
from tdmpc2_fast.kernels.inspect.compile import specialisation
from tdmpc2_fast.kernels.inspect.plan_work import dry_plan
from tdmpc2_fast.kernels.inspect.published import plan_sizes, update_sizes
from tdmpc2_fast.kernels.inspect.update_work import dry_update

Work = tuple[int, int, int, str]
"""Size, environments of a plan or 0 for an update, actions or batch, precision."""

_ACTIONS = 6

PLANS: tuple[Work, ...] = tuple(
    (size, envs, actions, precision)
    for size, envs, actions in (
        (5, 1, 6),
        *((5, e, 6) for e in (4, 16, 64, 256)),
        *((s, 1, 6) for s in (1, 19, 48, 317)),
        (5, 1, 38),
    )
    for precision in ("tf32", "bfloat16", *(["float32"] if (size, envs, actions) == (5, 1, 6) else []))
)
UPDATES: tuple[Work, ...] = tuple(
    (size, 0, batch, precision)
    for size, batch in ((5, 256), *((s, 1024) for s in (1, 5, 19, 48, 317)))
    for precision in ("tf32", "bfloat16")
)


@lru_cache(maxsize=2)
def launches(work: Work, pdl: bool) -> list[Launch]:
    """Of a plan or an update as measured."""
    size, envs, actions, precision = work
    if not envs:
        sizes = replace(update_sizes(size, _ACTIONS), batch=actions)
        return dry_update(sizes, Precision(precision), pdl=pdl)[0]
    return dry_plan(plan_sizes(size, envs, actions), Precision(precision), pdl=pdl)[1]


def distinct(works: Sequence[Work], pdl: bool) -> Iterator[tuple[Work, int]]:
    """Work and place of the first launch of each kind that is compiled apart."""
    seen: set[str] = set()
    for work in works:
        for i, launch in enumerate(launches(work, pdl)):
            kind = str(specialisation(launch))
            if kind not in seen:
                seen.add(kind)
                yield work, i


def compile_one(work: Work, place: int, pdl: bool) -> str:
    """Compile a launch as it would be at first use; empty, or why it failed."""
    launch = launches(work, pdl)[place]
    options = {"enable_fp_fusion": True, **launch.options}
    try:
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
    pdl = has_dependent_launch(device)
    work = list(distinct(PLANS + UPDATES, pdl))
    jobs = min(16, len(os.sched_getaffinity(0)), len(work))  # each holds a context of the device
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = [x for x in pool.map(compile_one, *zip(*work, strict=True), [pdl] * len(work)) if x]
    what = f"{len(work)} kernels of {len(PLANS)} plans and {len(UPDATES)} updates"
    print(*failed, f"{what} in {time.perf_counter() - start:.0f} s", sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
