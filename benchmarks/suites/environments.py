"""The cost of an environment per decision, and how much of it is Python around the physics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.train.envs import make_env
from tdmpc2_fast.train.envs.dmcontrol import TASKS, DMControl

from ..harness.measure import CannotMeasureError, Case, Gate, Variant
from ..options import Options

_STEPS = 25


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """Yield the case of the task's own environment."""
    yield partial(case, options)


def case(options: Options) -> Case:
    """Return the environment's decisions against the suite's own steps and against the physics alone."""
    cfg = options.config(5, options.actions[0], task=options.task)
    if options.task not in TASKS:
        raise CannotMeasureError(f"the environment suite times DMControl tasks; got {options.task!r}")
    try:
        ours, bare, raw = (make_env(cfg, options.seed) for _ in range(3))
    except Exception as e:
        raise CannotMeasureError(str(e)) from e
    assert isinstance(bare, DMControl)
    assert isinstance(raw, DMControl)
    rng = np.random.default_rng(options.seed)
    actions = rng.uniform(-1, 1, (_STEPS, ours.action_dim)).astype(np.float32)
    physics, task = bare.env.physics, bare.env.task
    bare.reset()
    substeps = bare.env._n_sub_steps * bare.action_repeat

    def decide() -> Any:
        ours.reset()
        return [ours.step(a)[0] for a in actions][-1]

    def decide_alone(env: DMControl, action: NDArray[np.float32]) -> Any:
        for _ in range(env.action_repeat):
            step = env.env.step(action.astype(np.float64))
        return step.observation

    def flat(observation: Any) -> Any:
        return np.concatenate([np.ravel(v) for v in observation.values()])

    def suite() -> Any:
        raw.env.reset()
        return flat([decide_alone(raw, a) for a in actions][-1])

    def only_physics() -> None:
        bare.env.reset()
        for a in actions:
            task.before_step(a.astype(np.float64), physics)
            physics.step(substeps)

    def gate() -> Gate:
        a, b = make_env(cfg, options.seed), make_env(cfg, options.seed)
        assert isinstance(b, DMControl)
        a.reset()
        b.env.reset()
        worst = max(float(np.abs(a.step(action)[0] - flat(decide_alone(b, action))).max()) for action in actions)
        a.close()
        b.close()
        return Gate(worst, 1e-4)

    def split() -> dict[str, float]:
        """Return the time of the physics, and what dm_control's Python and ours add to it; each the fastest of ten."""
        whole, theirs, bare = (min(_ms(run) for _ in range(10)) for run in (decide, suite, only_physics))
        return dict(physics=bare, dm_control=theirs - bare, ours=whole - theirs)

    return Case(
        "environment",
        options.task,
        {
            "environment": Variant(decide, inner=_STEPS, split=split),
            "dm_control alone": Variant(suite, inner=_STEPS, gate=gate),
            "physics alone": Variant(only_physics, inner=_STEPS, gate=gate),
        },
        actions=ours.action_dim,
        shape=f"{ours.action_repeat} environment steps a decision, {substeps} of the physics",
        unit="decisions",
    )


def _ms(run: Callable[[], object]) -> float:
    """Return the milliseconds of one decision."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start) / _STEPS
