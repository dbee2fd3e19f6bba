"""What `Updater` asks of an implementation of learning, by torch or by kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from ..rng import UpdateNoise
from .batch import Batch, Sampler, UpdateTrace
from .scale import RunningScale

TASK_GRADIENT = "task_gradient"
"""Name, in a kept state, of what the policy loss has left in the task embedding's gradient."""


class UpdateBackend(Protocol):
    """One implementation of a whole update: optimisers, running scale and losses around one world model."""

    scale: RunningScale
    steps: int  # updates so far

    def step(self, batch: Batch, noise: UpdateNoise | None, trace: UpdateTrace | None) -> dict[str, Tensor]:
        """Train on one batch, already checked, and return the metrics as `Updater.step` does."""
        ...

    def step_from(self, buffer: Sampler) -> dict[str, Tensor] | None:
        """Train on a batch that kernels draw from the buffer; None where they cannot, and nothing was done."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of `Updater.state`."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        ...

    def synchronise(self) -> None:
        """Wait for the updates so far, and raise what they failed with."""
        ...

    def td_target(self, next_z: Tensor, batch: Batch, eps: Tensor, members: Tensor) -> Tensor:
        """Return r + gamma (1 - terminated) min of two target critics at a policy action: (H, B, 1)."""
        ...
