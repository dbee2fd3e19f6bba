"""Official files, which carry no config: what is read off their tensors, what the task tells, what has to be given."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, filled_buffer, tiny_config, tiny_multitask
from test_world_model import old_generation

from tdmpc2_fast import TDMPC2, Config, Planner, WorldModel, load
from tdmpc2_fast.benchmarks.baselines.official import load_official, official_agent
from tdmpc2_fast.benchmarks.harness.measure import CannotMeasureError
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.config import MODEL_SIZES, task_embedding_dim
from tdmpc2_fast.errors import CheckpointError, ConfigError
from tdmpc2_fast.model import checkpoint
from tdmpc2_fast.model.official import OfficialModel
from tdmpc2_fast.task_sets import TASK_SETS, TASKS
from tdmpc2_fast.train import cli

RECORDED = json.loads((GOLDEN / "param_counts.json").read_text())
SETS = [row for row in RECORDED["counts"] if row["task"] in TASK_SETS]
SINGLE = [row for row in RECORDED["counts"] if row["task"] in TASKS]


def same(a: WorldModel, b: WorldModel) -> bool:
    x, y = (tensors_only(model.state_dict()) for model in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def write(model: WorldModel, path: Path, older: bool) -> Path:
    state = model.state_dict()
    torch.save({"model": old_generation(state) if older else state}, path)
    return path


def shapes_of(cfg: Config, older: bool) -> dict[str, Any]:
    """The state dict of a model of any size, which takes no memory: each tensor is one number, expanded."""
    with torch.device("meta"):
        state = WorldModel(cfg).state_dict()
    small = WorldModel(cfg.replace(model_size=None, latent_dim=16, mlp_dim=8, enc_dim=8, num_q=2)).state_dict()
    state = {k: torch.zeros(()).expand(x.shape) for k, x in state.items() if isinstance(x, torch.Tensor)}
    state |= {k: small[k] for k in ("_action_masks", "log_std_min", "log_std_dif") if k in state}
    return old_generation(state) if older else state


def test_the_table_of_tasks_is_as_recorded() -> None:
    for name, (obs_dim, action_dim, length) in RECORDED["env_dims_obs_act_steps"].items():
        task = TASKS[name]
        assert (task.obs_dim, task.action_dim, task.episode_length) == (obs_dim, action_dim, length), name
    assert TASK_SETS["mt80"][:30] == TASK_SETS["mt30"]
    assert len({*TASK_SETS["mt30"]}) == 30
    assert len({*TASK_SETS["mt80"]}) == 80
    assert {(TASKS[n].obs_dim, TASKS[n].action_dim, TASKS[n].episode_length) for n in TASK_SETS["mt80"][30:]} == {
        (39, 4, 100)
    }


@pytest.mark.parametrize("row", SETS, ids=lambda r: f"{r['task']}-{r['model_size']}")
def test_a_set_and_a_size_make_the_config(row: dict[str, Any]) -> None:
    cfg = Config(task=row["task"], model_size=row["model_size"])
    with torch.device("meta"):
        assert WorldModel(cfg).total_params == row["total_params"]
    assert cfg.task_dim == row["task_dim"] == task_embedding_dim(row["task"], row["model_size"])
    assert cfg.obs_shape == {"state": (row["obs"],)}
    assert (cfg.latent_dim, len(cfg.tasks), cfg.action_dim) == (row["latent_dim"], row["n_tasks"], row["act"])
    assert (
        cfg
        == Config.from_dict(cfg.to_dict())
        == Config(task="mt30").replace(task=cfg.task).replace(model_size=row["model_size"])
    )
    assert cfg.discounts[0] == pytest.approx(0.99)
    assert (cfg.discounts[-1] == 0.95) == (row["task"] == "mt80")


def test_a_set_leaves_with_its_name_and_keys_given_stay() -> None:
    one = Config(task="mt30", model_size=1).replace(task="dog-run")
    assert (one.multitask, one.tasks, one.task_dim, one.obs_shape) == (False, (), 0, None)
    assert Config(task="mt80", task_dim=32).task_dim == 32
    two = dict(tasks=("a", "b"), action_dims=(1, 2), episode_lengths=(5, 6), action_dim=2, obs_shape={"state": (3,)})
    assert Config(task="mt30", **two).tasks == ("a", "b")  # type: ignore[arg-type]


@pytest.mark.parametrize("older", [False, True], ids=["current", "older"])
@pytest.mark.parametrize("row", [*SETS, *SINGLE], ids=lambda r: f"{r['task']}-{r['model_size']}")
def test_each_published_size_is_known_by_its_tensors(row: dict[str, Any], older: bool) -> None:
    task, size = row["task"], row["model_size"]
    made = Config(task=task, model_size=size)
    made = made if made.multitask else made.with_env({"state": (row["obs"],)}, row["act"], 500)
    model = OfficialModel({"model": shapes_of(made, older)}, "'a.pt'")
    assert (model.older, model.model_size) == (older, size)
    assert model.task_set == (task if made.multitask else None)
    cfg = model.config({} if made.multitask else dict(task=task))
    keys = [*MODEL_SIZES[1], "task", "model_size", "task_dim", "obs_shape", "action_dim", "multitask", "tasks"]
    keys += ["action_dims", "episode_lengths", "episode_length", "episodic", "num_bins", "log_std_min", "log_std_max"]
    assert {k: getattr(cfg, k) for k in keys} == {k: getattr(made, k) for k in keys}
    with torch.device("meta"):
        assert WorldModel(cfg).total_params == row["total_params"]


@pytest.mark.parametrize("older", [False, True], ids=["current", "older"])
@pytest.mark.parametrize("task", ["mt30", "mt80", "dog-run"])
def test_files_load_by_themselves(task: str, older: bool, tmp_path: Path) -> None:
    cfg = Config(task=task, model_size=1, device="cpu", backend="torch")
    cfg = cfg if cfg.multitask else cfg.with_env({"state": (223,)}, 38, 500)
    model = WorldModel(cfg)
    path = write(model, tmp_path / "x.pt", older)
    given = dict(backend="torch", device="cpu") | ({} if cfg.multitask else dict(task=task))
    agent = load(path, **given)
    planner = Planner.from_checkpoint(path, num_envs=2, **given)
    assert same(agent.model, model)
    assert same(planner.model, model)
    assert agent.cfg.replace(seed_steps=None) == cfg.replace(seed_steps=None)
    index = 29 if cfg.multitask else None
    assert agent.act(torch.zeros(cfg.observation_shape), t0=True, task=index).shape == (cfg.action_dim,)


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True], ids=["current", "older"])
@pytest.mark.parametrize("size", [19, 48, 317])
def test_the_large_ones_load_too(size: int, older: bool, tmp_path: Path) -> None:
    """By whole files: 317M are 2 GB with their targets, and twice that in memory."""
    cfg = Config(task="mt30", model_size=size, device="cpu")
    with torch.device("meta"):
        empty = WorldModel(cfg)
    model = empty.to_empty(device="cpu")
    for p in model.state_dict().values():
        if isinstance(p, torch.Tensor):
            p.fill_(1)
    model._action_masks.copy_(WorldModel(cfg.replace(model_size=1, latent_dim=None))._action_masks)
    model.log_std_min.fill_(-10)
    model.log_std_dif.fill_(12)
    path = write(model, tmp_path / "x.pt", older)
    del empty, model
    state, _, found = checkpoint.read_with_config(path, {})
    assert (found.task, found.model_size) == ("mt30", size)
    with torch.device("meta"):
        model = WorldModel(found)
    model = model.to_empty(device="cpu")
    model.log_std_min.fill_(-10)
    model.log_std_dif.fill_(12)
    model._action_masks.copy_(WorldModel(found.replace(model_size=1, latent_dim=None))._action_masks)
    checkpoint.load_into(model, state)
    assert float(model._task_emb.weight.mean()) == 1
    path.unlink()


@pytest.mark.parametrize(
    "changes", [dict(episodic=True), dict(num_bins=51), dict(num_enc_layers=4), dict(num_q=4), dict(log_std_min=-5.3)]
)
def test_what_tensors_tell_need_not_be_given(changes: dict[str, Any], tmp_path: Path) -> None:
    agent = TDMPC2(tiny_config(**changes))
    agent.save(tmp_path / "a.pt")
    again = load(tmp_path / "a.pt", task="mine", episode_length=50)
    assert {k: getattr(again.cfg, k) for k in changes} == changes
    assert same(agent.model, again.model)
    assert again.cfg.model_size is None


def test_pixels_are_told_from_states(tmp_path: Path) -> None:
    cfg = Config(obs="rgb", latent_dim=64, mlp_dim=24, num_q=3, device="cpu").with_env({"rgb": (9, 64, 64)}, 2, 500)
    agent = TDMPC2(cfg)
    agent.save(tmp_path / "a.pt")
    again = load(tmp_path / "a.pt", task="walker-walk")
    assert (again.cfg.obs, again.cfg.obs_shape, again.cfg.num_channels) == ("rgb", {"rgb": (9, 64, 64)}, 4)
    assert same(agent.model, again.model)


def test_what_the_official_code_sets_by_the_task_is_set(tmp_path: Path) -> None:
    TDMPC2(tiny_config(17, 6)).save(tmp_path / "a.pt")
    for task, length, rho in (("bipedal-walker", 1600, 0.7), ("myo-reach", 100, 0.5), ("cheetah-jump", 500, 0.5)):
        cfg = load(tmp_path / "a.pt", task=task).cfg
        assert (cfg.episode_length, cfg.rho) == (length, rho)
        assert cfg.discounts == [pytest.approx({1600: 0.99, 100: 0.95, 500: 0.99}[length])]


def test_several_tasks_of_ones_own(tmp_path: Path) -> None:
    agent = TDMPC2(tiny_multitask())
    lengths, names = agent.cfg.episode_lengths, agent.cfg.tasks
    widths = agent.cfg.action_dims
    for older in (False, True):
        path = write(agent.model, tmp_path / "a.pt", older)
        given: dict[str, Any] = dict(tasks=names, episode_lengths=lengths)
        if older:
            with pytest.raises(CheckpointError, match=r"do not tell action_dims; give action_dims=\(3 widths\)"):
                load(path, **given)
            given["action_dims"] = widths
        again = load(path, task="mine", **given)
        assert same(agent.model, again.model)
        assert (again.cfg.task, again.cfg.discounts) == ("mine", agent.cfg.discounts)


MT30 = Config(task="mt30", model_size=1, device="cpu")
REFUSED: list[tuple[Callable[[], Config], dict[str, Any], str]] = [
    (tiny_config, {}, r"no config, and tensors do not tell task and episode_length; give task=NAME, as in task='dog-"),
    (tiny_config, dict(task="mine"), r"do not tell episode_length; give episode_length=N, in decisions$"),
    (tiny_config, dict(task="mt30"), "got task='mt30', allowed: one task"),
    (
        tiny_config,
        dict(task="dog-run"),
        "no model of dog-run, .* 223 and 38: its own are 5 and 2; give the task",
    ),
    (lambda: tiny_config(num_bins=1), dict(task="mine", episode_length=9), "num_bins; give num_bins=1 where .*, 0 wh"),
    (tiny_config, dict(task="mine", episode_length=9, mlp_dim=32), "mlp_dim is 24 in it and 32 here; set mlp_dim=24"),
    (tiny_config, dict(task="mine", episode_length=9, model_size=5), "latent_dim is 16 in it and 512 here"),
    (tiny_multitask, {}, r"tasks and episode_lengths; give tasks=\(3 names\), episode_lengths=\(3 lengths"),
    (tiny_multitask, dict(task="mt80"), "no model of mt80, which has 80 tasks: its own are 3 of widths 5 and 3"),
    (tiny_multitask, dict(tasks=("a",), episode_lengths=(1,)), r"got 1 tasks \(several\), allowed: the 3"),
    (lambda: MT30, dict(task="mt80"), "no model of mt80, .*; it is one of mt30$"),
]


@pytest.mark.parametrize(("make", "given", "words"), REFUSED, ids=[w[:30] for _, _, w in REFUSED])
def test_what_is_missing_or_wrong_is_named(
    make: Callable[[], Config], given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    checkpoint.save(WorldModel(make()), tmp_path / "a.pt")
    for use in (load, Planner.from_checkpoint):
        with pytest.raises(CheckpointError, match=words) as caught:
            use(tmp_path / "a.pt", **given)  # type: ignore[operator]
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"'horizn'\. Did you mean"):
        load(tmp_path / "a.pt", horizn=3)


def test_a_mask_of_other_tasks_is_none_of_a_set(tmp_path: Path) -> None:
    model = WorldModel(MT30)
    model._action_masks[3, 0] = 0
    checkpoint.save(model, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="do not tell tasks and episode_lengths"):
        load(tmp_path / "a.pt")


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda s: {k: v for k, v in s.items() if k != key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s | {"_pi.0.bias": torch.zeros(10**6)}, "_pi.1.weight is|_dynamics.0.weight is .*1000000"),
        (lambda s: s | {"_dynamics.2.bias": torch.zeros(10**6)}, r"_dynamics.0.weight is \(24, 18\), allowed beside"),
        (without("_Qs.params.1.weight"), "no whole TD-MPC2 model: no _Qs.params.1.weight"),
        (without("_pi.2.bias"), "no whole TD-MPC2 model: '_pi.2.bias'"),
        (without("_encoder.state.1.weight"), "no whole TD-MPC2 model: _dynamics|_encoder.state.0.weight|latent"),
        (lambda s: s | {"log_std_min": torch.zeros(3)}, "log_std_min is"),
        (lambda s: s | {"log_std_dif": torch.tensor(torch.nan)}, "log_std_dif is nan"),
    ],
)
def test_tensors_that_do_not_fit_each_other_make_no_model(change: Any, words: str, tmp_path: Path) -> None:
    """Otherwise a small file could ask for a model of any size."""
    state = tensors_only(TDMPC2(tiny_config()).model.state_dict())
    torch.save({"model": change(state)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path / "a.pt", task="mine", episode_length=50)


@pytest.mark.parametrize(("key", "value"), [("task", ["a"]), ("tasks", 3), ("episode_lengths", 3), ("action_dim", "x")])
def test_values_of_the_wrong_kind_are_named(key: str, value: Any, tmp_path: Path) -> None:
    TDMPC2(tiny_multitask()).save(tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=f"config key '{key}': got "):
        load(tmp_path / "a.pt", **{key: value})


def test_tensors_of_another_device_come_to_this_one(tmp_path: Path) -> None:
    agent = TDMPC2(tiny_config())
    agent.save(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as z, zipfile.ZipFile(tmp_path / "b.pt", "w") as out:
        for entry in z.infolist():
            blob = z.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in blob
                blob = blob.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:3")
            out.writestr(entry.filename, blob)
    again = load(tmp_path / "b.pt", task="mine", episode_length=50, device="cpu")
    assert same(again.model, agent.model)
    agent.load(tmp_path / "b.pt")


def test_the_commands_say_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dm_control")

    def info(model: WorldModel, older: bool) -> str:
        assert cli.main(["info", str(write(model, tmp_path / "a.pt", older))]) == 0
        return " ".join(capsys.readouterr().out.split())

    out = info(WorldModel(MT30), older=True)
    assert "official, older generation" in out
    assert "published as mt30, model_size 1 load needs nothing" in out
    out = info(WorldModel(tiny_multitask()), older=False)
    assert "no set of 3 tasks that is known, no published size load needs tasks=(3 names), episode_lengths" in out
    one = Config(model_size=1).with_env({"state": (5,)}, 1, 500)
    out = info(WorldModel(one), older=False)
    assert "current generation" in out
    assert "a single-task model, model_size 1 load needs task=NAME, and episode_length=N" in out
    assert cli.main(["eval", str(tmp_path / "a.pt")]) == 2
    assert "do not tell task; give task=NAME, as in task='dog-run'" in capsys.readouterr().err
    keys = ["eval_episodes=1", "num_samples=8", "num_elites=4", "num_pi_trajs=2", "iterations=1", "horizon=1"]
    assert cli.main(["eval", str(tmp_path / "a.pt"), "task=cartpole-swingup", *keys]) == 0  # its size is known now
    assert "cartpole-swingup: return" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_file_of_an_agent_that_has_learned_holds_its_weights_and_nothing_else(backend: str, tmp_path: Path) -> None:
    """Of kernels, parameters are views into buffers, and a pickle of a view takes its whole buffer along."""
    if backend == "cpu" and sys.platform != "linux":
        pytest.skip("the CPU's kernels are built on Linux here")
    agent = TDMPC2(tiny_config(backend=backend))
    agent.update(filled_buffer(agent.cfg))
    agent.save(tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)["model"]
    numbers = 0
    for name, x in state.items():
        if isinstance(x, torch.Tensor):
            assert x.is_contiguous(), name
            assert x.untyped_storage().nbytes() == x.nbytes, name
            numbers += 0 if name.startswith("_detach_") else x.nbytes
    assert state["_detach_Qs_params.0.weight"].data_ptr() == state["_Qs.params.0.weight"].data_ptr()
    assert (tmp_path / "a.pt").stat().st_size < numbers + 400 * len(state)
    other = TDMPC2(agent.cfg)
    other.load(tmp_path / "a.pt")
    assert same(agent.model, other.model)


MODELS: dict[str, Callable[[], Config]] = {
    "one task": lambda: tiny_config(simnorm_dim=8),
    "terminates": lambda: tiny_config(episodic=True),
    "several": tiny_multitask,
    "mt30": lambda: MT30,
    "mt80": lambda: Config(task="mt80", model_size=1, device="cpu"),
}


@pytest.mark.skipif("OFFICIAL" not in os.environ, reason="OFFICIAL names no checkout of the official code")
@pytest.mark.parametrize("name", MODELS)
def test_files_go_to_the_official_code_and_back(name: str, tmp_path: Path) -> None:
    """Ours of an agent that has learned loads there as it is; what the official code saves then loads here."""
    checkout = os.environ["OFFICIAL"]
    try:
        load_official(checkout, torch.device("cpu"))
    except CannotMeasureError as e:
        pytest.skip(str(e))
    cfg = MODELS[name]()
    agent = TDMPC2(cfg)
    agent.update(filled_buffer(cfg, length=8, episodes=max(4, len(cfg.tasks))))
    agent.save(tmp_path / "ours.pt")
    theirs = official_agent(checkout, TDMPC2(cfg.replace(seed=5)), compiled=False)
    theirs.load(str(tmp_path / "ours.pt"))
    want, got = agent.model.state_dict(), theirs.model.state_dict()
    assert list(got) == list(want)
    for key, x in want.items():
        assert torch.equal(got[key], x) if isinstance(x, torch.Tensor) else got[key] == x, key
    theirs.save(str(tmp_path / "theirs.pt"))
    given: dict[str, Any] = {} if cfg.task in TASK_SETS else dict(task="mine", device="cpu")
    if cfg.multitask and given:
        given |= dict(tasks=cfg.tasks, episode_lengths=cfg.episode_lengths)
    elif given:
        given["episode_length"] = 50
    assert same(load(tmp_path / "theirs.pt", **given).model, agent.model)
