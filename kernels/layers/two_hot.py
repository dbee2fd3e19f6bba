"""Discrete regression in symlog space: two-hot targets, their inverse, the cross-entropy.

`num_bins` > 1 is the method of the paper (section 3.1); 1 regresses symlog values and 0
plain values, both with a squared error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Code(NamedTuple):
    """Tells what the logits of a head stand for."""

    num_bins: int
    vmin: float  # first and last bin, in symlog
    vmax: float


def symlog(x: Tensor) -> Tensor:
    """Return sign(x) log(1 + |x|)."""
    return torch.sign(x) * torch.log(1 + torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Return sign(x) (exp(|x|) - 1), the inverse of `symlog`."""
    return torch.sign(x) * (torch.exp(torch.abs(x)) - 1)


def _bins_of(x: Tensor, num_bins: int, vmin: float, vmax: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return lower bin, upper bin (modulo K, as official) and weight of the upper one; (..., 1) each."""
    position = (symlog(x).clamp(vmin, vmax) - vmin) / ((vmax - vmin) / (num_bins - 1))
    lower = torch.floor(position)
    # NaN has no bin; it stays in the weight, where the loss shows it.
    index = lower.nan_to_num(0).long()
    return index, (index + 1) % num_bins, position - lower


def two_hot(x: Tensor, num_bins: int, vmin: float, vmax: float) -> Tensor:
    """Return the two-hot code of scalars: (..., 1) -> (..., K), K >= 2; values beyond the bins are clamped.

    At exactly `vmax` the upper neighbour wraps to bin 0 and gets weight 0 there.
    """
    lower, upper, weight = _bins_of(x, num_bins, vmin, vmax)
    code = torch.zeros(*x.shape[:-1], num_bins, device=x.device, dtype=x.dtype)
    return code.scatter_(-1, lower, 1 - weight).scatter_(-1, upper, weight)


def two_hot_inv(logits: Tensor, num_bins: int, vmin: float, vmax: float) -> Tensor:
    """Return the scalar a distribution over bins stands for: symexp(sum softmax(logits) bins).

    logits: (..., max(K, 1)) -> (..., 1).
    """
    if num_bins == 0:
        return logits
    if num_bins == 1:
        return symexp(logits)
    bins = torch.linspace(vmin, vmax, num_bins, device=logits.device, dtype=logits.dtype)
    return symexp((logits.softmax(-1) @ bins).unsqueeze(-1))


def soft_cross_entropy(logits: Tensor, target: Tensor, num_bins: int, vmin: float, vmax: float) -> Tensor:
    """Return -sum two_hot(target) log_softmax(logits): (..., max(K, 1)), (..., 1) -> (..., 1).

    Only the two bins with weight are read. `target` broadcasts over the leading dims.
    """
    if num_bins <= 1:
        return (logits - (symlog(target) if num_bins else target)).square()
    lower, upper, weight = _bins_of(target, num_bins, vmin, vmax)
    leading = (*logits.shape[:-1], 1)
    at_lower = logits.gather(-1, lower.expand(leading))
    at_upper = logits.gather(-1, upper.expand(leading))
    return logits.logsumexp(-1, keepdim=True) - torch.lerp(at_lower, at_upper, weight)
