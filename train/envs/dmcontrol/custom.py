"""The 11 tasks that the paper adds to DMControl: robots of the suite with other rewards, and a reacher of three links.

Each is a task of the suite with another `get_reward`, so that dm_control's own loop runs it, too.
Rewards are in [0, 1]. The shapes are `tolerance`s: linear ones reach 0 at the margin where no value is named.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dm_control.rl import control
from dm_control.suite import ball_in_cup, base, cheetah, hopper, pendulum, reacher, walker
from typing_extensions import override

from . import benches, runners
from .sim import Parts, Reading, Sim, norm, reader
from .tolerance import INF, tolerance

Reward = Callable[[Sim], Callable[[], float]]


def _cheetah_backwards(sim: Sim) -> Callable[[], float]:
    vx, fast = runners.forward(sim), tolerance(-INF, -8, 8, "linear", 0)
    return lambda: fast(vx())


def _cheetah_on(raised: str) -> Reward:
    """Return the reward for running on one foot with the other one, `raised`, high up."""

    def reward(sim: Sim) -> Callable[[], float]:
        vx, foot, torso = runners.forward(sim), sim.height(raised), sim.height("torso")
        high, fast = tolerance(1.2, INF, 0.6), tolerance(6, INF, 6, "linear", 0)
        return lambda: (3 * high(foot()) + 2 * high(torso())) / 5 * (5 * fast(vx()) + 1) / 6

    return reward


def _cheetah_jumps(sim: Sim) -> Callable[[], float]:
    vx, torso = runners.forward(sim), sim.height("torso")
    feet = [sim.height(foot) for foot in ("bfoot", "ffoot")]
    high, still = tolerance(1.2, INF, 0.6), tolerance(-0.5, 0.5, 0.5, "linear", 0)

    def reward() -> float:
        stays, z = still(vx()), torso()
        back, front = ((5 * high((z + foot()) / 2) + stays) / 6 for foot in feet)
        return (back + front) / 2

    return reward


def _walker_backwards(speed: float) -> Reward:
    def reward(sim: Sim) -> Callable[[], float]:
        stands, vx = runners.walker_stands(sim), runners.forward(sim)
        moves = tolerance(-INF, -speed, speed / 2, "linear", 0.5)
        return lambda: stands() * (5 * moves(vx()) + 1) / 6

    return reward


def _hopper_backwards(sim: Sim) -> Callable[[], float]:
    stands, vx = runners.hopper_stands(sim), runners.forward(sim)
    hops = tolerance(-INF, -1, 0.5, "linear", 0.5)
    return lambda: stands() * hops(vx())


def _cup_spins(sim: Sim) -> Callable[[], float]:
    ball, far, fast = benches.Ball(sim), tolerance(0.5, INF, 0.25, "linear", 0.5), tolerance(6, INF, 3, "linear", 0.5)
    dofs = [int(sim.model.joint(name).dofadr[0]) for name in ("ball_x", "ball_z")]

    def reward() -> float:
        outside = 1 - ball.caught()
        return outside * (far(norm(ball.way.into)) + 2 * fast(norm(sim.qvel[dofs]))) / 3

    return reward


def _pendulum_spins(sim: Sim) -> Callable[[], float]:
    rate = reader(sim.qvel, int(sim.model.joint("hinge").dofadr[0]))
    fast = tolerance(9, INF, 4.5, "linear", 0.5)
    return lambda: fast(abs(rate()))


class CustomTask(base.Task):  # type: ignore[misc]
    """A task of the suite with another reward; `parts` is what its observation is read from."""

    parts: Callable[[Sim], Parts]
    score: Reward

    @override
    def get_reward(self, physics: Any) -> float:
        return float(type(self).score(Sim(physics))())


class _CupSpin(ball_in_cup.BallInCup):  # type: ignore[misc]
    """Nine episodes of ten begin with the ball in the cup, which is to be thrown out; the tenth, as the suite's do."""

    @override
    def initialize_episode(self, physics: Any) -> None:
        anywhere = self.random.uniform() < 0.1
        while True:
            physics.named.data.qpos["ball_x"] = self.random.uniform(-0.2, 0.2)
            physics.named.data.qpos["ball_z"] = self.random.uniform(0.2, 0.5)
            physics.after_reset()
            if physics.data.ncon == 0 and (anywhere or physics.in_target()):
                break
        base.Task.initialize_episode(self, physics)


class _Kind(NamedTuple):
    """How a custom task is made.

    module: its domain's.
    seconds: of an episode.
    timestep: seconds of a control step; None: one step of the physics.
    task: the class that it is but for its reward, called with `args` and a random state.
    parts, score: what its observation and reward are read from; None where they are those of `task`.
    """

    module: Any
    seconds: float
    timestep: float | None
    task: Any
    args: tuple[Any, ...] = ()
    parts: Callable[[Sim], Parts] | None = None
    score: Reward | None = None

    def make(self, random: Any) -> Any:
        """Return the task."""
        if self.score is None or self.parts is None:
            return self.task(*self.args, random)
        own = dict(parts=staticmethod(self.parts), score=staticmethod(self.score))
        return type(f"Custom{self.task.__name__}", (CustomTask, self.task), own)(*self.args, random)


def _cheetah(score: Reward) -> _Kind:
    return _Kind(cheetah, 10, None, cheetah.Cheetah, (), runners.cheetah_parts, score)


def _walker(speed: float) -> _Kind:
    return _Kind(walker, 25, 0.025, walker.PlanarWalker, (speed,), runners.walker_parts, _walker_backwards(speed))


_FLOORS = {"ground": 200, "floor": 500}  # of the cheetah and the walker, half their length in metres
_KINDS = {
    ("cheetah", "run_backwards"): _cheetah(_cheetah_backwards),
    ("cheetah", "run_front"): _cheetah(_cheetah_on("bfoot")),
    ("cheetah", "run_back"): _cheetah(_cheetah_on("ffoot")),
    ("cheetah", "jump"): _cheetah(_cheetah_jumps),
    ("walker", "walk_backwards"): _walker(1),
    ("walker", "run_backwards"): _walker(8),
    ("hopper", "hop_backwards"): _Kind(
        hopper, 20, 0.02, hopper.Hopper, (True,), runners.hopper_parts, _hopper_backwards
    ),
    ("reacher", "three_easy"): _Kind(reacher, 20, None, reacher.Reacher, (0.05,)),
    ("reacher", "three_hard"): _Kind(reacher, 20, None, reacher.Reacher, (0.015,)),
    ("ball_in_cup", "spin"): _Kind(ball_in_cup, 20, 0.02, _CupSpin, (), benches.all_of_it, _cup_spins),
    ("pendulum", "spin"): _Kind(pendulum, 20, None, pendulum.SwingUp, (), benches.pendulum_parts, _pendulum_spins),
}


def load(domain: str, name: str, task_kwargs: Mapping[str, Any], environment_kwargs: Mapping[str, Any]) -> Any:
    """Return the environment of a custom task, as `dm_control.suite.load` does of others.

    task_kwargs: `random`, and `time_limit` in seconds.
    """
    kind, given = _KINDS[domain, name], dict(task_kwargs)
    random, limit = given.pop("random"), given.pop("time_limit", kind.seconds)
    if given:
        raise TypeError(f"got {', '.join(given)}, allowed: time_limit")
    xml, assets = kind.module.get_model_and_assets()
    physics = kind.module.Physics.from_xml_string(three_links(xml) if name.startswith("three") else xml, assets)
    _lengthen_floor(physics)
    settings = dict(environment_kwargs)
    if kind.timestep is not None and "n_sub_steps" not in settings:
        settings.setdefault("control_timestep", kind.timestep)
    return control.Environment(physics, kind.make(random), time_limit=limit, **settings)


def reading(sim: Sim, task: Any) -> Reading:
    """Read a custom task, as those of the suite are read."""
    parts, refresh = task.parts(sim)
    return Reading(parts, refresh, task.score(sim))


def three_links(xml: str | bytes) -> str:
    """Return the model of the reacher with a third link between its first and its hand.

    The three of 0.09 m reach as far as the suite's two; the two inner joints bend by 80 degrees.
    """
    root = ET.fromstring(xml)
    arm, target = (root.find(f"worldbody/{path}") for path in ("body[@name='arm']", "geom[@name='target']"))
    assert arm is not None
    assert target is not None
    hand = _child(arm, "body")
    finger, wrist = _child(hand, "body"), _child(hand, "joint")
    arm.set("name", "arm0")
    _child(arm, "joint").set("name", "shoulder0")
    link = _child(arm, "geom")
    link.set("name", "arm0")
    link.set("fromto", "0 0 0 0.09 0 0")
    second = ET.SubElement(arm, "body", name="arm1", pos=".09 0 0")
    ET.SubElement(second, "geom", {**link.attrib, "name": "arm1"})
    ET.SubElement(second, "joint", name="shoulder1", limited="true", range="-80 80")
    arm.remove(hand)
    second.append(hand)
    hand.set("pos", ".09 0 0")
    finger.set("pos", ".09 0 0")
    wrist.set("range", "-80 80")
    motors = _child(root, "actuator")
    motors.clear()
    for joint in ("shoulder0", "shoulder1", "wrist"):
        ET.SubElement(motors, "motor", name=joint, joint=joint)
    return ET.tostring(root, encoding="unicode")


def _child(of: ET.Element, tag: str) -> ET.Element:
    found = of.find(tag)
    assert found is not None, tag
    return found


def _lengthen_floor(physics: Any) -> None:
    """Draw the floor twice as long, as officially: going backwards leaves that of the suite after two metres.

    Planes have no end but in pictures, so it changes no step.
    """
    model = physics.model.ptr
    for i in range(model.ngeom):
        if (length := _FLOORS.get(model.geom(i).name)) and model.geom(i).size[0] == length / 2:
            model.geom_size[i, 0] = length
