"""Compile what parts of `make gpu` will run, on all cores, into Triton's cache on disk.

    python -m tdmpc2_fast.benchmarks.gpu.warm PART ...

A plan has some thirty kernel configurations, an update fifty. Compiled one after the other, each at its first launch,
they would take longer than the measurements. The parts are compiled for in the order given; what is done when the time
is over stays.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch

from tdmpc2_fast.kernels.device.cluster import clusters_compiled
from tdmpc2_fast.kernels.device.launch import Launch, Precision, why_not
from tdmpc2_fast.kernels.inspect.compile import specialisation
from tdmpc2_fast.kernels.inspect.plan_work import dry_plan
from tdmpc2_fast.kernels.inspect.published import plan_sizes, update_sizes
from tdmpc2_fast.kernels.inspect.update_work import dry_update
from tdmpc2_fast.kernels.plan.buffers import PlanSizes
from tdmpc2_fast.kernels.update.buffers import UpdateSizes

from ..options import parse
from .parts import RUN, parts
from .processes import ROOT, Part

TESTS = {"tests": False, "more-tests": True}
"""Parts that are tests of plans and updates, and whether they are those that come later."""
_SHOWN = 5  # failures: where one kernel fails, many do


class Work(NamedTuple):
    """A plan or an update."""

    sizes: PlanSizes | UpdateSizes
    precision: str
    once: bool | None = None

    @property
    def name(self) -> str:
        """What the work is called in a message."""
        s = self.sizes
        what = f"a plan for {s.envs}" if isinstance(s, PlanSizes) else f"an update of {s.batch}"
        return f"{what}, latent {s.latent_dim}, layers of {s.mlp_dim}, {self.precision}"


def run_by(names: Sequence[str]) -> list[Work]:
    """Return the plans and updates that parts measure or test.

    Raises:
        KeyError: there is no such part.
    """
    known = {part.name: part for part in parts()}
    found: list[Work] = []
    for name in names:
        found += tested(TESTS[name]) if name in TESTS else measured(known[name])
    return list(dict.fromkeys(found))


def measured(part: Part) -> Iterator[Work]:
    """Yield what the commands of a part measure."""
    for command in (c for c in part.commands if RUN in c):
        words = command[command.index(RUN) + 1 :]
        options = parse([w for w in words if "=" in w])
        if "planner" in words:
            for size, envs, actions, x in product(options.size, options.envs, options.actions, options.precisions):
                yield Work(plan_sizes(size, envs, actions), x)
        if "update" in words:
            for size, actions, batch, x in product(options.size, options.actions, options.batch, options.precisions):
                yield Work(replace(update_sizes(size, actions), batch=batch), x)


def tested(later: bool) -> Iterator[Work]:
    """Yield what the tests run."""
    sys.path.append(str(ROOT / "tests" / "support"))
    yield from (Work(*x) for x in importlib.import_module("gpu_cases").compiled(later))


@lru_cache(maxsize=2)
def launches(work: Work, arch: int) -> list[Launch]:
    """Return the launches of a plan or an update."""
    precision = Precision(work.precision)
    if isinstance(work.sizes, PlanSizes):
        return dry_plan(work.sizes, precision, arch, work.once)[1]
    return dry_update(work.sizes, precision, arch, work.once)[0]


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
        return f"{launch.name} of {work.name}: {type(e).__name__}: {str(e)[:200]}"
    return ""


def main(names: Sequence[str]) -> int:
    """Compile the kernels of all that these parts run; returns the exit status."""
    start, device = time.perf_counter(), torch.device("cuda")
    if reason := why_not(device):
        print(f"error: {reason}", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability(device)
    works, arch = run_by(names), 10 * major + minor
    work = list(distinct(works, arch))
    jobs = min(16, max(1, len(os.sched_getaffinity(0)) - 2), len(work))  # each holds a context of the device
    done, failed = 0, list[str]()
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in as_completed([pool.submit(compile_one, *x, arch) for x in work]):
            done += 1
            failed += filter(None, [future.result()])
    except KeyboardInterrupt:
        failed.append("the time was over")
        for worker in multiprocessing.active_children():  # else the pool waits for them for ever
            worker.kill()
    except BrokenProcessPool as e:
        failed.append(str(e))
    pool.shutdown(wait=not failed, cancel_futures=True)
    what = f"{done} of {len(work)} kernels of {len(works)} plans and updates, {len(failed)} failures"
    print(*failed[:_SHOWN], f"{what}, {jobs} processes, {time.perf_counter() - start:.0f} s", sep="\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
