"""What the training loop asks of an environment."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.config import Config

Array = NDArray[np.float32] | NDArray[np.uint8]


class Env(Protocol):
    """One environment. Actions are in [-1, 1]; one step is one decision of the agent."""

    obs_shape: tuple[int, ...]
    action_dim: int
    max_episode_steps: int  # decisions
    action_repeat: int  # environment steps per decision

    def reset(self) -> Array:
        """Start an episode; returns the observation, float32 (or uint8 pixels)."""
        ...

    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Observation, reward, terminated, truncated, info (with `success`) after one decision."""
        ...

    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        """An RGB picture (height, width, 3)."""
        ...

    def overrides(self, cfg: Config) -> Config:
        """The config with settings the official code fixes for this task."""
        ...

    def close(self) -> None:
        """Free what the environment holds."""
        ...
