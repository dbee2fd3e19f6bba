"""What others do to an accelerated agent: followed, refused by name, or a reason to give it back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_config
from official_like import OfficialLike
from official_pairs import BACKENDS, KINDS, batch_of, close, draws, equal, learn, numbers, pair, plan
from torch import Tensor

from tdmpc2_fast.compat.accelerate import accelerate, deaccelerate
from tdmpc2_fast.compat.draws import given, update_order
from tdmpc2_fast.errors import InputError


def changes() -> Iterator[tuple[str, Any]]:
    def config(agent: Any) -> None:
        agent.cfg.num_samples, agent.cfg.temperature = 12, 0.8

    def learning_rate(agent: Any) -> None:
        for group in [*agent.optim.param_groups, *agent.pi_optim.param_groups]:
            group["lr"] *= 0.5

    def moments(agent: Any) -> None:
        kept = copy.deepcopy(agent.optim.state_dict())
        for state in kept["state"].values():
            state["exp_avg"] *= 2
        agent.optim.load_state_dict(kept)

    def weights(agent: Any) -> None:
        with torch.no_grad():
            agent.model._pi.get_parameter("0.weight").mul_(1.1)
            agent.model._target_Qs_params.get_buffer("0.weight").mul_(1.1)

    def warm_start(agent: Any) -> None:
        agent._prev_mean.fill_(0.3)

    def parameters(agent: Any) -> None:
        layer = agent.model._dynamics.get_submodule("1")
        with torch.no_grad():
            layer.weight.data = layer.weight.data * 1.1

    def own_steps(agent: Any) -> None:
        for _ in range(3):
            for group in agent.optim.param_groups:
                for p in group["params"]:
                    p.grad = torch.full_like(p, 1e-3)
            agent.optim.step()
            agent.optim.zero_grad(set_to_none=True)

    def own_update(agent: Any) -> None:
        cfg = KINDS["state"]
        batch = batch_of(cfg, 77)
        with given(update_order(draws(cfg, 77))):
            type(agent)._update(agent, *batch[:4])

    def range_of_log_std(agent: Any) -> None:
        agent.model.log_std_min.fill_(-5)
        agent.model.log_std_dif.fill_(6)
        agent.made_of = agent.made_of.replace(log_std_min=-5, log_std_max=1)

    def another_adam(agent: Any) -> None:
        pi = [p for n, p in agent.model.named_parameters() if n.startswith("_pi.")]
        agent.pi_optim = torch.optim.Adam(pi, lr=3e-4, eps=1e-5)

    def dropout_that_is_read_once(agent: Any) -> None:
        agent.cfg.dropout = 0.5

    for each in (config, learning_rate, moments, weights, warm_start, parameters, own_steps, own_update):
        yield each.__name__, each
    for each in (range_of_log_std, another_adam, dropout_that_is_read_once):
        yield each.__name__, each


@BACKENDS
@pytest.mark.parametrize("change", [pytest.param(f, id=name) for name, f in changes()])
def test_what_others_change_is_taken_up(change: Any, backend: str) -> None:
    agent, plain, cfg = pair("state")
    accelerate(agent, backend=backend)
    for each in (agent, plain):
        plan(each, cfg, 0)
        learn(each, cfg, 0)
        change(each)
    cfg = cfg.replace(num_samples=plain.cfg.num_samples)
    torch.testing.assert_close(plan(agent, cfg, 1), plan(plain, cfg, 1), rtol=0, atol=1e-4)
    learn(agent, cfg, 1)
    learn(plain, cfg, 1)
    assert close(agent, plain)


@BACKENDS
def test_optimisers_that_ours_cannot_be_are_given_back(backend: str) -> None:
    agent, plain, cfg = pair("state")
    accelerate(agent, backend=backend)
    for each in (agent, plain):
        learn(each, cfg, 0)
        for group in each.optim.param_groups:
            group["weight_decay"] = 0.1
    batch = batch_of(cfg, 1)
    buffer = SimpleNamespace(sample=lambda: tuple(batch))
    with (
        pytest.warns(UserWarning, match="its own code learns from now on: .*got weight_decay=0.1"),
        given(update_order(draws(cfg, 1))),
    ):
        agent.update(buffer)
    with given(update_order(draws(cfg, 1))):
        plain.update(buffer)
    assert close(agent, plain)
    torch.testing.assert_close(plan(agent, cfg, 2), plan(plain, cfg, 2), rtol=0, atol=1e-4)  # still ours
    assert [*agent.acceleration.left] == ["update"]
    deaccelerate(agent)
    assert close(agent, plain)


def test_learning_rates_that_ours_cannot_have_do_not_hold_it_back() -> None:
    agent, _, cfg = pair("state")
    accelerate(agent, backend="torch")
    learn(agent, cfg, 0)
    now = numbers(agent)
    agent.optim.param_groups[1]["lr"] = 0.5
    deaccelerate(agent)
    assert equal(now, numbers(agent))


def test_masks_of_somebodys_own_are_refused() -> None:
    agent, _, cfg = pair("several tasks")
    accelerate(agent, backend="torch")
    agent.model._action_masks[0, 0] = 0
    with pytest.raises(InputError, match=r"agent\.model\._action_masks: got others"):
        plan(agent, cfg, 0)
    deaccelerate(agent)


def test_plans_without_a_prior_are_taken_over() -> None:
    agent = OfficialLike(tiny_config(num_pi_trajs=0, dropout=0.0))
    agent._plan = lambda *a, **k: without_draws_of_nothing(agent, *a, **k)
    accelerate(agent, backend="torch")
    assert not agent.acceleration.left


def without_draws_of_nothing(agent: Any, *args: Any, **keys: Any) -> Tensor:
    """As the official code, which draws nothing for no sequences."""
    like = torch.randn_like

    def drawn(x: Tensor) -> Tensor:
        return x.clone() if x.numel() == 0 else like(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", drawn)
        return OfficialLike._plan(agent, *args, **keys)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_accelerated_in_any_mode(mode: Any) -> None:
    agent, _, cfg = pair("state")
    with mode():
        accelerate(agent, backend="torch")
    assert not agent.acceleration.left
    learn(agent, cfg, 0)
