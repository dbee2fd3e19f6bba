"""The sampling side of MPPI: warm start, sampling, elites, new mean and std, choice of action.

All ops are batched over E environments that never mix (paper, section 3.2 and eq. 6).
`mppi_begin` and `mppi_refine`, in files of their names, are the launches composed of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

SUM_EPS = 1e-9


class Rule(NamedTuple):
    """What elites make of the next distribution; names as in the config."""

    num_elites: int  # 1 to N
    temperature: float  # of the scores
    min_std: float  # least std of a live dimension
    max_std: float

    @classmethod
    def of(cls, settings: Any) -> Rule:
        """Take the rule from what has its fields among others: a config, or the sizes of a plan."""
        return cls(*(getattr(settings, name) for name in cls._fields))


class Samples(NamedTuple):
    """The sequences of an iteration and the normal distribution they come from: float32, contiguous."""

    actions: Tensor  # (E, H, N, A)
    mean: Tensor  # (E, H, A)
    std: Tensor  # (E, H, A), clamped, then masked


class Elites(NamedTuple):
    """Returns of all sequences and the best of them, contiguous."""

    returns: Tensor  # (E, N) float32, NaN and infinities as they came
    best: Tensor  # (E, num_elites) int64 indices, by descending value, ties to the lower index
    scores: Tensor  # (E, num_elites) float32, sum to one
    order: Tensor  # (E, num_elites) int64, the same indices by themselves, which a launch works with


def shift_mean(prev_mean: Tensor, t0: Tensor) -> Tensor:
    """Warm start: return the previous mean one step on, zeros last; zeros where an episode starts.

    prev_mean: (E, H, A); t0: (E,) bool. Returns a new (E, H, A).
    """
    mean = torch.cat([prev_mean[:, 1:], torch.zeros_like(prev_mean[:, :1])], 1)
    return mean.masked_fill_(t0.view(-1, 1, 1), 0.0)


def sample_actions(mean: Tensor, std: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return clamp(mean + std noise, -1, 1), times the action mask.

    mean, std: (E, H, A); noise: (E, H, N', A) standard normal; mask: (E, A) of 0/1.
    """
    actions = torch.addcmul(mean.unsqueeze(2), std.unsqueeze(2), noise).clamp_(-1, 1)
    return actions if mask is None else actions.mul_(mask[:, None, None])


def refine(
    values: Tensor, actions: Tensor, rule: Rule, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return elites, their scores, and the new mean and std.

    values: (E, N), NaN counts as 0; actions: (E, H, N, A); mask: (E, A) or None. Returns
    elite indices (E, K) by descending value with ties to the lower index, scores (E, K) that
    sum to one, mean and std (E, H, A). The std is clamped before it is masked, so dead
    dimensions end at 0.
    """
    values = values.nan_to_num(0)
    order = torch.sort(values, dim=-1, descending=True, stable=True)
    index = order.indices[:, : rule.num_elites]
    elite_values = order.values[:, : rule.num_elites]
    elites = take_samples(actions, index)
    score = torch.exp(rule.temperature * (elite_values - elite_values[:, :1]))
    score = score / score.sum(-1, keepdim=True)
    weight = score[:, None, :, None]
    norm = score.sum(-1)[:, None, None] + SUM_EPS
    mean = (weight * elites).sum(2) / norm
    std = ((weight * (elites - mean.unsqueeze(2)).square()).sum(2) / norm).sqrt()
    std = std.clamp(rule.min_std, rule.max_std)
    if mask is not None:
        mean, std = mean * mask[:, None], std * mask[:, None]
    return index, score, mean, std


def take_samples(actions: Tensor, index: Tensor) -> Tensor:
    """Take sequences `index` (E, K) out of actions (E, H, N, A): (E, H, K, A)."""
    e, h, _, a = actions.shape
    return actions.gather(2, index[:, None, :, None].expand(e, h, index.shape[1], a))


def pick_elite(score: Tensor, exponential: Tensor) -> Tensor:
    """Pick one elite per environment with probability `score`, by the Gumbel trick.

    score, exponential: (E, K), the latter Exp(1) draws. Returns (E,) indices into the elites.
    """
    return (score.log() - exponential.log()).argmax(-1)


def explore(action: Tensor, std: Tensor, noise: Tensor, eval_mode: Tensor) -> Tensor:
    """Return clamp(action + std noise, -1, 1), without the noise where `eval_mode`.

    action, std: (E, A); noise: (E, A) standard normal; eval_mode: (E,) bool.
    """
    return (action + (~eval_mode).unsqueeze(1) * std * noise).clamp(-1, 1)
