"""What tasks of suites built on MuJoCo share: episodes of 100 decisions, and pictures."""

from __future__ import annotations

import atexit
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError, InputError, did_you_mean

from .. import random_state
from ..base import Array, Env, RenderError
from ..mujoco_setup import cannot_render
from ..pixels import FRAMES, SIZE, Stack

_DECISIONS = 100


class MujocoTask(Env):
    """A task that lasts 100 decisions, whatever the suite says of its end; the official wrappers of both have it so.

    A subclass calls `sees` once its simulation is there, and has `env`, the suite's own environment, `generator`,
    `begin` and `decide`.
    """

    env: Any

    max_episode_steps = _DECISIONS
    action_repeat = 1
    frames = 1

    def __init__(self, cfg: Config) -> None:
        self.task = cfg.task
        self._stack = Stack(FRAMES) if cfg.obs == "rgb" else None
        self._decisions = 0

    @property
    def generator(self) -> np.random.Generator:
        """The generator that draws all that differs between episodes."""
        raise NotImplementedError

    def begin(self) -> NDArray[Any]:
        """Start an episode; return its observation (n,)."""
        raise NotImplementedError

    def decide(self, action: NDArray[np.float32]) -> tuple[NDArray[Any], float, float]:
        """Make one decision; return observation (n,), reward, success."""
        raise NotImplementedError

    def sees(self, camera: Camera, size: int) -> None:
        """Set what is observed: `size` numbers or, with `obs=rgb`, pictures of this camera.

        Raises:
            ConfigError: pictures, and nothing here draws any.
        """
        self._camera = camera
        self.obs_shape: tuple[int, ...] = (size,)
        if self._stack is not None:
            self.frames, self.obs_shape = FRAMES, (3 * FRAMES, SIZE, SIZE)
            try:
                self.render(SIZE, SIZE)
            except RenderError as e:
                raise ConfigError(f"config key 'obs': 'rgb' needs a renderer; {e}") from e

    @override
    def reset(self) -> Array:
        self._decisions = 0
        return self._observation(self.begin(), first=True)

    @override
    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        obs, reward, success = self.decide(action)
        self._decisions += 1
        over = self._decisions >= _DECISIONS
        return self._observation(obs, first=False), reward, False, over, {"success": success}

    def _observation(self, numbers: NDArray[Any], first: bool) -> Array:
        if self._stack is None:
            return numbers.astype(np.float32)
        return self._stack(self.render(SIZE, SIZE).transpose(2, 0, 1), first)

    @override
    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        """Draw what the official code's camera sees, as `Env.render`."""
        if min(width, height) < 1:
            raise InputError(f"width, height: got {width}, {height}, allowed: at least 1")
        try:
            return self._camera.picture(width, height)
        except Exception as e:  # whatever the OpenGL driver at hand raises
            raise cannot_render(self.task, e) from e

    @override
    def overrides(self, cfg: Config) -> Config:
        return cfg

    @override
    def random_state(self) -> Any:
        return random_state.told(self.generator)

    @override
    def set_random_state(self, state: Any) -> None:
        random_state.take(self.generator, state)

    @override
    def close(self) -> None:
        self._camera.close()
        self.env.close()


class Camera:
    """Draws what a camera of a model sees, with a renderer of its own beside the suite's, which have one size each.

    Args:
        model: the `mujoco.MjModel`.
        data: its `mujoco.MjData`.
        name: of the camera.
        shows: what is drawn beside the defaults, as `mujoco.mjtVisFlag`.
        upside_down: whether the camera is.
    """

    def __init__(
        self, model: Any, data: Any, name: str, shows: tuple[int, ...] = (), upside_down: bool = False
    ) -> None:
        self._model, self._data, self.name, self._shows, self._upside_down = model, data, name, shows, upside_down
        self._renderers: dict[tuple[int, int], Any] = {}

    def picture(self, width: int, height: int) -> NDArray[np.uint8]:
        """Return a picture (height, width, 3)."""
        import mujoco

        renderer = self._renderers.get((width, height))
        if renderer is None:
            buffer = self._model.vis.global_
            buffer.offwidth, buffer.offheight = max(buffer.offwidth, width), max(buffer.offheight, height)
            renderer = self._renderers[width, height] = mujoco.Renderer(self._model, height, width)
            atexit.register(self.close)  # now, so that it comes before OpenGL's own end
        option = mujoco.MjvOption()
        for flag in self._shows:
            option.flags[flag] = 1
        renderer.update_scene(self._data, self.name, option)
        picture: NDArray[np.uint8] = renderer.render()
        return np.ascontiguousarray(picture[::-1]) if self._upside_down else picture

    def close(self) -> None:
        """Free the renderers."""
        atexit.unregister(self.close)
        while self._renderers:
            self._renderers.popitem()[1].close()


def check_task(cfg: Config, tasks: tuple[str, ...], suite: str) -> None:
    """Raise `ConfigError` for a task that a suite does not have; the message has the nearest one."""
    if cfg.task not in tasks:
        raise ConfigError(f"config key 'task': {suite} has no {cfg.task!r}.{did_you_mean(cfg.task, tasks)}")


def settings_of(cfg: Config, allowed: dict[str, tuple[Any, ...] | None]) -> dict[str, Any]:
    """Return the settings `env.KEY=VALUE` of a config.

    allowed: the keys, and for each the values it may have; None allows any.

    Raises:
        ConfigError: another key or value; the message names it.
    """
    settings = dict(cfg.env_kwargs or {})
    for key, value in settings.items():
        if key not in allowed:
            names = ", ".join(f"env.{k}" for k in allowed)
            raise ConfigError(f"config key 'env.{key}': got {value!r}, allowed for {cfg.task}: {names}")
        values = allowed[key]
        if values is not None and value not in values:
            text = ", ".join(repr(v) for v in values)
            raise ConfigError(f"config key 'env.{key}': got {value!r}, allowed for {cfg.task}: {text}")
    return settings
