"""Stepping a DMControl task without dm_control's own Python, which takes half the time or more.

The same calls of MuJoCo in the same order, observation and reward read off its arrays where they are
known to lie. Whether that gives the numbers of the installed dm_control is not taken for granted: each
task is judged by it, bit for bit, before the first environment steps so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from dm_control.suite.wrappers import action_scale
from numpy.typing import NDArray

from . import benches, bodies, custom, runners
from .sim import Reading, Sim

READINGS: dict[Any, Callable[[Sim, Any], Reading]] = {**benches.READINGS, **bodies.READINGS, **runners.READINGS}
_JUDGED_STEPS = 4
_known: dict[tuple[Any, ...], str] = {}  # what was found of each kind of environment, in this process


class Direct:
    """Steps the physics of an environment.

    Args:
        env: of dm_control, its actions scaled; it begins episodes.

    Raises:
        NotImplementedError: a task that no reading is known of.
        Exception: the installed dm_control has another model or task than the reading expects.
    """

    def __init__(self, env: action_scale.Wrapper) -> None:
        raw, physics = env._env, env.physics
        self._physics, self._task = physics, env.task
        self._model, self._data = physics.model.ptr, physics.data.ptr
        self._ctrl, self._warned = self._data.ctrl, physics.data.warning.number
        self._advance = _advance(physics, raw._n_sub_steps)
        spec = raw.action_spec()
        # An array, for a number would leave float32 actions float32.
        self._low, self._lowest = np.full(spec.shape, -1.0), spec.minimum
        scale = (spec.maximum - spec.minimum) / 2.0
        self._scale = None if (scale == 1.0).all() else scale  # which changes no bit
        self._reading: Reading  # of the episode under way

    def _read(self) -> Reading:
        task = self._task
        if isinstance(task, custom.CustomTask):
            return custom.reading(Sim(self._physics), task)
        if type(task) not in READINGS:
            raise NotImplementedError(f"no reading of {type(task).__qualname__}")
        return READINGS[type(task)](Sim(self._physics), task)

    def begin(self) -> NDArray[np.float32]:
        """Read the first observation of an episode that dm_control has begun.

        All is looked up again: a task may have changed its model, and with it what is rewarded.
        """
        self._reading = self._read()
        self._warnings = self._warned.tobytes()
        return self._reading.observation()

    def step(self, action: NDArray[Any], times: int) -> float:
        """Take so many control steps with one action (A,) in [-1, 1]; return the sum of their rewards.

        Raises:
            PhysicsError: the simulation has diverged; as dm_control raises it.
        """
        ctrl = self._ctrl
        np.subtract(action, self._low, out=ctrl)
        if self._scale is not None:
            np.multiply(ctrl, self._scale, out=ctrl)
        np.add(ctrl, self._lowest, out=ctrl)
        total, advance, reward = 0.0, self._advance, self._reading.reward
        for _ in range(times):
            advance()
            total += reward()
        if self._warned.tobytes() != self._warnings:
            self._diverged()
        return total

    def observation(self) -> NDArray[np.float32]:
        """Return the observation of the state as it is."""
        return self._reading.observation()

    def _diverged(self) -> None:
        """Let dm_control say which warnings are new."""
        now, before = self._warned.copy(), np.frombuffer(self._warnings, self._warned.dtype)
        self._warned[:] = before
        self._warnings = now.tobytes()
        with self._physics.check_invalid_state():
            self._warned[:] = now


def _advance(physics: Any, substeps: int) -> Callable[[], None]:
    """Return what takes so many steps of the physics, as dm_control's `Physics.step` does, to the same numbers.

    Only what nobody reads is left out. Sensors change no step, and only those of the last one are looked at.
    Islands are sets of bodies that are solved apart; a model of one kinematic tree is one island at most.
    """
    model, data = physics.model.ptr, physics.data.ptr
    step, step1, step2 = mujoco.mj_step, mujoco.mj_step1, mujoco.mj_step2
    _stop_the_clock()
    if not physics.legacy_step:
        return lambda: step(model, data, substeps)
    if model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4:

        def by_runge_kutta() -> None:
            step(model, data, substeps)
            step1(model, data)

        return by_runge_kutta

    option = model.opt
    if model.ntree == 1:
        option.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_ISLAND)
    as_it_is = option.disableflags
    without_sensors = as_it_is | int(mujoco.mjtDisableBit.mjDSBL_SENSOR)

    # Of the last step's sensors some follow its accelerations, and are computed in it; the others after it.
    stages = model.sensor_needstage
    in_the_last = 1 if (stages == int(mujoco.mjtStage.mjSTAGE_ACC)).any() else 0
    without = max(substeps - 1 - in_the_last, 0)

    def advance() -> None:
        step2(model, data)
        if substeps > 1:
            step(model, data, substeps - 1)
        step1(model, data)

    def advance_with_sensors() -> None:
        option.disableflags = without_sensors
        try:
            step2(model, data)
            if without:
                step(model, data, without)
        finally:
            option.disableflags = as_it_is
        if in_the_last:
            step(model, data)
        step1(model, data)

    return advance if substeps == 1 or not model.nsensor else advance_with_sensors


def _stop_the_clock() -> None:
    """Let MuJoCo leave out timing each stage of each step, a tenth of them, for its profile `MjData.timer`."""
    for clock, _ in clocks():
        clock.value = None


@contextlib.contextmanager
def running_clock() -> Iterator[None]:
    """Let MuJoCo time its stages inside the `with`, as it does where nothing of ours steps it."""
    for clock, as_it_was in clocks():
        clock.value = as_it_was
    try:
        yield
    finally:
        _stop_the_clock()


@functools.cache
def clocks() -> list[tuple[ctypes.c_void_p, int | None]]:
    """Return the variable of MuJoCo's library that holds the clock its Python package installs, and the clock.

    The package has no call that takes it out. Empty where the library is laid out differently.
    """
    found = []
    for path in Path(mujoco.__file__).parent.glob("libmujoco.*"):
        with contextlib.suppress(OSError, ValueError):
            clock = ctypes.c_void_p.in_dll(ctypes.CDLL(str(path)), "mjcb_time")
            found.append((clock, clock.value))
    return found


def direct(env: action_scale.Wrapper, kind: tuple[Any, ...]) -> Direct | str:
    """Return what steps an environment directly, or why dm_control steps it itself.

    kind: what environments that are judged alike have in common.
    """
    try:
        found = Direct(env)
        if kind not in _known:
            _known[kind] = _judged(env, found)
    except Exception as e:  # of whatever dm_control is installed
        return f"{type(e).__name__}: {e}"
    return _known[kind] or found


def _judged(env: action_scale.Wrapper, found: Direct) -> str:
    """Say where a few steps differ from dm_control's own; the episodes to come are drawn as if there had been none."""
    task, drawn = env.task, env.task._random
    task._random = np.random.RandomState(0)
    try:
        rng = np.random.default_rng(0)
        data, before = found._data, mujoco.MjData(found._model)
        for _ in range(2):
            obs = flat(env.reset().observation)
            if not np.array_equal(found.begin(), obs):
                return "its observations are others"
            for _ in range(_JUDGED_STEPS):
                action = rng.uniform(-1, 1, len(found._ctrl))
                mujoco.mj_copyData(before, found._model, data)
                step = env.step(action)
                mujoco.mj_copyData(data, found._model, before)
                reward = found.step(action, 1)
                if reward != step.reward or not np.array_equal(found.observation(), flat(step.observation)):
                    return f"its {'observations' if reward == step.reward else 'rewards'} are others"
                if step.last():
                    break
    finally:
        task._random = drawn
    return ""


def flat(observation: dict[str, Any]) -> NDArray[np.float32]:
    """Return dm_control's observation as models take it: all entries one after another, float32."""
    return np.concatenate([np.ravel(v) for v in observation.values()]).astype(np.float32)
