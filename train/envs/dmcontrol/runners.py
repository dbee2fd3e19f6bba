"""Readings of the planar robots that run and hop: cheetah, hopper, walker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from dm_control.suite import cheetah, hopper, walker

from .sim import XX, XZ, Gather, Parts, Reading, Sim, reader
from .tolerance import INF, tolerance

SPEED = "torso_subtreelinvel"


def forward(sim: Sim) -> Callable[[], float]:
    """Return what reads the robot's speed along x."""
    return reader(sim.sensordata, sim.sensor(SPEED).start)


def cheetah_parts(sim: Sim) -> Parts:
    """Return the observation: all but the place along x, and the velocities."""
    return [sim.qpos[1:], sim.qvel], []


def cheetah_run(sim: Sim, task: Any) -> Reading:
    """Read cheetah-run: its reward is the share of the wanted speed."""
    vx, wanted = forward(sim), cheetah._RUN_SPEED
    fast = tolerance(wanted, INF, wanted, "linear", 0)
    return Reading(*cheetah_parts(sim), lambda: fast(vx()))


def walker_parts(sim: Sim) -> Parts:
    """Return the observation and what refreshes it: orientations of all bodies, height, velocities."""
    bodies = range(1, sim.model.nbody)
    turned = Gather(sim.xmat, (9 * body + column for body in bodies for column in (XX, XZ)))
    torso = sim.body("torso")
    return [turned.into, sim.xpos[torso, 2:3], sim.qvel], [turned]


def walker_stands(sim: Sim) -> Callable[[], float]:
    """Return what reads how well a walker stands."""
    z, up = sim.height("torso"), sim.upright("torso")
    standing = tolerance(walker._STAND_HEIGHT, INF, walker._STAND_HEIGHT / 2)
    return lambda: (3 * standing(z()) + (1 + up()) / 2) / 4


def walker_moves(sim: Sim, task: Any) -> Reading:
    """Read walker-stand, -walk and -run."""
    stands, vx, wanted = walker_stands(sim), forward(sim), task._move_speed
    if wanted == 0:
        return Reading(*walker_parts(sim), stands)
    moves = tolerance(wanted, INF, wanted / 2, "linear", 0.5)
    return Reading(*walker_parts(sim), lambda: stands() * (5 * moves(vx()) + 1) / 6)


def hopper_parts(sim: Sim) -> Parts:
    """Return the observation and what refreshes it: all but the place along x, velocities, touch."""
    touch = Gather(sim.sensordata, (sim.sensor(name).start for name in ("touch_toe", "touch_heel")), np.log1p)
    return [sim.qpos[1:], sim.qvel, touch.into], [touch]


def hopper_stands(sim: Sim) -> Callable[[], float]:
    """Return what reads whether a hopper stands."""
    torso, foot = sim.height("torso", "xipos"), sim.height("foot", "xipos")
    standing = tolerance(hopper._STAND_HEIGHT, 2)
    return lambda: standing(torso() - foot())


def hopper_moves(sim: Sim, task: Any) -> Reading:
    """Read hopper-stand and hopper-hop."""
    stands, vx, ctrl = hopper_stands(sim), forward(sim), sim.ctrl
    if task._hopping:
        wanted = hopper._HOP_SPEED
        hops = tolerance(wanted, INF, wanted / 2, "linear", 0.5)
        return Reading(*hopper_parts(sim), lambda: stands() * hops(vx()))
    return Reading(*hopper_parts(sim), lambda: stands() * ((small_control(ctrl) + 4) / 5))


def small_control(ctrl: Any) -> Any:
    """Return the mean over the controls of 1 - ctrl^2, at least 0: a quadratic tolerance of margin 1 and value 0."""
    small = 1 - ctrl * ctrl
    np.maximum(small, 0.0, out=small)
    return np.add.reduce(small) / len(small)


READINGS = {
    cheetah.Cheetah: cheetah_run,
    walker.PlanarWalker: walker_moves,
    hopper.Hopper: hopper_moves,
}
