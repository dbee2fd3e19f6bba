"""Weights of rows in the losses of an update, their losses, and the metrics made of these.

Every kernel writes the losses of its rows into one buffer, a time step a row; two small products
make the metrics of them, in a fixed order.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .buffers import UpdateSizes

# Sums of mean losses of rows, by a matrix; the last two are parts of the policy loss.
_MIXED = (
    "consistency_loss",
    "reward_loss",
    "value_loss",
    "termination_loss",
    "total_loss",
    "pi_entropy",
    "pi_scaled_entropy",
    "_value",
    "_entropy",
)
METRICS = (*_MIXED, "pi_loss", "grad_norm", "pi_grad_norm", "pi_scale")
"""Names of `UpdateLosses.metrics`, in order; those with an underscore are parts of others."""


class UpdateLosses:
    """Losses of rows, (H or H+1, B) each and one beside another, and the metrics (len(METRICS),)."""

    def __init__(self, s: UpdateSizes, device: torch.device) -> None:
        h, b, heads = s.horizon, s.batch, 1 + s.num_q
        rho = s.rho ** torch.arange(h + 1, dtype=torch.float32)
        shares = torch.full((heads, 1), s.value_coef / s.num_q)
        shares[0] = s.reward_coef
        self.head_weight = (shares * rho[:h] / (h * b)).to(device).contiguous()
        # Of the square of one entry.
        self.consistency_weight = (s.consistency_coef * rho[:h] / (h * b * s.latent_dim)).to(device)
        self.termination_weight = torch.full((1, h), s.termination_coef / (h * b), device=device)
        self.policy_weight = (rho / ((h + 1) * b)).to(device)

        counts = [h, heads * h, h if s.episodic else 0, h + 1, h + 1, h + 1]
        self._rows = torch.zeros(sum(counts), b, device=device)
        at = torch.tensor([0, *counts]).cumsum(0).tolist()
        parts = [self._rows[start:end] for start, end in pairwise(at)]
        self.consistency_loss, self.head_loss = parts[0], parts[1].view(heads, h, b)
        self.termination_loss = parts[2].view(-1, h, b)
        # Of the policy loss: mean of two critics, log-probability, scaled entropy.
        self.q, self.log_prob, self.entropy = parts[3:]

        mix = torch.zeros(len(_MIXED), len(self._rows))
        mix[0, at[0] : at[1]] = rho[:h] / h
        mix[1, at[1] : at[1] + h] = rho[:h] / h
        mix[2, at[1] + h : at[2]] = (rho[:h] / (h * s.num_q)).repeat(s.num_q)
        mix[3, at[2] : at[3]] = 1 / h
        mix[4] = torch.tensor([s.consistency_coef, s.reward_coef, s.value_coef, s.termination_coef]) @ mix[:4]
        mix[5, at[4] : at[5]] = -1 / (h + 1)
        mix[6, at[5] : at[6]] = 1 / (h + 1)
        mix[7, at[3] : at[4]] = rho / (h + 1)
        mix[8, at[5] : at[6]] = -s.entropy_coef * rho / (h + 1)
        self._mix = mix.to(device)
        self._means = torch.zeros(len(self._rows), device=device)
        self.metrics = torch.zeros(len(METRICS), device=device)

    def metric(self, name: str) -> Tensor:
        """Where one metric lies: (1,)."""
        at = METRICS.index(name)
        return self.metrics[at : at + 1]

    def summarise(self, scale: Tensor) -> None:
        """Make the metrics of the losses of rows and the running scale (1,); norms are written by others."""
        torch.mean(self._rows, 1, out=self._means)
        torch.mv(self._mix, self._means, out=self.metrics[: len(_MIXED)])
        value, entropy = self.metric("_value"), self.metric("_entropy")
        torch.addcdiv(entropy, value, scale, value=-1, out=self.metric("pi_loss"))
        self.metric("pi_scale").copy_(scale)

    def not_finite(self) -> list[str]:
        """Losses whose own rows were not, at the last `summarise`; its product makes all metrics NaN by one. Waits."""
        mixed = (self._mix != 0) & ~self._means.isfinite()
        return [name for name, bad in zip(_MIXED, mixed.any(1).tolist(), strict=True) if bad]
