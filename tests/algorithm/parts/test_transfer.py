"""Weights for a new task: the old model's functions are kept where both are defined, and nothing else is taken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_multitask
from torch import Tensor
from update_oracle import Liven

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.errors import CheckpointError, ConfigError
from tdmpc2_fast.model.transfer import Donor, begin_from
from tdmpc2_fast.model.world_model import WorldModel

OBS, ACTIONS, N = 5, 3, 7


def saved(cfg: Config, folder: Path, livened: Liven, name: str = "old.safetensors") -> tuple[WorldModel, Donor]:
    """A model whose heads all differ, and what is read of its file."""
    agent = livened(TDMPC2(cfg))
    agent.save(folder / name)
    return agent.model, Donor.read(folder / name)


def functions(model: WorldModel, obs: Tensor, action: Tensor, task: Tensor | None) -> dict[str, Tensor]:
    """What a model computes: observations (N, .) and actions (N, .) in the widths it has."""
    with torch.no_grad():
        z = model.encode(obs, task)
        eps = torch.zeros(len(z), model.cfg.need("action_dim"))
        out = model.policy(z, task, eps)
        found = dict(z=z, next=model.next(z, action, task), reward=model.reward(z, action, task), mean=out.mean)
        found |= dict(q=model.Q(z, action, task, "all"), target=model.Q(z, action, task, "all", target=True))
        return found | dict(log_std=out.log_std)


def check_kept(old: WorldModel, new: WorldModel, old_task: int | None, new_task: int | None) -> None:
    """Check that the models agree on the inputs both have, where further ones are zero."""
    g = torch.Generator().manual_seed(3)
    widths = [(m.cfg.observation_shape[0], m.cfg.need("action_dim")) for m in (old, new)]
    o, a = (min(pair) for pair in zip(*widths, strict=True))
    obs, action = torch.randn(N, o, generator=g), torch.rand(N, a, generator=g) * 2 - 1
    found = []
    for model, (wide_o, wide_a), task in zip((old, new), widths, (old_task, new_task), strict=True):
        index = None if task is None else torch.full((N,), task)
        found.append(functions(model, F.pad(obs, (0, wide_o - o)), F.pad(action, (0, wide_a - a)), index))
    for key, x in found[0].items():
        y = found[1][key]
        if key in ("mean", "log_std"):
            x, y = x[..., :a], y[..., :a]
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


WIDTHS = dict(same=(OBS, ACTIONS), wider=(OBS + 4, ACTIONS + 2), narrower=(OBS - 2, ACTIONS - 1))


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_a_single_task_model_keeps_its_functions_in_other_widths(
    widths: tuple[int, int], tmp_path: Path, livened: Liven
) -> None:
    old, donor = saved(tiny_config(OBS, ACTIONS), tmp_path, livened)
    cfg = donor.fitted(tiny_config(*widths, seed=2))
    model = WorldModel(cfg).eval()
    fresh = {k: v.clone() for k, v in tensors_only(model.state_dict()).items()}
    told = begin_from(model, donor)
    check_kept(old, model, None, None)
    dynamics, z, a = model.state_dict()["_dynamics.0.weight"], cfg.latent_dim, min(widths[1], ACTIONS)
    assert torch.equal(dynamics[:, z + a :], fresh["_dynamics.0.weight"][:, z + a :])  # new action columns are fresh
    assert ("new:" in told, "left out" in told) == (widths[0] > OBS, widths[0] < OBS)


@pytest.mark.parametrize("init_task", ["b", None])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_a_multi_task_model_takes_up_a_new_task(
    widths: tuple[int, int], init_task: str | None, tmp_path: Path, livened: Liven
) -> None:
    old, donor = saved(tiny_multitask(), tmp_path, livened)
    cfg = donor.fitted(tiny_config(*widths, task="new", seed=2))
    assert (cfg.multitask, cfg.tasks, cfg.action_dims, cfg.task_dim) == (True, ("new",), (widths[1],), 4)
    assert cfg.observation_shape == (max(widths[0], OBS),)
    assert cfg.action_dim == max(widths[1], ACTIONS)
    assert cfg.discounts == [cfg.discount(50)]
    model = WorldModel(cfg).eval()
    told = begin_from(model, donor, init_task)
    rows = old._task_emb.weight.data
    assert torch.equal(model._task_emb.weight[0], rows[1] if init_task else rows.mean(0))
    assert ("that of b" if init_task else "the mean of all") in told
    assert model._action_masks.tolist() == [[1.0] * widths[1] + [0.0] * (cfg.need("action_dim") - widths[1])]
    if init_task and widths[1] >= ACTIONS:  # a narrower task's policy is masked where b's is not
        check_kept(old, model, 1, 0)


def test_tasks_that_both_have_keep_their_embeddings(tmp_path: Path, livened: Liven) -> None:
    old, donor = saved(tiny_multitask(), tmp_path, livened)
    cfg = donor.fitted(tiny_multitask(tasks=("c", "new", "b"), action_dims=(2, 3, 3)))
    model = WorldModel(cfg).eval()
    told = begin_from(model, donor, "a")
    assert torch.equal(model._task_emb.weight, old._task_emb.weight[[2, 0, 1]])
    assert "embedding of new" in told
    assert "embedding of c" not in told
    check_kept(old, model, 1, 2)


def test_a_single_task_model_may_become_one_of_several(tmp_path: Path, livened: Liven) -> None:
    old, donor = saved(tiny_config(OBS, ACTIONS), tmp_path, livened)
    model = WorldModel(donor.fitted(tiny_multitask())).eval()
    model._task_emb.weight.data.zero_()
    assert "task embedding" in begin_from(model, donor)
    check_kept(old, model, None, 1)


def test_a_termination_head_is_taken_where_both_have_one(tmp_path: Path, livened: Liven) -> None:
    old, donor = saved(tiny_config(OBS, ACTIONS, episodic=True), tmp_path, livened)
    model = WorldModel(donor.fitted(tiny_config(OBS, ACTIONS, episodic=True, seed=3))).eval()
    begin_from(model, donor)
    assert torch.equal(model.state_dict()["_termination.2.weight"], old.state_dict()["_termination.2.weight"])
    _, plain = saved(tiny_config(OBS, ACTIONS), tmp_path, livened, "plain.safetensors")
    assert "_termination" in begin_from(model, plain)


@pytest.mark.parametrize("multitask", [False, True])
def test_official_files_are_begun_from(multitask: bool, tmp_path: Path, livened: Liven) -> None:
    old, donor = saved(tiny_multitask() if multitask else tiny_config(OBS, ACTIONS), tmp_path, livened, "old.pt")
    cfg = donor.fitted(tiny_config(OBS, ACTIONS, task="new"))
    model = WorldModel(cfg).eval()
    begin_from(model, donor, donor.cfg.tasks[1] if multitask else None)
    check_kept(old, model, 1 if multitask else None, 0 if multitask else None)


def test_the_architecture_is_the_donors(tmp_path: Path, livened: Liven) -> None:
    _, donor = saved(tiny_multitask(), tmp_path, livened)
    keys = donor.keys(dict(task="walker-walk", seed=3))
    assert (keys["latent_dim"], keys["num_q"], keys["seed"]) == (16, 3, 3)
    with pytest.raises(ConfigError, match=r"'latent_dim': got 32, allowed: 16, as in the model of init"):
        donor.keys(dict(task="walker-walk", latent_dim=32))
    with pytest.raises(ConfigError, match=r"'init_task': got 'bb', allowed: one of a, b, c"):
        donor.keys(dict(init="x", init_task="bb"))
    for tasks in (dict(task="b"), dict(task="two", tasks=("b", "c"))):
        with pytest.raises(ConfigError, match=r"'init_task': got 'a', allowed: none, since init has an embedding of b"):
            donor.keys(dict(init="x", init_task="a", **tasks))
    assert donor.keys(dict(init="x", init_task="a", task="two", tasks=("b", "new")))["init_task"] == "a"
    with pytest.raises(CheckpointError, match=r"latent_dim is 16 in it and 24 here"):
        begin_from(WorldModel(tiny_config(latent_dim=24)), donor)


@pytest.mark.parametrize("multitask", [False, True])
def test_what_is_frozen_has_no_columns_that_nothing_was_taken_for(
    multitask: bool, tmp_path: Path, livened: Liven
) -> None:
    _, donor = saved(tiny_multitask() if multitask else tiny_config(OBS, ACTIONS), tmp_path, livened)
    for freeze, obs, actions, part in (
        ("encoder", OBS, ACTIONS + 1, None),
        ("encoder+dynamics", OBS - 1, ACTIONS - 1, None),
        ("encoder", OBS + 1, ACTIONS, "encoder"),
        ("encoder+dynamics", OBS, ACTIONS + 1, "dynamics"),
    ):
        cfg = tiny_config(obs, actions, task="new", freeze=freeze)
        if part is None:
            donor.fitted(cfg)
        else:
            with pytest.raises(ConfigError, match=rf"'freeze': got '{re.escape(freeze)}', allowed: no {part}, which"):
                donor.fitted(cfg)
    if not multitask:  # the embedding is an input, too
        with pytest.raises(ConfigError, match="allowed: no encoder, which sees more here"):
            donor.fitted(tiny_multitask(freeze="encoder"))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, livened: Liven) -> None:
    agent = livened(TDMPC2(tiny_config()))
    with torch.no_grad():
        agent.model._pi[0].bias[0] = float("nan")
    agent.save(tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"_pi.0.bias holds NaN"):
        Donor.read(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(init_task="x"), "'init_task': got 'x', allowed: none without init"),
        (dict(mix=0.5), "'mix': got 0.5, allowed: none without data_dir"),
        (dict(mix=1, data_dir="x"), "'mix': got 1, allowed: between 0 and 1"),
        (dict(freeze="pi"), "'freeze': got 'pi', allowed: one of encoder, encoder"),
    ],
)
def test_keys_that_make_no_sense_together_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as e:
        Config.from_dict(keys)
    assert words in str(e.value)
