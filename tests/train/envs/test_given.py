"""Environments that a program hands over: what they are taken for, and vectors of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.envs import complete
from tdmpc2_fast.train.envs.base import Step
from tdmpc2_fast.train.envs.given import Source, source_of
from tdmpc2_fast.train.envs.given.vector import VectorEnvironments
from tdmpc2_fast.train.envs.spaces import action_space


class Counter(gym.Env[Any, Any]):
    """Observes its own number and how far it is; ends after `length` steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-2, 2, (1,), np.float32)
    render_mode = None

    def __init__(self, number: int = 0, length: int = 3, terminates: bool = False) -> None:
        self.number, self.length, self.terminates = number, length, terminates
        self.seeds: list[int | None] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.t = 0
        return self._see(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        self.t += 1
        end = self.t >= self.length
        return self._see(), float(self.t), end and self.terminates, end and not self.terminates, {"success": end}

    def _see(self) -> Any:
        return np.array([self.number, self.t], np.float32)


def limited(length: int = 3) -> Any:
    return gym.wrappers.TimeLimit(Counter(length=99), length)


def config(**keys: Any) -> Config:
    return Config(num_envs=3, episodic=True, **keys).with_env({"state": (2,)}, 1, 5)


# ---- what is taken for what


def test_names_factories_objects_and_vectors_are_told_apart() -> None:
    assert type(source_of("walker-walk")) is type(source_of(None)) is Source
    one, factory, vector = source_of(limited()), source_of(limited), source_of(SyncVectorEnv([limited] * 2))
    assert one.shared
    assert [factory.shared, vector.shared] == [False, False]
    assert vector.keys["num_envs"] == 2
    assert source_of(one) is one
    cfg = Config(task="x")
    for source in (one, factory, vector):
        assert source.form(cfg).max_episode_steps == 3
        assert complete(cfg, source.form(cfg)).episode_length == 3


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (
            3,
            "env: got builtins.int, allowed: a task's name, a Gymnasium id, a gymnasium.Env, a function that makes one",
        ),
        ([limited], "SyncVectorEnv([make, make])"),
        (type("Old", (), {"reset": None, "step": None})(), "shimmy"),
    ],
)
def test_what_is_none_of_these_is_refused(env: Any, words: str) -> None:
    with pytest.raises(ConfigError) as e:
        source_of(env)
    assert words in str(e.value)


def test_a_function_that_makes_something_else_is_named() -> None:
    with pytest.raises(ConfigError, match=r"env: the function made dict, allowed: a gymnasium.Env"):
        source_of(dict).make(Config(), 1)


def test_an_environment_without_a_limit_needs_one() -> None:
    with pytest.raises(ConfigError, match="'episode_length': 'Counter' has no time limit"):
        source_of(Counter()).form(Config(task="Counter"))
    env = source_of(Counter(length=99)).make(Config(task="Counter", episode_length=2), 7)
    env.reset()
    assert [env.step(np.zeros(1, np.float32))[3] for _ in range(2)] == [False, True]


def test_what_was_handed_over_is_seeded_and_left_open() -> None:
    inner = Counter()
    closed: list[int] = []
    inner.close = lambda: closed.append(1)  # type: ignore[method-assign]
    env = source_of(gym.wrappers.TimeLimit(inner, 3)).make(Config(task="x"), 7)
    env.reset()
    env.reset()
    env.close()
    assert inner.seeds == [7, None]
    assert not closed


# ---- vectors


def play(envs: VectorEnvironments, decisions: int) -> list[list[tuple[float, ...]]]:
    """Play as the training loop does; return the episodes, as lists of (number, t, reward), of each environment."""
    episodes: list[list[list[tuple[float, ...]]]] = [[], [], []]
    running: list[list[tuple[float, ...]] | None] = [None] * 3
    for _ in range(decisions):
        which = [i for i, e in enumerate(running) if e is None]
        if which:
            for i, obs in envs.reset(which).items():
                running[i] = [(*obs.tolist(), 0.0)]
        envs.step_async(np.zeros((3, 1), np.float32))
        for i, step in enumerate(envs.step_wait()):
            if not isinstance(step, Step):
                running[i] = None
                continue
            now = running[i]
            assert now is not None
            now.append((*step.obs.tolist(), step.reward))
            if step.terminated or step.truncated:
                assert step.success == 1.0
                episodes[i].append(now)
                running[i] = None
    return [e for of_one in episodes for e in of_one]


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("terminates", [False, True])
def test_episodes_of_a_vector_come_whole_whatever_resets_them(mode: AutoresetMode, terminates: bool) -> None:
    def made(number: int) -> Callable[[], Any]:
        return lambda: Counter(number, length=2 + number, terminates=terminates)

    vector = SyncVectorEnv([made(i) for i in range(3)], autoreset_mode=mode)
    vector.spec = gym.envs.registration.EnvSpec("C-v0", max_episode_steps=9)
    found = play(VectorEnvironments(vector, config(), print), 30)
    assert len(found) > 15
    for episode in found:
        number = episode[0][0]
        assert episode == [(number, float(t), float(t)) for t in range(int(number) + 3)]
    assert {e[0][0] for e in found} == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_episodes_without_a_limit_are_cut(mode: AutoresetMode) -> None:
    vector = SyncVectorEnv([lambda: Counter(length=99)] * 3, autoreset_mode=mode)
    envs = VectorEnvironments(vector, config(), print)
    envs.reset([0, 1, 2])
    ends = []
    for _ in range(6):
        envs.step_async(np.zeros((3, 1), np.float32))
        steps = envs.step_wait()
        ends.append([s is not None and s.truncated for s in steps])
        if any(ends[-1]):
            assert all(obs.tolist() == [0, 0] for obs in envs.reset([0, 1, 2]).values())
    assert ends == [[False] * 3] * 4 + [[True] * 3] + [[False] * 3]


def test_one_of_a_vector_can_be_cut_alone() -> None:
    vector = SyncVectorEnv([lambda: Counter(length=99), lambda: Counter(length=4), lambda: Counter(length=99)])
    envs = VectorEnvironments(vector, config(), print)
    lengths: dict[int, list[int]] = {0: [], 1: [], 2: []}
    now = [0, 0, 0]
    envs.reset([0, 1, 2])
    for _ in range(24):
        envs.step_async(np.zeros((3, 1), np.float32))
        steps = envs.step_wait()
        for i, step in enumerate(steps):
            now[i] += step is not None
            if step is None or step.truncated:
                if step is not None:
                    lengths[i].append(now[i])
                now[i] = 0
                envs.reset([i])
    assert {*lengths[0], *lengths[2]} == {5}
    assert {*lengths[1]} == {4}


class InParts(Counter):
    observation_space = spaces.Dict(
        text=spaces.Text(4, charset="ab"), one=spaces.OneOf([spaces.Discrete(2), spaces.Box(0, 1)]),
        two=spaces.Tuple([spaces.Discrete(3), spaces.Box(0, 9, (2,))]),
    )  # fmt: skip

    def _see(self) -> Any:
        return {"text": "ab", "one": (0, 1), "two": (2, np.full(2, self.number, np.float32))}


def test_parts_of_a_vector_are_taken_apart_by_their_space() -> None:
    space = InParts.observation_space
    vector = SyncVectorEnv([lambda: gym.wrappers.TimeLimit(InParts(3, 99), 5)] * 3)
    cfg = Config(num_envs=3).with_env({"state": (spaces.flatdim(space),)}, 1, 5)
    found = VectorEnvironments(vector, cfg, print).reset([0, 1, 2])
    wanted = spaces.flatten(space, InParts(3).reset()[0])
    assert all(np.array_equal(found[i], wanted) for i in range(3))


class Unmasked(gym.vector.VectorEnv[Any, Any, Any]):
    """A vector of somebody's own, which tells no limit."""

    num_envs = 3
    single_observation_space = Counter.observation_space
    single_action_space = Counter.action_space


def test_a_vector_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'num_envs': got 3, allowed: 2, as many as given"):
        VectorEnvironments(SyncVectorEnv([limited] * 2), config(), print)
    with pytest.raises(ConfigError, match="without a time limit, and cannot reset one of them alone"):
        VectorEnvironments(Unmasked(), config(), print)
    with pytest.raises(ConfigError, match="eval_env: got None, and Unmasked does not tell how"):
        source_of(Unmasked()).make(Config(), 1)


# ---- discrete actions


@pytest.mark.parametrize(
    ("space", "size"),
    [
        (spaces.Discrete(4), 4),
        (spaces.Discrete(3, start=-1), 3),
        (spaces.MultiDiscrete([2, 5, 3]), 10),
        (spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[1, 0], [0, 5]]), 11),
        (spaces.MultiBinary(3), 6),
        (spaces.MultiBinary([2, 2]), 8),
    ],
)
def test_every_choice_of_a_discrete_space_can_be_made_and_no_other(space: Any, size: int) -> None:
    made = action_space(space, "x")
    assert made.size == size
    rng = np.random.default_rng()
    seen = set()
    for _ in range(600):
        action = made(rng.uniform(-1, 1, size).astype(np.float32))
        assert space.contains(action)
        seen.add(tuple(np.ravel(action).tolist()))
    choices = [{x[i] for x in seen} for i in range(len(next(iter(seen))))]
    assert sum(map(len, choices)) == size


def test_the_largest_number_is_chosen_and_the_first_of_equals() -> None:
    made = action_space(spaces.MultiDiscrete([2, 3]), "x")
    assert made(np.array([0.1, 0.2, -1, -0.5, -0.6], np.float32)).tolist() == [1, 1]
    assert made(np.zeros(5, np.float32)).tolist() == [0, 0]
    assert made.facts == ["discrete actions are relaxed: 2 + 3 numbers, the largest of which is chosen"]


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Discrete(1), "allowed: something to choose"),
        (spaces.Discrete(1000), "allowed: at most 128 choices in all"),
        (spaces.Text(3), "allowed: a Box with finite bounds, Discrete, MultiDiscrete or MultiBinary"),
    ],
)
def test_spaces_without_a_choice_are_refused(space: Any, words: str) -> None:
    with pytest.raises(ConfigError) as e:
        action_space(space, "x")
    assert words in str(e.value)
