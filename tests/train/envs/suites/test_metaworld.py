"""Meta-World: official semantics against the suite itself. `suite_checks.py` says how these tests are run."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import suite_checks as checks

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.envs.base import step
from tdmpc2_fast.train.envs.mujoco_setup import prepare_rendering
from tdmpc2_fast.train.envs.suites.metaworld import TASKS, make

if find_spec("metaworld") is None:
    pytest.skip("Meta-World is not installed here", allow_module_level=True)
prepare_rendering()  # before a test imports the suite

# One that draws a goal only, one an object and a goal again and again, one that moves a part of its model.
SOME = ("mw-reach", "mw-pick-place", "mw-door-open")


def raw(task: str, seed: int) -> Any:
    """The suite's own class, seeded; the goal is seen and drawn for each episode."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env = ALL_V3_ENVIRONMENTS[task.removeprefix("mw-") + "-v3"]()
    env._partially_observable = False
    del env.sawyer_observation_space  # cached, of the goal hidden
    env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True
    env.seed(seed)
    return env


def test_all_50_tasks_are_there() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert {name.removesuffix("-v3") for name in ALL_V3_ENVIRONMENTS} == {task.removeprefix("mw-") for task in TASKS}
    assert len(TASKS) == 50


@pytest.mark.parametrize("task", SOME)
def test_a_decision_is_two_steps_after_one_that_nobody_sees(task: str) -> None:
    env, suite, without = make(Config(task=task), 3), raw(task, 3), raw(task, 3)
    assert (env.obs_shape, env.action_dim, env.action_repeat, env.frames_per_second) == ((39,), 4, 2, 40)
    for _ in range(2):
        first = suite.reset()[0].astype(np.float32)
        np.testing.assert_array_equal(env.reset(), first)
        without.reset()
        suite.step(np.zeros(4))
        for i, action in enumerate(checks.actions_of(env, 10)):
            obs, reward, _, _, info = env.step(action)
            (_, r1, _, _, _), (wanted, r2, _, _, told) = suite.step(action), suite.step(action)
            np.testing.assert_array_equal(obs, wanted.astype(np.float32))
            assert (obs.dtype, reward, info["success"]) == (np.float32, r1 + r2, float(told["success"]))
            if i == 0:
                other = [without.step(action) for _ in range(2)][-1][0].astype(np.float32)
                assert not np.array_equal(obs, other)
    env.close()


def test_success_stays_until_the_episode_ends() -> None:
    env: Any = make(Config(task="mw-reach"), 3)
    original, told = env.env.step, iter([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])

    def steps(action: Any) -> tuple[Any, ...]:
        *rest, info = original(action)
        return (*rest, {**info, "success": next(told)})

    env.reset()
    env.env.step = steps
    assert [step(env, action).success for action in checks.actions_of(env, 3)] == [0.0, 1.0, 1.0]
    env.env.step = original
    env.reset()
    assert step(env, np.zeros(4, np.float32)).success == 0.0
    env.close()


def test_the_suites_own_policy_reaches() -> None:
    from metaworld.policies import ENV_POLICY_MAP

    env, policy = make(Config(task="mw-reach"), 3), ENV_POLICY_MAP["reach-v3"]()
    obs, successes = env.reset(), []
    for _ in range(100):
        action = np.clip(policy.get_action(obs.astype(np.float64)), -1, 1).astype(np.float32)
        obs, _, _, _, info = env.step(action)
        successes.append(info["success"])
    assert successes == sorted(successes)
    assert (successes[0], successes[-1]) == (0.0, 1.0)
    env.close()


def test_nothing_ends_an_episode_early() -> None:
    checks.nothing_ends_an_episode_before_its_100_decisions(make, "mw-reach", 2, "success")


@pytest.mark.parametrize("task", SOME)
def test_equal_seeds_give_equal_numbers(task: str) -> None:
    checks.equal_seeds_give_equal_numbers(make, task)


@pytest.mark.parametrize("task", SOME)
def test_a_random_state_brings_back_an_episode(task: str) -> None:
    checks.a_random_state_brings_back_an_episode(make, task)


def test_pictures_change_no_number() -> None:
    checks.pictures_change_no_number(make, "mw-pick-place")


def test_up_is_up_in_pictures() -> None:
    env = make(Config(task="mw-reach"), 3)

    def row() -> float:
        red, green, blue = np.moveaxis(env.render(96, 96).astype(int), -1, 0)
        return float(np.nonzero((green > 150) & (blue > 150) & (red < 90))[0].mean())  # of the finger that is cyan

    env.reset()
    before = row()
    for _ in range(5):
        env.step(np.array([0, 0, 1, 0], np.float32))
    assert row() < before - 2
    env.close()


def test_pixels_are_the_last_three_pictures() -> None:
    checks.pixels_are_the_last_three_pictures(make, "mw-pick-place")


def test_the_older_reward_is_a_setting() -> None:
    """All but the reward stays as it is."""
    new, old = (make(Config(task="mw-reach", env_kwargs={"reward_function_version": v}), 3) for v in ("v2", "v1"))
    actions = checks.actions_of(new, 3)
    one, other = checks.played(new, actions), checks.played(old, actions)
    assert [x[0] for x in one] == [x[0] for x in other]
    assert all(x[1] != y[1] for x, y in zip(one[1:], other[1:], strict=True))
    assert one == checks.played(make(Config(task="mw-reach"), 3), actions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"goal": 1}, "config key 'env.goal': got 1, allowed for mw-reach: env.reward_function_version"),
        (
            {"reward_function_version": 2},
            "config key 'env.reward_function_version': got 2, allowed for mw-reach: 'v1', 'v2'",
        ),
    ],
)
def test_other_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(Config(task="mw-reach", env_kwargs=settings), 3)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config key 'task': Meta-World has no 'mw-raech'\. Did you mean 'mw-reach'"):
        make(Config(task="mw-raech"), 3)


def test_torch_is_not_needed() -> None:
    make(Config(task="mw-reach", obs="rgb"), 3).close()
    assert "torch" not in sys.modules
