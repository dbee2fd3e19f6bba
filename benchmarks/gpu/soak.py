"""The soak: thousands of updates of a small model, with new episodes now and then, show whether an update leaks.

    python -m tdmpc2_fast.benchmarks.gpu.soak [updates=20000] [KEY=VALUE ...]

The keys are those of `tdmpc2-fast train`. After a tenth of the updates, when caches are full, it looks at the process
ten times. The exit status is 1 where resident memory or open files have grown from the first look to the last, where
anything was compiled in between, or where a metric is not finite. Linux only.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch._dynamo.utils import counters

from tdmpc2_fast import TDMPC2, Config, ReplayBuffer
from tdmpc2_fast.errors import ConfigError, NonFiniteError
from tdmpc2_fast.train.cli.keys import parse

from ..harness.agents import episode_of

MEMORY_SHARE, MEMORY_BYTES = 0.02, 5e6  # growth that is still noise: below both
POINTS = 10

# A model of milliseconds: what leaks does so once an update, whatever its size.
_SIZES = dict(latent_dim=16, mlp_dim=32, enc_dim=16, num_q=3, batch_size=16, device="cpu")
_OBS_DIM, _ACTION_DIM, _LENGTH = 5, 2, 50
_EPISODES_HELD, _UPDATES_PER_EPISODE = 20, 50


class Point(NamedTuple):
    """The process after some updates."""

    updates: int
    resident: int  # bytes
    files: int  # open
    graphs: int  # compiled by torch.compile so far
    finite: bool  # all metrics of all updates since the point before
    ms: float  # mean time of these updates

    @classmethod
    def now(cls, updates: int, finite: bool, ms: float) -> Point:
        """Look at this process."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            updates=updates,
            resident=pages * os.sysconf("SC_PAGE_SIZE"),
            files=len(os.listdir("/proc/self/fd")),
            graphs=counters["stats"]["unique_graphs"],
            finite=finite,
            ms=ms,
        )


def soak(cfg: Config, updates: int) -> list[Point]:
    """Update an agent and look at the process after a tenth of the updates and nine times more.

    cfg: completed, of states and one task. The replay is full before the first update, so that its
    memory is in use from the start.
    """
    agent = TDMPC2(cfg)
    buffer = ReplayBuffer(cfg, agent.device)
    rng = np.random.default_rng(cfg.seed)
    for _ in range(_EPISODES_HELD + 1):
        buffer.add(episode_of(cfg, _LENGTH, rng))
    looks = np.linspace(updates // POINTS, updates, POINTS).astype(int).tolist()
    points, last, done, start = [], 0, torch.ones((), dtype=torch.bool, device=agent.device), time.perf_counter()
    for i in range(1, updates + 1):
        if i % _UPDATES_PER_EPISODE == 0:
            buffer.add(episode_of(cfg, _LENGTH, rng))
        metrics = agent.update(buffer)
        done &= torch.stack([v.float() for v in metrics.values()]).isfinite().all()
        if i in looks:
            ms = 1e3 * (time.perf_counter() - start) / (i - last)
            points.append(Point.now(i, bool(done), ms))
            last, start = i, time.perf_counter()
            done.fill_(True)
    return points


def faults(points: Sequence[Point]) -> list[str]:
    """Return what must not have happened between the first point and the last."""
    first, last = points[0], points[-1]
    found = []
    grown = last.resident - first.resident
    if grown > min(MEMORY_SHARE * first.resident, MEMORY_BYTES):
        found.append(f"memory grew by {grown / 1e6:.1f} MB ({grown / first.resident:.1%})")
    if last.files > first.files:
        found.append(f"open files grew from {first.files} to {last.files}")
    if last.graphs > first.graphs:
        found.append(f"{last.graphs - first.graphs} graphs were compiled after the warm-up")
    if not all(p.finite for p in points):
        found.append("a metric is not finite")
    return found


def table(points: Sequence[Point]) -> str:
    """Return a heading, and a line for each point."""
    lines = [f"{'updates':>9} {'resident MB':>12} {'files':>6} {'graphs':>7} {'finite':>7} {'ms':>6}"]
    lines += [
        f"{p.updates:>9,} {p.resident / 1e6:>12.2f} {p.files:>6} {p.graphs:>7} {str(p.finite).lower():>7} {p.ms:>6.2f}"
        for p in points
    ]
    return "\n".join(lines)


def options(words: Sequence[str]) -> tuple[int, Config]:
    """Return the updates and the completed config that words ask for; a bad word raises `ConfigError`."""
    own = [w for w in words if w.startswith("updates=")]
    text = own[-1].partition("=")[2].replace("_", "") if own else "20000"
    if not text.isdecimal() or int(text) < 2 * POINTS:
        raise ConfigError(f"soak key 'updates': got {text!r}, allowed: an integer, at least {2 * POINTS}")
    size = dict(buffer_size=_EPISODES_HELD * (_LENGTH + 1))
    cfg = Config.from_dict({**_SIZES, **size, **parse([w for w in words if w not in own])})
    if cfg.obs != "state":
        raise ConfigError(f"config key 'obs': got {cfg.obs!r}, allowed in a soak: 'state'")
    return int(text), cfg.with_env({"state": (_OBS_DIM,)}, _ACTION_DIM, _LENGTH)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    words = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & {*words}:
        print(__doc__)
        return 0
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        updates, cfg = options(words)
        points = soak(cfg, updates)
    except (ConfigError, NonFiniteError) as e:
        print(e, file=sys.stderr)
        return 1
    print(table(points))
    found = faults(points)
    for fault in found:
        print(f"FAULT: {fault}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
