"""Metrics of an update besides its losses."""

from __future__ import annotations

from torch import Tensor


def termination_statistics(prob: Tensor, target: Tensor, eps: float = 1e-9) -> dict[str, Tensor]:
    """Return the rate of terminations and the F1 score of their prediction over a batch (B, 1)."""
    predicted, actual = prob > 0.5, target == 1
    tp = (predicted & actual).sum()
    recall = tp / (actual.sum() + eps)
    precision = tp / ((predicted & (target == 0)).sum() + tp + eps)
    return dict(termination_rate=target.mean(), termination_f1=2 * precision * recall / (precision + recall + eps))
