"""The episodes under way in the environments of a run: in the host's memory, or on the device of their simulator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tdmpc2_fast.config import Config

from ...envs.base import Environments, Failures
from ...envs.device.base import DeviceEnvironments
from .base import Rollouts
from .device import DeviceRollouts
from .host import HostRollouts

__all__ = ["DeviceRollouts", "HostRollouts", "Rollouts", "rollouts_in"]


def rollouts_in(
    envs: Environments | DeviceEnvironments,
    cfg: Config,
    device: torch.device,
    note: Callable[[str], None],
    restarts: int = 0,
    dropped: int = 0,
) -> Rollouts:
    """Return the rollouts in the environments of a run.

    Args:
        envs: as `Source.together` returns them.
        cfg: a completed config.
        device: that of the agent.
        note, restarts, dropped: as for `Source.together`.

    Raises:
        ConfigError: the environments are on another device than the agent.
    """
    if isinstance(envs, DeviceEnvironments):
        return DeviceRollouts(envs, cfg, device, Failures(cfg, note, dropped), restarts)
    return HostRollouts(envs, cfg)
