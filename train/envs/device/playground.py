"""The DMControl tasks of MuJoCo Playground, as `playground:CheetahRun`: simulated in JAX, all environments at once.

They are other tasks than those of DMControl: the same robots and rewards with solver settings made for
accelerators, so that returns are near but not the same. Hence names of their own. Official semantics otherwise: a
decision is two control steps, an episode 500 decisions, and nothing terminates. `env.engine=mjx` (default) or
`warp` chooses what computes the physics.

Playground's robots download their models when they are made, and are not here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError, did_you_mean

from ..base import Env
from .base import device_of

if TYPE_CHECKING:
    from .mjx import Playground

_PREFIX = "playground:"
_NAMES = """
AcrobotSwingup AcrobotSwingupSparse BallInCup CartpoleBalance CartpoleBalanceSparse CartpoleSwingup
CartpoleSwingupSparse CheetahRun FingerSpin FingerTurnEasy FingerTurnHard FishSwim HopperHop HopperStand HumanoidRun
HumanoidStand HumanoidWalk PendulumSwingup PointMass ReacherEasy ReacherHard SwimmerSwimmer6 WalkerRun WalkerStand
WalkerWalk
"""
TASKS = tuple(_PREFIX + name for name in _NAMES.split())
_ENGINES = {"mjx": "jax", "warp": "warp"}  # by their names in Playground


def accepts(task: str) -> bool:
    """Tell whether a name is meant for Playground, whether or not it has such a task."""
    return task.startswith(_PREFIX)


def make(cfg: Config, seed: int) -> Env:
    """Make one environment, as `Env`.

    Raises:
        ConfigError: no such task, or a setting that cannot be had.
        ImportError: of a package that is not installed.
    """
    name, engine = _chosen(cfg)
    from .view import View

    simulator = _simulator(cfg, name, engine, [seed])
    return View(simulator, simulator.frames_per_second, simulator.draw)


def together(cfg: Config, seeds: Sequence[int]) -> Playground:
    """Make an environment for each seed, all in one simulator on the agent's device; raises as `make` does."""
    return _simulator(cfg, *_chosen(cfg), seeds)


def _simulator(cfg: Config, name: str, engine: str, seeds: Sequence[int]) -> Playground:
    from .mjx import Playground

    simulator = Playground(name, engine, seeds, device_of(cfg))
    simulator.compile()
    return simulator


def _chosen(cfg: Config) -> tuple[str, str]:
    """Return the task's name in Playground and that of the engine."""
    if cfg.task not in TASKS:
        raise ConfigError(f"config key 'task': unknown task {cfg.task!r}.{did_you_mean(cfg.task, TASKS)}")
    if cfg.obs != "state":
        raise ConfigError(f"config key 'obs': got {cfg.obs!r}, allowed: 'state' for {cfg.task}")
    settings: Mapping[str, Any] = cfg.env_kwargs or {}
    for key, value in settings.items():
        if key != "engine" or value not in _ENGINES:
            raise ConfigError(
                f"config key 'env.{key}': got {value!r}, allowed in {cfg.task}: env.engine={' or '.join(_ENGINES)}"
            )
    engine = settings.get("engine", "mjx")
    if engine == "warp" and importlib.util.find_spec("warp") is None:
        raise ConfigError("config key 'env.engine': 'warp' needs warp; pip install warp-lang")
    return cfg.task.removeprefix(_PREFIX), _ENGINES[engine]
