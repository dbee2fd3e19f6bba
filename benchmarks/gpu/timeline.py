"""Where the device's time of a plan and an update goes, kernel by kernel.

    python -m tdmpc2_fast.benchmarks.gpu.timeline [plan] [update] [regimes] [KEY=VALUE of `bench` ...]

Prints, for each plan of one environment and each update of 256, the time of a replay of its graph on the device, by
events around many; with `regimes` also that of each other way to do it (suites/regimes.py). Then, from the profiler,
by kernel and grid: the launches, and how much later each ended than what ended before it. These add up to the replay,
also where kernels start early and wait. What the wall clock of the other benchmarks shows beyond it is the host's.
`timeline.json` in `out` has all numbers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tdmpc2_fast.learn.kernel_update import KernelUpdate
from tdmpc2_fast.plan.backend import PlanRequest
from tdmpc2_fast.plan.kernel_plan import KernelPlan

from ..harness.agents import agent_of, batch_of, check_captured, observations
from ..harness.machine import this_machine
from ..options import Options, parse
from ..suites.regimes import regimes_on

_WHAT = ("plan", "update")
_WAYS = "regimes"
_REPLAYS = 100
_PROFILED = 20


def replay_of(options: Options, size: int, precision: str, what: str, regime: dict[str, Any]) -> Callable[[], object]:
    """Return what replays the graph of a plan or an update, and nothing else."""
    cfg = options.config(size, options.actions[0], precision=precision, backend="triton")
    agent = agent_of(cfg)
    made: Any
    if what == "plan":
        made = KernelPlan(agent.model, 1, options.seed, **regime)
        made.plan(PlanRequest(observations(cfg, 1).to(agent.device)))
        graph = made._graph
    else:
        made = KernelUpdate(agent.model, **regime)
        agent.updater._chosen.made = made
        agent.updater.step(batch_of(cfg, agent.device))
        graph = made._from_batch
    check_captured(made, agent.device)
    return lambda: graph()


def microseconds(replay: Callable[[], object]) -> list[float]:
    """Return the device's time of each of many replays, one behind the other."""
    for _ in range(10):
        replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    torch.cuda.synchronize()
    return [1000 * a.elapsed_time(b) for a, b in pairwise(events)]


def kernels(replay: Callable[[], object]) -> list[dict[str, Any]]:
    """Return the kernels of replays in their order: name, grid, start and end in microseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_PROFILED):
            replay()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = [
        dict(name=e["name"], grid="x".join(map(str, e["args"]["grid"])), start=e["ts"], end=e["ts"] + e["dur"])
        for e in events
        if e.get("cat") == "kernel"
    ]
    return sorted(found, key=lambda k: k["start"])


def shares(found: Sequence[dict[str, Any]]) -> list[tuple[str, str, float, float, float]]:
    """Return by name and grid: launches a replay, microseconds of a replay, and the median of one launch.

    What a launch takes is how much later it ended than all before it.
    """
    each: dict[tuple[str, str], list[float]] = {}
    last = found[0]["start"] if found else 0.0
    for k in found:
        each.setdefault((k["name"], k["grid"]), []).append(max(0.0, k["end"] - last))
        last = max(last, k["end"])
    rows = [(*key, len(x) / _PROFILED, sum(x) / _PROFILED, median(x)) for key, x in each.items()]
    return sorted(rows, key=lambda r: -r[3])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse([w for w in words if w not in (*_WHAT, _WAYS)])
    asked = [w for w in words if w in _WHAT] or _WHAT
    print(this_machine(options.torch_device).label)
    measured = []
    for what, size, precision in product(asked, options.size, options.precisions):
        ways: dict[str, dict[str, Any]] = {"chosen": {}}
        if _WAYS in words:
            ways |= regimes_on(options.torch_device, what)
        replays = {way: replay_of(options, size, precision, what, regime) for way, regime in ways.items()}
        times = {way: microseconds(replay) for way, replay in replays.items()}
        measured.append((f"{what}, {size}M, {precision}", replays["chosen"], times))
    kept = []
    for name, replay, times in measured:  # a profiler, once attached, slows down what is timed after it
        print(f"\n{name}: us a replay (20th, 80th percentile)")
        for way, found in times.items():
            p20, p50, p80 = (sorted(found)[int(q * len(found))] for q in (0.2, 0.5, 0.8))
            print(f"  {way:16} {p50:8.1f} ({p20:.1f}, {p80:.1f})")
        rows = shares(kernels(replay))
        print(f"  {'kernel':28} {'grid':>14} {'launches':>8} {'us':>8} {'us each':>8}")
        for kernel, grid, launches, us, one in rows:
            print(f"  {kernel:28} {grid:>14} {launches:8.1f} {us:8.1f} {one:8.2f}")
        kept.append(dict(name=name, replay_us=times, kernels=rows))
    Path(options.out).mkdir(parents=True, exist_ok=True)
    Path(options.out, "timeline.json").write_text(json.dumps(kept) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
