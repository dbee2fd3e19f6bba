"""A plan, from observations on the host to actions on the host: what a control loop waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.kernels.device.launch import Precision, why_not
from tdmpc2_fast.kernels.inspect.plan_work import plan_work
from tdmpc2_fast.plan.backend import PlanRequest
from tdmpc2_fast.plan.kernel_plan import KernelPlan
from tdmpc2_fast.plan.trace import PlanTrace
from tdmpc2_fast.rng import PlanNoise
from tdmpc2_fast.sizes import plan_sizes

from ..baselines.jax_port import plan_variant
from ..baselines.official import accelerated_plan, official_plan
from ..harness.agents import (
    CompiledReference,
    agent_of,
    check_captured,
    first_observations,
    observations,
    plan_draws,
    reference_of,
    trained_agent,
    within,
)
from ..harness.measure import Case, Gate, Lineup, Variant
from ..options import Options, backend_of, each

# RMS difference of the values of a plan's first candidates, by their standard deviation. Products of
# plain torch in tf32 and bfloat16 make 1e-3 and 2e-2 of it (5M), a wrong plan about 1. What kernels may
# err is judged by the tests, against float64.
VALUE_LIMIT = dict(float32=1e-4, tf32=2e-2, bfloat16=1e-1)
ACTION_LIMIT = 1e-3  # of whole plans in float32: each iteration amplifies the rounding of the one before


class Plans(Protocol):
    """A planner, the reference or the compiled reference."""

    @property
    def prev_mean(self) -> Tensor:
        """The sequences that the next plan starts from."""
        ...

    def plan(
        self, obs: Tensor, t0: bool, eval_mode: bool, task: None, noise: PlanNoise, trace: PlanTrace | None = None
    ) -> Tensor:
        """Plan and return the actions."""
        ...


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """Yield a case for each size, action dimension, number of environments and precision."""
    return each(case, options, "size", "actions", "envs", "precisions")


class Setting:
    """An agent, observations on the host and draws for a plan, and the work that a plan is."""

    def __init__(self, options: Options, size: int, actions: int, envs: int, precision: str) -> None:
        self.cfg = cfg = options.config(size, actions, precision=precision, backend=backend_of(options))
        if options.checkpoint is None:
            self.agent, self.obs = agent_of(cfg, envs), observations(cfg, envs)
        else:
            self.agent = trained_agent(cfg, options.trained[0], envs)
            self.obs = first_observations(cfg, envs)
        self.device = self.agent.device
        self.noise = plan_draws(cfg, envs, self.device)
        self.sizes = plan_sizes(cfg, envs)
        self.work = work = plan_work(self.sizes, Precision(precision))
        self.facts: dict[str, Any] = dict(size=size, envs=envs, actions=actions, precision=precision)
        self.facts |= {} if options.checkpoint is None else dict(shape=f"weights of {Path(options.checkpoint).name}")
        self.facts |= dict(results=envs, unit="plans", gflop=work.flops / 1e9, mbyte=work.bytes / 1e6)


def case(options: Options, size: int, actions: int, envs: int, precision: str) -> Case:
    """Return planning for `envs` environments; baselines that plan for one do so for each of them."""
    at = Setting(options, size, actions, envs, precision)
    cfg, agent, device, obs, noise = at.cfg, at.agent, at.device, at.obs, at.noise
    product = agent.backend.name
    if product != "triton" and why_not(device) is None:
        raise RuntimeError(f"the kernels were to be measured, and torch plans: {agent.backend.why}")
    fused = isinstance(agent.planner._plan, KernelPlan)
    check_captured(agent.planner._plan, device)
    # A bfloat16 config is for the kernels; what else computes for it does so in tf32, or on a CPU exactly.
    other = "float32" if device.type == "cpu" else "tf32"
    note, theirs = (f" ({other})", other) if precision == "bfloat16" else ("", None)
    lineup = Lineup(product, Variant(lambda: agent.act(obs), launches=at.work.launches if fused else None), note)

    def against(baseline: Plans, envs: int) -> Callable[[], Gate]:
        return partial(plan_gate, agent, baseline, envs, noise, obs)

    if fused and precision != "bfloat16":
        plain = TDMPC2(cfg.replace(backend="torch"), envs)
        plain.load(agent.model.state_dict())
        lineup.add("torch", Variant(lambda: plain.act(obs), gate=against(plain.planner, envs)))

    one, first = _first(noise), obs[:1]
    reference = reference_of(agent)

    def planning(it: Plans) -> Variant:
        run = within(cfg, device, lambda: it.plan(first.to(device), False, False, None, one).cpu())
        return Variant(run, calls=envs, gate=against(it, 1), precision=theirs)

    def judged(other: Variant) -> Variant:
        """Compare it with its own kin, and the product with the reference."""
        assert other.gate is not None
        return replace(other, gate=partial(_both, other.gate, against(reference, 1)), precision=theirs)

    lineup.add("reference", planning(reference))
    if options.compiled:
        lineup.attempt("compiled reference", lambda: planning(CompiledReference(agent)))
    if official := options.official:
        lineup.attempt("official", lambda: judged(replace(official_plan(official, agent, first[0], one), calls=envs)))
        if envs == 1:
            lineup.attempt(
                "official, accelerated", lambda: accelerated_plan(official, agent, first[0], one), alike=True
            )
    if jax := options.jax:
        lineup.attempt("JAX port", lambda: judged(plan_variant(jax, agent, obs)))
    return Case("planner", "plan", lineup.variants, lineup.missing, **at.facts)


def _both(*gates: Callable[[], Gate]) -> Gate:
    return Gate.worst(*(g() for g in gates))


def _first(noise: PlanNoise) -> PlanNoise:
    """Return the draws of the first environment."""
    cut: dict[str, Tensor | None] = {}
    for f in fields(noise):
        x = getattr(noise, f.name)
        shared = x is None or f.name == "members"
        cut[f.name] = x if shared else x.narrow(1 if f.name in ("samples", "value_eps") else 0, 0, 1)
    return PlanNoise(**cut)  # type: ignore[arg-type]


def _traced(it: Plans, cfg: Config, envs: int, noise: PlanNoise, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Plan from a zero warm start; return the first environment's values of its first candidates, and its action."""
    trace, device = PlanTrace(), it.prev_mean.device
    found: list[Tensor] = []
    it.prev_mean.zero_()
    if envs == 1:
        obs, noise = obs[:1], _first(noise)
    within(cfg, device, lambda: found.append(it.plan(obs.to(device), False, False, None, noise, trace)))()
    action = found[0].reshape(envs, -1)[0]
    return trace.values[0][0].double().cpu(), action.double().cpu()


def plan_gate(agent: TDMPC2, baseline: Plans, envs: int, noise: PlanNoise, obs: Tensor) -> Gate:
    """Return the gate of a plan: values of first candidates, in float32 the whole plan, and replays that are eager."""
    cfg = agent.cfg
    ours, action = _traced(agent.planner, cfg, agent.planner.num_envs, noise, obs)
    theirs, wanted = _traced(baseline, cfg, envs, noise, obs)
    gates = [Gate.of_values(ours, theirs, VALUE_LIMIT[cfg.precision])]
    if cfg.precision == "float32":
        gates.append(Gate(float((action - wanted).abs().max()), ACTION_LIMIT))
    gates.append(Gate(float(not _replay_is_eager(agent, obs)), 0))
    return Gate.worst(*gates)


def _replay_is_eager(agent: TDMPC2, obs: Tensor) -> bool:
    """Tell whether a plan as timed gives, from the same draws, what the eager one gives that was compared."""
    plan = agent.planner._plan
    if not isinstance(plan, KernelPlan):
        return True
    inputs = plan.chain.inputs
    kept = inputs.rng.clone(), inputs.prev_mean.clone()
    found = []
    for trace in (None, PlanTrace()):
        inputs.rng.copy_(kept[0])
        inputs.prev_mean.copy_(kept[1])
        found.append(plan.plan(PlanRequest(obs, trace=trace)))
    return torch.equal(*found)
