"""What the training loop asks of an environment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import BackendError
from tdmpc2_fast.rng import stream_seed

Array = NDArray[np.float32] | NDArray[np.uint8]
Actions = NDArray[np.float32]  # (A,), or more in front


class RenderError(BackendError):
    """A picture or video that cannot be made here; the message says what to install or set."""


class Env(Protocol):
    """One environment. Actions are in [-1, 1]; one step is one decision of the agent."""

    obs_shape: tuple[int, ...]
    action_dim: int
    max_episode_steps: int  # decisions
    action_repeat: int  # environment steps per decision
    frames_per_second: float  # decisions per second of simulated time

    def reset(self) -> Array:
        """Start an episode; returns the observation, float32 (or uint8 pixels)."""
        ...

    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Observation, reward, terminated, truncated, info (with `success`) after one decision."""
        ...

    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        """An RGB picture (height, width, 3), uint8; drawing it changes nothing in the environment.

        Raises:
            RenderError: the task has no pictures, or nothing here can draw them.
        """
        ...

    def overrides(self, cfg: Config) -> Config:
        """The config with settings the official code fixes for this task."""
        ...

    def random_state(self) -> Any:
        """All that the episodes to come are drawn from, JSON-ready; None where it cannot be told."""
        ...

    def set_random_state(self, state: Any) -> None:
        """Draw the episodes to come as the environment did whose `random_state` this is."""
        ...

    def close(self) -> None:
        """Free what the environment holds."""
        ...


class Step(NamedTuple):
    """What came of one decision in one environment."""

    obs: Array
    reward: float
    terminated: bool
    truncated: bool
    success: float


class EnvError(RuntimeError):
    """An environment failed; the message says how."""


class EnvState(NamedTuple):
    """Where an environment stands, JSON-ready: its random state now, and when its episode began."""

    now: Any
    origin: Any


class Environments(Protocol):
    """The `num_envs` environments of a run, stepped together: in this process or in others.

    Equal seeds give equal trajectories wherever they run.
    """

    restarts: int
    """Times environments were made anew, over the whole run."""

    def reset(self, which: Sequence[int]) -> dict[int, Array]:
        """Start an episode in these environments; observations by index.

        Others may be among them: those that had to be made anew meanwhile, whose episodes
        are lost.
        """
        ...

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Give every environment its action, (E, A); ended by `step_wait`."""
        ...

    def step_wait(self) -> list[Step | None]:
        """What came of it; None where the environment had to be made anew and its episode is lost."""
        ...

    def states(self) -> list[EnvState | None]:
        """Where each stands between two steps; None where it had to be made anew and its episode is lost."""
        ...

    def restore(self, states: Sequence[EnvState], actions: Mapping[int, Actions]) -> dict[int, list[Step]]:
        """Take environments just made to where those stood that `states` is of.

        actions: what has been done, (T, A), in the episodes under way: they are played again
        from their origin. What came of it is returned by index, the reset (reward 0) first.
        """
        ...

    def close(self) -> None:
        """Free the environments."""
        ...


def restore(env: Env, state: EnvState, actions: Actions | None) -> list[Step] | None:
    """`Environments.restore` for one."""
    if actions is None:
        if state.now is not None:
            env.set_random_state(state.now)
        return None
    if state.origin is not None:
        env.set_random_state(state.origin)
    return [Step(env.reset(), 0.0, False, False, 0.0), *(step(env, a) for a in actions)]


def step(env: Env, action: Actions) -> Step:
    """One decision in one environment."""
    obs, reward, terminated, truncated, info = env.step(action)
    return Step(obs, float(reward), bool(terminated), bool(truncated), float(info["success"]))


def env_seed(seed: int, index: int, restart: int = 0) -> int:
    """Seed of environment `index` of a run; `restart` counts the times environments were made anew.

    The first environment has the run's own seed, as in the official code; every other one,
    and every one made anew, has a stream of its own.
    """
    if index == restart == 0:
        return seed
    return stream_seed(seed, f"env {index}" + (f" restart {restart}" if restart else "")) % 2**31


def checked(step: Step, task: str, index: int) -> Step:
    """The step, unless it holds what no number can be learned from.

    Raises:
        EnvError: an observation or reward is NaN or infinite.
    """
    if not (math.isfinite(step.reward) and (step.obs.dtype == np.uint8 or np.isfinite(step.obs).all())):
        raise EnvError(f"{task}, environment {index}: got a NaN or infinite observation or reward, allowed: numbers")
    return step
