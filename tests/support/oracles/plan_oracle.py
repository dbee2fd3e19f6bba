"""Values of whole plans against a float64 run and against plain torch at the same precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from unittest import mock

import torch
import torch.nn.functional as F
from judge import within_twice
from oracle import KERNELS

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.kernels.device.launch import Precision
from tdmpc2_fast.plan.backend import PlanBackend, PlanRequest
from tdmpc2_fast.plan.kernel_plan import KernelPlan
from tdmpc2_fast.plan.torch_plan import TorchPlan
from tdmpc2_fast.plan.trace import PlanTrace
from tdmpc2_fast.rng import PlanNoise, generator

# How near 0.5 a termination is that rounding may put on the other side.
MARGIN = dict(float32=1e-3, tf32=2e-2, bfloat16=0.15)


CPU = torch.device("cpu")


def draw(cfg: Config, count: int, device: torch.device = CPU) -> PlanNoise:
    return PlanNoise.draw(cfg, count, generator(0, "test", device))


def observation(cfg: Config, count: int, device: torch.device) -> torch.Tensor:
    size = count, *cfg.observation_shape
    if cfg.obs == "rgb":
        return torch.randint(256, size, dtype=torch.uint8, device=device)
    return torch.randn(size, device=device)


def task_of(cfg: Config, count: int, device: torch.device) -> torch.Tensor | None:
    return torch.arange(count, device=device) % len(cfg.tasks) if cfg.multitask else None


def first_values(plan: PlanBackend, cfg: Config, count: int, obs: torch.Tensor, noise: PlanNoise) -> PlanTrace:
    trace = PlanTrace()
    plan.plan(PlanRequest(obs, True, True, task_of(cfg, count, obs.device), noise, trace))
    return trace


def in_double(agent: TDMPC2) -> TorchPlan:
    """The float64 oracle of an agent's plans; what it does needs float64 as the default type."""
    twin = TDMPC2(agent.cfg.replace(backend="torch", precision="float32"), num_envs=agent.planner.num_envs)
    twin.load(agent.model.state_dict())
    return TorchPlan(twin.model, agent.planner.num_envs, twin.planner.generator)


@contextmanager
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def plain_products(agent: TDMPC2, precision: str) -> Iterator[None]:
    """Within: plain torch multiplies at this precision; bins and returns stay float32, as in the kernels.

    tf32 is a GPU's own; elsewhere operands are rounded to it.
    """
    device, scalar, linear = agent.device.type, agent.model.scalar, F.linear
    tf32 = Precision("tf32")

    def scalar_in_float32(logits: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, enabled=False):
            return scalar(logits.float())

    def rounded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(tf32.operand(x), tf32.operand(weight), bias)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(agent.model, "scalar", scalar_in_float32))
        stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"))
        if precision == "tf32" and device != "cuda":
            stack.enter_context(mock.patch.object(F, "linear", rounded))
        yield


@contextmanager
def terminations_watched(plan: TorchPlan, margin: float) -> Iterator[list[torch.Tensor]]:
    """Within: for each call, whether no sequence's termination is one that rounding may turn."""
    seen: list[torch.Tensor] = []
    termination = plan.model.termination

    def watched(z: torch.Tensor) -> torch.Tensor:
        p = termination(z)
        seen.append(((p - 0.5).abs() > margin).squeeze(-1))
        return p

    with mock.patch.object(plan.model, "termination", watched):
        yield seen


def as_double(noise: PlanNoise) -> PlanNoise:
    given = {f.name: getattr(noise, f.name) for f in fields(noise)}
    return PlanNoise(**{k: v.double() if v is not None and v.is_floating_point() else v for k, v in given.items()})


def check_values(agent: TDMPC2, precision: str, once: bool) -> None:
    """Values of the fused plan's first iteration err at most twice as far as plain torch's.

    agent: of the torch backend, at tf32 or exact as `precision` asks of what torch computes.
    """
    cfg, count = agent.cfg, agent.planner.num_envs
    obs, noise = observation(cfg, count, agent.device), draw(cfg, count, agent.device)
    if cfg.episodic:  # of a new model they are all near 0.5
        with torch.no_grad():
            agent.model.get_parameter("_termination.2.weight").mul_(30)
    twin = TDMPC2(cfg, num_envs=count)
    twin.load(agent.model.state_dict())
    twin.model.cfg = cfg.replace(precision=precision, backend=KERNELS)
    fused = KernelPlan(twin.model, count, 0, once=once)
    got = first_values(fused, cfg, count, obs, noise).values[0].double()
    with plain_products(agent, precision):
        plan = TorchPlan(agent.model, count, agent.planner.generator)
        plain = first_values(plan, cfg, count, obs, noise).values[0].double()
    with double_by_default():
        exact_plan = in_double(agent)
        with terminations_watched(exact_plan, MARGIN[precision]) as seen:
            exact = first_values(exact_plan, cfg, count, obs.double(), as_double(noise)).values[0]
    kept = torch.ones_like(exact, dtype=torch.bool)
    if cfg.episodic:
        # Each step of the prior's sequences, then each of the samples'.
        prior, samples = seen[: cfg.horizon], seen[cfg.horizon : 2 * cfg.horizon]
        kept = torch.cat([torch.stack(x).all(0) for x in (prior, samples)], 1)
    assert kept.sum() >= kept.numel() / 4
    within_twice(got[kept], plain[kept], exact[kept], floor=2**-22)
