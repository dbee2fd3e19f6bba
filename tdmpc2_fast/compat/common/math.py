"""The official `common.math`: what losses, policy and planner compute with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdmpc2_fast.kernels.layers import two_hot as op
from tdmpc2_fast.kernels.layers.policy_head import gaussian_log_prob, squash_correction
from tdmpc2_fast.kernels.layers.two_hot import symexp, symlog

from ...learn.metrics import termination_statistics as _statistics

__all__ = [
    "gaussian_logprob",
    "gumbel_softmax_sample",
    "int_to_one_hot",
    "log_std",
    "soft_ce",
    "squash",
    "symexp",
    "symlog",
    "termination_statistics",
    "two_hot",
    "two_hot_inv",
]


def soft_ce(pred: Tensor, target: Tensor, cfg: Any) -> Tensor:
    """Return the cross-entropy of logits (B, K) against the two-hot code of scalars (B, 1): (B, 1).

    With `num_bins` 0 or 1, whose targets are no distributions, it is what the official code gives: minus the
    product of target and log-softmax of one logit, which is 0.
    """
    return -(two_hot(target, cfg) * F.log_softmax(pred, dim=-1)).sum(-1, keepdim=True)


def log_std(x: Tensor, low: Tensor | float, dif: Tensor | float) -> Tensor:
    """Return low + dif (tanh(x) + 1) / 2, the policy's log std."""
    return low + 0.5 * dif * (torch.tanh(x) + 1)


def gaussian_logprob(eps: Tensor, log_std: Tensor) -> Tensor:
    """Return the log-density of a Gaussian sample, summed over A: (..., A) -> (..., 1)."""
    return gaussian_log_prob(eps, log_std)


def squash(mu: Tensor, pi: Tensor, log_pi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tanh of mean and sample, and the log-probability (..., 1) of the squashed sample."""
    pi = torch.tanh(pi)
    return torch.tanh(mu), pi, log_pi - squash_correction(pi)


def int_to_one_hot(x: Tensor, num_classes: int) -> Tensor:
    """Return the one-hot code of integers, float32: (...) -> (..., num_classes)."""
    return F.one_hot(x, num_classes).float()


def two_hot(x: Tensor, cfg: Any) -> Tensor:
    """Return the two-hot code (B, K) of scalars (B, 1); with `num_bins` 0 or 1, x and symlog(x)."""
    if cfg.num_bins == 0:
        return x
    x = x if x.is_floating_point() else x.float()
    if cfg.num_bins == 1:
        return symlog(x)
    return op.two_hot(x, cfg.num_bins, cfg.vmin, cfg.vmax)


def two_hot_inv(x: Tensor, cfg: Any) -> Tensor:
    """Return the scalars (..., 1) that logits (..., max(K, 1)) stand for."""
    return op.two_hot_inv(x, cfg.num_bins, cfg.vmin, cfg.vmax)


def gumbel_softmax_sample(p: Tensor, temperature: float = 1.0, dim: int = 0) -> Tensor:
    """Return the index of an entry of p (K,), drawn with these probabilities."""
    logits = p.log()
    gumbels = -torch.empty_like(logits, memory_format=torch.legacy_contiguous_format).exponential_().log()
    return ((logits + gumbels) / temperature).softmax(dim).argmax(-1)


def termination_statistics(pred: Tensor, target: Tensor, eps: float = 1e-9) -> dict[str, Tensor]:
    """Return rate and F1 score of predicted terminations, pred and target (B, 1)."""
    return _statistics(pred, target, eps)
