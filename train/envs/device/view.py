"""One environment of a simulator on a device, as evaluations and pictures take it: by numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config

from ..base import Array, Env, RenderError
from .base import DeviceEnvironments, checked

Draw = Callable[[int, int], NDArray[np.uint8]]


class View(Env):
    """The one environment of a simulator; every answer of it is copied to the host.

    Args:
        envs: a simulator of one environment.
        frames_per_second: decisions per second of simulated time.
        draw: draws a picture of a width and a height; None where there are none.
    """

    def __init__(self, envs: DeviceEnvironments, frames_per_second: float, draw: Draw | None = None) -> None:
        assert envs.num_envs == 1
        self.envs, self.frames_per_second, self._draw = envs, frames_per_second, draw
        self.obs_shape, self.action_dim = envs.obs_shape, envs.action_dim
        self.max_episode_steps, self.action_repeat = envs.max_episode_steps, envs.action_repeat
        self._all = torch.ones(1, dtype=torch.bool, device=envs.device)

    @override
    def reset(self) -> Array:
        return self._told(self.envs.reset(self._all))

    @override
    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        actions = torch.from_numpy(np.asarray(action, np.float32)).unsqueeze(0).to(self.envs.device)
        found = checked(self.envs.step(actions), self.envs)
        ends = bool(found.terminated), bool(found.truncated)
        return self._told(found.obs), float(found.reward), *ends, {"success": float(found.success)}

    def _told(self, obs: torch.Tensor) -> Array:
        copied: Array = obs[0].cpu().numpy().copy()  # the simulator's memory is not to be written to
        return copied

    @override
    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        if self._draw is None:
            raise RenderError(f"{type(self.envs).__name__} draws no pictures")
        return self._draw(width, height)

    @override
    def overrides(self, cfg: Config) -> Config:
        return cfg

    @override
    def random_state(self) -> Any:
        return self.envs.random_state()

    @override
    def set_random_state(self, state: Any) -> None:
        self.envs.set_random_state(state)

    @override
    def close(self) -> None:
        self.envs.close()
