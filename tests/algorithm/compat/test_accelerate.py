"""A living official agent made fast in place, and given back."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_multitask
from official_like import OfficialLike
from torch import Tensor

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.compat.accelerate import accelerate, deaccelerate
from tdmpc2_fast.compat.draws import given, plan_order, update_order
from tdmpc2_fast.errors import ConfigError, InputError
from tdmpc2_fast.learn.batch import Batch
from tdmpc2_fast.rng import PlanNoise, UpdateNoise

LIMIT = 1e-5
KINDS = {
    "state": tiny_config(dropout=0.0),
    "many actions": tiny_config(action_dim=21, dropout=0.0),
    # Where actions are clamped and episodes end, sequences are of exactly equal value, and torch takes any of them.
    "episodic": tiny_config(episodic=True, dropout=0.0, max_std=0.3),
    "several tasks": tiny_multitask(dropout=0.0),
}


@pytest.fixture(params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        pytest.importorskip("tdmpc2_fast.kernels.cpu.build")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return str(request.param)


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
    with given(update_order(noise)):
        return agent.update(SimpleNamespace(sample=lambda: tuple(batch)))


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


@pytest.mark.parametrize("kind", KINDS)
def test_it_plans_and_learns_as_before_and_is_given_back_bit_for_bit(kind: str, backend: str) -> None:
    agent, plain, cfg = pair(kind)
    before = numbers(agent)
    assert accelerate(agent, backend=backend) is agent
    assert not agent.acceleration.left
    assert agent.acceleration.backend.name == backend
    assert equal(before, numbers(agent))
    for i in range(3):
        got, wanted = plan(agent, cfg, i, t0=i == 0), plan(plain, cfg, i, t0=i == 0)
        assert got.shape == wanted.shape
        assert torch.allclose(got, wanted, rtol=0, atol=1e-4)
        metrics, theirs = learn(agent, cfg, i), learn(plain, cfg, i)
        for name in metrics:
            torch.testing.assert_close(metrics[name], theirs[name].reshape(()), rtol=1e-4, atol=1e-4)
    assert close(agent, plain)
    now = numbers(agent)
    assert deaccelerate(agent) is agent
    assert equal(now, numbers(agent))
    assert not {"acceleration", "_plan_val", "_update"} & agent.__dict__.keys()
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in agent.model.parameters())
    learn(agent, cfg, 7)
    learn(plain, cfg, 7)
    assert close(agent, plain)


def test_act_and_update_are_those_of_the_agent(backend: str) -> None:
    agent, _, cfg = pair("state")
    accelerate(agent, backend=backend)
    accelerate(agent)  # again changes nothing
    calls = agent.acceleration.planner.stats().calls
    action = agent.act(torch.zeros(cfg.observation_shape), t0=True)
    assert action.shape == (cfg.action_dim,)
    assert agent.acceleration.planner.stats().calls == calls + 1
    steps = agent.acceleration.updater.steps
    metrics = agent.update(SimpleNamespace(sample=lambda: tuple(batch_of(cfg, 1))))
    assert "total_loss" in metrics
    assert agent.acceleration.updater.steps == steps + 1
    assert float(agent.optim.state_dict()["state"][0]["step"]) == steps + 1


@pytest.mark.parametrize("how", ["copy.deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["state", "several tasks"])
def test_a_copy_goes_on_as_the_agent_does(kind: str, how: str, backend: str) -> None:
    agent, _, cfg = pair(kind)
    accelerate(agent, backend=backend)
    plan(agent, cfg, 1)
    learn(agent, cfg, 1)
    other = copied(agent, how)
    obs, task = torch.zeros(cfg.observation_shape), 1 if cfg.multitask else None
    assert torch.equal(agent.act(obs, task=task), other.act(obs, task=task))  # from the random streams of their own
    batch = batch_of(cfg, 2)
    for each in (agent, other):
        each.update(SimpleNamespace(sample=lambda: tuple(batch)))
    assert equal(numbers(agent), numbers(other))
    deaccelerate(other)
    learn(agent, cfg, 3)
    learn(other, cfg, 3)
    assert close(agent, other)


def copied(agent: Any, how: str) -> Any:
    return copy.deepcopy(agent) if how == "copy.deepcopy" else pickle.loads(pickle.dumps(agent))


@pytest.mark.parametrize("how", ["copy.deepcopy", "pickle"])
@pytest.mark.parametrize("learned", [False, True])
def test_a_copy_of_a_copy_that_did_nothing_has_everything(how: str, learned: bool) -> None:
    agent, plain, cfg = pair("state")
    accelerate(agent, backend="torch")
    if learned:
        learn(agent, cfg, 5)
        learn(plain, cfg, 5)
    other = copied(copied(agent, how), how)
    given_back = deaccelerate(copied(other, how))
    assert not hasattr(given_back, "acceleration")
    for each in (agent, other, given_back, plain):
        learn(each, cfg, 6)
    assert equal(numbers(agent), numbers(other))
    assert close(given_back, plain)
    assert close(agent, plain)


def test_files_are_as_before(tmp_path: Path, backend: str) -> None:
    agent, plain, cfg = pair("state")
    accelerate(agent, backend=backend)
    learn(agent, cfg, 1)
    agent.save(tmp_path / "a.pt")
    plain.load(tmp_path / "a.pt")
    assert equal(numbers(agent)[:20], numbers(plain)[:20])
    other, _, _ = pair("state", before=3)
    other.save(tmp_path / "b.pt")
    agent.load(tmp_path / "b.pt")  # by its own code
    for each in (agent, other):
        each._prev_mean.zero_()
    torch.testing.assert_close(plan(agent, cfg, 5), plan(other, cfg, 5), rtol=0, atol=1e-4)


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

    for each in (config, learning_rate, moments, weights, warm_start, parameters):
        yield each.__name__, each


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


class OtherPlan(OfficialLike):
    def _plan(self, obs: Tensor, **keys: Any) -> Tensor:
        return -super()._plan(obs, **keys)


class OtherLoss(OfficialLike):
    def _update(self, obs: Tensor, action: Tensor, reward: Tensor, *rest: Any, **keys: Any) -> dict[str, Tensor]:
        return super()._update(obs, action, 2 * reward, *rest, **keys)


class OwnFace(OfficialLike):
    """One that scales what it sees, which is no other algorithm."""

    def act(self, obs: Tensor, *args: Any, **keys: Any) -> Tensor:
        return super().act(obs / 2, *args, **keys)


def test_a_part_that_computes_something_else_is_named_and_left_alone() -> None:
    cfg = KINDS["state"]
    for kind, part in ((OtherPlan, "plan"), (OtherLoss, "update")):
        agent = kind(cfg)
        before = numbers(agent)
        with pytest.warns(UserWarning, match=f"left alone: {part}: its _?{part} "):
            accelerate(agent)
        assert [*agent.acceleration.left] == [part]
        assert ("_plan_val" in agent.__dict__) == (part == "update")
        assert ("_update" in agent.__dict__) == (part == "plan")
        deaccelerate(agent)  # what judging wrote was put back
        assert equal(before, numbers(agent))

    class Both(OtherPlan, OtherLoss):
        pass

    with pytest.raises(InputError, match=r"nothing of it can be taken over: plan: .*; update: "):
        accelerate(Both(cfg))


def test_a_subclass_that_changes_what_goes_in_keeps_it() -> None:
    agent = OwnFace(KINDS["state"])
    accelerate(agent, backend="torch")
    seen: list[Tensor] = []
    agent.__dict__["_plan_val"] = lambda obs, **keys: seen.append(obs) or torch.zeros(2)
    agent.act(torch.ones(KINDS["state"].observation_shape))
    assert float(seen[0].max()) == 0.5


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: a.optim.param_groups[1].update(weight_decay=0.1), "got weight_decay=0.1, allowed: weight_decay=0"),
        (lambda a: a.optim.param_groups[1].update(lr=1.0), "one of the encoder, one of all others"),
        (
            lambda a: a.__dict__.update(optim=torch.optim.SGD(a.model.parameters(), lr=0.1)),
            "got SGD, allowed: torch.opt",
        ),
        (lambda a: a.optim.param_groups[1].update(params=[]), "it trains not _dynamics.0.weight, allowed"),
        (lambda a: a.optim.param_groups[1]["params"].append(torch.zeros(1)), "none of agent.model's parameters"),
    ],
)
def test_an_optimiser_of_another_kind_is_left_alone(spoil: Any, words: str) -> None:
    agent = OfficialLike(KINDS["state"])
    spoil(agent)
    with pytest.warns(UserWarning, match=re.escape(words)):
        accelerate(agent)
    assert [*agent.acceleration.left] == ["update"]


def test_what_is_no_official_agent_is_refused() -> None:
    cfg = KINDS["state"]
    with pytest.raises(InputError, match="agent: got dict without 'cfg', allowed: an agent of the official TDMPC2"):
        accelerate({})
    agent = OfficialLike(cfg)
    with pytest.raises(ConfigError, match=r"got the key 'precison', allowed: backend, precision, task_grad_leak\. Did"):
        accelerate(agent, precison="float32")
    del agent.model._reward.get_submodule("0").weight
    with pytest.raises(InputError, match=r"agent.model: _reward.0.weight: got none, allowed: \("):
        accelerate(agent)
    ours = TDMPC2(cfg)
    assert accelerate(ours) is ours
    with pytest.raises(InputError, match="got TDMPC2, which is ours"):
        deaccelerate(ours)
    plain = OfficialLike(cfg)
    assert deaccelerate(plain) is plain


def test_what_was_compiled_is_judged_as_written_and_comes_back() -> None:
    def compiled(*args: Any, **keys: Any) -> Any:
        raise AssertionError("it would be compiled now")

    agent, _, cfg = pair("state")
    compiled._torchdynamo_orig_callable = agent._update  # type: ignore[attr-defined]
    agent._update = compiled
    agent.__dict__["_plan_val"] = compiled
    accelerate(agent, backend="torch")
    assert not agent.acceleration.left
    agent.act(torch.zeros(cfg.observation_shape))
    agent.update(SimpleNamespace(sample=lambda: tuple(batch_of(cfg, 1))))
    deaccelerate(agent)
    assert agent._update is compiled
    assert agent.__dict__["_plan_val"] is compiled


def test_judging_disturbs_nothing() -> None:
    agent = OfficialLike(KINDS["state"])
    agent.model.train()
    before, kept = numbers(agent), torch.get_rng_state()
    accelerate(agent, backend="torch")
    assert torch.equal(kept, torch.get_rng_state())
    assert agent.model.training
    assert agent.cfg.batch_size == KINDS["state"].batch_size
    assert agent.cfg.max_std == KINDS["state"].max_std
    deaccelerate(agent)
    assert equal(before, numbers(agent))
    assert not agent.optim.state


def test_newt_is_named() -> None:
    agent = OfficialLike(KINDS["state"])
    agent.model._Qs.online = torch.nn.Module()
    with pytest.raises(InputError, match="an agent of Newt"):
        accelerate(agent)
