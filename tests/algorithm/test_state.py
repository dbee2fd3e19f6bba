"""What an agent and a replay keep is all they need to go on bit for bit, through a file and in another object."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import filled_buffer, random_episode, tiny_config, tiny_multitask
from going_on import check_goes_on

from tdmpc2_fast import TDMPC2, Config, ReplayBuffer
from tdmpc2_fast.model.files import read_tensors, write_tensors

SMALL = dict(mlp_dim=8, enc_dim=8, latent_dim=8, num_q=2, num_bins=11, horizon=1, num_samples=8, num_elites=2)
SMALLER: dict[str, Any] = dict(SMALL, num_pi_trajs=2, batch_size=4, iterations=1)
CONFIGS = {
    "plain": lambda **keys: tiny_config(**keys),
    "episodic": lambda **keys: tiny_config(episodic=True, **keys),
    "multitask": lambda **keys: tiny_multitask(**keys),
}


@pytest.mark.parametrize("backend", ["torch", "triton", "cpu"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_agent_goes_on_as_if_it_had_not_been_kept(kind: str, backend: str, tmp_path: Path) -> None:
    def through_a_file(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        write_tensors(tmp_path / "state", tensors)
        return read_tensors(tmp_path / "state")[0]

    seed = int(np.random.default_rng().integers(2**31))
    check_goes_on(CONFIGS[kind](**SMALLER, backend=backend, seed=seed), through_a_file)


@pytest.mark.parametrize(
    ("before", "after"),
    [("torch", "triton"), ("triton", "torch"), ("torch", "cpu"), ("cpu", "torch"), ("triton", "cpu")],
)
def test_moments_go_from_one_backend_to_the_other(before: str, after: str) -> None:
    cfg = tiny_multitask(**SMALLER)
    agents = {name: TDMPC2(cfg.replace(backend=name)) for name in (before, after)}
    buffer = filled_buffer(cfg)
    agents[before].update(buffer)
    state = agents[before].updater.state()
    agents[after].load(agents[before].model.state_dict())
    agents[after].updater.load_state(state)
    loaded = agents[after].updater.state()
    names = [n for n, p in agents[before].model.named_parameters() if p.requires_grad]
    for key in [f"{m}.{n}" for m in ("exp_avg", "exp_avg_sq") for n in names] + ["scale", "task_gradient"]:
        assert torch.equal(state[key], loaded[key]), key
    assert int(loaded["world.step"]) == int(loaded["policy.step"]) == 1
    assert any(state[f"exp_avg.{n}"].any() for n in names)
    agents[after].update(buffer)
    assert agents[after].updater.steps == 2


def test_an_agent_that_never_learned_is_kept_as_that(tmp_path: Path) -> None:
    agent = TDMPC2(tiny_config(**SMALLER))
    assert agent.updater.state() == {}
    agent.updater.load_state({})
    assert agent.updater.steps == 0
    agent.update(filled_buffer(agent.cfg))
    agent.updater.load_state({})
    assert agent.updater.state() == {}


def test_an_optimiser_that_took_no_step_is_kept_as_that() -> None:
    """The first gradient of the policy may have been none, after the world model's step."""
    cfg = tiny_config(**SMALLER, backend="torch")
    agent, other, buffer = TDMPC2(cfg), TDMPC2(cfg), filled_buffer(cfg)
    agent.update(buffer)
    state = {k: v for k, v in agent.updater.state().items() if k != "policy.step" and "._pi." not in k}
    other.updater.load_state(state)
    found = other.updater.state()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) for k in state)
    other.update(buffer)


class TestReplay:
    def filled(self, capacity: int, lengths: list[int]) -> ReplayBuffer:
        buffer = ReplayBuffer(tiny_config(buffer_size=capacity, batch_size=64))
        for i, length in enumerate(lengths):
            buffer.add(random_episode(buffer.cfg, length, seed=i))
        return buffer

    def restored(self, buffer: ReplayBuffer, cfg: Config, cuts: list[int]) -> ReplayBuffer:
        """From chunks that end at these numbers."""
        first = max(0, buffer.written - buffer.capacity)
        ends = [first, *(c for c in cuts if c > first), buffer.written]
        other = ReplayBuffer(cfg)
        state = {k: v.clone() for k, v in buffer.state().items()}
        other.restore(state, [(a, buffer.steps(a, b)) for a, b in itertools.pairwise(ends)])
        return other

    @pytest.mark.parametrize("capacity", [1000, 50, 37])
    def test_it_goes_on_as_if_it_had_not_been_kept(self, capacity: int) -> None:
        """Before the ring is full, when it has just been, and long after."""
        buffer = self.filled(capacity, [20, 11, 25, 9, 18, 20])
        buffer.sample()
        other = self.restored(buffer, buffer.cfg, cuts=[13, 60, 61, 90])
        for _ in range(3):
            assert len(other) == len(buffer)
            for x, y in zip(buffer.sample(), other.sample(), strict=True):
                assert x is y is None or torch.equal(x, y)
            for b in (buffer, other):
                b.add(random_episode(b.cfg, 21, seed=b.num_eps))

    def test_a_smaller_one_keeps_the_last_steps(self) -> None:
        buffer = self.filled(100, [30, 30, 30])
        other = self.restored(buffer, buffer.cfg.replace(buffer_size=40), cuts=[45])
        assert len(other) == 40
        held = {row.tobytes() for row in other.steps(50, 90)["obs"].numpy()}
        assert held == {row.tobytes() for row in buffer.steps(50, 90)["obs"].numpy()}
        assert {o.numpy().tobytes() for o in other.sample().obs.flatten(0, 1)} <= held
