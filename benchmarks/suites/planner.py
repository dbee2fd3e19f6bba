"""A plan, from observations on the host to actions on the host: what a control loop waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.kernels.device.launch import Precision, why_not
from tdmpc2_fast.kernels.inspect.plan_work import PlanWork, plan_work
from tdmpc2_fast.plan.backend import PlanRequest
from tdmpc2_fast.plan.trace import PlanTrace
from tdmpc2_fast.plan.triton_plan import TritonPlan
from tdmpc2_fast.rng import PlanNoise, generator
from tdmpc2_fast.sizes import plan_sizes

from ..baselines.jax_port import plan_variant
from ..baselines.official import official_plan
from ..harness.agents import CompiledReference, agent_of, check_captured, observations, reference_of, within
from ..harness.measure import CannotMeasureError, Case, Gate, Variant
from ..options import Options, backend_of

# RMS difference of the values of a plan's first candidates, by their standard deviation. Products of
# plain torch in tf32 and bfloat16 make 1e-3 and 2e-2 of it (5M), a wrong plan about 1. What kernels may
# err is judged by the tests, against float64.
VALUE_LIMIT = dict(float32=1e-4, tf32=2e-2, bfloat16=1e-1)
ACTION_LIMIT = 1e-3  # of whole plans in float32: each iteration amplifies the rounding of the one before


class Plans(Protocol):
    """What `Planner`, the reference and the compiled reference share."""

    @property
    def prev_mean(self) -> Tensor:
        """Where the next plan starts."""
        ...

    def plan(
        self, obs: Tensor, t0: bool, eval_mode: bool, task: None, noise: PlanNoise, trace: PlanTrace | None = None
    ) -> Tensor:
        """Actions."""
        ...


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """One case for each size, action dimension, number of environments and precision."""
    for size in options.size:
        for actions in options.actions:
            for envs in options.envs:
                for precision in options.precisions:
                    yield partial(case, options, size, actions, envs, precision)


def case(options: Options, size: int, actions: int, envs: int, precision: str) -> Case:
    """Planning for `envs` environments; baselines that plan for one do so for each of them."""
    cfg = options.config(size, actions, precision=precision, backend=backend_of(options))
    agent = agent_of(cfg, envs)
    device, obs = agent.device, observations(cfg, envs)
    noise = PlanNoise.draw(cfg, envs, generator(options.seed, "benchmark", device))
    work = plan_work(plan_sizes(cfg, envs), Precision(precision))
    product = agent.backend.name
    if product != "triton" and why_not(device) is None:
        raise RuntimeError(f"the kernels were to be measured, and torch plans: {agent.backend.why}")
    fused = isinstance(agent.planner._plan, TritonPlan)
    check_captured(agent.planner._plan, device)
    variants = {product: Variant(lambda: agent.act(obs), launches=work.launches if fused else None)}
    missing: dict[str, str] = {}

    def against(baseline: Plans, envs: int) -> Callable[[], Gate]:
        return partial(plan_gate, agent, baseline, envs, noise, obs)

    if fused and precision != "bfloat16":
        plain = TDMPC2(cfg.replace(backend="torch"), envs)
        plain.load(agent.model.state_dict())
        variants["torch"] = Variant(lambda: plain.act(obs), gate=against(plain.planner, envs))

    one, first = _first(noise), obs[:1]
    # A bfloat16 config is for the kernels; what else computes for it does so in tf32.
    note, theirs = (" (tf32)", "tf32") if precision == "bfloat16" else ("", None)

    def planning(it: Plans) -> Variant:
        run = within(cfg, device, lambda: it.plan(first.to(device), False, False, None, one).cpu())
        return Variant(run, calls=envs, gate=against(it, 1), precision=theirs)

    reference = reference_of(agent)
    same = against(reference, 1)
    variants[f"reference{note}"] = planning(reference)
    if options.compiled:
        try:
            variants[f"compiled reference{note}"] = planning(CompiledReference(agent))
        except CannotMeasureError as e:
            missing["compiled reference"] = str(e)
    if options.official:
        try:
            run, gate = official_plan(options.official, agent, first[0], one)
            # It is compared with the reference's kin on the torch backend; the product with the reference.
            both = partial(_both, gate, same)
            variants[f"official{note}"] = Variant(run, calls=envs, gate=both, precision=theirs)
        except CannotMeasureError as e:
            missing["official"] = str(e)
    if options.jax:
        try:
            port = plan_variant(options.jax, agent, obs)
            assert port.gate is not None
            variants[f"JAX port{note}"] = replace(port, gate=partial(_both, port.gate, same), precision=theirs)
        except CannotMeasureError as e:
            missing["JAX port"] = str(e)
    return Case("planner", "plan", variants, missing, **facts(size, envs, actions, precision, work))


def facts(size: int, envs: int, actions: int, precision: str, work: PlanWork) -> dict[str, Any]:
    """What is measured in a case of plans."""
    return dict(
        size=size,
        envs=envs,
        actions=actions,
        precision=precision,
        results=envs,
        unit="plans",
        gflop=work.flops / 1e9,
        mbyte=work.bytes / 1e6,
    )


def _both(*gates: Callable[[], Gate]) -> Gate:
    return Gate.worst(*(g() for g in gates))


def _first(noise: PlanNoise) -> PlanNoise:
    """The draws of the first environment."""
    cut: dict[str, Tensor | None] = {}
    for f in fields(noise):
        x = getattr(noise, f.name)
        shared = x is None or f.name == "members"
        cut[f.name] = x if shared else x.narrow(1 if f.name in ("samples", "value_eps") else 0, 0, 1)
    return PlanNoise(**cut)  # type: ignore[arg-type]


def _traced(it: Plans, cfg: Config, envs: int, noise: PlanNoise, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the first environment's first candidates, and its action, from a zero warm start."""
    trace, device = PlanTrace(), it.prev_mean.device
    found: list[Tensor] = []
    it.prev_mean.zero_()
    if envs == 1:
        obs, noise = obs[:1], _first(noise)
    within(cfg, device, lambda: found.append(it.plan(obs.to(device), False, False, None, noise, trace)))()
    action = found[0].reshape(envs, -1)[0]
    return trace.values[0][0].double().cpu(), action.double().cpu()


def plan_gate(agent: TDMPC2, baseline: Plans, envs: int, noise: PlanNoise, obs: Tensor) -> Gate:
    """Values of the first candidates; in float32 whole plans, too; and a replay is what was compared."""
    cfg = agent.cfg
    ours, action = _traced(agent.planner, cfg, agent.planner.num_envs, noise, obs)
    theirs, wanted = _traced(baseline, cfg, envs, noise, obs)
    gates = [Gate(float((ours - theirs).square().mean().sqrt() / theirs.std()), VALUE_LIMIT[cfg.precision])]
    if cfg.precision == "float32":
        gates.append(Gate(float((action - wanted).abs().max()), ACTION_LIMIT))
    gates.append(Gate(float(not _replay_is_eager(agent, obs)), 0))
    return Gate.worst(*gates)


def _replay_is_eager(agent: TDMPC2, obs: Tensor) -> bool:
    """Whether a plan as timed gives, from the same draws, what the eager one gives that was compared."""
    plan = agent.planner._plan
    if not isinstance(plan, TritonPlan):
        return True
    inputs = plan.chain.inputs
    kept = inputs.rng.clone(), inputs.prev_mean.clone()
    found = []
    for trace in (None, PlanTrace()):
        inputs.rng.copy_(kept[0])
        inputs.prev_mean.copy_(kept[1])
        found.append(plan.plan(PlanRequest(obs, trace=trace)))
    return torch.equal(*found)
