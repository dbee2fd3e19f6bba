"""From policy logits to a squashed Gaussian action, its log-probability and scaled entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_SQRT_2PI = 0.9189385175704956


class PolicyOutput(NamedTuple):
    """All that the policy gives at some latents; leading dims are the input's."""

    action: Tensor  # (..., A) tanh of the sample
    mean: Tensor  # (..., A) tanh of the mean
    log_std: Tensor  # (..., A)
    log_prob: Tensor  # (..., 1) of the squashed action
    scaled_entropy: Tensor  # (..., 1)


def _gaussian(logits: Tensor, low: float, high: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    mean, log_std = logits.chunk(2, dim=-1)
    log_std = low + 0.5 * (high - low) * (torch.tanh(log_std) + 1)
    if mask is not None:
        mean, log_std = mean * mask, log_std * mask
    return mean, log_std


def gaussian_log_prob(eps: Tensor, log_std: Tensor) -> Tensor:
    """Return the log-density of mean + eps exp(log_std), summed over A: (..., A) -> (..., 1)."""
    return (-0.5 * eps.square() - log_std - LOG_SQRT_2PI).sum(-1, keepdim=True)


def squash_correction(action: Tensor) -> Tensor:
    """Return what tanh takes off the log-density: sum log(relu(1 - action²) + 1e-6), (..., A) -> (..., 1)."""
    return torch.log(F.relu(1 - action.square()) + 1e-6).sum(-1, keepdim=True)


def policy_action(logits: Tensor, eps: Tensor, low: float, high: float, mask: Tensor | None = None) -> Tensor:
    """Return tanh(mean + eps exp(log_std)): the action alone, all that planning needs.

    logits: (..., 2A); eps: (..., A) standard normal; mask: 0/1, broadcastable to (..., A),
    the live action dims of each row's task; dead dims act 0. Returns (..., A) in [-1, 1].
    """
    mean, log_std = _gaussian(logits, low, high, mask)
    if mask is not None:
        eps = eps * mask
    return torch.tanh(torch.addcmul(mean, eps, log_std.exp()))


def policy_head(logits: Tensor, eps: Tensor, low: float, high: float, mask: Tensor | None = None) -> PolicyOutput:
    """Return action, mean, log std, log-prob and scaled entropy; arguments as in `policy_action`.

    Two properties of the official code are kept on purpose. The squash correction uses
    log(relu(1 - tanh²) + 1e-6), which differs from the stable softplus form once tanh
    saturates. `scaled_entropy` multiplies the corrected entropy by the ratio of the
    (dimension-scaled) Gaussian log-prob to the corrected one, so the correction cancels.
    A dead dim has log std 0 and eps 0 and still adds -0.919 to the Gaussian log-prob.
    """
    mean, log_std = _gaussian(logits, low, high, mask)
    live: Tensor | float = float(mean.shape[-1])
    if mask is not None:
        eps = eps * mask
        live = mask.sum(-1, keepdim=True)
    gaussian = gaussian_log_prob(eps, log_std)
    action = torch.tanh(torch.addcmul(mean, eps, log_std.exp()))
    log_prob = gaussian - squash_correction(action)
    scaled_entropy = -log_prob * (gaussian * live / (log_prob + 1e-8))
    return PolicyOutput(action, torch.tanh(mean), log_std, log_prob, scaled_entropy)
