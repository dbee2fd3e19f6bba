"""What the training loop asks of a simulator whose observations, actions and rewards are tensors of the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from tdmpc2_fast.config import Config

from ..answers import EnvError

if TYPE_CHECKING:  # commands that only list tasks come without torch
    import torch
    from torch import Tensor


class DeviceStep(NamedTuple):
    """What came of one decision in every environment."""

    obs: Tensor  # (E, *obs_shape), the last one of this decision: where an episode ended, its last one
    reward: Tensor  # (E,) float
    terminated: Tensor  # (E,) bool
    truncated: Tensor  # (E,) bool
    success: Tensor  # (E,) float


@runtime_checkable
class DeviceEnvironments(Protocol):
    """The `num_envs` environments of a run in one simulator. Actions are in [-1, 1]; one step is one decision.

    An environment whose episode has ended is stepped no further before `reset` begins its next one. What it plays
    depends on its own seed and its own actions alone. Tensors it returns are not written to later.
    """

    num_envs: int
    obs_shape: tuple[int, ...]
    action_dim: int
    max_episode_steps: int  # decisions, after which `truncated` is true
    action_repeat: int  # environment steps per decision
    device: torch.device

    def reset(self, mask: Tensor) -> Tensor:
        """Start an episode in the environments of a mask (E,) bool of `device`; the others stay as they are.

        Returns the observations (E, *obs_shape), float32 (or uint8 pixels); rows of the others mean nothing.
        """
        ...

    def step(self, actions: Tensor) -> DeviceStep:
        """Make one decision with actions (E, A), float32 of `device`, in every environment."""
        ...

    def random_state(self) -> Any:
        """Return all that the episodes to come are drawn from, JSON-ready; None where it cannot be told."""
        ...

    def set_random_state(self, state: Any) -> None:
        """Draw the episodes to come as the environments that told this `random_state` would have."""
        ...

    def state(self) -> Mapping[str, Tensor] | None:
        """Return where the episodes under way stand, so that they can be gone on with; None where it cannot be told."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the episodes that stood at this `state`.

        Raises:
            ValueError: the simulator has another state now, of other sizes.
        """
        ...

    def close(self) -> None:
        """Free what the simulator holds."""
        ...


def device_of(cfg: Config) -> torch.device:
    """Return the device of the agent of a config, as its tensors name it: `cuda` is `cuda:0`, or the one chosen."""
    import torch

    from tdmpc2_fast.runtime.backend import resolve_device

    return torch.empty(0, device=resolve_device(cfg.device)).device


def checked(found: DeviceStep, envs: DeviceEnvironments) -> DeviceStep:
    """Return the answer of a simulator; its values are not looked at, so nobody waits for them.

    Raises:
        EnvError: a tensor of another shape, kind or device than `DeviceStep` has.
    """
    one = (envs.num_envs,)
    check_tensor("observation", found.obs, (*one, *envs.obs_shape), envs.device)
    for name in ("reward", "terminated", "truncated", "success"):
        check_tensor(name, getattr(found, name), one, envs.device, flag=name in ("terminated", "truncated"))
    return found


def check_tensor(name: str, x: Any, shape: tuple[int, ...], device: torch.device, flag: bool = False) -> None:
    """Raise `EnvError` for anything but a tensor of this shape and device: of bool for a flag, else of numbers."""
    import torch

    fits = isinstance(x, torch.Tensor) and tuple(x.shape) == shape and x.device == device
    if not fits or (x.dtype == torch.bool) != flag or x.is_complex():
        got = f"{x.dtype} of shape {tuple(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise EnvError(f"{name}: got {got}, allowed: {'bool' if flag else 'numbers'} of shape {shape} on {device}")
