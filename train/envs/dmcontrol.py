"""The 28 standard DMControl tasks, official semantics.

One decision repeats the action for two control steps and sums the rewards; the observation
is the one after the second, all entries flattened and concatenated in their order. Episodes
end with the suite's time limit, which is after 500 decisions, and never terminate. Settings
(`env.KEY=VALUE`) are `task_kwargs` and `environment_kwargs` of `dm_control.suite.load`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError, InputError

from . import random_state
from .base import Array, Env, RenderError, in_a_line
from .mujoco_setup import cannot_render, keep_log_out_of_the_way, prepare_rendering
from .pixels import FRAMES, SIZE, Stack

_STANDARD = """
acrobot-swingup cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse cheetah-run
cup-catch dog-run dog-stand dog-trot dog-walk finger-spin finger-turn-easy finger-turn-hard fish-swim hopper-hop
hopper-stand humanoid-run humanoid-stand humanoid-walk pendulum-swingup quadruped-run quadruped-walk
reacher-easy reacher-hard walker-run walker-stand walker-walk
"""
TASKS = tuple(_STANDARD.split())
_DOMAINS = {"cup": "ball_in_cup"}
_ACTION_REPEAT = 2
_DECISIONS = 500
_SETTINGS = ("task_kwargs", "environment_kwargs")


class DMControl(Env):
    """A DMControl task. `seed` seeds the task's own random state, as in the official code."""

    action_repeat = _ACTION_REPEAT

    def __init__(self, task: str, seed: int, settings: Mapping[str, Any] | None = None) -> None:
        suite, action_scale = _import_suite()

        domain, name = task.replace("-", "_").split("_", 1)
        domain = _DOMAINS.get(domain, domain)
        raw = _load(suite, domain, name, seed, settings or {})
        limit = raw._step_limit / _ACTION_REPEAT
        self.max_episode_steps = math.ceil(limit) if math.isfinite(limit) else _DECISIONS
        self.env = action_scale.Wrapper(raw, minimum=-1.0, maximum=1.0)
        self.camera_id = 2 if domain == "quadruped" else 0
        size = sum(int(np.prod(v.shape)) for v in self.env.observation_spec().values())
        self.obs_shape: tuple[int, ...] = (size,)
        self.action_dim = int(self.env.action_spec().shape[0])
        self.frames_per_second = 1 / (_ACTION_REPEAT * raw.control_timestep())
        self.task = task
        self._decisions = 0

    @override
    def reset(self) -> Array:
        self._decisions = 0
        return _flatten(self.env.reset().observation)

    @override
    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        action = action.astype(np.float64)
        reward = 0.0
        for _ in range(_ACTION_REPEAT):
            step = self.env.step(action)
            reward += step.reward
            if step.last():  # a step more would begin the next episode
                break
        self._decisions += 1
        over = step.last() or self._decisions >= self.max_episode_steps
        return _flatten(step.observation), reward, False, over, {"success": 0.0}

    @override
    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        """Draw what the official code's camera sees, as `Env.render`."""
        try:
            picture: NDArray[np.uint8] = self.env.physics.render(height, width, self.camera_id)
        except ValueError as e:  # larger than the model's own buffer, which most leave at 640x480
            raise InputError(f"width, height: got {width}, {height}: {e}") from e
        except Exception as e:  # whatever the OpenGL driver at hand raises
            raise cannot_render(self.task, e) from e
        return picture

    @override
    def overrides(self, cfg: Config) -> Config:
        return cfg

    @override
    def random_state(self) -> dict[str, Any]:
        return random_state.told(self.env.task.random)  # type: ignore[no-any-return]

    @override
    def set_random_state(self, state: dict[str, Any]) -> None:
        random_state.take(self.env.task.random, state)

    @override
    def close(self) -> None:
        self.env.close()


class Pixels(DMControl):
    """Three stacked 64x64 frames, channels first, instead of the state."""

    def __init__(self, task: str, seed: int, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, seed, settings)
        self.frames = FRAMES
        self.obs_shape = (3 * FRAMES, SIZE, SIZE)
        self._stack = Stack(FRAMES)

    def _observe(self, first: bool = False) -> Array:
        return self._stack(self.render(SIZE, SIZE).transpose(2, 0, 1), first)

    @override
    def reset(self) -> Array:
        super().reset()
        return self._observe(first=True)

    @override
    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        _, *rest = super().step(action)
        return (self._observe(), *rest)  # type: ignore[return-value]


def make(cfg: Config, seed: int) -> Env:
    """Make the task, from states or (`obs=rgb`) pixels."""
    if cfg.obs == "state":
        return DMControl(cfg.task, seed, cfg.env_kwargs)
    env = Pixels(cfg.task, seed, cfg.env_kwargs)
    try:
        env.render(8, 8)
    except RenderError as e:
        raise ConfigError(f"config key 'obs': 'rgb' needs a renderer; {e}") from e
    return env


def _import_suite() -> tuple[Any, Any]:
    """Import `dm_control.suite` and its action scaling, which takes or refuses the renderer that MUJOCO_GL names."""
    prepare_rendering()
    try:
        from dm_control import suite
        from dm_control.suite.wrappers import action_scale
    except ModuleNotFoundError:
        raise
    except Exception as e:  # of the OpenGL driver: also AttributeError, RuntimeError
        raise cannot_render("dm_control", e) from e
    keep_log_out_of_the_way()
    return suite, action_scale


def _load(suite: Any, domain: str, name: str, seed: int, settings: Mapping[str, Any]) -> Any:
    """Return the raw environment, with the settings in their places."""
    for key, value in settings.items():
        if key not in _SETTINGS or not isinstance(value, dict):
            raise ConfigError(
                f"config key 'env.{key}': got {value!r}, allowed in DMControl: env.task_kwargs.KEY=VALUE and "
                "env.environment_kwargs.KEY=VALUE"
            )
    task_kwargs, environment_kwargs = (copy.deepcopy(settings.get(k, {})) for k in _SETTINGS)
    if "random" in task_kwargs:
        raise ConfigError("config key 'env.task_kwargs.random': allowed: seed=N, which seeds the task")
    try:
        return suite.load(
            domain,
            name,
            task_kwargs={**task_kwargs, "random": seed},
            environment_kwargs=environment_kwargs,
            visualize_reward=False,
        )
    except Exception as e:  # of the task, or of MuJoCo
        if not settings:
            raise
        raise ConfigError(f"config key 'env': {domain}-{name} takes none of these settings: {in_a_line(e)}") from e


def _flatten(observation: dict[str, Any]) -> NDArray[np.float32]:
    return np.concatenate([np.ravel(v) for v in observation.values()]).astype(np.float32)
