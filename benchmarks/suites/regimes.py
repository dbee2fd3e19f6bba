"""The ways in which kernels can do a plan and an update, beside the one that `kernels/layers/tiles.py` chooses.

    latency        a layer's readers activate it: fewer, dependent launches
    throughput     activations have launches of their own: tensor cores are not kept waiting
    persistent     an iteration's rollout is one cooperative launch
    no early start a kernel does not begin before the one ahead of it has ended

What is fastest where is what the thresholds of that table are to be set by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.kernels.device.launch import Precision, has_dependent_launch
from tdmpc2_fast.kernels.inspect.plan_work import dry_plan, plan_work
from tdmpc2_fast.learn.triton_update import TritonUpdate
from tdmpc2_fast.plan.backend import PlanRequest
from tdmpc2_fast.plan.trace import PlanTrace
from tdmpc2_fast.plan.triton_plan import TritonPlan
from tdmpc2_fast.rng import PlanNoise, UpdateNoise, generator
from tdmpc2_fast.runtime.backend import resolve_backend
from tdmpc2_fast.sizes import plan_sizes

from ..harness.agents import agent_of, batch_of, check_captured, observations
from ..harness.measure import CannotMeasureError, Case, Gate, Variant
from ..options import Options, backend_of
from .planner import VALUE_LIMIT, facts
from .update import LIMIT, first_update, learn, weights_of

_INTERPRETED_PROGRAMS = 8  # of a persistent launch; a GPU has one a multiprocessor


def plan_cases(options: Options) -> Iterator[Callable[[], Case]]:
    """A plan of each size, action dimension, number of environments and precision."""
    for size in options.size:
        for actions in options.actions:
            for envs in options.envs:
                for precision in options.precisions:
                    yield partial(plan_case, options, size, actions, envs, precision)


def update_cases(options: Options) -> Iterator[Callable[[], Case]]:
    """An update of each size, batch and precision."""
    for size in options.size:
        for batch in options.batch:
            for precision in options.precisions:
                yield partial(update_case, options, size, batch, precision)


def _check(options: Options) -> None:
    backend = resolve_backend(Config(backend=backend_of(options)), options.torch_device)
    if backend.name != "triton":
        raise CannotMeasureError(f"regimes are the kernels', and torch computes here: {backend.why}")


def plan_case(options: Options, size: int, actions: int, envs: int, precision: str) -> Case:
    """From observations on the host to actions on the host, by planners of the same model."""
    _check(options)
    cfg = options.config(size, actions, precision=precision, backend=backend_of(options))
    agent = agent_of(cfg, envs)
    device, obs = agent.device, observations(cfg, envs)
    noise = PlanNoise.draw(cfg, envs, generator(options.seed, "benchmark", device))
    sizes = plan_sizes(cfg, envs)
    work = plan_work(sizes, Precision(precision))
    chosen = agent.planner._plan
    assert isinstance(chosen, TritonPlan)

    on_gpu = device.type == "cuda"
    programs = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else _INTERPRETED_PROGRAMS
    regimes: dict[str, dict[str, Any]] = {
        "latency": dict(throughput=False),
        "throughput": dict(throughput=True),
        "persistent": dict(throughput=False, persistent=programs),
    }
    if has_dependent_launch(device):
        regimes["no early start"] = dict(pdl=False)

    planners: dict[str, Callable[[], TritonPlan]] = {"chosen": lambda: chosen}
    variants = {"chosen": Variant(partial(_act, planners["chosen"], obs), launches=work.launches)}
    missing: dict[str, str] = {}
    for name, regime in regimes.items():
        try:
            launches = len(dry_plan(sizes, Precision(precision), **regime)[1])
        except ValueError as e:
            missing[name] = str(e)
            continue
        made = cache(partial(TritonPlan, agent.model, envs, options.seed, **regime))
        planners[name] = made
        # A persistent plan's first iteration is the chain's for few environments, bit for bit; its second is the
        # first it rolls out, and may be compared with nothing else, for elites go with rounding.
        other, iteration = ("latency", 1) if "persistent" in regime else ("chosen", 0)
        gate = partial(_same_values, made, planners[other], obs, noise, iteration, VALUE_LIMIT[precision])
        variants[name] = Variant(partial(_act, made, obs), gate=gate, launches=launches)
    return Case("plan-regimes", "plan", variants, missing, **facts(size, envs, actions, precision, work))


def _act(made: Callable[[], TritonPlan], obs: Tensor) -> Tensor:
    return made().plan(PlanRequest(obs)).cpu()


def _same_values(
    made: Callable[[], TritonPlan],
    other: Callable[[], TritonPlan],
    obs: Tensor,
    noise: PlanNoise,
    iteration: int,
    limit: float,
) -> Gate:
    """RMS difference of an iteration's values by their standard deviation."""
    check_captured(made(), made().prev_mean.device)
    theirs, ours = (_values(plan, obs, noise, iteration) for plan in (other(), made()))
    return Gate(float((ours - theirs).square().mean().sqrt() / theirs.std()), limit)


def _values(plan: TritonPlan, obs: Tensor, noise: PlanNoise, iteration: int) -> Tensor:
    trace = PlanTrace()
    plan.prev_mean.zero_()
    plan.plan(PlanRequest(obs, noise=noise, trace=trace))
    return trace.values[iteration].double()


def update_case(options: Options, size: int, batch_size: int, precision: str) -> Case:
    """An update on a batch on the device, by updaters of agents with the same weights."""
    _check(options)
    actions = options.actions[0]
    cfg = options.config(size, actions, precision=precision, batch_size=batch_size, backend=backend_of(options))
    agent = agent_of(cfg)
    batch, start = batch_of(cfg, agent.device), weights_of(agent)
    noise = UpdateNoise.draw(cfg, generator(options.seed, "benchmark", agent.device))
    wanted = first_update(agent, start, batch, noise)

    regimes: dict[str, dict[str, bool]] = {"latency": dict(throughput=False), "throughput": dict(throughput=True)}
    if has_dependent_launch(agent.device):
        regimes["no early start"] = dict(pdl=False)
    variants = {"chosen": Variant(partial(learn, agent, batch, "triton"))}

    def learning(regime: dict[str, bool]) -> Variant:
        @cache
        def made() -> TDMPC2:
            it = agent_of(cfg)
            it.updater._chosen.made = TritonUpdate(it.model, **regime)
            return it

        first = cache(lambda: first_update(made(), start, batch, noise))

        def run() -> None:
            first()
            learn(made(), batch, "triton")

        return Variant(run, gate=lambda: Gate.of_metrics(first(), wanted, LIMIT[precision]))

    variants |= {name: learning(regime) for name, regime in regimes.items()}
    return Case(
        "update-regimes",
        "update",
        variants,
        size=size,
        actions=actions,
        batch=batch_size,
        precision=precision,
        unit="updates",
    )
