"""Gymnasium-Robotics by the names of its tasks: made, repeated to the bit, drawn, or named where it is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.envs import complete, make_env
from tdmpc2_fast.train.envs.base import reset, state_of, step

there = pytest.mark.skipif(find_spec("gymnasium_robotics") is None, reason="needs the extra [robotics]")

SIZES = {  # observation, action, decisions
    "FetchReach-v4": (16, 4, 50),
    "FetchPickAndPlace-v4": (31, 4, 50),
    "HandReach-v3": (93, 20, 50),
    "AdroitHandDoor-v1": (39, 28, 200),
    "PointMaze_UMaze-v3": (8, 2, 300),
    "AntMaze_UMaze-v5": (109, 8, 700),
    "FrankaKitchen-v1": (93, 9, 280),
}


def config(task: str) -> Config:
    return Config(task=task, model_size=1, episodic=True)


@there
@pytest.mark.parametrize("task", SIZES)
def test_a_task_is_made_and_repeats(task: str) -> None:
    """A maze's ant and a kitchen's robot draw from generators of their own, which are restored, too."""
    env = make_env(config(task), 1)
    cfg = complete(config(task), env)
    assert (env.obs_shape, env.action_dim, env.max_episode_steps) == ((SIZES[task][0],), *SIZES[task][1:])
    actions = np.random.default_rng(0).uniform(-1, 1, (5, env.action_dim)).astype(np.float32)
    reset(env)
    state = state_of(env)
    first, once = reset(env), [step(env, a) for a in actions]
    other = make_env(cfg, 2)
    for again in env, other:
        again.set_random_state(state)
        assert np.array_equal(reset(again), first)
        for action, want in zip(actions, once, strict=True):
            found = step(again, action)
            assert np.array_equal(found.obs, want.obs)
            assert found[1:] == want[1:]
    assert not np.array_equal(reset(env), first)


@there
def test_a_goal_reached_is_a_success() -> None:
    """The hand goes to where it is to be, which the observation tells: achieved, then desired, then the rest."""
    env = make_env(config("FetchReach-v4"), 1)
    obs = reset(env)
    found = step(env, np.zeros(4, np.float32))
    assert (found.reward, found.success) == (-1, 0)
    for _ in range(30):
        way = 5 * (obs[3:6] - obs[:3])
        found = step(env, np.array([*way.clip(-1, 1), 0], np.float32))
        obs = found.obs
    assert (found.reward, found.success) == (0, 1)


@there
@pytest.mark.parametrize("task", ["FetchReach-v4", "AntMaze_UMaze-v4", "FrankaKitchen-v1"])
def test_the_first_picture_of_a_process(task: str) -> None:
    """The renderer is chosen before the first picture, also that of an environment within another one."""

    program = (
        "import sys; from tdmpc2_fast import Config; from tdmpc2_fast.train.envs import make_env;"
        f"env = make_env(Config(task={task!r}, model_size=1, episodic=True), 1); env.reset();"
        "print(env.render(64, 48).shape)"
    )
    environ = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    ended = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    if "MUJOCO_GL=disable" in ended.stderr:
        pytest.skip("nothing here renders without a screen")
    assert ended.stdout.splitlines()[-1:] == ["(48, 64, 3)"], ended.stderr


@pytest.mark.parametrize("task", ["FetchReach-v4", "AntMaze_Large-v5", "AdroitHandPen-v1"])
def test_a_missing_package_is_named(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(ConfigError, match=rf"'{task}' needs gymnasium_robotics; pip install 'tdmpc2-fast\[robotics\]'"):
        make_env(config(task), 1)
