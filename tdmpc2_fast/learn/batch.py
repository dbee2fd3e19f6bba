"""What an update learns from, and what tests may ask of it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import Config
from ..errors import InputError
from ..inputs import as_tensor


class Batch(NamedTuple):
    """Slices of H+1 consecutive steps, as `ReplayBuffer.sample` gives them."""

    obs: Tensor  # (H+1, B, *obs_shape)
    action: Tensor  # (H, B, A)
    reward: Tensor  # (H, B, 1)
    terminated: Tensor  # (H, B, 1) float
    task: Tensor | None  # (B,) int64

    def checked(self, cfg: Config) -> Batch:
        """Return the batch in tensors that can be learned from; a shape that does not fit is an `InputError`."""
        given = {name: x for name, x in self._asdict().items() if x is not None}
        found = self._replace(**{name: _usable(x, f"batch.{name}") for name, x in given.items()})
        found._check(cfg)
        return found

    def to(self, cfg: Config, device: torch.device, dtype: torch.dtype) -> Batch:
        """Return the batch on a device and, but for pixels and tasks, in a floating-point type."""
        obs = self.obs.to(device, self.obs.dtype if cfg.obs == "rgb" else dtype)
        action, reward, terminated = (x.to(device, dtype) for x in (self.action, self.reward, self.terminated))
        return Batch(obs, action, reward, terminated, None if self.task is None else self.task.to(device))

    def _check(self, cfg: Config) -> None:
        h, b = cfg.horizon, cfg.batch_size
        shapes = dict(
            obs=(h + 1, b, *cfg.observation_shape),
            action=(h, b, cfg.need("action_dim")),
            reward=(h, b, 1),
            terminated=(h, b, 1),
        )
        for name, shape in shapes.items():
            got = tuple(getattr(self, name).shape)
            if got != shape:
                raise InputError(f"batch.{name}: got shape {got}, allowed: {shape}")
        if cfg.multitask and (self.task is None or tuple(self.task.shape) != (b,)):
            got_task = None if self.task is None else tuple(self.task.shape)
            raise InputError(f"batch.task: got {got_task}, allowed: task indices of shape ({b},)")


class Sampler(Protocol):
    """What an update draws from: our `ReplayBuffer`, or the official `Buffer`."""

    def sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return the fields of a `Batch`."""
        ...


def _usable(x: Tensor, name: str) -> Tensor:
    x = as_tensor(x, name)
    return x.clone() if x.is_inference() else x  # autograd cannot save what was made in inference mode


class UpdateTrace(NamedTuple):
    """Values and gradients before clipping, filled in by an update that is given one: for tests."""

    tensors: dict[str, Tensor]
    grads: dict[str, Tensor]

    @classmethod
    def empty(cls) -> UpdateTrace:
        """Return a trace to hand to `Updater.step`."""
        return cls({}, {})
