"""That an agent goes on from what it keeps of itself, on the host and on a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from conftest import random_episode

from tdmpc2_fast import TDMPC2, Config, ReplayBuffer
from tdmpc2_fast.compat.state_dict import tensors_only


def learn(agent: TDMPC2, buffer: ReplayBuffer, updates: int) -> list[float]:
    """Make some updates and a plan; return what can be seen of them."""
    task = 1 if agent.cfg.multitask else None
    metrics = [agent.update(buffer)["total_loss"] for _ in range(updates)]
    return [*torch.stack(metrics).tolist(), *agent.act(torch.ones(5), task=task).tolist()]


def everything(agent: TDMPC2) -> dict[str, bytes]:
    found = tensors_only(agent.model.state_dict()) | agent.updater.state()
    found |= {f"planner {k}": v for k, v in agent.planner.state().items()}
    found = {k: v.detach().cpu().contiguous() for k, v in found.items()}
    return {k: v.flatten().view(torch.uint8).numpy().tobytes() for k, v in found.items()}


def replay(agent: TDMPC2) -> ReplayBuffer:
    return ReplayBuffer(agent.cfg, agent.device)


def check_goes_on(cfg: Config, keep: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Check that an agent and its replay, kept and taken up by others, do what they themselves do from there."""
    agent = TDMPC2(cfg)
    buffer = replay(agent)
    for i in range(4):
        buffer.add(random_episode(cfg, 20, seed=i, task=i % len(cfg.tasks) if cfg.multitask else None))
    learn(agent, buffer, 2)
    weights = {k: v.clone() for k, v in agent.model.state_dict().items() if isinstance(v, torch.Tensor)}
    updater, planner, steps = keep(agent.updater.state()), keep(agent.planner.state()), keep(buffer.state())
    chunk = buffer.steps(0, buffer.written)

    other = TDMPC2(cfg.replace(seed=5))
    other_buffer = replay(agent)
    other.load(weights)
    other.updater.load_state(updater)
    other.planner.load_state(planner)
    other_buffer.restore(steps, [(0, chunk)])
    assert other_buffer.state().keys() == buffer.state().keys()
    assert everything(other) == everything(agent)
    assert other.updater.steps == 2
    assert learn(other, other_buffer, 2) == learn(agent, buffer, 2)
    assert everything(other) == everything(agent)
