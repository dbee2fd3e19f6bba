"""Readings of the robots that move in three dimensions: dog, fish, humanoid, quadruped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
from dm_control.suite import dog, fish, humanoid, quadruped

from .runners import SPEED, small_control
from .sim import ZX, ZZ, Floats, Gather, Reading, Sim, entries, norm, reader
from .tolerance import INF, tolerance


class _Turned:
    """A vector seen from a body's frame: `into` after each call."""

    def __init__(self, read: Callable[[], Floats], frame: Floats, into: Floats) -> None:
        self._read, self._frame, self.into = read, frame, into

    def __call__(self) -> Floats:
        return self._read().dot(self._frame, out=self.into)


def humanoid_moves(sim: Sim, task: Any) -> Reading:
    """Read humanoid-stand, -walk and -run."""
    torso, frame = sim.xpos[sim.body("torso")], sim.frame("torso")
    limbs = [sim.xpos[sim.body(f"{side}_{limb}")] for side in ("left", "right") for limb in ("hand", "foot")]
    extremities = np.empty(3 * len(limbs))
    turned = [
        _Turned(lambda limb=limb: limb - torso, frame, extremities[3 * i : 3 * i + 3])  # type: ignore[misc]
        for i, limb in enumerate(limbs)
    ]
    com, head = sim.sensed(SPEED), sim.body("head")
    up_axis = sim.xmat[sim.body("torso"), ZX : ZZ + 1]
    parts = [sim.qpos[7:], sim.xpos[head, 2:3], extremities, up_axis, com, sim.qvel]

    z, up, ctrl, wanted = sim.height("head"), sim.upright("torso"), sim.ctrl, task._move_speed
    standing = tolerance(humanoid._STAND_HEIGHT, INF, humanoid._STAND_HEIGHT / 4)
    upright = tolerance(0.9, INF, 1.9, "linear", 0)
    still = tolerance(0, 0, 2, of_array=True)
    moves = tolerance(wanted, INF, wanted, "linear", 0)
    vx, vy = (reader(com, i) for i in (0, 1))

    def reward() -> float:
        stands = standing(z()) * upright(up())
        small: float = (4 + small_control(ctrl)) / 5
        if wanted == 0:
            return small * stands * ((still(vx()) + still(vy())) / 2)
        return small * stands * ((5 * moves(norm(com[:2])) + 1) / 6)

    return Reading(parts, turned, reward)


def dog_moves(sim: Sim, task: Any) -> Reading:
    """Read dog-stand, -walk, -trot and -run."""
    hinges, dofs = sim.hinges()
    angles, rates = Gather(sim.qpos, hinges), Gather(sim.qvel, dofs)
    torso, pelvis, skull = (sim.body(name) for name in ("torso", "pelvis", "skull"))
    heights = Gather(sim.xpos, (3 * torso + 2, 3 * pelvis + 2))
    axes = Gather(sim.xmat, (9 * body + i for body in (skull, torso, pelvis) for i in range(ZX, ZZ + 1)))
    com, frame = sim.sensed("torso_linvel"), sim.frame("torso")
    velocity = _Turned(lambda: com, frame, np.empty(3))

    def sensors(*names: str) -> Gather:
        return Gather(sim.sensordata, entries(*(sim.sensor(name) for name in names)))

    inertial = sensors("accelerometer", "velocimeter", "gyro")
    forces = sensors("foot_L", "foot_R", "hand_L", "hand_R")
    touch = sensors("palm_L", "palm_R", "sole_L", "sole_R")
    refresh: list[Gather | _Turned] = [angles, rates, heights, axes, velocity, inertial, forces, touch]
    parts = [each.into for each in refresh]

    low, weight = task._stand_height.tolist(), float(task._body_weight)
    tall = [tolerance(each, INF, each) for each in low]
    upright = tolerance(dog._MIN_UPRIGHT_COSINE, INF, dog._MIN_UPRIGHT_COSINE + 1, "linear", 0)
    light = tolerance(weight, INF, weight, "linear", 0.9)
    wanted = getattr(task, "_move_speed", None)
    moves = None if wanted is None else tolerance(wanted, 2 * wanted, max(1.0, wanted), "linear", 0)
    factors = np.empty(6 if moves is None else 7)
    cosines = [sim.upright(body) for body in ("skull", "torso", "pelvis")]

    def reward() -> float:
        factors[:2] = [whole(z) for whole, z in zip(tall, heights().tolist(), strict=True)]
        factors[2:5] = [upright(cosine()) for cosine in cosines]
        factors[5] = light(float(np.add.reduce(touch())))
        if moves is not None:
            factors[6] = (4 * moves(velocity().item(0)) + 1) / 5
        return np.multiply.reduce(factors)  # type: ignore[no-any-return]

    return Reading([*parts, sim.act], refresh, reward)


def fish_swims(sim: Sim, task: Any) -> Reading:
    """Read fish-swim."""
    angles = Gather(sim.qpos, (int(sim.model.joint(name).qposadr[0]) for name in fish._JOINTS))
    upright = sim.xmat[sim.body("torso"), ZZ : ZZ + 1]
    geoms, places = [sim.model.geom(name) for name in ("mouth", "target")], sim.data.geom_xpos
    mouth, target = (places[geom.id] for geom in geoms)
    to_target = _Turned(lambda: target - mouth, sim.data.geom_xmat[geoms[0].id].reshape(3, 3), np.empty(3))
    radii = float(sum(geom.size[0] for geom in geoms))
    there, up = tolerance(0, radii, 2 * radii), sim.upright("torso")
    return Reading(
        [angles.into, upright, to_target.into, sim.qvel],
        [angles, to_target],
        lambda: (7 * there(norm(to_target())) + 0.5 * (up() + 1)) / 8,
    )


def quadruped_moves(sim: Sim, task: Any) -> Reading:
    """Read quadruped-walk and -run."""
    hinges, dofs = sim.hinges()
    angles, rates = Gather(sim.qpos, hinges), Gather(sim.qvel, dofs)
    kinds = mujoco.mjtSensor

    def sensors(*of: mujoco.mjtSensor) -> list[int]:
        return entries(*(sim.sensor(name) for name in sim.sensors_of(*of)))

    imu = Gather(sim.sensordata, sensors(kinds.mjSENS_GYRO, kinds.mjSENS_ACCELEROMETER))
    forces = Gather(sim.sensordata, sensors(kinds.mjSENS_FORCE, kinds.mjSENS_TORQUE), np.arcsinh)
    velocity, torso = sim.sensed("velocimeter"), sim.body("torso")
    wanted = task._desired_speed
    upright, up = tolerance(1, INF, 2, "linear", 0), sim.upright("torso")
    moves, vx = tolerance(wanted, INF, wanted, "linear", 0.5), reader(velocity, 0)
    return Reading(
        [angles.into, rates.into, sim.act, velocity, sim.xmat[torso, ZZ : ZZ + 1], imu.into, forces.into],
        [angles, rates, imu, forces],
        lambda: upright(up()) * moves(vx()),
    )


READINGS = {
    dog.Stand: dog_moves,
    dog.Move: dog_moves,
    fish.Swim: fish_swims,
    humanoid.Humanoid: humanoid_moves,
    quadruped.Move: quadruped_moves,
}
