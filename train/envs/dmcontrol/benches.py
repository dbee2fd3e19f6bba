"""Readings of what stands on a bench: acrobot, cartpole, ball in cup, finger, pendulum, reacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from dm_control.suite import acrobot, ball_in_cup, cartpole, finger, pendulum, reacher

from .sim import XZ, ZZ, Gather, Parts, Reading, Sim, entries, norm, reader
from .tolerance import tolerance


class Between:
    """The way from one point to another along some axes: `into` after each call."""

    def __init__(self, start: Any, end: Any, axes: slice = slice(None)) -> None:
        self._start, self._end = start[axes], end[axes]
        self.into = np.empty(self._start.shape)

    def __call__(self) -> Any:
        """Read it again."""
        return np.subtract(self._end, self._start, out=self.into)


def acrobot_swings(sim: Sim, task: Any) -> Reading:
    """Read acrobot-swingup."""
    bodies = [sim.body(name) for name in ("upper_arm", "lower_arm")]
    turned = Gather(sim.xmat, (9 * body + column for column in (XZ, ZZ) for body in bodies))
    target, tip = (sim.model.site(name) for name in ("target", "tip"))
    way = Between(sim.data.site_xpos[tip.id], sim.data.site_xpos[target.id])
    near = tolerance(0, float(target.size[0]), 0 if task._sparse else 1)
    return Reading([turned.into, sim.qvel], [turned], lambda: near(norm(way())))


def cartpole_balances(sim: Sim, task: Any) -> Reading:
    """Read cartpole's tasks of one pole."""
    pole, slider, hinge = sim.xmat[2:], int(sim.model.joint("slider").qposadr[0]), sim.qvel
    turned = Gather(sim.xmat, (9 * body + column for body in range(2, sim.model.nbody) for column in (ZZ, XZ)))
    parts: Parts = [sim.qpos[slider : slider + 1], turned.into, sim.qvel], [turned]
    if len(pole) != 1 or len(sim.ctrl) != 1:
        raise NotImplementedError(f"{len(pole)} poles")
    x, cosine, rate, push = reader(sim.qpos, slider), reader(pole, 0, ZZ), reader(hinge, 1), reader(sim.ctrl, 0)
    if task._sparse:
        centred, upright = tolerance(*task._CART_RANGE), tolerance(*task._ANGLE_COSINE_RANGE)
        return Reading(*parts, lambda: centred(x()) * upright(cosine()))
    centred, slow = tolerance(0, 0, 2), tolerance(0, 0, 5, of_array=True)

    def reward() -> float:
        u = push()
        small = (4 + max(1 - u * u, 0.0)) / 5
        return (cosine() + 1) / 2 * small * ((1 + slow(rate())) / 2) * ((1 + centred(x())) / 2)

    return Reading(*parts, reward)


class Ball:
    """The ball, seen from the middle of the cup.

    way: from the ball to the target, (2,) x and z; read again by each call.
    """

    def __init__(self, sim: Sim) -> None:
        target = sim.model.site("target")
        self.way = Between(sim.xpos[sim.body("ball")], sim.data.site_xpos[target.id], slice(0, 3, 2))
        room = target.size[0:3:2] - sim.model.geom("ball").size[0]
        self._room_x, self._room_z = room.tolist()

    def caught(self) -> float:
        """Return 1 where the ball is in the cup's target box, else 0."""
        x, z = self.way().tolist()
        return float(abs(x) < self._room_x and abs(z) < self._room_z)


def all_of_it(sim: Sim) -> Parts:
    """Return positions and velocities, which are all of the observation."""
    return [sim.qpos, sim.qvel], []


def cup_catches(sim: Sim, task: Any) -> Reading:
    """Read cup-catch."""
    return Reading(*all_of_it(sim), Ball(sim).caught)


def _finger(sim: Sim) -> tuple[list[Any], list[Callable[[], Any]], Between]:
    """Return the observation of finger-spin, and where its tip is."""
    tip = Between(sim.sensed("spinner"), sim.sensed("tip"), slice(0, 3, 2))
    angles, rates = (
        Gather(sim.sensordata, entries(*(sim.sensor(name) for name in names)))
        for names in (("proximal", "distal"), ("proximal_velocity", "distal_velocity", "hinge_velocity"))
    )
    touch = Gather(sim.sensordata, entries(sim.sensor("touchtop"), sim.sensor("touchbottom")), np.log1p)
    return [angles.into, tip.into, rates.into, touch.into], [angles, tip, rates, touch], tip


def finger_spins(sim: Sim, task: Any) -> Reading:
    """Read finger-spin."""
    parts, refresh, _ = _finger(sim)
    rate, wanted = reader(sim.sensed("hinge_velocity"), 0), -finger._SPIN_VELOCITY
    return Reading(parts, refresh, lambda: float(rate() <= wanted))


def finger_turns(sim: Sim, task: Any) -> Reading:
    """Read finger-turn-easy and -hard."""
    parts, refresh, tip = _finger(sim)
    target = Between(sim.sensed("spinner"), sim.sensed("target"), slice(0, 3, 2))
    radius, distance = float(sim.model.site("target").size[0]), np.empty(1)

    def far() -> float:
        distance[0] = norm(target() - tip()) - radius
        return distance.item(0)

    return Reading([*parts, target.into, distance], [*refresh, far], lambda: float(far() <= 0))


def pendulum_parts(sim: Sim) -> Parts:
    """Return the observation: which way the pole points, and its velocity."""
    pole, hinge = sim.body("pole"), int(sim.model.joint("hinge").dofadr[0])
    turned = Gather(sim.xmat, (9 * pole + ZZ, 9 * pole + XZ))
    return [turned.into, sim.qvel[hinge : hinge + 1]], [turned]


def pendulum_swings(sim: Sim, task: Any) -> Reading:
    """Read pendulum-swingup."""
    up, upright = sim.upright("pole"), tolerance(pendulum._COSINE_BOUND, 1)
    return Reading(*pendulum_parts(sim), lambda: upright(up()))


def reacher_reaches(sim: Sim, task: Any) -> Reading:
    """Read reacher's tasks, of two links and of three."""
    geoms, places = [sim.model.geom(name) for name in ("target", "finger")], sim.data.geom_xpos
    way = Between(places[geoms[1].id], places[geoms[0].id], slice(0, 2))
    near = tolerance(0, float(geoms[0].size[0] + geoms[1].size[0]))
    return Reading([sim.qpos, way.into, sim.qvel], [way], lambda: near(norm(way())))


READINGS = {
    acrobot.Balance: acrobot_swings,
    ball_in_cup.BallInCup: cup_catches,
    cartpole.Balance: cartpole_balances,
    finger.Spin: finger_spins,
    finger.Turn: finger_turns,
    pendulum.SwingUp: pendulum_swings,
    reacher.Reacher: reacher_reaches,
}
