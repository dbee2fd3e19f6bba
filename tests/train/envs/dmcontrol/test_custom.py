"""The 11 tasks beside the suite: rewards against their formulas, where episodes begin, the reacher of three links."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import renderer_first  # noqa: F401

pytest.importorskip("dm_control")
from dm_control.suite import reacher

from tdmpc2_fast.train.envs.dmcontrol import DMControl, custom
from tdmpc2_fast.train.envs.dmcontrol.names import CUSTOM

SEED = int(np.random.default_rng().integers(2**31))


def ramp(x: float) -> float:
    return min(1.0, max(0.0, x))


def bell(x: float, low: float, margin: float) -> float:
    return 1.0 if x >= low else 0.1 ** (((low - x) / margin) ** 2)


def vx(p: Any) -> float:
    return float(p.named.data.sensordata["torso_subtreelinvel"][0])


def z(p: Any, body: str) -> float:
    return float(p.named.data.xpos[body, "z"])


def on_one_foot(raised: str) -> Callable[[Any], float]:
    def reward(p: Any) -> float:
        up = (3 * bell(z(p, raised), 1.2, 0.6) + 2 * bell(z(p, "torso"), 1.2, 0.6)) / 5
        return up * (5 * ramp(vx(p) / 6) + 1) / 6

    return reward


def jump(p: Any) -> float:
    still = 1.0 if abs(vx(p)) <= 0.5 else ramp(2 - abs(vx(p)) / 0.5)
    parts = [(5 * bell((z(p, "torso") + z(p, f)) / 2, 1.2, 0.6) + still) / 6 for f in ("bfoot", "ffoot")]
    return sum(parts) / 2


def walk_backwards(speed: float) -> Callable[[Any], float]:
    def reward(p: Any) -> float:
        upright = (1 + float(p.named.data.xmat["torso", "zz"])) / 2
        stand = (3 * bell(z(p, "torso"), 1.2, 0.6) + upright) / 4
        return stand * (5 * ramp(-vx(p) / speed) + 1) / 6

    return reward


def hop_backwards(p: Any) -> float:
    height = float(p.named.data.xipos["torso", "z"] - p.named.data.xipos["foot", "z"])
    return float(0.6 <= height <= 2) * ramp(-vx(p))


def reach(radius: float) -> Callable[[Any], float]:
    def reward(p: Any) -> float:
        places = p.named.data.geom_xpos
        return float(math.dist(places["finger", :2], places["target", :2]) <= radius + 0.01)

    return reward


def spin_cup(p: Any) -> float:
    x, height = (p.named.data.site_xpos["target", i] - p.named.data.xpos["ball", i] for i in ("x", "z"))
    room = p.named.model.site_size["target", [0, 2]] - p.named.model.geom_size["ball", 0]
    caught = float(abs(x) < room[0] and abs(height) < room[1])
    speed = math.hypot(*(float(p.named.data.qvel[name][0]) for name in ("ball_x", "ball_z")))
    return (1 - caught) * (ramp(math.hypot(x, height) / 0.5) + 2 * ramp(speed / 6)) / 3


FORMULAS: dict[str, Callable[[Any], float]] = {
    "cheetah-run-backwards": lambda p: ramp(-vx(p) / 8),
    "cheetah-run-front": on_one_foot("bfoot"),
    "cheetah-run-back": on_one_foot("ffoot"),
    "cheetah-jump": jump,
    "walker-walk-backwards": walk_backwards(1),
    "walker-run-backwards": walk_backwards(8),
    "hopper-hop-backwards": hop_backwards,
    "reacher-three-easy": reach(0.05),
    "reacher-three-hard": reach(0.015),
    "cup-spin": spin_cup,
    "pendulum-spin": lambda p: ramp(abs(float(p.named.data.qvel["hinge"][0])) / 9),
}
SHAPES = {
    "cheetah": (17, 6),
    "walker": (24, 6),
    "hopper": (15, 4),
    "reacher": (8, 3),
    "cup": (8, 2),
    "pendulum": (3, 1),
}


@pytest.mark.parametrize("task", CUSTOM)
def test_rewards_are_those_of_the_formulas(task: str) -> None:
    """On an episode of random actions and on random states, from rest to far too fast."""
    env, rng, formula = DMControl(task, SEED), np.random.default_rng(SEED), FORMULAS[task]
    assert (env.obs_shape[0], env.action_dim) == SHAPES[task.partition("-")[0]]
    physics = env.env.physics
    seen = set()

    def same() -> None:
        assert env._direct is not None
        ours, theirs, wanted = env._direct._reading.reward(), env.env.task.get_reward(physics), formula(physics)
        assert abs(ours - wanted) <= 1e-12, SEED
        assert ours == theirs, SEED
        seen.add(round(wanted, 3))

    env.reset()
    for _ in range(200):
        env.step(rng.uniform(-1, 1, env.action_dim).astype(np.float32))
        same()
    for i in range(2000):
        if i % 100 == 0:
            env.reset()  # the reacher's target
        physics.data.qpos[:] = rng.normal(0, 1, physics.model.nq)
        physics.data.qvel[:] = rng.normal(0, 1, physics.model.nv) * rng.choice([0.1, 1, 10])
        physics.forward()
        same()
    assert len(seen) > 1


@pytest.mark.parametrize("task", CUSTOM)
def test_an_episode_is_500_decisions_of_two_control_steps(task: str) -> None:
    env = DMControl(task, SEED)
    assert env.max_episode_steps == 500
    seconds = {"cheetah": 0.01, "walker": 0.025}.get(task.partition("-")[0], 0.02)
    assert env.frames_per_second == pytest.approx(1 / (2 * seconds))
    env.reset()
    ends = [env.step(np.zeros(env.action_dim, np.float32))[2:4] for _ in range(500)]
    assert ends == [(False, False)] * 499 + [(False, True)]


def test_nine_cups_of_ten_begin_with_the_ball_in_them() -> None:
    env = DMControl("cup-spin", SEED)
    inside = 0
    for _ in range(400):
        env.reset()
        assert env.env.physics.data.ncon == 0
        assert not env.env.physics.data.qvel.any()
        inside += bool(env.env.physics.in_target())
    assert 0.84 < inside / 400 < 0.97  # of 0.9 and a tenth of a few, five standard deviations


def test_the_reacher_of_three_links() -> None:
    env = DMControl("reacher-three-hard", SEED)
    p = env.env.physics
    model = p.named.model
    assert [model.actuator_trnid.axes.row.names[i] for i in range(3)] == ["shoulder0", "shoulder1", "wrist"]
    assert model.jnt_limited[:].tolist() == [0, 1, 1]
    np.testing.assert_allclose(np.rad2deg(model.jnt_range[1:]), [[-80, 80]] * 2)
    for body, parent, offset in (
        ("arm0", "world", (0, 0, 0.01)),
        ("arm1", "arm0", (0.09, 0, 0)),
        ("hand", "arm1", (0.09, 0, 0)),
    ):
        assert p.model.id2name(int(model.body_parentid[body]), "body") == parent
        np.testing.assert_allclose(model.body_pos[body], offset)
    np.testing.assert_allclose(model.body_pos["finger"], (0.09, 0, 0))
    # A capsule's half length is that between its ends; its body's mass follows from its size, as in the suite.
    np.testing.assert_allclose(model.geom_size[["arm0", "arm1", "hand"], 1], [0.045, 0.045, 0.05])
    suites = reacher.Physics.from_xml_string(*reacher.get_model_and_assets())
    assert model.body_mass["hand"] == suites.named.model.body_mass["hand"]
    assert p.timestep() == 0.02
    p.data.qpos[:] = 0
    p.forward()
    np.testing.assert_allclose(p.named.data.geom_xpos["finger"], (0.27, 0, 0.01))
    distances = []
    for _ in range(200):
        env.reset()
        place = p.named.model.geom_pos["target"]
        distances.append(math.hypot(*place[:2]))
        assert p.named.model.geom_size["target", 0] == 0.015
    assert 0.05 <= min(distances) < 0.07
    assert 0.18 < max(distances) <= 0.2


@pytest.mark.parametrize(
    ("task", "geom", "size"), [("cheetah-run-backwards", "ground", 200), ("walker-run-backwards", "floor", 500)]
)
def test_the_floor_is_drawn_where_backwards_leads(task: str, geom: str, size: float) -> None:
    model = DMControl(task, SEED).env.physics.named.model
    assert model.geom_size[geom, 0] == size


def test_settings() -> None:
    env = DMControl("cup-spin", SEED, {"task_kwargs": {"time_limit": 1.0}})
    assert env.max_episode_steps == 25
    with pytest.raises(Exception, match="got colour, allowed: time_limit"):
        DMControl("cup-spin", SEED, {"task_kwargs": {"colour": 1}})


def test_the_suites_own_tables_stay_as_they_are() -> None:
    from dm_control import suite

    DMControl("cup-spin", SEED)
    assert ("ball_in_cup", "spin") not in suite.ALL_TASKS
    assert set(custom._KINDS) & set(suite.ALL_TASKS) == set()
