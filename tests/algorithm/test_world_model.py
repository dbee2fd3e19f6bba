"""The world model's official face: parameters, state dicts, methods."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import GOLDEN, tiny_config, tiny_multitask

from tdmpc2_fast import TDMPC2, Config, WorldModel
from tdmpc2_fast.config import task_embedding_dim
from tdmpc2_fast.errors import ConfigError, InputError
from tdmpc2_fast.model.task_embedding import look_up

COUNTS = json.loads((GOLDEN / "param_counts.json").read_text())["counts"]
INIT = json.loads((GOLDEN / "init_stats.json").read_text())


def config_of(row: dict[str, Any]) -> Config:
    task, n = row["task"], row.get("n_tasks", 1)
    values: dict[str, Any] = dict(model_size=row["model_size"])
    if "rgb" in task:
        return Config.from_dict(dict(values, obs="rgb")).with_env({"rgb": (9, 64, 64)}, row["act"], 500)
    if n > 1:
        lengths = dict(action_dims=(row["act"],) * n, episode_lengths=(500,) * n)
        dim = task_embedding_dim(task, row["model_size"])
        values |= dict(multitask=True, tasks=tuple(f"t{i}" for i in range(n)), task_dim=dim, **lengths)
        if task == "mt30" and row["model_size"] == 19:
            values["latent_dim"] = 512
    values["episodic"] = "episodic" in task
    return Config.from_dict(values).with_env({"state": (row["obs"],)}, row["act"], 500)


@pytest.mark.parametrize("row", COUNTS, ids=lambda r: f"{r['task']}-{r['model_size']}")
def test_parameter_counts(row: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = WorldModel(config_of(row))
    assert model.total_params == row["total_params"]
    for name, count in row.get("modules", {}).items():
        assert sum(p.numel() for p in getattr(model, name).parameters()) == count, name


@pytest.mark.parametrize("case", ["single_1m", "single_5m", "episodic", "multitask", "rgb", "action_dim_38"])
def test_state_dict_is_the_official_one(case: str) -> None:
    meta = json.loads((GOLDEN / f"{case}.json").read_text())
    state = WorldModel(Config.from_official(meta["config"])).state_dict()
    assert list(state) == [k for k, *_ in meta["state_dict_keys"]]
    for key, shape, kind in meta["state_dict_keys"]:
        if kind.startswith("torch."):
            assert list(state[key].shape) == shape, key
            assert str(state[key].dtype) == kind, key
    assert state["_Qs.params.__batch_size"] == torch.Size([meta["config"]["num_q"]])
    assert state["_detach_Qs_params.0.weight"] is not None


INIT_CASES = dict(
    single_size1=dict(task="x", model_size=1, obs=24, act=6),
    single_size5=dict(task="x", model_size=5, obs=24, act=6),
    episodic_size1=dict(task="x episodic", model_size=1, obs=24, act=6),
    rgb_size5=dict(task="x rgb", model_size=5, obs=None, act=6),
)


@pytest.mark.parametrize("case", INIT_CASES)
def test_initial_weights_have_the_official_law(case: str) -> None:
    state = WorldModel(config_of(INIT_CASES[case])).state_dict()
    for key, want in INIT[case].items():
        if key not in state or not state[key].is_floating_point():
            continue
        x = state[key]
        assert bool((x == 0).all()) == want["all_zero"], key
        assert bool((x == 1).all()) == want["all_one"], key
        if want["std"] and list(x.shape) == want["shape"]:
            # two samples of one law: the std of n normals scatters by 1/sqrt(2n)
            slack = 6 * (1 / x.numel()) ** 0.5
            assert float(x.std()) == pytest.approx(want["std"], rel=slack), key
            assert abs(float(x.mean()) - want["mean"]) < 6 * want["std"] * (2 / x.numel()) ** 0.5, key


def test_targets_start_equal_and_critics_differ_from_each_other() -> None:
    state = WorldModel(tiny_config()).state_dict()
    weight = state["_Qs.params.0.weight"]
    torch.testing.assert_close(state["_target_Qs_params.0.weight"], weight)
    assert (weight[0] != weight[1]).all()


def old_generation(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict an official checkpoint of the older code holds."""
    leaves = ["weight", "bias", "ln.weight", "ln.bias"]
    out = {}
    for key, value in state.items():
        for new, old in (("_Qs.params.", "_Qs.params."), ("_target_Qs_params.", "_target_Qs.params.")):
            if key.startswith(new):
                layer, _, leaf = key.removeprefix(new).partition(".")
                if leaf in leaves:
                    out[f"{old}{4 * int(layer) + leaves.index(leaf)}"] = value
                break
        else:
            if not key.startswith(("_detach", "log_std", "_action_masks")):
                out[key] = value
    return out


@pytest.mark.parametrize("multitask", [False, True])
def test_old_generation_loads_to_the_same_model(multitask: bool) -> None:
    cfg = tiny_multitask() if multitask else tiny_config()
    saved, fresh = TDMPC2(cfg), TDMPC2(cfg.replace(seed=9))
    fresh.load({"model": old_generation(saved.model.state_dict())})
    for (key, a), (_, b) in zip(saved.model.state_dict().items(), fresh.model.state_dict().items(), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), key


def test_methods_have_the_official_shapes() -> None:
    model = WorldModel(tiny_config(episodic=True)).eval()
    z, a = model.encode(torch.randn(7, 5)), torch.rand(7, 2)
    assert z.shape == (7, 16)
    assert model.next(z, a).shape == (7, 16)
    assert model.reward(z, a).shape == (7, 101)
    assert model.termination(z).shape == (7, 1)
    action, info = model.pi(z)
    assert action.shape == info["mean"].shape == (7, 2)
    assert info["entropy"].shape == info["scaled_entropy"].shape == (7, 1)
    assert model.Q(z, a, return_type="all").shape == (3, 7, 101)
    assert model.Q(z, a, return_type="min", target=True).shape == (7, 1)
    assert model.encode(torch.randn(3, 7, 5)).shape == (3, 7, 16)
    assert "Learnable parameters" in repr(model)


def test_random_pair_is_the_minimum_and_mean_of_two() -> None:
    agent = TDMPC2(tiny_config())
    for p in agent.model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model, z, a = agent.model, torch.rand(4, 16), torch.rand(4, 2)
    members = torch.tensor([2, 0])
    values = model.scalar(model.Q(z, a, return_type="all"))[members]
    torch.testing.assert_close(model.Q(z, a, return_type="min", members=members), values.min(0).values)
    torch.testing.assert_close(model.Q(z, a, return_type="avg", members=members), values.mean(0))


def test_dropout_only_in_training_and_never_in_targets() -> None:
    model = WorldModel(tiny_config(dropout=0.5))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    z, a = torch.rand(4, 16), torch.rand(4, 2)

    def spread(**kwargs: bool) -> float:
        first, second = (model.Q(z, a, return_type="all", **kwargs) for _ in range(2))
        return float((first - second).detach().abs().max())

    model.train()
    assert spread() > 0
    assert spread(detach=True) > 0
    assert spread(target=True) == 0
    model.eval()
    assert spread() == 0


def test_task_lookup_renormalises_only_the_rows_looked_up() -> None:
    model = WorldModel(tiny_multitask())
    with torch.no_grad():
        model._task_emb.weight.fill_(1.0)
        model.encode(torch.randn(1, 5), 1)
    norms = model._task_emb.weight.detach().norm(dim=-1)
    torch.testing.assert_close(norms, torch.tensor([2.0, 1.0, 2.0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("task", [[3, 0, 3, 1, 4], [[0, 1], [4, 4], [3, 3]], 1])
def test_task_lookup_is_torchs_embedding(task: Any) -> None:
    index, weight = torch.tensor(task), torch.randn(5, 3, dtype=torch.float64)
    weight[0], weight[4] = torch.tensor([0.0, 1.0, 0.0]), 0.1  # of norm 1 exactly, and below
    expected = weight.clone()
    rows = torch.nn.functional.embedding(index, expected, max_norm=1.0)
    torch.testing.assert_close(look_up(weight, index.flatten()).view(rows.shape), rows, rtol=1e-12, atol=0)
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)


def test_wrong_use_is_named() -> None:
    single, multi = WorldModel(tiny_config()), WorldModel(tiny_multitask())
    with pytest.raises(InputError, match="no termination head"):
        single.termination(torch.rand(1, 16))
    with pytest.raises(InputError, match="task: got None"):
        multi.encode(torch.randn(1, 5))
    with pytest.raises(InputError, match=r"task: got \[3\], allowed: 0 to 2"):
        multi.encode(torch.randn(1, 5), 3)
    with pytest.raises(InputError, match="'median'"):
        single.Q(torch.rand(1, 16), torch.rand(1, 2), return_type="median")
    with pytest.raises(ConfigError, match="obs_shape"):
        WorldModel(Config().with_env({"rgb": (9, 64, 64)}, 2, 500))
