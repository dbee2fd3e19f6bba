"""MyoSuite: official semantics against the suite itself. `suite_checks.py` says how these tests are run."""

from __future__ import annotations

import subprocess
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
from tdmpc2_fast.train.envs.suites.mujoco_task import Camera
from tdmpc2_fast.train.envs.suites.myosuite import TASKS, make

if find_spec("myosuite") is None:
    pytest.skip("MyoSuite is not installed here", allow_module_level=True)
prepare_rendering()  # before a test imports the suite

SOME = ("myo-reach", "myo-pose-hard", "myo-obj-hold-hard", "myo-key-turn-hard", "myo-pen-twirl-hard")


def raw(task: str, seed: int) -> Any:
    """The task as the official code makes it, but seeded."""
    import myosuite  # noqa: F401 - registers the tasks
    from myosuite.utils import gym

    variant = "Random" if task.endswith("-hard") else "Fixed"
    name = "".join(part.title() for part in task.removesuffix("-hard").split("-")[1:])
    return gym.make(f"myoHand{name}{variant}-v0", seed=seed)


@pytest.mark.parametrize("task", TASKS)
def test_a_decision_is_a_step(task: str) -> None:
    env, suite = make(Config(task=task), 3), raw(task, 3)
    assert (env.obs_shape, env.action_dim, env.action_repeat) == (suite.observation_space.shape, 39, 1)
    assert env.frames_per_second == pytest.approx(100 if "pen" in task else 50)
    for _ in range(2):
        np.testing.assert_array_equal(env.reset(), suite.reset()[0].astype(np.float32))
        for action in checks.actions_of(env, 5):
            obs, reward, _, _, info = env.step(action)
            wanted, r, _, _, told = suite.step(action)
            np.testing.assert_array_equal(obs, wanted.astype(np.float32))
            assert (obs.dtype, reward, info["success"]) == (np.float32, np.ravel(r)[0], np.ravel(told["solved"])[0])
    env.close()


def test_there_are_ten_tasks() -> None:
    names = ("reach", "pose", "obj-hold", "key-turn", "pen-twirl")
    assert set(TASKS) == {f"myo-{name}{hard}" for name in names for hard in ("", "-hard")}


def test_success_is_that_of_the_step() -> None:
    """A key may be turned too far back; the official code reports what the last step said."""
    env: Any = make(Config(task="myo-key-turn"), 3)
    original, told = env.env.step, iter([np.array([False]), np.array([True]), np.array([False])])

    def steps(action: Any) -> tuple[Any, ...]:
        *rest, info = original(action)
        return (*rest, {**info, "solved": next(told)})

    env.reset()
    env.env.step = steps
    assert [step(env, action).success for action in checks.actions_of(env, 3)] == [0.0, 1.0, 0.0]
    env.close()


def test_nothing_ends_an_episode_early() -> None:
    """Neither a pen that falls nor the suite's limit of 50 steps for this task."""
    checks.nothing_ends_an_episode_before_its_100_decisions(make, "myo-pen-twirl", 1, "solved")


@pytest.mark.parametrize("task", SOME)
def test_equal_seeds_give_equal_numbers(task: str) -> None:
    checks.equal_seeds_give_equal_numbers(make, task)


@pytest.mark.parametrize("task", SOME)
def test_a_random_state_brings_back_an_episode(task: str) -> None:
    checks.a_random_state_brings_back_an_episode(make, task)


def test_pictures_change_no_number() -> None:
    checks.pictures_change_no_number(make, "myo-obj-hold-hard")


def test_pictures_are_those_of_the_official_code() -> None:
    """Muscles are drawn as strong as they pull."""
    env: Any = make(Config(task="myo-key-turn-hard"), 3)
    env.reset()
    for _ in range(5):
        env.step(np.ones(39, np.float32))
    sim = env.env.sim
    wanted = sim.renderer.render_offscreen(width=96, height=64, camera_id="hand_side_inter")
    np.testing.assert_array_equal(env.render(96, 64), wanted)
    without = Camera(sim.model.ptr, sim.data.ptr, "hand_side_inter")
    assert not np.array_equal(without.picture(96, 64), wanted)
    sim.renderer._renderer.close()
    without.close()
    env.close()


def test_pixels_are_the_last_three_pictures() -> None:
    checks.pixels_are_the_last_three_pictures(make, "myo-key-turn-hard")


@pytest.mark.parametrize(
    "settings",
    [
        {"frame_skip": 20},
        {"muscle_condition": "sarcopenia"},
        {"muscle_condition": "fatigue"},
        {"weighted_reward_keys": {"reach": 2.0}},
        {"far_th": 10.0},
    ],
)
def test_settings_reach_the_task(settings: dict[str, Any]) -> None:
    plain, other = make(Config(task="myo-reach"), 3), make(Config(task="myo-reach", env_kwargs=settings), 3)
    actions = checks.actions_of(plain, 25)
    found = checks.played(other, actions)
    assert found != checks.played(plain, actions)
    assert found == checks.played(other, actions)  # nothing of an episode is left in the next
    assert other.frames_per_second == pytest.approx(25 if "frame_skip" in settings else 50)


def test_fewer_observations_are_a_smaller_shape() -> None:
    env = make(Config(task="myo-reach", env_kwargs={"obs_keys": ["qpos"]}), 3)
    assert env.reset().shape == env.obs_shape == (23 + 39,)  # the suite adds the muscles' activations


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pose_thd": 1}, r"config key 'env.pose_thd': got 1, allowed for myo-reach: .*env.far_th"),
        ({"model_path": "x"}, r"config key 'env.model_path': got 'x', allowed for myo-reach: "),
        ({"muscle_condition": "old"}, r"config key 'env.muscle_condition': got 'old', .*'sarcopenia'"),
        (
            {"weighted_reward_keys": {"speed": 1}},
            r"config key 'env': myo-reach cannot be made .*KeyError: 'speed'",
        ),
        ({"frame_skip": "many"}, r"config key 'env': myo-reach cannot be made with these settings: TypeError"),
    ],
)
def test_other_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(Config(task="myo-reach", env_kwargs=settings), 3)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config key 'task': MyoSuite has no 'myo-raech'\. Did you mean 'myo-reach'"):
        make(Config(task="myo-raech"), 3)


def test_the_suite_says_nothing() -> None:
    program = """
from tdmpc2_fast.config import Config
from tdmpc2_fast.train.envs.suites.myosuite import make
env = make(Config(task="myo-reach"), 3)
env.reset()
env.render(32, 24)
"""
    told = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


def test_torch_is_not_needed() -> None:
    make(Config(task="myo-reach", obs="rgb"), 3).close()
    assert "torch" not in sys.modules
