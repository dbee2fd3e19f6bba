"""Running scale of Q values, by which the policy loss is normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from tdmpc2_fast.kernels.losses.running_scale import places


class RunningScale:
    """A moving average of the 5%-95% range of Q values, at least 1 (paper, section 3.1).

    `value` is a (1,) tensor, updated in place.
    """

    def __init__(self, tau: float, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.tau = tau
        self.value = torch.ones(1, device=device, dtype=dtype)

    @torch.no_grad()
    def after(self, q: Tensor) -> Tensor:
        """Return `value` one step towards the range of q (B, 1); `value` itself stays."""
        low, high = percentiles(q)
        return self.value.lerp((high - low).clamp(min=1.0).to(self.value), self.tau)

    def update(self, q: Tensor) -> None:
        """Move `value` one step towards the range of q (B, 1)."""
        self.value.copy_(self.after(q))


def percentiles(x: Tensor) -> Tensor:
    """Return the 5% and 95% percentile over the batch, linearly interpolated: (B, ...) -> (2, ...)."""
    ordered = torch.sort(x, dim=0).values
    return torch.stack([ordered[i] * (1 - share) + ordered[j] * share for i, j, share in places(x.shape[0])])
