"""The 28 standard DMControl tasks, official semantics.

One decision repeats the action for two control steps and sums the rewards; the observation
is the one after the second, all entries flattened and concatenated in their order. Episodes
are cut after 500 decisions and never terminate.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError, InputError

from .base import Array, Env, RenderError
from .mujoco_setup import cannot_render, keep_log_out_of_the_way, prepare_rendering

TASKS = (
    "acrobot-swingup",
    "cartpole-balance",
    "cartpole-balance-sparse",
    "cartpole-swingup",
    "cartpole-swingup-sparse",
    "cheetah-run",
    "cup-catch",
    "dog-run",
    "dog-stand",
    "dog-trot",
    "dog-walk",
    "finger-spin",
    "finger-turn-easy",
    "finger-turn-hard",
    "fish-swim",
    "hopper-hop",
    "hopper-stand",
    "humanoid-run",
    "humanoid-stand",
    "humanoid-walk",
    "pendulum-swingup",
    "quadruped-run",
    "quadruped-walk",
    "reacher-easy",
    "reacher-hard",
    "walker-run",
    "walker-stand",
    "walker-walk",
)
_DOMAINS = {"cup": "ball_in_cup"}
_ACTION_REPEAT = 2
_DECISIONS = 500


class DMControl:
    """A DMControl task. `seed` seeds the task's own random state, as in the official code."""

    action_repeat = _ACTION_REPEAT
    max_episode_steps = _DECISIONS

    def __init__(self, task: str, seed: int) -> None:
        suite, action_scale = _import_suite()

        domain, name = task.replace("-", "_").split("_", 1)
        domain = _DOMAINS.get(domain, domain)
        raw = suite.load(domain, name, task_kwargs={"random": seed}, visualize_reward=False)
        self.env = action_scale.Wrapper(raw, minimum=-1.0, maximum=1.0)
        self.camera_id = 2 if domain == "quadruped" else 0
        size = sum(int(np.prod(v.shape)) for v in self.env.observation_spec().values())
        self.obs_shape: tuple[int, ...] = (size,)
        self.action_dim = int(self.env.action_spec().shape[0])
        self.frames_per_second = 1 / (_ACTION_REPEAT * raw.control_timestep())
        self.task = task
        self._decisions = 0

    def reset(self) -> Array:
        """Start an episode from the task's random state."""
        self._decisions = 0
        return _flatten(self.env.reset().observation)

    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """One decision: the action twice, rewards summed."""
        action = action.astype(np.float64)
        reward = 0.0
        for _ in range(_ACTION_REPEAT):
            step = self.env.step(action)
            reward += step.reward
        self._decisions += 1
        return _flatten(step.observation), reward, False, self._decisions >= _DECISIONS, {"success": 0.0}

    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        """The official camera's picture."""
        try:
            picture: NDArray[np.uint8] = self.env.physics.render(height, width, self.camera_id)
        except ValueError as e:  # larger than the model's own buffer, which most leave at 640x480
            raise InputError(f"width, height: got {width}, {height}: {e}") from e
        except Exception as e:  # whatever the OpenGL driver at hand raises
            raise cannot_render(self.task, e) from e
        return picture

    def overrides(self, cfg: Config) -> Config:
        """Nothing is fixed for these tasks."""
        return cfg

    def random_state(self) -> dict[str, Any]:
        """Of the task."""
        state = self.env.task.random.get_state(legacy=False)
        return {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}}

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Of the task."""
        self.env.task.random.set_state(state)

    def close(self) -> None:
        """Free the physics."""
        self.env.close()


class Pixels:
    """Three stacked 64x64 frames, channels first, instead of the state."""

    def __init__(self, env: DMControl, num_frames: int = 3, size: int = 64) -> None:
        self.env, self.size = env, size
        self.obs_shape: tuple[int, ...] = (3 * num_frames, size, size)
        self.action_dim = env.action_dim
        self.action_repeat, self.max_episode_steps = env.action_repeat, env.max_episode_steps
        self.frames_per_second = env.frames_per_second
        self._frames: deque[NDArray[np.uint8]] = deque(maxlen=num_frames)

    def _observe(self, count: int) -> Array:
        frame = self.env.render(self.size, self.size).transpose(2, 0, 1)
        self._frames.extend([frame] * count)
        return np.concatenate(self._frames)

    def reset(self) -> Array:
        """Start an episode; the first frame fills the stack."""
        self.env.reset()
        return self._observe(self._frames.maxlen or 1)

    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """One decision, seen through the camera."""
        _, *rest = self.env.step(action)
        return (self._observe(1), *rest)  # type: ignore[return-value]

    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        """The official camera's picture."""
        return self.env.render(width, height)

    def overrides(self, cfg: Config) -> Config:
        """Nothing is fixed for these tasks."""
        return cfg

    def random_state(self) -> dict[str, Any]:
        """Of the task."""
        return self.env.random_state()

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Of the task."""
        self.env.set_random_state(state)

    def close(self) -> None:
        """Free the physics."""
        self.env.close()


def make(cfg: Config, seed: int) -> Env:
    """The task, from states or (`obs=rgb`) pixels."""
    env = DMControl(cfg.task, seed)
    if cfg.obs == "state":
        return env
    try:
        env.render(8, 8)
    except RenderError as e:
        raise ConfigError(f"config key 'obs': 'rgb' needs a renderer; {e}") from e
    return Pixels(env)


def _import_suite() -> tuple[Any, Any]:
    """`dm_control.suite` and its action scaling; the import takes or refuses the renderer that MUJOCO_GL names."""
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


def _flatten(observation: dict[str, Any]) -> NDArray[np.float32]:
    return np.concatenate([np.ravel(v) for v in observation.values()]).astype(np.float32)
