"""Environments drawn at random: each trains, or is refused before its first step by its space."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.envs import tried
from tdmpc2_fast.train.run.trainer import OnlineTrainer

gymnasium = pytest.importorskip("gymnasium")
hypothesis = pytest.importorskip("hypothesis")
from gymnasium import spaces  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

QUICK = dict(
    TINY,
    num_q=2,
    num_samples=8,
    num_elites=2,
    num_pi_trajs=1,
    iterations=1,
    horizon=1,
    batch_size=4,
    steps=60,
    seed_steps=6,
    utd=0.1,
    eval_freq=1000,
    eval_episodes=1,
    save_agent=False,
    save_csv=False,
    tensorboard=False,
    display="none",
    episodic=True,
    device="cpu",
)
FLOATS, WHOLE = ("float16", "float32", "float64"), ("int8", "uint8", "int16", "uint16", "int32", "int64", "bool")
ENDS = [-1e6, -2.5, -1.0, -0.1, -1e-20, 0.0, 1e-20, 0.3, 1.0, 7.0, 1e6]
WILD = [-np.inf, -3.4e38, 3.4e38, np.inf]


@st.composite
def boxes(draw: st.DrawFn, sides: int = 2, wild: bool = True) -> spaces.Box:
    """Of any dtype, shape and bounds: equal, one-sided, infinite, or further apart than the dtype counts."""
    dtype = np.dtype(draw(st.sampled_from(FLOATS + WHOLE)))
    shape = tuple(draw(st.lists(st.integers(0 if draw(st.integers(0, 20)) == 20 else 1, 3), max_size=sides)))
    size = int(np.prod(shape))
    if dtype.kind == "f":
        ends = st.sampled_from([e for e in ENDS if abs(e) <= np.finfo(dtype).max])
        if wild and draw(st.integers(0, 7)) == 7:
            ends = st.sampled_from([*ENDS, *WILD] if dtype != np.float16 else [0.0, -np.inf, np.inf])
    else:
        first, last = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        ends = st.one_of(st.integers(first, last), st.integers(max(first, -3), min(last, 12)))
    pairs = [
        sorted(draw(st.lists(ends, min_size=2, max_size=2, unique=draw(st.integers(0, 7)) < 7))) for _ in range(size)
    ]
    low, high = (np.array([p[k] for p in pairs], dtype).reshape(shape) for k in (0, 1))
    if dtype.kind == "f" and ((low == np.inf).any() or (high == -np.inf).any()):
        low, high = np.where(low == np.inf, 0, low).astype(dtype), np.where(high == -np.inf, 0, high).astype(dtype)
    return spaces.Box(low, high, shape, dtype.type)


images = st.builds(
    lambda shape, dtype: spaces.Box(0, 255 if dtype == np.uint8 else 1, shape, dtype),
    st.one_of(
        st.tuples(st.integers(16, 80), st.integers(16, 80), st.sampled_from([1, 3, 4, 6])),
        st.tuples(st.sampled_from([1, 3, 9]), st.integers(16, 80), st.integers(16, 80)),
        st.tuples(st.integers(1, 3), st.integers(16, 40), st.integers(16, 40), st.just(3)),
    ),
    st.sampled_from([np.uint8, np.float32]),
)
numbers = st.one_of(
    boxes(3, wild=False),
    st.builds(spaces.Discrete, st.integers(1, 4), start=st.integers(-2, 2)),
    st.builds(spaces.MultiBinary, st.integers(1, 3)),
    st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 3), min_size=1, max_size=3)),
)
without_size = st.sampled_from([spaces.Sequence(spaces.Discrete(2)), spaces.Graph(spaces.Box(-1, 1, (2,)), None)])
leaves = st.integers(0, 15).flatmap(lambda n: {15: without_size, 14: images}.get(n, numbers))
observations = st.one_of(
    leaves,
    images,
    st.dictionaries(st.sampled_from("abc"), leaves, min_size=1, max_size=3).map(spaces.Dict),
    st.lists(leaves, min_size=1, max_size=2).map(spaces.Tuple),
)
no_boxes = st.sampled_from([spaces.Discrete(3), spaces.Dict(a=spaces.Box(-1, 1))])
actions = st.integers(0, 15).flatmap(lambda n: no_boxes if n == 15 else boxes())
FORMS = [
    float,
    np.float32,
    np.array,
    lambda x: np.array([x]),
    lambda x: torch.tensor(x),
    lambda x: [x],
    lambda x: [[x]],
]


class Drawn(gymnasium.Env):  # type: ignore[misc]
    """Has what it was given; every action must be contained, and is counted."""

    drawn: dict[str, Any]
    steps = 0

    def __init__(self) -> None:
        self.observation_space, self.action_space = self.drawn["observation"], self.drawn["action"]
        self.observation_space.seed(0)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), (action, self.action_space)
        type(self).steps += 1
        self.t += 1
        form = self.drawn["form"]
        ends = form(self.drawn["ends"] and self.t % 5 == 0)
        cut = form(self.drawn["cuts"] and self.t % 7 == 0)
        return self.observation_space.sample(), form(self.drawn["reward"]), ends, cut, {"success": form(1.0)}


gymnasium.register("Drawn-v0", entry_point=Drawn)


def refusal(cfg: Config) -> str | None:
    try:
        tried(cfg)
    except ConfigError as e:
        return str(e)
    return None


def trained(cfg: Config) -> OnlineTrainer:
    with tempfile.TemporaryDirectory() as folder:
        trainer = OnlineTrainer(cfg, Path(folder))
        trainer.run()
    return trainer


environments = given(
    observation=observations,
    action=actions,
    length=st.integers(1, 15),
    ends=st.booleans(),
    cuts=st.booleans(),
    reward=st.one_of(st.floats(-100, 100, width=32), st.sampled_from([0, 1e5, -1e5, True])),
    form=st.sampled_from(FORMS),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@environments
def test_every_environment_trains_or_is_refused_by_its_space(length: int, **drawn: Any) -> None:
    trains_or_is_refused(length, drawn)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@environments
def test_many_environments_train_or_are_refused_by_their_spaces(length: int, **drawn: Any) -> None:
    trains_or_is_refused(length, drawn)


def trains_or_is_refused(length: int, drawn: dict[str, Any]) -> None:
    Drawn.drawn, Drawn.steps = drawn, 0
    keys: dict[str, Any] = dict(QUICK, task="Drawn-v0", episode_length=length)
    if (why := refusal(Config(**keys))) is not None:
        assert Drawn.steps == 0
        assert "\n" not in why
        shown = {name: " ".join(str(drawn[name]).split()) for name in ("action", "observation")}
        assert any(f"{name} space {space}" in why for name, space in shown.items()), why
        if "set obs=rgb" not in why:
            return
        keys |= dict(obs="rgb", num_channels=1, latent_dim=16)  # as advised
    trainer = trained(Config(**keys))
    assert Drawn.steps >= 60
    assert trainer.agent.updater.steps > 0
    assert all(bool(p.isfinite().all()) for p in trainer.agent.model.parameters())
    held = trainer.buffer.steps(0, len(trainer.buffer))
    assert held["obs"].float().isfinite().all()
    assert held["reward"][~held["reward"].isnan()].isfinite().all()
