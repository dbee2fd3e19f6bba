"""The cost of an environment per decision: dm_control's own steps, ours, the physics alone; and in worker processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.train.envs import complete, dmcontrol, make_env
from tdmpc2_fast.train.envs.apart.workers import Workers
from tdmpc2_fast.train.envs.base import Environments, Failures
from tdmpc2_fast.train.envs.dmcontrol import TASKS, DMControl
from tdmpc2_fast.train.envs.together import InProcess

from ..harness.measure import CannotMeasureError, Case, Gate, Variant
from ..options import Options

_STEPS = 250
_TOGETHER = 4
_WORKERS = (1, 2, 4)


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """Yield the cases of each task, which commas separate: one environment, and several in processes."""
    for task in options.task.split(","):
        yield partial(case, options, task)
        yield partial(in_processes, options, task)


def _made(options: Options, task: str, **changes: Any) -> DMControl:
    if task not in TASKS:
        raise CannotMeasureError(f"the environment suite times DMControl tasks; got {task!r}")
    try:
        env = make_env(options.config(5, options.actions[0], task=task, **changes), options.seed)
    except Exception as e:
        raise CannotMeasureError(str(e)) from e
    assert isinstance(env, DMControl)
    return env


def _actions(options: Options, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(options.seed).uniform(-1, 1, shape).astype(np.float32)


def case(options: Options, task: str) -> Case:
    """Return the environment's decisions against the suite's own steps and against the physics alone.

    dm_control's have MuJoCo's clock running, as they have where nothing of ours steps it.
    """
    ours, bare = (_made(options, task) for _ in range(2))
    from tdmpc2_fast.train.envs.dmcontrol import direct
    from tdmpc2_fast.train.envs.dmcontrol.task import stock

    if ours._direct is None or bare._direct is None:
        raise CannotMeasureError(ours.notes[0])
    raw = stock(task, options.seed)
    actions = _actions(options, _STEPS, ours.action_dim)
    bare.reset()
    ctrl, advance = bare._direct._ctrl, bare._direct._advance

    def decide() -> Any:
        ours.reset()
        return [ours.step(a)[0] for a in actions][-1]

    def decide_alone(env: Any, action: NDArray[np.float32]) -> Any:
        for _ in range(ours.action_repeat):
            step = env.step(action.astype(np.float64))
        return direct.flat(step.observation)

    def suite() -> Any:
        with direct.running_clock():
            raw.reset()
            return [decide_alone(raw, a) for a in actions][-1]

    def only_physics() -> None:
        bare.env.reset()
        for a in actions:
            ctrl[:] = a
            for _ in range(bare.action_repeat):
                advance()

    def gate() -> Gate:
        a, b = _made(options, task), stock(task, options.seed)
        a.reset()
        b.reset()
        worst = max(float(np.abs(a.step(action)[0] - decide_alone(b, action)).max()) for action in actions)
        a.close()
        return Gate(worst, 0.0)

    def split() -> dict[str, float]:
        """Return the time of the physics, and what Python adds to it, ours and dm_control's; the fastest of ten."""
        whole, theirs, bare = (min(_ms(run) for _ in range(10)) for run in (decide, suite, only_physics))
        return dict(physics=bare, ours=whole - bare, dm_control=theirs - bare)

    return Case(
        "environment",
        task,
        {
            "environment": Variant(decide, inner=_STEPS, split=split),
            "dm_control alone": Variant(suite, inner=_STEPS, gate=gate),
            "physics alone": Variant(only_physics, inner=_STEPS, gate=gate),
        },
        actions=ours.action_dim,
        shape=f"{ours.action_repeat} environment steps a decision, {_substeps(ours)} of the physics",
        unit="decisions",
    )


def in_processes(options: Options, task: str) -> Case:
    """Return the decisions of four environments in this process and in one, two and four others."""
    first = _made(options, task)
    cfg = complete(options.config(5, first.action_dim, task=task, num_envs=_TOGETHER, obs_shape=None), first)
    actions = _actions(options, _STEPS, _TOGETHER, first.action_dim)
    which = list(range(_TOGETHER))

    def together(workers: int) -> Environments:
        failures = Failures(cfg, print)
        if workers == 0:
            return InProcess(cfg, dmcontrol.make, failures)
        return Workers(cfg, dmcontrol.make, workers, failures)

    def of(workers: int) -> Variant:
        envs = together(workers)

        def decide() -> Any:
            envs.reset(which)
            for a in actions:
                envs.step_async(a)
                found = envs.step_wait()
            return np.stack([step.obs for step in found if step is not None])

        def gate() -> Gate:
            here, there = together(0), together(workers)
            worst = 0.0
            for each in (here, there):
                each.reset(which)
            for a in actions:
                for each in (here, there):
                    each.step_async(a)
                x, y = ([s.obs for s in each.step_wait() if s is not None] for each in (here, there))
                worst = max(worst, float(np.abs(np.stack(x) - np.stack(y)).max()))
            here.close()
            there.close()
            return Gate(worst, 0.0)

        return Variant(decide, inner=_STEPS * _TOGETHER, gate=gate if workers else None)

    return Case(
        "environment",
        f"{task} in processes",
        {"this process": of(0), **{f"{n} worker{'s' * (n > 1)}": of(n) for n in _WORKERS}},
        actions=first.action_dim,
        envs=_TOGETHER,
        shape=f"{_TOGETHER} environments",
        unit="decisions",
    )


def _substeps(env: DMControl) -> int:
    return int(env.env._n_sub_steps * env.action_repeat)


def _ms(run: Callable[[], object]) -> float:
    """Return the milliseconds of one decision."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start) / _STEPS
