"""DMControl tasks with the official semantics.

One decision repeats the action for two control steps and sums the rewards; the observation
is the one after the second, all entries flattened and concatenated in their order. Episodes
end with the suite's time limit, which is after 500 decisions, and never terminate. Settings
(`env.KEY=VALUE`) are `task_kwargs` and `environment_kwargs` of `dm_control.suite.load`, and `quality`, the model's
`visual/quality`, of pictures.

dm_control loads a task and begins its episodes; the steps of those that `direct.py` knows go past its Python.
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

from .. import random_state
from ..base import Array, Env, in_a_line
from ..mujoco_setup import cannot_render, keep_log_out_of_the_way, prepare_rendering
from .names import CUSTOM, MORE, domain_and_task

_ACTION_REPEAT = 2
_DECISIONS = 500
_SETTINGS = ("task_kwargs", "environment_kwargs", "quality")


class DMControl(Env):
    """A DMControl task. `seed` seeds the task's own random state, as in the official code."""

    action_repeat = _ACTION_REPEAT

    def __init__(self, task: str, seed: int, settings: Mapping[str, Any] | None = None) -> None:
        self.env = stock(task, seed, settings)
        from . import direct  # which imports dm_control

        self._flat, found = direct.flat, direct.direct(self.env, (task, repr(settings)))
        self._direct = None if isinstance(found, str) else found
        expected = task not in MORE and isinstance(found, str)
        self.notes = [f"{task}: dm_control itself steps it, slower: {found}"] if expected else []
        self._limit = self.env._step_limit
        limit = self._limit / _ACTION_REPEAT
        self.max_episode_steps = math.ceil(limit) if math.isfinite(limit) else _DECISIONS
        self.camera_id = 2 if task.startswith("quadruped") else 0
        size = sum(int(np.prod(v.shape)) for v in self.env.observation_spec().values())
        self.obs_shape: tuple[int, ...] = (size,)
        self.action_dim = int(self.env.action_spec().shape[0])
        self.frames_per_second = 1 / (_ACTION_REPEAT * self.env.control_timestep())
        self.task = task
        self._decisions = 0

    @override
    def reset(self) -> Array:
        self._decisions = 0
        begun = self.env.reset()
        return self._flat(begun.observation) if self._direct is None else self._direct.begin()

    @override
    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        left = self._limit - _ACTION_REPEAT * self._decisions
        self._decisions += 1
        over = self._decisions >= self.max_episode_steps
        if self._direct is not None:
            reward = self._direct.step(action, _ACTION_REPEAT if left >= _ACTION_REPEAT else 1)
            return self._direct.observation(), reward, False, over, {"success": 0.0}
        reward = 0.0
        for _ in range(_ACTION_REPEAT):
            step = self.env.step(action.astype(np.float64))
            reward += step.reward
            if step.last():  # a step more would begin the next episode
                break
        return self._flat(step.observation), reward, False, over or step.last(), {"success": 0.0}

    @override
    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        """Draw what the official code's camera sees, as `Env.render`."""
        try:
            return self.draw(width, height)
        except ValueError as e:  # larger than the model's own buffer, which most leave at 640x480
            raise InputError(f"width, height: got {width}, {height}: {e}") from e
        except Exception as e:  # whatever the OpenGL driver at hand raises
            raise cannot_render(self.task, e) from e

    def draw(self, width: int, height: int) -> NDArray[np.uint8]:
        """Draw as `render`; whatever goes wrong is raised as it comes."""
        picture: NDArray[np.uint8] = self.env.physics.render(height, width, self.camera_id)
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


def stock(task: str, seed: int, settings: Mapping[str, Any] | None = None) -> Any:
    """Return dm_control's own environment of a task, seeded, its actions scaled to [-1, 1].

    Importing it takes or refuses the renderer that MUJOCO_GL names.
    """
    prepare_rendering()
    try:
        from dm_control import suite
        from dm_control.suite.wrappers import action_scale
    except ModuleNotFoundError:
        raise
    except Exception as e:  # of the OpenGL driver: also AttributeError, RuntimeError
        raise cannot_render("dm_control", e) from e
    keep_log_out_of_the_way()
    return action_scale.Wrapper(_load(suite, task, seed, settings or {}), minimum=-1.0, maximum=1.0)


def _load(suite: Any, task: str, seed: int, settings: Mapping[str, Any]) -> Any:
    """Return the raw environment, with the settings in their places."""
    for key, value in settings.items():
        if key not in _SETTINGS or not isinstance(value, dict):
            allowed = ", ".join(f"env.{k}.KEY=VALUE" for k in _SETTINGS)
            raise ConfigError(f"config key 'env.{key}': got {value!r}, allowed in DMControl: {allowed}")
    task_kwargs, environment_kwargs, quality = (copy.deepcopy(settings.get(k, {})) for k in _SETTINGS)
    if "random" in task_kwargs:
        raise ConfigError("config key 'env.task_kwargs.random': allowed: seed=N, which seeds the task")
    try:
        task_kwargs["random"], (domain, name) = seed, domain_and_task(task)
        if task in CUSTOM:
            from . import custom

            raw = custom.load(domain, name, task_kwargs, environment_kwargs)
        else:
            raw = suite.load(domain, name, task_kwargs, environment_kwargs, visualize_reward=False)
        for key, value in quality.items():
            setattr(raw.physics.model.vis.quality, key, value)
        return raw
    except Exception as e:  # of the task, or of MuJoCo
        if not settings:
            raise
        raise ConfigError(f"config key 'env': {task} cannot be made with these settings: {in_a_line(e)}") from e
