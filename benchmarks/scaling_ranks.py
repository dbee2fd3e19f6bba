"""Updates shared by processes of this machine, one thread each, beside what scaling.py's sum predicts of them.

    predicted(n) = update(1) max(1, n / cores) + collectives(n)

where collectives are measured apart, on all ranks and with nothing between them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.learn.batch import Batch
from tdmpc2_fast.learn.kernel_update import KernelUpdate
from tdmpc2_fast.runtime.cores import cores
from tdmpc2_fast.runtime.ranks import Ranks, joined

RANKS = (1, 2, 4)
_REPEATS, _WARM_UP = 15, 3
_SLICES = 64  # on each rank
_MODEL = dict(model_size=1, backend="cpu", device="cpu", batch_size=_SLICES)


def measured(repeats: int = _REPEATS, **model: object) -> str:
    """Run 1, 2 and 4 ranks and return a table of medians with quartiles, in ms.

    model: config keys other than those of the 1M model at 64 slices a rank.
    """
    rows = [_run(n, repeats, {**_MODEL, **model}) for n in RANKS]
    one = statistics.median(rows[0].update)
    load = os.getloadavg()[0]
    lines = ["| ranks | batch | update, ms | collectives apart | predicted | measured / predicted | slices/s |"]
    lines.append("| ---: |" + " ---: |" * 6)
    for n, row in zip(RANKS, rows, strict=True):
        update = statistics.median(row.update)
        apart = statistics.median(row.collectives) if n > 1 else 0.0
        predicted = one * max(1, n / cores()) + apart
        batch = n * row.slices
        lines.append(
            f"| {n} | {batch} | {_spread(row.update)} | {_spread(row.collectives) if n > 1 else '0'} | "
            f"{1e3 * predicted:.1f} | {update / predicted:.2f} | {batch / update:,.0f} |"
        )
    return "\n".join([*lines, "", f"{cores()} cores, load {load:.1f}, {repeats} updates, median (quartiles)"])


def _spread(seconds: list[float]) -> str:
    low, middle, high = (1e3 * x for x in statistics.quantiles(seconds, n=4))
    return f"{middle:.1f} ({low:.1f}, {high:.1f})"


class _Times(NamedTuple):
    update: list[float]  # seconds
    collectives: list[float]
    slices: int  # on each rank


def _run(n: int, repeats: int, model: dict[str, object]) -> _Times:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    words = ["-m", __spec__.name, str(repeats), json.dumps(model)]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run([*torchrun, *words], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{n} ranks: {done.stderr.strip()[-2000:]}")
    return _Times(*json.loads(done.stdout.strip().splitlines()[-1]))


def _rank(repeats: int, model: dict[str, object]) -> None:
    """Measure on this rank; the first one prints."""
    torch.set_num_threads(1)
    ranks = joined("cpu", 5.0)
    slices = int(str(model["batch_size"]))
    cfg = Config.from_dict({**model, "batch_size": slices * ranks.count}).with_env({"state": (24,)}, 6, 500)
    agent, h = TDMPC2(cfg, ranks=ranks), cfg.horizon
    g = torch.Generator().manual_seed(ranks.rank)
    batch = Batch(
        obs=torch.randn(h + 1, slices, 24, generator=g),
        action=2 * torch.rand(h, slices, 6, generator=g) - 1,
        reward=torch.rand(h, slices, 1, generator=g),
        terminated=torch.zeros(h, slices, 1),
        task=None,
    )
    updates = _timed(lambda: agent.updater.step(batch), repeats, ranks)
    chain = agent.updater._update.chain if isinstance(agent.updater._update, KernelUpdate) else None
    assert chain is not None, "the C++ kernels of the CPU are what is measured"
    q, whole = torch.zeros(slices), torch.zeros(slices * ranks.count)

    def exchange() -> None:
        for x in (chain.world.grad, chain.policy.grad, chain.losses.told):
            ranks.sum(x)
        ranks.gather(q, whole)

    apart = _timed(exchange, repeats, ranks)
    if ranks.first:
        print(json.dumps(_Times(updates, apart, slices)), flush=True)
    ranks.leave()


def _timed(work: Callable[[], object], repeats: int, ranks: Ranks) -> list[float]:
    found = []
    for i in range(repeats + _WARM_UP):
        ranks.most(0)  # all begin together
        begun = time.perf_counter()
        work()
        if i >= _WARM_UP:
            found.append(time.perf_counter() - begun)
    return found


if __name__ == "__main__":
    _rank(int(sys.argv[1]), json.loads(sys.argv[2]))
