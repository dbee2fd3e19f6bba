"""Environments: official names and semantics, and straight answers to wrong names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.envs import SUITES, complete, dmcontrol, make_env

pytest.importorskip("dm_control")
# observation and action widths of the official environments
SHAPES = {
    "acrobot-swingup": (6, 1),
    "cartpole-swingup": (5, 1),
    "cheetah-run": (17, 6),
    "cup-catch": (8, 2),
    "dog-run": (223, 38),
    "finger-spin": (9, 2),
    "finger-turn-hard": (12, 2),
    "fish-swim": (24, 5),
    "hopper-hop": (15, 4),
    "humanoid-run": (67, 21),
    "pendulum-swingup": (3, 1),
    "reacher-easy": (6, 2),
    "walker-walk": (24, 6),
}


def test_there_are_28_standard_tasks() -> None:
    assert len(set(dmcontrol.TASKS)) == 28


@pytest.mark.parametrize("task", dmcontrol.TASKS)
def test_every_dmcontrol_task_runs(task: str) -> None:
    env = make_env(Config(task=task), 1)
    if task in SHAPES:
        assert (env.obs_shape[0], env.action_dim) == SHAPES[task]
    assert (env.max_episode_steps, env.action_repeat) == (500, 2)
    rng = np.random.default_rng(0)
    obs = env.reset()
    for _ in range(3):
        assert obs.shape == env.obs_shape
        assert obs.dtype == np.float32
        assert np.isfinite(obs).all()
        obs, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_dim).astype(np.float32))
        assert 0 <= reward <= 2
        assert not terminated
        assert not truncated
    env.close()


def test_one_decision_is_two_control_steps_of_the_suite() -> None:
    from dm_control import suite

    env = make_env(Config(task="finger-spin"), 7)
    raw = suite.load("finger", "spin", task_kwargs={"random": 7})
    spec = raw.action_spec()
    rng, obs, step = np.random.default_rng(0), env.reset(), raw.reset()
    for _ in range(20):
        flat = np.concatenate([np.ravel(v) for v in step.observation.values()])
        np.testing.assert_array_equal(obs, flat.astype(np.float32))
        action = rng.uniform(-1, 1, env.action_dim).astype(np.float32)
        scaled = spec.minimum + (action.astype(np.float64) + 1) / 2 * (spec.maximum - spec.minimum)
        total = 0.0
        for _ in range(2):
            step = raw.step(scaled)
            total += step.reward
        obs, reward, *_ = env.step(action)
        assert reward == pytest.approx(total)


def test_episodes_end_after_500_decisions_and_seeds_repeat() -> None:
    a, b, c = (make_env(Config(task="pendulum-swingup"), seed) for seed in (3, 3, 4))
    first = a.reset()
    np.testing.assert_array_equal(first, b.reset())
    assert not np.array_equal(first, c.reset())
    ends = [a.step(np.zeros(1, np.float32))[3] for _ in range(500)]
    assert ends == [False] * 499 + [True]
    assert not np.array_equal(a.reset(), first)


def test_gymnasium_tasks_and_their_config() -> None:
    cfg = Config(task="Hopper-v5", episodic=True)
    env = make_env(cfg, 1)
    assert (env.obs_shape, env.action_dim, env.max_episode_steps, env.action_repeat) == ((11,), 3, 1000, 1)
    assert complete(cfg, env).rho == 0.5
    obs, done, steps = env.reset(), False, 0
    rng = np.random.default_rng(0)
    while not done:
        obs, _, terminated, truncated, info = env.step(rng.uniform(-1, 1, 3).astype(np.float32))
        steps += 1
        done = terminated or truncated
    assert terminated
    assert steps < 1000
    assert obs.dtype == np.float32
    assert info["success"] == 0.0
    named = Config(task="mujoco-walker", episodic=True)
    done_cfg = complete(named, make_env(named, 1))
    assert (done_cfg.rho, done_cfg.discount_max) == (0.7, 0.99)
    assert done_cfg.seed_steps == 5000


def test_actions_are_rescaled_to_the_space() -> None:
    env = make_env(Config(task="Pendulum-v1"), 1)
    obs = env.reset()
    theta, speed = np.arctan2(obs[1], obs[0]), obs[2]
    _, reward, *_ = env.step(np.ones(1, np.float32))  # full torque is 2
    assert reward == pytest.approx(-(theta**2 + 0.1 * speed**2 + 0.001 * 4), rel=1e-4)
    assert env.max_episode_steps == 200


def test_mujoco_leaves_no_log_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = make_env(Config(task="HalfCheetah-v5"), 1)
    env.reset()
    import mujoco

    physics = env.env.unwrapped  # type: ignore[attr-defined]
    physics.data.qvel[:] = 1e12  # an unstable state makes MuJoCo warn
    mujoco.mj_step(physics.model, physics.data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("walker-wlak", ["unknown task 'walker-wlak'", "walker-walk", "[train]", "Gymnasium"]),
        ("hoper-hop", ["hopper-hop"]),
        ("mw-reach", ["Meta-World", "does not have yet"]),
        ("cheetah-jump", ["custom DMControl"]),
        ("Hoper-v5", ["cannot make 'Hoper-v5'", "Hopper-v5"]),
        ("CartPole-v1", ["CartPole-v1", "Discrete", "Box"]),
    ],
)
def test_wrong_tasks_get_a_straight_answer(task: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        make_env(Config(task=task), 1)
    for word in words:
        assert word in str(e.value)


def test_every_suite_knows_its_own_names() -> None:
    for suite in SUITES.values():
        assert all(suite.accepts(name) for name in suite.names)


def test_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_env(Config(task="cartpole-balance", obs="rgb"), 1)
    try:
        obs = env.reset()
    except Exception as e:  # rendering needs a driver; where there is none that is what is tested
        pytest.skip(f"no headless renderer here: {e}")
    assert obs.shape == env.obs_shape == (9, 64, 64)
    assert obs.dtype == np.uint8
    assert np.array_equal(obs[:3], obs[3:6])
    after, *_ = env.step(np.ones(1, np.float32))
    assert np.array_equal(after[:6], obs[3:])
    assert obs.std() > 1
