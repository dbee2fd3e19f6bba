"""How many CPU threads a command gives torch.

Every op of a plan ends in a barrier. A thread that shares its core with another process
makes all others wait there: on two cores with one of them busy, two threads plan almost
three times slower than one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from tdmpc2_fast.config import Config

_STAT = Path("/proc/stat")
_SAMPLE_SECONDS = 0.3


def choose_threads(cfg: Config) -> int:
    """Set and return torch's threads: `num_threads`, or as many as cores are idle now.

    The environment variable OMP_NUM_THREADS wins over the guess, `num_threads` over both.
    The choice is made once, so that a run's arithmetic does not change under way.
    """
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    elif "OMP_NUM_THREADS" not in os.environ and _STAT.exists():
        before = _STAT.read_text()
        time.sleep(_SAMPLE_SECONDS)
        idle = idle_cores(before, _STAT.read_text())
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else round(idle)
        torch.set_num_threads(max(1, min(torch.get_num_threads(), allowed, round(idle))))
    return torch.get_num_threads()


def idle_cores(before: str, after: str) -> float:
    """Return how many cores' worth of time was idle between two readings of /proc/stat."""

    def ticks(text: str) -> tuple[int, int, int]:
        lines = [line.split() for line in text.splitlines() if line.startswith("cpu")]
        total = [int(x) for x in lines[0][1:9]]
        return sum(total), total[3] + total[4], len(lines) - 1  # idle and waiting for the disk

    (all0, idle0, cores), (all1, idle1, _) = ticks(before), ticks(after)
    return cores * (idle1 - idle0) / max(all1 - all0, 1)
