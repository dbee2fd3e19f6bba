"""What an update learns from, and what tests may ask of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .config import Config
from .errors import InputError


class Batch(NamedTuple):
    """Slices of H+1 consecutive steps, as `ReplayBuffer.sample` gives them."""

    obs: Tensor  # (H+1, B, *obs_shape)
    action: Tensor  # (H, B, A)
    reward: Tensor  # (H, B, 1)
    terminated: Tensor  # (H, B, 1) float
    task: Tensor | None  # (B,) int64

    def check(self, cfg: Config) -> None:
        """Raise `InputError` for a shape that does not fit the config."""
        h, b = cfg.horizon, cfg.batch_size
        shapes = dict(
            obs=(h + 1, b, *dict(cfg._require("obs_shape"))[cfg.obs]),
            action=(h, b, cfg._require("action_dim")),
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


class UpdateTrace(NamedTuple):
    """Filled by an update that is given one, for tests: values and gradients before clipping."""

    tensors: dict[str, Tensor]
    grads: dict[str, Tensor]

    @classmethod
    def empty(cls) -> UpdateTrace:
        """A trace to hand to `Updater.step`."""
        return cls({}, {})
