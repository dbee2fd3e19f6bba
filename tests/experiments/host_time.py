"""An experiment: the host's time in a call of a planner on a GPU, without the device's: `python host_time.py`.

The planner is made on the rehearsed device, and its graph replaced by nothing. Then the rehearsal is left: what torch
does with small tensors of the host costs about what it costs to send the same to a device, less the driver's part.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import rehearsal
import torch


def micros(call: Callable[[], object], calls: int = 2000) -> tuple[float, float]:
    """Return median and 90th percentile of calls, in microseconds."""
    call()
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        found.append(1e6 * (time.perf_counter() - start))
    return statistics.median(found), statistics.quantiles(found, n=10)[-1]


def planner_without_device(num_envs: int = 1, **keys: Any) -> Any:
    """Return a planner of a GPU whose replays do nothing, for use outside the rehearsal."""
    from tdmpc2_fast import Config, WorldModel
    from tdmpc2_fast.plan.planner import Planner

    cfg = Config.from_dict(dict(model_size=1, device="cuda", backend="triton") | keys)
    with rehearsal.without_kernels():
        planner: Any = Planner(WorldModel(cfg.with_env({"state": (24,)}, 6, 500)).to("cuda").eval(), num_envs)
    planner._plan._graph = lambda stale: None
    planner._plan._device.check = lambda *_: None  # it would notice that the rehearsal is left
    return planner


def main() -> None:
    """Print a line for each part: median, and 90th percentile."""
    rehearsal.begin()
    from tdmpc2_fast.inputs import check_obs
    from tdmpc2_fast.plan.backend import PlanRequest

    planner = planner_without_device()
    plan = planner._plan
    obs = np.random.default_rng(0).standard_normal((1, 24)).astype(np.float32)
    request = PlanRequest(torch.from_numpy(obs))

    def turn() -> None:
        with plan._device.turn():
            pass

    parts: dict[str, Callable[[], object]] = dict(
        plan=lambda: planner.plan(obs),
        check_obs=lambda: check_obs(obs, planner.cfg, (1,)),
        turn=turn,
        refresh=plan._packed.refresh,
        take_in=lambda: plan._take_in(request),
        action=lambda: plan.chain.state.action.clone(),
    )
    with rehearsal._plainly():
        for name, call in parts.items():
            print("{:10} {:6.1f} {:6.1f}".format(name, *micros(call)))


if __name__ == "__main__":
    main()
