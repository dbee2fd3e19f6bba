"""The official modules under their names: attributes, shapes, state dicts, numbers."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, filled_buffer, random_episode, tiny_config, tiny_multitask
from torch import Tensor, nn

from tdmpc2_fast import TDMPC2 as OURS
from tdmpc2_fast.benchmarks.baselines.official import OfficialConfig
from tdmpc2_fast.compat.common import init, layers, math
from tdmpc2_fast.compat.common.buffer import Buffer
from tdmpc2_fast.compat.common.scale import RunningScale
from tdmpc2_fast.compat.common.world_model import WorldModel
from tdmpc2_fast.compat.draws import given
from tdmpc2_fast.compat.tdmpc2 import TDMPC2
from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import CheckpointError, InputError

CFG = SimpleNamespace(num_bins=101, vmin=-10.0, vmax=10.0, bin_size=0.2, simnorm_dim=8, tau=0.01)


def official(cfg: Config) -> OfficialConfig:
    return OfficialConfig(**cfg.to_dict(), compile=False, bin_size=cfg.bin_size)


@pytest.mark.parametrize("case", ["single_1m", "episodic", "multitask", "rgb"])
def test_the_state_dict_is_the_official_one(case: str) -> None:
    recorded = json.loads((GOLDEN / f"{case}.json").read_text())
    model = WorldModel(OfficialConfig(**recorded["config"]))
    keys = recorded["state_dict_keys"]
    assert [*model.state_dict()] == [k if isinstance(k, str) else k[0] for k in keys]


@pytest.fixture(params=["one task", "several tasks", "episodic"])
def cfg(request: pytest.FixtureRequest) -> Config:
    kinds = {"one task": tiny_config(), "several tasks": tiny_multitask(), "episodic": tiny_config(episodic=True)}
    return kinds[request.param]


def test_the_model_has_the_official_face(cfg: Config) -> None:
    model = WorldModel(official(cfg)).eval()
    b, a, z, k = 4, cfg.action_dim or 0, cfg.latent_dim, cfg.num_bins
    task = torch.arange(b) % 3 if cfg.multitask else None
    latent = model.encode(torch.randn(b, *cfg.observation_shape), task)
    action, info = model.pi(latent, task)
    assert latent.shape == (b, z)
    assert action.shape == info["mean"].shape == info["log_std"].shape == (b, a)
    assert info["entropy"].shape == info["scaled_entropy"].shape == (b, 1)
    assert info["action_prob"] == 1
    assert model.next(latent, action, task).shape == (b, z)
    assert model.reward(latent, action, task).shape == (b, k)
    assert model.Q(latent, action, task, return_type="all").shape == (cfg.num_q, b, k)
    x = torch.cat([latent if task is None else model.task_emb(latent, task), action], -1)
    for critics in (model._Qs, model._detach_Qs, model._target_Qs):
        assert len(critics) == cfg.num_q
        torch.testing.assert_close(critics(x), model.Q(latent, action, task, return_type="all"))
    assert model._Qs.params["2", "weight"] is model._Qs.params[2].weight
    assert model._target_Qs_params["0", "ln", "bias"].shape == (cfg.num_q, cfg.mlp_dim)
    assert not model._detach_Qs(x.detach()).requires_grad
    assert model._Qs(x.detach()).requires_grad
    with torch.no_grad():
        model._Qs.params["2", "weight"].add_(1)
    assert not torch.equal(model._target_Qs(x), model._Qs(x))
    model.init()
    assert torch.equal(model._target_Qs(x), model._Qs(x))
    if cfg.episodic:
        assert model.termination(latent, None).shape == (b, 1)
        with pytest.raises(InputError, match="task: got 1, allowed: None"):
            model.termination(latent, 1)


def test_critics_have_dropout_in_training_and_targets_none() -> None:
    model = WorldModel(tiny_config(dropout=0.5))
    with torch.no_grad():
        model._Qs.params["2", "weight"].normal_()
    model.init()
    x = torch.randn(4, 18)
    model.train()
    assert not torch.equal(model._Qs(x), model._Qs(x))
    assert torch.equal(model._target_Qs(x), model._target_Qs(x))
    model.eval()
    assert torch.equal(model._Qs(x), model._target_Qs(x))


def test_the_agent_has_the_official_face(cfg: Config, tmp_path: Path) -> None:
    given_cfg = official(cfg)
    agent = TDMPC2(given_cfg)
    assert agent.cfg is given_cfg
    assert isinstance(agent, nn.Module)
    assert [len(g["params"]) for g in agent.optim.param_groups][:3] == [8, 12, 10]
    assert agent.optim.param_groups[0]["lr"] == pytest.approx(cfg.lr * cfg.enc_lr_scale)
    assert agent.scale.value.shape == (1,)
    assert agent._get_discount(500) == 0.99
    task = 1 if cfg.multitask else None
    obs = torch.randn(cfg.observation_shape)
    action = agent.act(obs, t0=True, task=task)
    assert action.shape == (cfg.action_dim,)
    assert agent._prev_mean.any()
    index = None if task is None else torch.tensor([task])
    assert agent.plan(obs.unsqueeze(0), eval_mode=True, task=index).shape == (cfg.action_dim,)
    buffer = filled_buffer(cfg)
    for i in range(2):
        before = copy.deepcopy(agent.model.state_dict())
        metrics = agent.update(buffer)
        assert all(x.ndim == 0 for x in metrics.values())
        assert float(agent.optim.state_dict()["state"][0]["step"]) == i + 1
        assert not torch.equal(before["_pi.0.weight"], agent.model.state_dict()["_pi.0.weight"])
    agent.save(tmp_path / "weights.anything")
    other = TDMPC2(official(cfg))
    other.load(tmp_path / "weights.anything")
    same = other.model.state_dict()
    assert all(torch.equal(x, same[k]) for k, x in agent.model.state_dict().items() if isinstance(x, Tensor))
    ours = OURS(cfg)
    ours.load(torch.load(tmp_path / "weights.anything", weights_only=True)["model"])
    with pytest.raises(CheckpointError):
        other.load({"model": {}})
    with pytest.raises(InputError, match="fp: got int"):
        other.load(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_an_agent_can_be_copied_in_the_middle_of_training(how: Any) -> None:
    cfg = tiny_config()
    agent, buffer = TDMPC2(cfg), filled_buffer(cfg)
    agent.update(buffer)
    other = how(agent)
    batch = buffer.sample()
    found = [each._update(*batch[:4]) for each in (agent, other)]
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    obs = torch.zeros(cfg.observation_shape)
    assert torch.equal(agent.act(obs), other.act(obs))


def test_iterations_of_large_action_spaces_are_counted_once() -> None:
    cfg = tiny_config(action_dim=21)
    theirs = official(cfg)
    agent = TDMPC2(theirs)
    assert theirs.iterations == cfg.iterations + 2
    assert agent.acceleration.planner.cfg.effective_iterations == cfg.iterations + 2
    assert TDMPC2(cfg).acceleration.planner.cfg.effective_iterations == cfg.iterations + 2


def test_an_agent_that_does_not_plan_takes_the_policy() -> None:
    cfg = tiny_config()
    agent = TDMPC2(OfficialConfig(**{**cfg.to_dict(), "mpc": False}))
    obs = torch.randn(cfg.observation_shape)
    eps = torch.randn(1, 2)
    with given(iter([eps, eps])):
        drawn, mean = agent.act(obs), agent.act(obs, eval_mode=True)
    z = agent.model.encode(obs.unsqueeze(0), None)
    action, info = agent.model.pi(z, None, eps)
    assert torch.equal(drawn, action[0].detach())
    assert torch.equal(mean, info["mean"][0].detach())


# ---- layers


def test_an_ensemble_is_its_modules_side_by_side() -> None:
    modules = [layers.mlp(6, [8, 8], 5, dropout=0.1).apply(init.weight_init) for _ in range(3)]
    both = layers.Ensemble(modules).eval()
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(both(x), torch.stack([m.eval()(x) for m in modules]))
    assert len(both) == 3
    assert repr(both).startswith("Vectorized 3x Sequential(")
    assert both.params["0", "ln", "weight"].shape == (3, 8)
    assert {k.removeprefix("params.") for k in both.state_dict()} == {*modules[0].state_dict()}
    leftovers = {"params.__batch_size": torch.Size([3]), "params.__device": None}
    other = layers.Ensemble([copy.deepcopy(modules[0]) for _ in range(3)]).eval()
    other.load_state_dict(both.state_dict() | leftovers)
    assert torch.equal(other(x), both(x))
    both.train()
    assert not torch.equal(both(x), both(x))
    both(x).sum().backward()
    assert all(p.grad is not None for p in both.parameters())
    with pytest.raises(InputError, match="modules: got none"):
        layers.Ensemble([])


def test_layers_compute_what_the_model_does() -> None:
    cfg = tiny_config()
    model = WorldModel(cfg)
    dynamics = layers.mlp(18, [24, 24], 16, act=layers.SimNorm(cfg))
    dynamics.load_state_dict(model._dynamics.state_dict())
    x = torch.randn(3, 18)
    torch.testing.assert_close(dynamics(x), model._dynamics(x))
    encoder = layers.enc(cfg)
    assert {f"_encoder.{k}" for k in encoder.state_dict()} == {k for k in model.state_dict() if "_encoder" in k}
    assert [*layers.enc(cfg, {"other": nn.Identity()})] == ["other", "state"]
    assert [*layers.enc(cfg)] == ["state"]  # not those of a call before
    text = "NormedLinear(in_features=18, out_features=24, bias=True, act=Mish)"
    assert repr(dynamics[0]) == text
    assert "dropout=0.1" in repr(layers.mlp(6, 8, 5, dropout=0.1)[0])


def test_images_are_encoded_as_the_model_does() -> None:
    cfg = Config(obs="rgb", latent_dim=64, simnorm_dim=8, seed_steps=1).with_env({"rgb": (3, 64, 64)}, 2, 50)
    model = WorldModel(cfg)
    encoder = layers.conv((3, 64, 64), cfg.num_channels, act=layers.SimNorm(cfg))
    encoder.load_state_dict(model._encoder["rgb"].state_dict())
    obs = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    shift = torch.randint(0, 7, (2, 1, 1, 2))
    with given(iter([shift])):
        found = encoder(obs)
    torch.testing.assert_close(found, model.encode(obs, None, shift))
    with pytest.raises(InputError, match="allowed: \\(channels, 64, 64\\)"):
        layers.conv((3, 32, 32), 8)
    with pytest.raises(InputError, match="allowed: square ones"):
        layers.ShiftAug()(torch.zeros(1, 3, 4, 5))


def test_files_of_the_older_generation_are_converted() -> None:
    model = WorldModel(tiny_multitask())
    new = model.state_dict()
    leaves = ["weight", "bias", "ln.weight", "ln.bias"]
    old: dict[str, Any] = {k: x for k, x in new.items() if "Qs" not in k and k not in ("_action_masks",)}
    old = {k: x for k, x in old.items() if not k.startswith("log_std")}
    for group, name in (("_Qs.params.", "_Qs.params."), ("_target_Qs_params.", "_target_Qs.params.")):
        for n in range(10):
            old[f"{name}{n}"] = new[f"{group}{n // 4}.{leaves[n % 4]}"].clone()
    found = layers.api_model_conversion(new, old)
    assert found is old
    assert {*found} == {*new}
    model.load_state_dict(found)
    assert layers.api_model_conversion(new, dict(new)) == dict(new)
    with pytest.raises(InputError, match="source_state_dict: got no _Qs"):
        layers.api_model_conversion(new, {"_pi.0.weight": new["_pi.0.weight"]})
    with pytest.raises(InputError, match="source_state_dict: got unknown nonsense"):
        layers.api_model_conversion(new, {**{k: x for k, x in old.items() if "detach" not in k}, "nonsense": old})


def test_weights_begin_as_officially() -> None:
    layer, table = nn.Linear(400, 300), nn.Embedding(50, 20)
    init.weight_init(layer)
    init.weight_init(table)
    assert float(layer.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert not layer.bias.any()
    assert table.weight.abs().max() <= 0.02
    init.weight_init(nn.Linear(3, 3, bias=False))
    init.zero_([layer.weight])
    assert not layer.weight.any()


# ---- math, scale


def recorded(name: str) -> Tensor:
    with np.load(GOLDEN / "math.npz", allow_pickle=False) as f:
        x = torch.from_numpy(f[name])
    return x.float() if x.is_floating_point() else x


def test_math_is_the_official_one() -> None:
    def same(got: Tensor, name: str) -> None:
        want = recorded(name)
        torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-5, atol=1e-5)

    same(math.symlog(recorded("x")), "symlog")
    same(math.symexp(recorded("symexp_in")), "symexp")
    same(math.two_hot(recorded("x").view(-1, 1), CFG), "two_hot")
    same(math.two_hot_inv(recorded("two_hot_inv_in"), CFG), "two_hot_inv")
    target = recorded("soft_ce_target")
    same(math.soft_ce(recorded("soft_ce_pred"), target.view(-1, 1), CFG), "soft_ce")
    same(math.log_std(recorded("log_std_in"), -10, 12), "log_std")
    x = torch.randn(5, 1)
    for bins, found in ((0, x), (1, math.symlog(x))):
        assert torch.equal(math.two_hot(x, SimpleNamespace(num_bins=bins)), found)
    assert math.soft_ce(x, x, SimpleNamespace(num_bins=0)).abs().max() == 0
    assert math.int_to_one_hot(torch.tensor([[0, 2]]), 3).tolist() == [[[1, 0, 0], [0, 0, 1]]]
    eps, std = torch.randn(4, 3), torch.randn(4, 3)
    normal = torch.distributions.Normal(0.0, std.exp())
    torch.testing.assert_close(math.gaussian_logprob(eps, std), normal.log_prob(eps * std.exp()).sum(-1, keepdim=True))
    mu, pi, log_pi = math.squash(eps, std, torch.zeros(4, 1))
    assert torch.equal(mu, eps.tanh())
    torch.testing.assert_close(log_pi, -torch.log(torch.relu(1 - pi**2) + 1e-6).sum(-1, keepdim=True))
    p = torch.tensor([0.7, 0.0, 0.3])
    drawn = torch.stack([math.gumbel_softmax_sample(p) for _ in range(2000)]).bincount(minlength=3) / 2000
    torch.testing.assert_close(drawn, p, rtol=0, atol=0.05)
    found = math.termination_statistics(torch.tensor([[0.9], [0.2]]), torch.tensor([[1.0], [1.0]]))
    assert found["termination_rate"] == 1
    assert float(found["termination_f1"]) == pytest.approx(2 / 3)


def test_the_scale_moves_as_officially() -> None:
    scale = RunningScale(CFG, "cpu")
    x = 20 * torch.randn(256, 1)
    low, high = np.percentile(x.numpy(), [5, 95])
    assert torch.equal(scale(x), x)
    scale.update(x)
    assert float(scale.value) == pytest.approx(1 + 0.01 * (high - low - 1), rel=1e-5)
    kept = scale.state_dict()
    assert {*kept} == {"value", "percentiles"}
    other = RunningScale(CFG, "cpu")
    other.load_state_dict(kept)
    assert torch.equal(other(x, update=True), x / other.value)
    assert repr(scale).startswith("RunningScale(S: ")


# ---- buffer


def test_the_buffer_takes_episodes_one_by_one_and_many_at_once() -> None:
    cfg = tiny_multitask()
    buffer = Buffer(official(cfg))
    assert buffer.capacity == cfg.buffer_size
    assert buffer.add(random_episode(cfg, 20, task=1)) == 1
    many = [random_episode(cfg, 15, seed=i, task=i % 3) for i in range(4)]
    td = {k: torch.stack([torch.as_tensor(e[k]) for e in many]) for k in many[0]}
    assert buffer.load(td | dict(episode=torch.zeros(4, 15))) == 5
    assert buffer.num_eps == 5
    obs, action, reward, terminated, task = buffer.sample()
    assert obs.shape == (cfg.horizon + 1, cfg.batch_size, 5)
    assert action.shape == (cfg.horizon, cfg.batch_size, 3)
    assert reward.shape == terminated.shape == (cfg.horizon, cfg.batch_size, 1)
    assert task is not None
    assert task.shape == (cfg.batch_size,)
    other = pickle.loads(pickle.dumps(buffer))
    assert isinstance(other, Buffer)
    assert torch.equal(other.sample().obs, buffer.sample().obs)
