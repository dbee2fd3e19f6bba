"""DMControl: where an episode ends, and what is seen of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.envs import make_env
from tdmpc2_fast.train.envs.base import RenderError
from tdmpc2_fast.train.envs.dmcontrol import DMControl, Pixels

pytest.importorskip("dm_control")


def test_an_episode_that_ends_within_a_decision_shows_its_last_step() -> None:
    """Three control steps of 0.02 s: the second decision is one of them, for a step more would begin an episode."""
    from dm_control import suite

    settings = {"task_kwargs": {"time_limit": 0.06}}
    env = make_env(Config(task="pendulum-swingup", env_kwargs=settings), 3)
    raw = suite.load("pendulum", "swingup", task_kwargs={"random": 3, "time_limit": 0.06})
    assert env.max_episode_steps == 2
    env.reset()
    raw.reset()
    action = np.ones(1, np.float32)
    assert env.step(action)[2:4] == (False, False)
    obs, reward, terminated, truncated, _ = env.step(action)
    steps = [raw.step(action.astype(np.float64)) for _ in range(3)]
    assert steps[-1].last()
    np.testing.assert_array_equal(
        obs, np.concatenate([np.ravel(v) for v in steps[-1].observation.values()], dtype="f4")
    )
    assert reward == steps[-1].reward
    assert (terminated, truncated) == (False, True)


def test_a_task_without_a_limit_has_500_decisions() -> None:
    env = DMControl("pendulum-swingup", 3, {"task_kwargs": {"time_limit": math.inf}})
    assert env.max_episode_steps == 500
    for _ in range(2):  # every episode by itself
        env.reset()
        assert [env.step(np.zeros(1, np.float32))[3] for _ in range(500)] == [False] * 499 + [True]


@pytest.mark.parametrize(("task", "camera"), [("quadruped-run", 2), ("cup-catch", 0)])
def test_the_camera_is_the_official_one(task: str, camera: int) -> None:
    env = make_env(Config(task=task), 1)
    assert env.camera_id == camera  # type: ignore[attr-defined]
    assert env.frames_per_second == pytest.approx(25)  # one decision is two control steps of 0.02 s


def test_pixels_are_three_frames() -> None:
    env = Pixels("pendulum-swingup", 1)
    assert (env.obs_shape, env.action_dim, env.max_episode_steps) == ((9, 64, 64), 1, 500)


def test_pixels_need_a_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(self: DMControl, width: int, height: int) -> None:
        raise RenderError("no driver")

    monkeypatch.setattr(DMControl, "render", none_here)
    with pytest.raises(ConfigError, match="'obs': 'rgb' needs a renderer; no driver"):
        make_env(Config(task="pendulum-swingup", obs="rgb"), 1)


def test_pixels_are_those_of_dm_control() -> None:
    """Whatever the buffer that they are drawn in, and after larger pictures as before."""
    env, plain = Pixels("walker-walk", 5), DMControl("walker-walk", 5)
    try:
        obs = env.reset()
    except RenderError as e:
        pytest.skip(str(e))
    plain.reset()
    for k in range(4):
        wanted = plain.env.physics.render(64, 64, 0).transpose(2, 0, 1)
        assert np.array_equal(obs[-3:], wanted)
        if k == 2:
            assert np.array_equal(env.render(200, 100), plain.render(200, 100))
        action = np.full(6, 0.5, np.float32)
        before, obs = obs, env.step(action)[0]
        assert np.array_equal(obs[:6], before[3:])
        plain.step(action)


def test_quality_is_a_setting() -> None:
    settings = {"quality": {"shadowsize": 512, "offsamples": 0}}
    quality = DMControl("cup-spin", 1, settings).env.physics.model.vis.quality
    assert (quality.shadowsize, quality.offsamples) == (512, 0)
    with pytest.raises(ConfigError, match="cannot be made with these settings"):
        DMControl("walker-walk", 1, {"quality": {"shadow": 1}})
