"""Gymnasium tasks: the official short names, and any id with a Box action space.

One decision is one environment step. Actions are rescaled from [-1, 1] to the space's
bounds (for the official tasks these are the same). Tasks that can terminate need
`episodic=true`.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError, did_you_mean

from .base import Array, Env, RenderError
from .mujoco_setup import cannot_render, keep_log_out_of_the_way, prepare_rendering

# Official name: Gymnasium id, decisions per episode, keyword arguments
OFFICIAL: dict[str, tuple[str, int, dict[str, Any]]] = {
    "mujoco-walker": ("Walker2d-v5", 1000, {}),
    "mujoco-halfcheetah": ("HalfCheetah-v5", 1000, {}),
    "bipedal-walker": ("BipedalWalker-v3", 1600, {}),
    "lunarlander-continuous": ("LunarLander-v3", 500, {"continuous": True}),
}
_SUCCESS_RETURN = {"lunarlander-continuous": 200.0}
_OFFICIAL_OVERRIDES = dict(discount_max=0.99, rho=0.7)


def names() -> tuple[str, ...]:
    """Official names and, where gymnasium is installed, the registered MuJoCo and Box2D ids."""
    return (*OFFICIAL, *(i for i in _registered() if i.endswith(("-v5", "-v3"))))


def _registered() -> tuple[str, ...]:
    try:
        import gymnasium
    except ImportError:
        return ()
    return tuple(gymnasium.registry)


def accepts(name: str) -> bool:
    """Whether the name is an official one, a registered id, or looks like an id (Name-v0)."""
    return name in OFFICIAL or name in _registered() or _looks_like_id(name)


def _looks_like_id(name: str) -> bool:
    stem, dash, version = name.rpartition("-v")
    return bool(stem and dash and version.isdigit())


class GymnasiumTask:
    """A Gymnasium environment with the project's conventions."""

    action_repeat = 1

    def __init__(self, cfg: Config, seed: int) -> None:
        import gymnasium

        keep_log_out_of_the_way()
        if cfg.obs != "state":
            raise ConfigError(f"config key 'obs': got {cfg.obs!r}, allowed: 'state' for {cfg.task!r}")
        name, length, kwargs = OFFICIAL.get(cfg.task, (cfg.task, 0, {}))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mode = _render_mode(name)
                env = gymnasium.make(name, render_mode=mode, max_episode_steps=length or cfg.episode_length, **kwargs)
        except gymnasium.error.DependencyNotInstalled as e:
            raise ConfigError(f"config key 'task': {cfg.task!r} cannot be made: {e}") from e
        except gymnasium.error.Error as e:
            hint = did_you_mean(name, _registered())
            raise ConfigError(f"config key 'task': Gymnasium cannot make {name!r}: {str(e).rstrip('.')}.{hint}") from e
        if not isinstance(env.action_space, gymnasium.spaces.Box) or len(env.action_space.shape) != 1:
            raise ConfigError(
                f"config key 'task': {name!r} has action space {env.action_space}, allowed: a Box of one dimension"
            )
        if not env.action_space.is_bounded():
            raise ConfigError(f"config key 'task': {name!r} has an unbounded action space, allowed: finite bounds")
        if not isinstance(env.observation_space, gymnasium.spaces.Box) or len(env.observation_space.shape) != 1:
            env = gymnasium.wrappers.FlattenObservation(env)
        self.env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
        steps = length or cfg.episode_length or (env.spec.max_episode_steps if env.spec else None)
        if not steps:
            raise ConfigError(f"config key 'episode_length': {name!r} has no time limit; set decisions per episode")
        self.task, self.name = cfg.task, name
        self.max_episode_steps = int(steps)
        self.obs_shape: tuple[int, ...] = tuple(env.observation_space.shape or ())
        self.action_dim = int(np.prod(env.action_space.shape or ()))
        self.frames_per_second = _frames_per_second(env)
        self._seed: int | None = seed
        self._return = 0.0

    def reset(self) -> Array:
        """Start an episode; the first one is seeded, the rest follow from it."""
        obs, _ = self.env.reset(seed=self._seed)
        self._seed, self._return = None, 0.0
        return np.array(obs, dtype=np.float32)

    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """One environment step."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._return += float(reward)
        if self.task in _SUCCESS_RETURN:
            success = self._return > _SUCCESS_RETURN[self.task]
        else:
            success = info.get("success", info.get("is_success", 0.0))
        info = {"success": float(success)}
        return np.array(obs, dtype=np.float32), float(reward), bool(terminated), bool(truncated), info

    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        """A picture by the environment's own renderer; one that draws in another shape is fitted into this one."""
        from PIL import Image, ImageOps  # of imageio and matplotlib, both in the extra [train]

        if self.env.render_mode != "rgb_array":
            modes = self.env.metadata.get("render_modes")
            raise RenderError(f"{self.name}: no pictures: its render modes are {modes}, not 'rgb_array'")
        mujoco = getattr(self.env.unwrapped, "mujoco_renderer", None)
        if mujoco is not None and mujoco.viewer is None:
            prepare_rendering()
            mujoco.width, mujoco.height = width, height  # of the first picture, and then for good
            buffer = mujoco.model.vis.global_
            buffer.offwidth, buffer.offheight = max(buffer.offwidth, width), max(buffer.offheight, height)
        elif mujoco is not None:
            mujoco.viewer.make_context_current()  # another environment's may be
        try:
            picture = Image.fromarray(np.asarray(self.env.render(), np.uint8))
        except Exception as e:  # of OpenGL, or of a package that is missing
            raise cannot_render(self.name, e) if mujoco else RenderError(f"{self.name}: no pictures: {e}") from e
        return np.array(picture if picture.size == (width, height) else ImageOps.pad(picture, (width, height)))

    def overrides(self, cfg: Config) -> Config:
        """The official code fixes discount_max and rho for its named Gymnasium tasks."""
        return cfg.replace(**_OFFICIAL_OVERRIDES) if self.task in OFFICIAL else cfg

    def random_state(self) -> dict[str, Any]:
        """The seed of the first episode, then the generator of the ones after."""
        return {"seed": self._seed, "generator": self.env.unwrapped.np_random.bit_generator.state}

    def set_random_state(self, state: dict[str, Any]) -> None:
        """As told by `random_state`."""
        self._seed = state["seed"]
        self.env.unwrapped.np_random.bit_generator.state = state["generator"]

    def close(self) -> None:
        """Free the environment."""
        self.env.close()


def make(cfg: Config, seed: int) -> Env:
    """The environment behind an official name or a Gymnasium id."""
    return GymnasiumTask(cfg, seed)


def _render_mode(name: str) -> str | None:
    """Pictures, where the environment has them: MuJoCo's, Box2D's and Gymnasium's own draw only when asked to."""
    import gymnasium
    from gymnasium.envs.registration import load_env_creator

    module, _, registered = name.rpartition(":")
    if module:  # of which the import registers the id
        importlib.import_module(module)
    entry = gymnasium.spec(registered).entry_point
    metadata = getattr(load_env_creator(entry) if isinstance(entry, str) else entry, "metadata", None)
    modes = metadata.get("render_modes") if isinstance(metadata, dict) else None
    return "rgb_array" if modes is None or "rgb_array" in modes else None


def _frames_per_second(env: Any) -> float:
    """Of simulated time where the environment tells its time step; else as it wants to be shown."""
    dt = getattr(env.unwrapped, "dt", None)
    return 1 / float(dt) if isinstance(dt, float) and dt > 0 else float(env.metadata.get("render_fps", 30))
