"""The official `common.world_model`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...model import world_model
from ...model.layers import Stack, ensemble_members, member_forward


class Critics:
    """Critics that learn nothing: the model's own, detached, or its targets. Called as the official modules are."""

    def __init__(self, params: Stack) -> None:
        self.params = params

    def __len__(self) -> int:
        return len(self.params[0].weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits of all at x (..., L + T + A): (Q, ..., K)."""
        members = ensemble_members(self.params, None, detach=True)
        return torch.stack([member_forward(m, (x,)) for m in members])


class WorldModel(world_model.WorldModel):
    """`tdmpc2_fast.WorldModel` with what else programs around the official one use.

    Differences: `cfg` is our `Config` of what was given; `pi` returns its facts in a dict; `to` leaves the target
    critics as they are, where the official one sets them to the critics; `_detach_Qs` has no dropout.
    """

    @property
    def _detach_Qs_params(self) -> Stack:
        return self._Qs.params

    @property
    def _detach_Qs(self) -> Critics:
        return Critics(self._Qs.params)

    @property
    def _target_Qs(self) -> Critics:
        return Critics(self._target_Qs_params)

    def init(self) -> None:
        """Set the target critics to the critics."""
        self._target_Qs_params.load_state_dict(self._Qs.params.state_dict())

    def pi(
        self, z: Tensor, task: int | Tensor | None = None, eps: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sample the policy prior as `WorldModel.pi` does; `action_prob` is one number, as in the official code."""
        action, info = super().pi(z, task, eps)
        return action, info | dict(action_prob=torch.ones((), device=z.device))

    def termination(self, z: Tensor, task: Any = None, unnormalized: bool = False) -> Tensor:
        """Return the probability (or logit) that z (..., L) is terminal: (..., 1); single-task, as officially."""
        if task is not None:
            raise InputError(f"task: got {task!r}, allowed: None, terminations are of a single task")
        return super().termination(z, None, unnormalized)
