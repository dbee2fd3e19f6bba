"""Metrics of an update: their names, and those that are no losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that only show names do without torch
    from torch import Tensor


def metric_names(episodic: bool) -> list[str]:
    """Return the names of all metrics of an update, in the order of a log's columns; those of losses end in `_loss`."""
    names = ["consistency_loss", "reward_loss", "value_loss", "termination_loss", "total_loss", "grad_norm"]
    names += ["termination_rate", "termination_f1"] if episodic else []
    return [*names, "pi_loss", "pi_grad_norm", "pi_entropy", "pi_scaled_entropy", "pi_scale"]


def termination_statistics(prob: Tensor, target: Tensor, eps: float = 1e-9) -> dict[str, Tensor]:
    """Return the rate of terminations and the F1 score of their prediction over a batch (B, 1)."""
    predicted, actual = prob > 0.5, target == 1
    tp = (predicted & actual).sum()
    recall = tp / (actual.sum() + eps)
    precision = tp / ((predicted & (target == 0)).sum() + tp + eps)
    return dict(termination_rate=target.mean(), termination_f1=2 * precision * recall / (precision + recall + eps))
