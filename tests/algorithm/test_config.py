"""Config: official names and defaults, ranges, errors that say what is allowed."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TINY, tiny_config

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.config import MODEL_SIZES, task_embedding_dim
from tdmpc2_fast.errors import ConfigError, nearest

gym = pytest.importorskip("gymnasium")


WRONG_SHAPES = [(3.5,), (-3,), (0,), 3, (), "3", None, (True,)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(horizon=0), ["horizon", "got 0", "at least 1"]),
        (dict(num_elites=600), ["num_elites", "600", "num_samples (512)"]),
        (dict(num_pi_trajs=513), ["num_pi_trajs", "num_samples (512)"]),
        (dict(model_size=7), ["model_size", "7", "317"]),
        (dict(model_size=[5]), ["model_size", "[5]", "317"]),
        (dict(mlp_dim=0), ["mlp_dim", "got 0", "at least 1"]),
        (dict(horizn=3), ["unknown config key 'horizn'", "Did you mean 'horizon'"]),
        (dict(lr="fast"), ["lr", "'fast'", "a number"]),
        (dict(lr=0.0), ["lr", "above 0"]),
        (dict(episodic=1), ["episodic", "true or false"]),
        (dict(batch_size=2.5), ["batch_size", "2.5", "an integer"]),
        (dict(obs="sound"), ["obs", "'sound'", "state, rgb"]),
        (dict(latent_dim=20), ["latent_dim", "multiple of simnorm_dim"]),
        (dict(min_std=3.0), ["min_std", "max_std"]),
        (dict(vmin=10, vmax=10), ["vmin", "vmax"]),
        (dict(num_q=1), ["num_q", "at least 2"]),
        (dict(rho=float("nan")), ["rho", "nan"]),
        (dict(backend="cuda"), ["backend", "auto, torch, triton"]),
        (dict(task_dim=64), ["task_dim", "single-task"]),
        (dict(obs="rgb", latent_dim=128, num_channels=32), ["latent_dim", "512", "num_channels=8"]),
        (dict(obs="rgb", latent_dim=120), ["latent_dim", "multiple of 16"]),
        (dict(steps=float("inf")), ["steps", "inf", "an integer"]),
        (dict(steps=float("nan")), ["steps", "nan"]),
        (dict(multitask=True, tasks=("a",), task_dim=4), ["action_dims", "one entry per task"]),
        (dict(seed=-1), ["seed", "-1"]),
        (dict(steps=10**5000), ["steps", "an integer of 16610 bits", "63 bits"]),
        (dict(lr=10**400), ["lr", "63 bits"]),
        ({3: 3}, ["unknown config key 3"]),
        (None, ["config: got None", "a dict"]),
        (dict(env_kwargs={"a": object()}), ["env_kwargs", "as JSON holds them"]),
        (dict(env_kwargs={1: "a"}), ["env_kwargs", "{1: 'a'}"]),
        *((dict(obs_shape={"state": s}), [f"{{'state': {s!r}}}", "each at least 1"]) for s in WRONG_SHAPES),
        (dict(obs_shape={"state": (64, 64, 3)}), ["(64, 64, 3)", "obs=rgb"]),
        (dict(obs_shape={"rgb": (3, 64, 64)}), ["rgb", "obs=state"]),
        (dict(obs="rgb", obs_shape={"rgb": (64, 64, 3)}), ["(64, 64, 3)", "channels first", "train"]),
    ],
)
def test_bad_values_name_key_value_and_range(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        Config.from_dict(values)
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_model_size_sets_dims_unless_given(size: int) -> None:
    def dims(cfg: Config) -> dict[str, int]:
        return {k: getattr(cfg, k) for k in MODEL_SIZES[size]}

    other = 5 if size != 5 else 1
    assert dims(Config(model_size=size)) == MODEL_SIZES[size]
    assert dims(Config.from_dict(dict(model_size=size))) == MODEL_SIZES[size]
    assert dims(Config(model_size=other).replace(model_size=size)) == MODEL_SIZES[size]
    assert dims(Config(model_size=size, mlp_dim=512)) == MODEL_SIZES[size] | dict(mlp_dim=512)
    assert dims(Config(model_size=other).replace(model_size=size, num_q=7)) == MODEL_SIZES[size] | dict(num_q=7)
    assert dims(Config(model_size=size, enc_dim=32).replace(model_size=size, seed=3))["enc_dim"] == 32


def test_dims_without_a_model_size() -> None:
    assert Config(mlp_dim=32).mlp_dim == 32
    assert Config(mlp_dim=32).replace(seed=2).mlp_dim == 32
    assert {k: getattr(Config(), k) for k in MODEL_SIZES[5]} == MODEL_SIZES[5]


def test_defaults_are_the_official_ones() -> None:
    official = json.loads((GOLDEN / "single_5m.json").read_text())["config"]
    ours = Config().to_dict()
    changed_in_recording = {"batch_size", "dropout", "task", "model_size", "compile"}
    of_the_environment = {"obs_shape", "action_dim", "episode_length", "seed_steps", "tasks"}
    for key, value in official.items():
        if key in ours and key not in changed_in_recording | of_the_environment and value != "???":
            if key in ("enable_wandb", "save_video"):  # off here: they need an account, a renderer
                continue
            assert ours[key] == value, key
    assert ours["batch_size"] == 256
    assert ours["dropout"] == 0.01


def test_round_trip_and_immutability() -> None:
    cfg = tiny_config(rho=0.7)
    assert Config.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.horizon = 4  # type: ignore[misc]


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
@pytest.mark.parametrize("case", ["single_1m", "multitask", "episodic", "rgb"])
def test_takes_the_official_cfg(case: str, kind: type) -> None:
    official = json.loads((GOLDEN / f"{case}.json").read_text())["config"]
    cfg = Config.from_official(kind(**official))
    assert cfg.action_dim == official["action_dim"]
    assert cfg.discount_max == official["discount_max"]
    assert cfg.multitask == official["multitask"]
    assert cfg.task_dim == official["task_dim"]
    assert cfg.checkpoint is None


def test_what_is_no_official_cfg_is_named() -> None:
    for wrong in ("walker-walk", None, 3, [], object()):
        with pytest.raises(ConfigError, match=r"cfg: got .*, allowed: a Config, the official cfg"):
            TDMPC2(wrong)
    with pytest.raises(ConfigError, match=r"'horizn'\. Did you mean 'horizon'"):
        TDMPC2({"horizn": 2})
    with pytest.raises(ConfigError, match=r"'horizn'\. Did you mean 'horizon'"):
        Config().replace(horizn=2)
    assert Config.from_official({"task_title": "A", "obs_shapes": "???", "bin_size": 0.2, "hydra": {}}) == Config()


def test_iterations_and_discount() -> None:
    assert tiny_config(action_dim=19).effective_iterations == 6
    assert tiny_config(action_dim=20).effective_iterations == 8
    assert Config().discount(500) == pytest.approx(0.99)
    assert Config().discount(10) == 0.95
    assert Config().discount(100_000) == 0.995


def test_environment_values_are_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"action_dim.*environment"):
        _ = Config().effective_iterations


@pytest.mark.parametrize(
    ("task", "size", "dim"), [("mt80", 5, 96), ("mt30", 5, 64), ("mt30", 1, 96), ("mt30", 317, 96)]
)
def test_task_embedding_width(task: str, size: int, dim: int) -> None:
    assert task_embedding_dim(task, size) == dim


TYPOS = """
horizn horizon, seeed seed, stpes steps, num_env num_envs, batchsize batch_size, batch batch_size, evalfreq eval_freq,
eval_episode eval_episodes, seedsteps seed_steps, wandb_projct wandb_project, modelsize model_size, elites num_elites,
checkpont checkpoint, video save_video, workdir work_dir, devic device, numthreads num_threads, precison precision,
exp exp_name, bufer_size buffer_size, overlp overlap, temp temperature, envs num_envs, Horizon horizon, LR lr
"""


@pytest.mark.parametrize("pair", TYPOS.replace("\n", " ").split(","), ids=lambda p: p.split()[0])
def test_a_mistyped_key_suggests_the_one_that_was_meant_and_no_other(pair: str) -> None:
    typed, meant = pair.split()
    assert nearest(typed, Config.key_names()) == [meant]


def test_what_is_as_close_is_suggested_too() -> None:
    assert nearest("discount", Config.key_names()) == ["discount_min", "discount_max", "discount_denom"]
    assert nearest("xyzzy", Config.key_names()) == nearest("a", []) == []
    assert nearest("walk", ["wolf", "wa1k", "walker-walk"]) == ["walker-walk", "wa1k"]


def pixel_dims(cfg: Config) -> tuple[int, int]:
    return cfg.latent_dim, cfg.num_channels


@pytest.mark.parametrize(
    ("values", "dims"),
    [
        ({}, (512, 32)),
        (dict(model_size=5), (512, 32)),
        (dict(model_size=1), (128, 8)),
        (dict(model_size=317), (1376, 86)),
        (dict(latent_dim=64), (64, 4)),
        (dict(latent_dim=np.int64(64)), (64, 4)),
        (dict(num_channels=8), (128, 8)),
        (dict(num_channels=16, model_size=1), (256, 16)),
        (dict(num_channels=4, latent_dim=64), (64, 4)),
    ],
)
def test_latent_and_channels_follow_each_other_from_pixels(values: dict[str, Any], dims: tuple[int, int]) -> None:
    cfg = Config(obs="rgb", **values)
    assert pixel_dims(cfg) == dims
    assert Config.from_dict(cfg.to_dict()) == cfg == cfg.replace(seed=1)
    assert pixel_dims(cfg.replace(latent_dim=256)) == pixel_dims(cfg.replace(num_channels=16)) == (256, 16)
    assert pixel_dims(cfg.replace(model_size=19)) == (pixel_dims(cfg) if values.get("model_size") == 19 else (768, 48))
    assert Config(**values).replace(obs="rgb").latent_dim == Config(**values).latent_dim
    assert Config(**{k: v for k, v in values.items() if k != "num_channels"}).num_channels == 32


def box(*shape: int) -> gym.spaces.Box:
    return gym.spaces.Box(-1, 1, shape)


ENVS: dict[str, Any] = {
    "Gymnasium": SimpleNamespace(
        observation_space=box(3), action_space=box(2), spec=SimpleNamespace(max_episode_steps=9)
    ),
    "vectorised": SimpleNamespace(
        observation_space=box(4, 3), action_space=box(4, 2), single_observation_space=box(3),
        single_action_space=box(2), spec=SimpleNamespace(max_episode_steps=9),
    ),
    "dict": SimpleNamespace(
        observation_space=gym.spaces.Dict(state=box(3), rgb=box(3, 64, 64)), action_space=box(2), spec=None,
        max_episode_steps=9,
    ),
    "one in a process": SimpleNamespace(
        single_observation_space=box(3), single_action_space=box(2),
        get_attr=lambda name: {"spec": (SimpleNamespace(max_episode_steps=9),)}[name],
    ),
    "ours": SimpleNamespace(obs_shape=(3,), action_dim=2, max_episode_steps=9),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENVS)
def test_an_environment_completes_a_config(kind: str) -> None:
    cfg = Config(task="mine", **TINY).with_env(ENVS[kind])
    assert (cfg.obs_shape, cfg.action_dim, cfg.episode_length) == ({"state": (3,)}, 2, 9)
    assert TDMPC2(cfg).act(np.zeros(3)).shape == (2,)


def test_gymnasium_itself_completes_a_config() -> None:
    cfg = Config(task="Pendulum-v1", model_size=1).with_env(gym.make("Pendulum-v1"))
    assert (cfg.obs_shape, cfg.action_dim, cfg.episode_length) == ({"state": (3,)}, 1, 200)
    assert Config().with_env(gym.make_vec("Pendulum-v1", 2)) == Config().with_env({"state": (3,)}, 1, 200)


class Endless(gym.Env[Any, Any]):
    observation_space, action_space = box(3), box(1)


@pytest.mark.parametrize("vector", [None, gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv])
@pytest.mark.parametrize("kind", ["registered", "wrapped"])
def test_the_length_of_episodes_is_found_in_wrappers_and_vectors(kind: str, vector: Any) -> None:
    def make() -> Any:
        if kind == "registered":
            return gym.make("Pendulum-v1", max_episode_steps=30)
        return gym.wrappers.ClipAction(gym.wrappers.TimeLimit(Endless(), 30))

    env = make() if vector is None else vector([make] * 2)
    try:
        assert Config().with_env(env) == Config().with_env({"state": (3,)}, 1, 30)
    finally:
        env.close()


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (SimpleNamespace(action_space=box(2)), ["without observation_space", "obs_shape, action_dim"]),
        (SimpleNamespace(observation_space=box(2)), ["without action_space"]),
        (SimpleNamespace(obs_shape=(3,), action_space=gym.spaces.Discrete(3)), ["action_space=Discrete(3)", "a Box"]),
        (SimpleNamespace(obs_shape=(3,), action_space=box(2, 2)), ["one dimension"]),
        (
            SimpleNamespace(observation_space=gym.spaces.Dict(a=box(2))),
            ["observation_space=Dict", "'state'"],
        ),
        (SimpleNamespace(obs_shape=(3,), action_dim=2), ["max_episode_steps", "Config(episode_length=N)"]),
        (None, ["got None without observation_space"]),
    ],
)
def test_an_environment_that_does_not_tell_is_named(env: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        Config().with_env(env)
    for word in words:
        assert word in str(e.value)


def test_the_length_of_episodes_may_be_given() -> None:
    named = SimpleNamespace(obs_shape={"state": (3,)}, action_dim=2, max_episode_steps=9)
    assert Config().with_env(named) == Config().with_env({"state": (3,)}, 2, 9)
    cfg = Config(episode_length=70).with_env(SimpleNamespace(obs_shape=(3,), action_dim=2))
    assert cfg.episode_length == 70
    with pytest.raises(ConfigError, match=r"Config\.with_env\(env\)"):
        TDMPC2(Config())


def test_values_of_numpy_and_paths_are_plain_ones() -> None:
    cfg = Config(
        work_dir=Path("a/b"), checkpoint=Path("c"), horizon=np.int64(4), lr=np.float32(0.5), episodic=np.bool_(True),
        seed=np.array(3), obs_shape={"state": np.array([3])}, task=np.str_("x"),
    )  # fmt: skip
    assert json.loads(json.dumps(cfg.to_dict())) == cfg.to_dict() | dict(obs_shape={"state": [3]})
    kinds = (cfg.work_dir, cfg.checkpoint, cfg.horizon, cfg.lr, cfg.episodic, cfg.seed)
    assert kinds == (str(Path("a/b")), "c", 4, 0.5, True, 3)
    assert [type(k) for k in kinds] == [str, str, int, float, bool, int]
    tasks = Config(multitask=True, tasks=("a", "b"), task_dim=4, action_dims=np.array([1, 2]), episode_lengths=(5, 5))
    assert [type(n) for n in tasks.action_dims] == [int, int]
    assert Config(device=torch.device("cuda", 1)).device == "cuda:1"  # type: ignore[arg-type]
    kwargs = {"gain": np.float32(2), "xs": np.array([1, 2]), "deep": {"x": torch.ones(1)}, "file": Path("a")}
    assert Config(env_kwargs=kwargs).env_kwargs == {"gain": 2.0, "xs": [1, 2], "deep": {"x": [1.0]}, "file": "a"}
    with pytest.raises(ConfigError, match="episodic"):
        Config(episodic=np.int64(1))


def test_every_key_has_a_group_and_groups_lie_together() -> None:
    groups = [f.metadata["group"] for f in dataclasses.fields(Config)]
    assert all(groups)
    assert len([name for name, _ in itertools.groupby(groups)]) == len({*groups})


def test_a_key_of_the_environment_that_is_not_set_is_named() -> None:
    with pytest.raises(ConfigError, match="'action_dim' is not set: it comes from the environment"):
        Config().need("action_dim")
    with pytest.raises(ConfigError, match="'obs_shape' is not set"):
        _ = Config().observation_shape
    assert Config().with_env({"state": (3,)}, 2, 9).observation_shape == (3,)


OWN_SET = dict(task="two", tasks=["walker-walk", "cup-catch"])


def test_a_set_of_ones_own_is_complete_where_its_tasks_are_official() -> None:
    cfg = Config(**OWN_SET)  # type: ignore[arg-type]
    assert (cfg.multitask, cfg.task_dim, cfg.action_dims, cfg.action_dim) == (True, 64, (6, 2), 6)
    assert (cfg.obs_shape, cfg.episode_lengths, cfg.episode_length) == ({"state": (24,)}, (500, 500), 500)
    assert cfg.with_tasks().seed_steps == 5000  # five episodes of each
    assert cfg == Config.from_dict(cfg.to_dict())
    assert (cfg.replace(model_size=1).task_dim, cfg.replace(model_size=1).replace(model_size=5).task_dim) == (96, 64)
    assert Config(**OWN_SET, task_dim=7).replace(model_size=1).task_dim == 7  # type: ignore[arg-type]
    one = cfg.of_task("cup-catch")
    assert (one.task, one.multitask, one.tasks, one.action_dims, one.task_dim) == ("cup-catch", False, (), (), 0)
    assert (one.obs_shape, one.action_dim, one.episode_length, one.episode_lengths) == (None, None, 500, ())
    assert cfg.replace(tasks=("cup-catch",)).action_dims == (2,)
    assert cfg.replace(tasks=[*cfg.tasks], lr=1.0).action_dims == (6, 2)
    with pytest.raises(ConfigError, match="'tasks': got None"):
        cfg.replace(tasks=None)
    # Settings of environments may change sizes, which are then asked of them.
    assert not Config(**OWN_SET, env_kwargs={"task_kwargs": {"time_limit": 1}}).multitask  # type: ignore[arg-type]


def test_a_set_of_other_tasks_is_completed_by_their_environments() -> None:
    cfg = Config(task="two", tasks=("walker-walk", "Pendulum-v1"), model_size=1)
    assert (cfg.multitask, cfg.action_dims, cfg.task_dim) == (False, (), 0)
    with pytest.raises(ConfigError, match=r"action_dim.*environment"):
        cfg.need("action_dim")
    done = cfg.with_tasks([(24, 6, 500), (3, 1, 200)])
    assert (done.multitask, done.task_dim, done.action_dims, done.action_dim) == (True, 96, (6, 1), 6)
    assert (done.obs_shape, done.episode_lengths, done.seed_steps) == ({"state": (24,)}, (500, 200), 3500)
    assert done.discounts == [done.discount(500), done.discount(200)]
    assert done == Config.from_dict(done.to_dict()) == done.with_tasks()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(tasks=("a", "b", "a")), ["tasks", "each task once"]),
        (dict(tasks=(1,)), ["tasks", "names of tasks"]),
        (dict(tasks=("a",), obs="rgb"), ["obs", "rgb", "multi-task"]),
        (dict(tasks=("a",), episodic=True), ["episodic", "false in a multi-task model"]),
    ],
)
def test_sets_that_no_model_can_have_are_refused(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        Config(**{**OWN_SET, **values})  # type: ignore[arg-type]
    assert all(word in str(e.value) for word in words)
