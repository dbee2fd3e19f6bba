"""What a plan draws: which law each tensor follows, and which stream of Philox it takes."""

from __future__ import annotations

from ..device.draw import EXPONENTIAL, INTEGER, NORMAL, PAIRS, Run
from ..layers.sizes import SHIFT_PAD
from .buffers import PlanDraws


def plan_runs(draws: PlanDraws, num_q: int) -> list[Run]:
    """Return all draws of a plan, two of `num_q` critics for each iteration among them."""
    runs = [
        Run("pi_eps", NORMAL, 0, draws.pi_eps),
        Run("samples", NORMAL, 1, draws.samples),
        Run("value_eps", NORMAL, 2, draws.value_eps),
        Run("action", NORMAL, 3, draws.action),
        Run("elite", EXPONENTIAL, 4, draws.elite),
        Run("members", PAIRS, 5, draws.members, num_q),
    ]
    return runs if draws.shift is None else [*runs, Run("shift", INTEGER, 6, draws.shift, 2 * SHIFT_PAD + 1)]
