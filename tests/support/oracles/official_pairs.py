"""Pairs of equal official agents, of which one is made fast, and what they do from equal draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from official_like import OfficialLike
from small_configs import tiny_config, tiny_multitask
from torch import Tensor

from tdmpc2_fast import Config
from tdmpc2_fast.compat.draws import given, plan_order, updated
from tdmpc2_fast.learn.batch import Batch
from tdmpc2_fast.rng import PlanNoise, UpdateNoise

BACKENDS = pytest.mark.parametrize("backend", ["torch", "cpu"])
LIMIT = 1e-5
KINDS = {
    "state": tiny_config(dropout=0.0),
    "many actions": tiny_config(action_dim=21, dropout=0.0),
    # Where actions are clamped and episodes end, sequences are of exactly equal value, and torch takes any of them.
    "episodic": tiny_config(episodic=True, dropout=0.0, max_std=0.3),
    "several tasks": tiny_multitask(dropout=0.0),
}


def batch_of(cfg: Config, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    h, b = cfg.horizon, cfg.batch_size
    task = torch.randint(0, len(cfg.tasks), (b,), generator=g) if cfg.multitask else None
    ends = (torch.rand(h, b, 1, generator=g) < 0.3).float() * cfg.episodic
    action = 2 * torch.rand(h, b, cfg.need("action_dim"), generator=g) - 1
    obs = torch.randn(h + 1, b, *cfg.observation_shape, generator=g)
    return Batch(obs, action, torch.randn(h, b, 1, generator=g), ends, task)


def draws(cfg: Config, seed: int) -> UpdateNoise:
    return UpdateNoise.draw(cfg, torch.Generator().manual_seed(seed))


def learn(agent: Any, cfg: Config, seed: int) -> dict[str, Tensor]:
    """One step of an agent, accelerated or not, from draws of this seed."""
    batch, noise = batch_of(cfg, seed), draws(cfg, seed)
    if hasattr(agent, "acceleration"):
        return agent.acceleration.learn(batch, noise)
    return updated(agent, batch, noise)


def plan(agent: Any, cfg: Config, seed: int, t0: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    noise, obs = PlanNoise.draw(cfg, 1, g), torch.randn(1, *cfg.observation_shape, generator=g)
    task = torch.tensor([seed % len(cfg.tasks)]) if cfg.multitask else None
    if hasattr(agent, "acceleration"):
        return agent.acceleration.plan(obs, t0, False, task, noise)
    with given(plan_order(noise)):
        return agent.plan(obs, t0=t0, eval_mode=False, task=task)


def numbers(agent: Any) -> list[Tensor]:
    """Everything an agent has learned, and its warm start."""
    found = [x for x in agent.model.state_dict().values() if isinstance(x, Tensor)]
    for optim in (agent.optim, agent.pi_optim):
        kept = optim.state_dict()["state"]
        found += [kept[i][k] for i in kept for k in ("step", "exp_avg", "exp_avg_sq")]
    return [x.detach().clone() for x in [*found, agent.scale.value, agent._prev_mean]]


def close(a: Any, b: Any) -> bool:
    return all(torch.allclose(x, y, rtol=0, atol=LIMIT) for x, y in zip(numbers(a), numbers(b), strict=True))


def equal(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return len(xs) == len(ys) and all(map(torch.equal, xs, ys))


def pair(kind: str, before: int = 1) -> tuple[OfficialLike, OfficialLike, Config]:
    """Two equal agents that have taken `before` steps."""
    cfg = KINDS[kind]
    agents = OfficialLike(cfg), OfficialLike(cfg)
    for agent in agents:
        for i in range(before):
            learn(agent, cfg, 100 + i)
    assert equal(*map(numbers, agents))
    return *agents, cfg
