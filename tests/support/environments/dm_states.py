"""Physics of dm_control put where an EnvPool observation says it stands.

Observations leave out what does not matter, such as where on a plane a walker is; where it
matters after a while (`heading`) or is seen later (`up`), the caller finds it out from what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Seen = Mapping[str, NDArray[np.float64]]
Numbers = NDArray[np.float64] | list[float]


def turned(angle: Any) -> Any:
    """The same angle in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def rotation(up: Numbers, heading: float) -> NDArray[np.float64]:
    """From body to world, of a body that sees the world's z axis at `up`."""
    z = np.asarray(up) / np.linalg.norm(up)
    x = np.eye(3)[np.argmin(np.abs(z))]
    x = x - x @ z * z
    x /= np.linalg.norm(x)
    c, s = np.cos(heading), np.sin(heading)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([x, np.cross(z, x), z])


def quaternion(matrix: NDArray[np.float64]) -> list[float]:
    import mujoco

    found = np.zeros(4)
    mujoco.mju_mat2Quat(found, np.ascontiguousarray(matrix).ravel())
    return found.tolist()


def put(physics: Any, qpos: Numbers, qvel: Numbers | None = None, act: Numbers | None = None) -> None:
    with physics.reset_context():
        physics.data.qpos[:] = qpos
        physics.data.qvel[:] = 0 if qvel is None else qvel
        if act is not None:
            physics.data.act[:] = act


def acrobot(physics: Any, seen: Seen) -> None:
    upper, lower = np.arctan2(seen["orientations"][:2], seen["orientations"][2:])
    put(physics, [upper, lower - upper], seen["velocity"])


def cartpole(physics: Any, seen: Seen) -> None:
    x, cosine, sine = seen["position"]
    put(physics, [x, np.arctan2(sine, cosine)], seen["velocity"])


def without_x(physics: Any, seen: Seen) -> None:
    put(physics, [0, *seen["position"]], seen["velocity"])


def cup(physics: Any, seen: Seen) -> None:
    put(physics, seen["position"], seen["velocity"])


def pendulum(physics: Any, seen: Seen) -> None:
    put(physics, [np.arctan2(seen["orientation"][1], seen["orientation"][0])], seen["velocity"])


def reacher(physics: Any, seen: Seen) -> None:
    put(physics, seen["position"], seen["velocity"])
    physics.named.model.geom_pos["target", :2] = physics.named.data.geom_xpos["finger", :2] + seen["to_target"]
    physics.forward()


def walker(physics: Any, seen: Seen) -> None:
    angles = np.arctan2(seen["orientations"][1::2], seen["orientations"][0::2])
    parents = angles[[0, 1, 2, 0, 4, 5]]  # torso, right thigh and leg, torso, left thigh and leg
    put(physics, [seen["height"] - 1.3, 0, angles[0], *turned(parents - angles[1:])], seen["velocity"])


def finger(physics: Any, seen: Seen) -> None:
    def angle(hinge: float) -> Any:
        put(physics, [0, 0, hinge])
        return np.arctan2(*physics.tip_position())

    zero, tip = angle(0), np.arctan2(*seen["position"][2:])
    sign = np.sign(turned(angle(0.1) - zero))
    put(physics, [*seen["position"][:2], sign * turned(tip - zero)], seen["velocity"])
    if np.any(seen["target_position"]):
        spinner = physics.named.data.sensordata["spinner"][[0, 2]]
        physics.named.model.site_pos["target", ["x", "z"]] = spinner + seen["target_position"]
        physics.forward()


def fish(physics: Any, seen: Seen, heading: float = 0.0, up: Numbers = (0, 0, 1)) -> None:
    put(physics, [0, 0, 0, *quaternion(rotation(up, heading)), *seen["joint_angles"]])
    mouth = physics.named.data.geom_xmat["mouth"].reshape(3, 3)
    physics.named.model.geom_pos["target"] = physics.named.data.geom_xpos["mouth"] + mouth @ seen["target"]
    physics.forward()


def humanoid(physics: Any, seen: Seen, heading: float = 0.0) -> None:
    turn = quaternion(rotation(seen["torso_vertical"], heading))
    put(physics, [0, 0, 0, *turn, *seen["joint_angles"]])
    height = float(seen["head_height"]) - physics.head_height()
    put(physics, [0, 0, height, *turn, *seen["joint_angles"]], seen["velocity"])


def quadruped(physics: Any, seen: Seen, heading: float = 0.0) -> None:
    up = -seen["origin"]
    joints, speeds, act = np.split(seen["egocentric_state"], [physics.model.nq - 7, -physics.model.na])
    put(physics, [0, 0, np.linalg.norm(up), *quaternion(rotation(up, heading)), *joints], [*[0] * 6, *speeds], act)


def dog(physics: Any, seen: Seen) -> None:
    """The root's velocity is what gives the sensors' readings, which depend on it linearly."""
    place = [0, 0, 0.0, *quaternion(rotation(seen["z_projection"][:3], 0)), *seen["joint_angles"]]
    put(physics, place)
    place[2] = seen["torso_pelvis_height"][0] - physics.torso_pelvis_height()[0]

    def sensed(root: NDArray[np.float64]) -> Any:
        put(physics, place, [*root, *seen["joint_velocites"]], seen["actuator_state"])
        return np.concatenate([physics.torso_com_velocity(), physics.inertial_sensors()[3:]])

    still = sensed(np.zeros(6))
    slopes = np.array([sensed(axis) - still for axis in np.eye(6)]).T
    wanted = np.concatenate([seen["torso_com_velocity"], seen["inertial_sensors"][3:]])
    sensed(np.linalg.lstsq(slopes, wanted - still, rcond=None)[0])


PLACE: dict[str, Callable[..., None]] = {
    "acrobot": acrobot,
    "cartpole": cartpole,
    "cheetah": without_x,
    "cup": cup,
    "dog": dog,
    "finger": finger,
    "fish": fish,
    "hopper": without_x,
    "humanoid": humanoid,
    "pendulum": pendulum,
    "quadruped": quadruped,
    "reacher": reacher,
    "walker": walker,
}
"""How to put a domain's physics where an observation of EnvPool, without its batch, says it stands after a reset."""
