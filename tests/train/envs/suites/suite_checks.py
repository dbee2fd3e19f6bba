"""What the tests of both suites ask of a task.

They run in the interpreter of their suite, where torch, and with it `tests/conftest.py`, is missing:

    make typecheck  # lays the packages out
    PYTHONPATH=build/typecheck PYTHON -P -m pytest -c /dev/null --noconftest -p no:cacheprovider tests/train/envs/suites
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.config import Config
from tdmpc2_fast.train.envs.base import Env

Make = Callable[[Config, int], Env]
Played = list[tuple[Any, ...]]


def actions_of(env: Env, count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (count, env.action_dim)).astype(np.float32)


def played(env: Env, actions: NDArray[np.float32], draw: bool = False) -> Played:
    """Play an episode; return what was seen, to the bit."""
    found: Played = [(env.reset().tobytes(),)]
    for i, action in enumerate(actions):
        given = action.copy()
        obs, *rest = env.step(given)
        assert given.tobytes() == action.tobytes()  # a step changes no action
        found.append((obs.tobytes(), *rest))
        if draw and i % 6 == 0:
            env.render(32, 24)
    return found


def equal_seeds_give_equal_numbers(make: Make, task: str) -> None:
    one, other, third = make(Config(task=task), 3), make(Config(task=task), 3), make(Config(task=task), 4)
    actions = actions_of(one, 12)
    np.random.seed(1)  # noqa: NPY002 - which no environment may heed
    first = [played(one, actions), played(one, actions)]
    np.random.seed(2)  # noqa: NPY002
    assert first == [played(other, actions), played(other, actions)]
    drawn = first[0] != first[1]
    assert drawn == (first[0] != played(third, actions))  # it draws something for each episode, or nothing ever
    assert drawn == (task.startswith("mw-") or task.endswith("-hard"))
    for env in one, other, third:
        env.close()


def a_random_state_brings_back_an_episode(make: Make, task: str) -> None:
    env = make(Config(task=task), 3)
    actions = actions_of(env, 12)
    played(env, actions_of(env, 20, seed=1))
    state = json.loads(json.dumps(env.random_state()))
    wanted = [played(env, actions), played(env, actions)]
    for lived in 0, 2:  # episodes that the other one has behind it
        other = make(Config(task=task), 99)
        for i in range(lived):
            played(other, actions_of(other, 7 + i, seed=i))
        other.set_random_state(state)
        assert [played(other, actions), played(other, actions)] == wanted
        other.close()
    env.close()


def pictures_change_no_number(make: Make, task: str) -> None:
    one, other = make(Config(task=task), 3), make(Config(task=task), 3)
    actions = actions_of(one, 12)
    other.render(32, 24)  # before the first episode, too
    assert [played(one, actions), played(one, actions)] == [played(other, actions, draw=True) for _ in range(2)]
    picture = one.render(80, 48)
    assert picture.shape == (48, 80, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 10
    assert one.render(4000, 8).shape == (8, 4000, 3)  # wider than the models' own buffers
    assert one.render(80, 48).tobytes() == picture.tobytes()
    one.close()
    other.close()


def pixels_are_the_last_three_pictures(make: Make, task: str) -> None:
    env, numbers = make(Config(task=task, obs="rgb"), 3), make(Config(task=task), 3)
    assert env.obs_shape == (9, 64, 64)
    obs = env.reset()
    numbers.reset()
    assert (obs.shape, obs.dtype) == (env.obs_shape, np.uint8)
    assert np.array_equal(obs[:3], obs[3:6])
    for action in actions_of(env, 4):
        before = obs
        obs, *rest = env.step(action)
        assert rest == list(numbers.step(action)[1:])  # reward and ends are those without pixels
        assert np.array_equal(obs[:6], before[3:])
        assert np.array_equal(obs[6:], numbers.render(64, 64).transpose(2, 0, 1))
    assert not np.array_equal(obs[:3], obs[6:])
    env.close()
    numbers.close()


def nothing_ends_an_episode_before_its_100_decisions(make: Make, task: str, steps: int, success: str) -> None:
    """The suite says in each of its steps that it is over; `steps` of them make a decision."""
    env: Any = make(Config(task=task), 3)
    env.reset()
    last, info = env.env.step(actions_of(env, 1)[0])[0], {success: 0.0}
    made = []

    def over(action: NDArray[Any]) -> tuple[Any, ...]:
        made.append(action)
        return last, 1.0, True, True, info

    env.env.step = over
    for _ in range(2):
        env.reset()
        made.clear()
        found = [env.step(action) for action in actions_of(env, 100)]
        assert [(x[2], x[3]) for x in found] == [(False, False)] * 99 + [(False, True)]
        assert {x[1] for x in found} == {float(steps)}
        assert len(made) == 100 * steps
    assert env.max_episode_steps == 100
    env.close()
