"""A living official agent made fast in place, and given back."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from official_like import OfficialLike
from official_pairs import BACKENDS, KINDS, batch_of, close, equal, learn, numbers, pair, plan
from torch import Tensor

from tdmpc2_fast import TDMPC2
from tdmpc2_fast.compat.accelerate import accelerate, deaccelerate
from tdmpc2_fast.errors import ConfigError, InputError


@BACKENDS
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
    assert not {"acceleration", "_plan_val", "_plan", "_update"} & agent.__dict__.keys()
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in agent.model.parameters())
    learn(agent, cfg, 7)
    learn(plain, cfg, 7)
    assert close(agent, plain)


@BACKENDS
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


@BACKENDS
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


@BACKENDS
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


class Counts(OfficialLike):
    """One that keeps a book, and acts by `_plan`."""

    steps = 0

    def _update(self, *args: Any, **keys: Any) -> dict[str, Tensor]:
        self.steps += 1
        self.cfg.entropy_coef *= 1.0
        self.cfg.mine = self.steps
        return super()._update(*args, **keys)

    def act(self, obs: Tensor, *args: Any, **keys: Any) -> Tensor:
        return self._plan(obs.unsqueeze(0), *args, **keys)


def test_judging_leaves_no_trace_in_a_subclass_and_its_act_is_taken_over() -> None:
    agent = Counts(KINDS["state"])
    accelerate(agent, backend="torch")
    assert agent.steps == 0
    assert not hasattr(agent.cfg, "mine")
    agent.act(torch.zeros(KINDS["state"].observation_shape))
    assert agent.acceleration.planner.stats().calls == 1


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
