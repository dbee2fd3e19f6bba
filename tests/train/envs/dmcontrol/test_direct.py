"""Stepping past dm_control's Python: the same numbers to the last bit, in every task, or dm_control itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import renderer_first  # noqa: F401

from tdmpc2_fast import Config
from tdmpc2_fast.train.envs import base, make_env

pytest.importorskip("dm_control")
from dm_control import suite
from dm_control.rl.control import PhysicsError

from tdmpc2_fast.train.envs.dmcontrol import MORE, TASKS, DMControl, direct
from tdmpc2_fast.train.envs.dmcontrol.names import CUSTOM, domain_and_task
from tdmpc2_fast.train.envs.dmcontrol.task import stock
from tdmpc2_fast.train.envs.dmcontrol.tolerance import tolerance

SEED = int(np.random.default_rng().integers(2**31))


def decided(raw: Any, action: Any) -> tuple[Any, float]:
    steps = [raw.step(action.astype(np.float64)) for _ in range(2)]
    return direct.flat(steps[1].observation), steps[0].reward + steps[1].reward


@pytest.mark.parametrize("task", TASKS)
def test_a_thousand_steps_are_dm_controls_to_the_bit(task: str) -> None:
    env, raw = DMControl(task, SEED), stock(task, SEED)
    assert env._direct is not None, env.notes
    rng = np.random.default_rng(SEED)
    for decisions in (400, 100):  # of two episodes: targets are placed anew
        assert np.array_equal(env.reset(), direct.flat(raw.reset().observation))
        for _ in range(decisions):
            action = rng.uniform(-1, 1, env.action_dim).astype(np.float32)
            obs, reward, *_ = env.step(action)
            wanted, total = decided(raw, action)
            assert obs.tobytes() == wanted.tobytes(), SEED
            assert reward == total, SEED


@pytest.mark.parametrize("task", ["walker-walk", "humanoid-run", "reacher-easy"])
def test_other_states_are_read_as_dm_control_reads_them(task: str) -> None:
    """Rewards far from where random actions lead: anywhere, upright, fast."""
    env, rng = DMControl(task, SEED), np.random.default_rng(SEED)
    physics, found = env.env.physics, env._direct
    assert found is not None
    env.reset()
    for _ in range(300):
        physics.data.qpos[:] = rng.normal(0, 1, physics.model.nq)
        physics.data.qvel[:] = rng.normal(0, 5, physics.model.nv)
        physics.data.ctrl[:] = rng.uniform(-1.2, 1.2, physics.model.nu)
        physics.forward()
        assert found._reading.reward() == env.env.task.get_reward(physics), SEED
        assert np.array_equal(found.observation(), direct.flat(env.env.task.get_observation(physics))), SEED


@pytest.mark.parametrize("task", MORE)
def test_other_tasks_of_the_suite_are_stepped_by_dm_control(task: str) -> None:
    env, raw = DMControl(task, SEED), stock(task, SEED)
    try:
        first = env.reset()
    except Exception as e:  # quadruped-escape hands its terrain to the renderer
        assert "quadruped-escape" in task
        pytest.skip(str(e))
    assert np.array_equal(first, direct.flat(raw.reset().observation))
    for _ in range(5):
        action = np.random.default_rng(SEED).uniform(-1, 1, env.action_dim).astype(np.float32)
        obs, reward, *_ = env.step(action)
        wanted, total = decided(raw, action)
        assert np.array_equal(obs, wanted)
        assert reward == total
    assert env.notes == []


def test_all_of_the_suite_is_there() -> None:
    ours = {domain_and_task(name) for name in (*TASKS, *MORE)}
    assert {pair for pair in suite.ALL_TASKS if pair[0] != "lqr"} <= ours
    assert (len(set(TASKS)), len(CUSTOM)) == (39, 11)


@pytest.mark.parametrize(
    ("task", "environment"),
    [
        ("pendulum-swingup", {"n_sub_steps": 3}),
        ("cheetah-run", {"control_timestep": 0.02}),
        ("cup-spin", {"n_sub_steps": 2}),
        ("walker-walk", {"legacy_step": False}),
        ("walker-walk", {"flat_observation": True}),
    ],
)
def test_settings_are_stepped_the_same_way(task: str, environment: dict[str, Any]) -> None:
    env, raw = (
        DMControl(task, SEED, {"environment_kwargs": environment}),
        stock(task, SEED, {"environment_kwargs": environment}),
    )
    assert env._direct is not None
    assert np.array_equal(env.reset(), direct.flat(raw.reset().observation))
    action = np.full(env.action_dim, 0.3, np.float32)
    for _ in range(20):
        obs, reward, *_ = env.step(action)
        wanted, total = decided(raw, action)
        assert np.array_equal(obs, wanted)
        assert reward == total


def test_a_task_with_other_numbers_is_left_to_dm_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another version: its reward has changed, and ours has not."""
    from dm_control.suite import pendulum

    monkeypatch.setattr(direct, "_known", {})
    monkeypatch.setattr(pendulum.SwingUp, "get_reward", lambda self, physics: 0.25)
    env = make_env(Config(task="pendulum-swingup"), SEED)
    assert env.notes == ["pendulum-swingup: dm_control itself steps it, slower: its rewards are others"]  # type: ignore[attr-defined]
    env.reset()
    assert env.step(np.zeros(1, np.float32))[1] == 0.5

    monkeypatch.setattr(direct, "_known", {})
    monkeypatch.setattr(pendulum.Physics, "pole_orientation", lambda self: np.zeros(2))
    monkeypatch.undo()
    monkeypatch.setattr(direct, "_known", {})
    monkeypatch.setattr(pendulum, "_COSINE_BOUND", "nothing")
    assert "TypeError" in DMControl("pendulum-swingup", 1).notes[0]


def test_judging_draws_nothing() -> None:
    direct._known.clear()
    first, second = (DMControl("cheetah-run", SEED) for _ in range(2))  # of which the first was judged
    assert first.random_state() == second.random_state()
    assert np.array_equal(first.reset(), second.reset())


def test_a_simulation_that_diverges_says_so_as_dm_control_does() -> None:
    env = DMControl("walker-walk", SEED)
    env.reset()
    env.env.physics.data.qvel[:] = 1e30
    with pytest.raises(PhysicsError, match="mjWARN_BAD"):
        env.step(np.zeros(6, np.float32))
    assert np.isfinite(env.reset()).all()
    assert np.isfinite(base.step(env, np.zeros(6, np.float32)).obs).all()


def test_a_step_that_is_interrupted_leaves_the_sensors_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import mujoco

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    env = DMControl("quadruped-walk", SEED)
    with monkeypatch.context() as patch:
        patch.setattr(mujoco, "mj_step2", interrupted)
        found = direct.Direct(env.env)
    env.reset()
    found.begin()
    with pytest.raises(KeyboardInterrupt):
        found.step(np.zeros(12), 1)
    flags = env.env.physics.model.opt.disableflags
    assert not flags & mujoco.mjtDisableBit.mjDSBL_SENSOR


def test_an_observation_is_no_view_of_the_simulation() -> None:
    env = DMControl("cup-catch", SEED)
    first = env.reset()
    kept = first.copy()
    env.step(np.ones(2, np.float32))
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("sigmoid", ["gaussian", "linear"])
@pytest.mark.parametrize("bounds", [(0.6, np.inf), (-np.inf, -2.0), (-0.5, 0.5), (1, 1)])
def test_tolerances_are_dm_controls(sigmoid: str, bounds: tuple[float, float]) -> None:
    from dm_control.utils import rewards

    rng = np.random.default_rng(SEED)
    for _ in range(300):
        margin, at_margin = rng.uniform(0.01, 3), rng.uniform(0.01, 0.9)
        x = np.float64(rng.normal(0, 3))
        ours = tolerance(*bounds, margin, sigmoid, at_margin)
        args = dict(bounds=bounds, margin=margin, sigmoid=sigmoid, value_at_margin=at_margin)
        assert ours(float(x)) == rewards.tolerance(x, **args), SEED
        of_array = tolerance(*bounds, margin, sigmoid, at_margin, of_array=True)
        assert of_array(float(x)) == rewards.tolerance(np.array([x]), **args)[0], SEED
    assert tolerance(*bounds)(float("nan")) == 0


def test_the_clock_of_the_simulator_stands() -> None:
    env = DMControl("pendulum-swingup", 1)
    env.reset()
    timer, action = env.env.physics.data.timer, np.zeros(1, np.float32)
    spent = timer.duration.sum()
    env.step(action)
    assert timer.duration.sum() == spent
    with direct.running_clock():
        env.step(action)
    assert timer.duration.sum() > spent
    spent = timer.duration.sum()
    env.step(action)
    assert timer.duration.sum() == spent
