"""What a task reads of a simulation: where its numbers lie in MuJoCo's arrays, looked up once an episode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Parts = tuple[Sequence[Floats], Sequence[Callable[[], Any]]]
"""The first two of a `Reading`."""

XX, XZ, ZX, ZY, ZZ = 0, 2, 6, 7, 8
"""Entries of a rotation matrix (9,): the column is that of the world's axis that the second letter names."""


class Reading(NamedTuple):
    """How a task's observation and reward are read off a simulation.

    parts: float64 views whose numbers, one after another, are the observation.
    refresh: what fills those of `parts` that are no views of MuJoCo's own arrays.
    reward: returns the reward of the state as it is.
    """

    parts: Sequence[Floats]
    refresh: Sequence[Callable[[], Any]]
    reward: Callable[[], float]

    def observation(self) -> NDArray[np.float32]:
        """Return the observation, (O,) in memory of its own."""
        for fill in self.refresh:
            fill()
        return np.concatenate(self.parts, dtype=np.float32, casting="same_kind")


class Sim:
    """Names of a model as places in MuJoCo's arrays, which are views and stay where they are.

    Args:
        physics: of dm_control.
    """

    def __init__(self, physics: Any) -> None:
        self.model, self.data = physics.model.ptr, physics.data.ptr
        data = self.data
        self.qpos: Floats = data.qpos
        self.qvel: Floats = data.qvel
        self.act: Floats = data.act
        self.ctrl: Floats = data.ctrl
        self.sensordata: Floats = data.sensordata
        self.xpos: Floats = data.xpos
        self.xmat: Floats = data.xmat

    def body(self, name: str) -> int:
        """Return a body's number."""
        return int(self.model.body(name).id)

    def frame(self, body: str) -> Floats:
        """Return the rotation of a body's frame, a view (3, 3)."""
        found: Floats = self.xmat[self.body(body)]
        return found.reshape(3, 3)

    def sensor(self, name: str) -> slice:
        """Return where a sensor's numbers lie in `sensordata`."""
        found = self.model.sensor(name)
        return slice(int(found.adr[0]), int(found.adr[0] + found.dim[0]))

    def sensed(self, name: str) -> Floats:
        """Return a view of a sensor's numbers."""
        return self.sensordata[self.sensor(name)]

    def sensors_of(self, *kinds: mujoco.mjtSensor) -> list[str]:
        """Return the names of all sensors of some kinds, in the model's order."""
        wanted = [int(kind) for kind in kinds]
        return [self.model.sensor(i).name for i in np.flatnonzero(np.isin(self.model.sensor_type, wanted))]

    def hinges(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return where the positions and velocities of all hinges lie."""
        of = self.model.jnt_type == int(mujoco.mjtJoint.mjJNT_HINGE)
        return self.model.jnt_qposadr[of], self.model.jnt_dofadr[of]

    def height(self, body: str, of: str = "xpos") -> Callable[[], float]:
        """Return what reads z of a body's frame, or (`xipos`) of its centre of mass."""
        return reader(getattr(self.data, of), self.body(body), 2)

    def upright(self, body: str) -> Callable[[], float]:
        """Return what reads how far a body's z axis points up: 1, or -1 upside down."""
        return reader(self.xmat, self.body(body), ZZ)


def reader(array: Floats, *index: int) -> Callable[[], float]:
    """Return what reads one number of an array as Python's float, whose arithmetic is faster and the same."""
    place = int(np.ravel_multi_index(index, array.shape))
    return functools.partial(array.reshape(-1).item, place)


class Gather:
    """Numbers of one array in another order, in memory of their own: `into` after each call.

    Args:
        array: a view of MuJoCo's.
        index: of its entries, flattened.
        map: applied to them in place.
    """

    def __init__(self, array: Floats, index: Iterable[Any], map: Callable[..., Any] | None = None) -> None:
        self._flat, self._index = array.reshape(-1), np.fromiter(index, np.intp)
        self._map = map
        self.into = np.empty(len(self._index))

    def __call__(self) -> Floats:
        """Read them again."""
        self._flat.take(self._index, out=self.into, mode="clip")  # indices are right, and this way nothing is copied
        if self._map is not None:
            self._map(self.into, out=self.into)
        return self.into


def entries(*places: slice) -> list[int]:
    """Return the indices in several ranges, one after another."""
    return [i for place in places for i in range(place.start, place.stop)]


def norm(x: Floats) -> float:
    """Return the length of a vector as `numpy.linalg.norm` computes it."""
    return np.sqrt(x.dot(x))  # type: ignore[no-any-return]
