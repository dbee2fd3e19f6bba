"""Config: official names and defaults, ranges, errors that say what is allowed."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import GOLDEN, tiny_config

from tdmpc2_fast import Config
from tdmpc2_fast.config import MODEL_SIZES, task_embedding_dim
from tdmpc2_fast.errors import ConfigError, nearest


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
        (dict(obs="rgb", latent_dim=128), ["latent_dim", "512"]),
        (dict(steps=float("inf")), ["steps", "inf", "an integer"]),
        (dict(steps=float("nan")), ["steps", "nan"]),
        (dict(multitask=True, tasks=("a",), task_dim=4), ["action_dims", "one entry per task"]),
        (dict(seed=-1), ["seed", "-1"]),
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
