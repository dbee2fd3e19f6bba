"""Plan and update of the torch backend against the eager reference, in one run.

    python benchmarks/plan_update.py [model_size=5] [repeats=20] [threads=N] [out=FILE.json]

Same weights, same inputs, same draws. Each ratio is printed only if both gave the same
result; the two are timed in turns, so that drift of the machine meets both alike.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tdmpc2_fast.kernels.launch import Precision
from tdmpc2_fast.kernels.work import plan_work

import tdmpc2_fast
from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.packing import plan_sizes
from tdmpc2_fast.reference import ReferenceAgent
from tdmpc2_fast.rng import PlanNoise, UpdateNoise, generator
from tdmpc2_fast.update import Batch

OBS, ACTION = 24, 6


def measure(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each variant, taken in turns after two warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(repeats + 2):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if i >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def randomise(agent: TDMPC2) -> None:
    """Weights of a trained model's size: the zero last layers would make all values equal."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in agent.model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)


def agents(cfg: Config) -> tuple[TDMPC2, ReferenceAgent]:
    """Product and reference with equal weights."""
    agent = TDMPC2(cfg)
    randomise(agent)
    return agent, ReferenceAgent(cfg, tensors_only(agent.model.state_dict()))


def plan_pair(cfg: Config, repeats: int) -> tuple[bool, dict[str, list[float]]]:
    """Whether both plan the same action, and their times."""
    agent, reference = agents(cfg)
    g = generator(0, "benchmark", torch.device("cpu"))
    noise, obs = PlanNoise.draw(cfg, 1, g), torch.randn(1, OBS)
    same = torch.allclose(
        agent.planner.plan(obs, True, False, None, noise)[0],
        reference.plan(obs, True, False, None, noise),
        atol=1e-3,
    )
    times = measure(
        {
            "reference": lambda: reference.plan(obs, False, False, None, PlanNoise.draw(cfg, 1, g)),
            "torch": lambda: agent.planner.plan(obs, False, False, None, PlanNoise.draw(cfg, 1, g)),
        },
        repeats,
    )
    return same, times


def update_pair(cfg: Config, repeats: int) -> tuple[bool, dict[str, list[float]]]:
    """Whether both compute the same losses, and their times."""
    agent, reference = agents(cfg)
    g = generator(0, "benchmark", torch.device("cpu"))
    h, b = cfg.horizon, cfg.batch_size
    batch = Batch(torch.randn(h + 1, b, OBS), torch.rand(h, b, ACTION), torch.rand(h, b, 1), torch.zeros(h, b, 1), None)
    noise = UpdateNoise.draw(cfg, g)
    got, want = agent.updater.step(batch, noise), reference.update(batch, noise)
    same = all(torch.allclose(got[k], want[k], rtol=1e-3, atol=1e-4) for k in want)
    times = measure(
        {
            "reference": lambda: reference.update(batch, UpdateNoise.draw(cfg, g)),
            "torch": lambda: agent.updater.step(batch, UpdateNoise.draw(cfg, g)),
        },
        repeats,
    )
    return same, times


def quartiles(x: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    q = statistics.quantiles(x, n=5)
    return q[0], statistics.median(x), q[-1]


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    root = Path(__file__).parents[1]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    return dict(
        cpu=cpu,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        tdmpc2_fast=tdmpc2_fast.__version__,
        commit=commit.stdout.strip() or "unknown",
    )


def main(argv: list[str]) -> int:
    """Measure and print; returns 1 if a correctness gate failed."""
    options = dict(model_size="5", repeats="20", threads=str(torch.get_num_threads()), out="")
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals or key not in options:
            print(f"argument {word!r}: allowed: {', '.join(k + '=...' for k in options)}", file=sys.stderr)
            return 2
        options[key] = value
    try:
        size, repeats, threads = (int(options[k]) for k in ("model_size", "repeats", "threads"))
    except ValueError as e:
        print(f"model_size, repeats and threads are integers: {e}", file=sys.stderr)
        return 2
    if repeats < 2 or threads < 1:
        print("allowed: repeats of at least 2, threads of at least 1", file=sys.stderr)
        return 2
    torch.set_num_threads(threads)
    cfg = Config.from_dict(dict(model_size=size, device="cpu")).with_env({"state": (OBS,)}, ACTION, 500)
    rows, failed = [], False
    print(
        "| what | reference ms (p20, p80) | torch backend ms (p20, p80) | ratio of medians |\n| --- | --- | --- | --- |"
    )
    for name, pair in (("plan", plan_pair), ("update", update_pair)):
        same, times = pair(cfg, repeats)
        stats = {k: quartiles(v) for k, v in times.items()}
        ratio = stats["reference"][1] / stats["torch"][1]
        cells = [f"{m:.0f} ({a:.0f}, {b:.0f})" for a, m, b in stats.values()]
        shown = f"{ratio:.2f}x" if same else "not shown: results differ"
        print(f"| {name}, {size}M | {cells[0]} | {cells[1]} | {shown} |", flush=True)
        failed |= not same
        rows.append(dict(what=name, model_size=size, same_result=same, ratio=ratio if same else None, ms=times))
    work = plan_work(plan_sizes(cfg, 1), Precision("bfloat16"))
    print(
        f"\nOn the Triton backend a plan of this size is {work.launches} launches, {work.flops / 1e9:.1f} GFLOP, at "
        f"bfloat16 {work.bytes / 1e6:.1f} MB from memory and {work.l2_bytes / 1e9:.2f} GB through L2 (counted)."
    )
    if options["out"]:
        Path(options["out"]).write_text(json.dumps(dict(machine=machine(), rows=rows), indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
