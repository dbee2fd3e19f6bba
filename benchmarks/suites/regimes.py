"""The ways in which kernels can do a plan and an update, beside the one that `kernels/layers/tiles.py` chooses.

    once           activations are computed once: layers finish their rows
    by readers     a layer's readers activate it, each anew
    early start    a kernel begins while the one ahead of it ends; an update's do unless told otherwise

What is fastest where is what the thresholds of that table are to be set by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.kernels.device.cluster_check import how_on
from tdmpc2_fast.kernels.device.launch import Precision
from tdmpc2_fast.kernels.inspect.plan_work import dry_plan
from tdmpc2_fast.learn.kernel_update import KernelUpdate
from tdmpc2_fast.plan.backend import PlanRequest
from tdmpc2_fast.plan.kernel_plan import KernelPlan
from tdmpc2_fast.plan.trace import PlanTrace
from tdmpc2_fast.rng import PlanNoise
from tdmpc2_fast.runtime.backend import resolve_backend

from ..harness.agents import agent_of, check_captured
from ..harness.measure import CannotMeasureError, Case, Gate, Variant
from ..options import Options, backend_of, each
from . import planner, update
from .planner import VALUE_LIMIT
from .update import LIMIT, first_update, learn


def plan_cases(options: Options) -> Iterator[Callable[[], Case]]:
    """Yield a plan of each size, action dimension, number of environments and precision."""
    return each(plan_case, options, "size", "actions", "envs", "precisions")


def update_cases(options: Options) -> Iterator[Callable[[], Case]]:
    """Yield an update of each size, batch and precision."""
    return each(update_case, options, "size", "batch", "precisions")


def _check(options: Options) -> None:
    backend = resolve_backend(Config(backend=backend_of(options)), options.torch_device)
    if backend.name != "triton":
        raise CannotMeasureError(f"regimes are the kernels', and torch computes here: {backend.why}")


def regimes_on(device: torch.device, what: str) -> dict[str, dict[str, Any]]:
    """Return the arguments of a backend for each regime of a plan or an update."""
    regimes: dict[str, dict[str, Any]] = {"once": dict(once=True), "by readers": dict(once=False)}
    if not how_on(device, Precision("float32")).pdl:
        return regimes
    return regimes | ({"early start": dict(early=True)} if what == "plan" else {"no early start": dict(early=False)})


def plan_case(options: Options, size: int, actions: int, envs: int, precision: str) -> Case:
    """Return planning by planners of one model, from observations on the host to actions on the host."""
    _check(options)
    at = planner.Setting(options, size, actions, envs, precision)
    device, obs, noise = at.device, at.obs, at.noise
    chosen = at.agent.planner._plan
    assert isinstance(chosen, KernelPlan)

    planners: dict[str, Callable[[], KernelPlan]] = {"chosen": lambda: chosen}
    variants = {"chosen": Variant(partial(_act, planners["chosen"], obs), launches=at.work.launches)}
    for name, regime in regimes_on(device, "plan").items():
        launches = len(dry_plan(at.sizes, Precision(precision), once=regime.get("once"))[1])
        made = cache(partial(KernelPlan, at.agent.model, envs, options.seed, **regime))
        gate = partial(_same_values, made, planners["chosen"], obs, noise, VALUE_LIMIT[precision])
        variants[name] = Variant(partial(_act, made, obs), gate=gate, launches=launches)
    return Case("plan-regimes", "plan", variants, **at.facts)


def _act(made: Callable[[], KernelPlan], obs: Tensor) -> Tensor:
    return made().plan(PlanRequest(obs)).cpu()


def _same_values(
    made: Callable[[], KernelPlan],
    other: Callable[[], KernelPlan],
    obs: Tensor,
    noise: PlanNoise,
    limit: float,
) -> Gate:
    """Return the gate of the first iteration's values; elites, and so later ones, go with rounding."""
    check_captured(made(), made().prev_mean.device)
    theirs, ours = (_values(plan, obs, noise) for plan in (other(), made()))
    return Gate.of_values(ours, theirs, limit)


def _values(plan: KernelPlan, obs: Tensor, noise: PlanNoise) -> Tensor:
    trace = PlanTrace()
    plan.prev_mean.zero_()
    plan.plan(PlanRequest(obs, noise=noise, trace=trace))
    return trace.values[0].double()


def update_case(options: Options, size: int, batch_size: int, precision: str) -> Case:
    """Return an update on a batch on the device, by updaters of agents with the same weights."""
    _check(options)
    at = update.Setting(options, size, options.actions[0], batch_size, precision)
    agent, batch, start, noise = at.agent, at.batch, at.start, at.noise
    wanted = first_update(agent, start, batch, noise)

    variants = {"chosen": Variant(partial(learn, agent, batch, "triton"))}

    def learning(regime: dict[str, Any]) -> Variant:
        @cache
        def made() -> TDMPC2:
            it = agent_of(at.cfg)
            it.updater._chosen.made = KernelUpdate(it.model, **regime)
            return it

        first = cache(lambda: first_update(made(), start, batch, noise))

        def run() -> None:
            first()
            learn(made(), batch, "triton")

        return Variant(run, gate=lambda: Gate.of_metrics(first(), wanted, LIMIT[precision]))

    variants |= {name: learning(regime) for name, regime in regimes_on(agent.device, "update").items()}
    return Case("update-regimes", "update", variants, **at.facts)
