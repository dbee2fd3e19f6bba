"""What `Planner` asks of an implementation of planning, by torch or by kernels."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from ..rng import PlanNoise
from .trace import PlanTrace


class PlanRequest(NamedTuple):
    """Arguments of one plan for E environments, as checked by `Planner.plan`."""

    obs: Tensor  # (E, *obs_shape)
    t0: bool | Tensor = False  # for all, or (1,) or (E,) bool
    eval_mode: bool | Tensor = False
    task: Tensor | None = None  # (E,) int64
    noise: PlanNoise | None = None
    trace: PlanTrace | None = None


class PlanBackend(Protocol):
    """One implementation of a whole plan."""

    prev_mean: Tensor  # (E, H, A), written to by plans
    counter: Tensor | None  # seed and offset of its own generator, (2,) int64; None where it draws from the planner's

    def plan(self, request: PlanRequest) -> Tensor:
        """Return actions (E, A), which no later call overwrites."""
        ...

    def values(self, z: Tensor, actions: Tensor, task: Tensor | None, eps: Tensor, members: Tensor) -> Tensor:
        """Return values (E, N) of sequences (E, H, N, A) from latents z (E, N, L).

        task: (E,) or None; eps: (E, N, A) of the terminal action; members: (2,) critics.
        """
        ...
