"""act(LayerNorm(x Wᵀ + b)) with the input given in parts, the layer all of TD-MPC2 is built of.

The first layer of dynamics, reward and critics reads `[z, e, a]`: latent, task embedding,
action. Instead of concatenating, each part meets its own columns of the weight,
`W [z, e, a] = Wz z + We e + Wa a`, and the parts broadcast against each other. A part that
many rows share (the latent of the first step, shared by all samples; the task embedding,
shared by all steps) is then multiplied once.

`linear` and `normed_linear` serve the torch backend. The fused planner evaluates the same
layer for several heads at once on rows of E environments, see `grouped_layer`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device.statistics import LAYER_NORM_EPS
from .activations import mish, simnorm


def linear(parts: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """Compute concat(parts) Wᵀ + b, without the concatenation.

    parts: tensors (..., K_i) whose leading dims broadcast; weight: (D, sum K_i), columns in
    the order of the parts; bias: (D,). Returns (..., D) with the broadcast leading dims.
    """
    if len(parts) == 1:
        return F.linear(parts[0], weight, bias)
    widths = [p.shape[-1] for p in parts]
    columns = weight.split(widths, dim=-1)
    # Shared parts are summed first, on their few rows; full-size parts are added to that.
    order = sorted(range(len(parts)), key=lambda i: parts[i].numel() // widths[i])
    total = F.linear(parts[order[0]], columns[order[0]], bias)
    for i in order[1:]:
        y = F.linear(parts[i], columns[i])
        # The fresh product is ours to reuse where autograd does not need it.
        in_place = not y.requires_grad and torch.broadcast_shapes(y.shape, total.shape) == y.shape
        total = y.add_(total) if in_place else y + total
    return total


def normed_linear(
    parts: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    simnorm_dim: int = 0,
    dropout: Tensor | None = None,
) -> Tensor:
    """Compute act(LN(dropout * (concat(parts) Wᵀ + b))); Mish, or SimNorm where `simnorm_dim` > 0.

    parts, weight, bias: as in `linear`; ln_weight, ln_bias: (D,). dropout: multiplier
    (..., D), 0 or 1/(1-p), applied *before* the LayerNorm as in the official layer.
    """
    y = linear(parts, weight, bias)
    if dropout is not None:
        y = y * dropout
    y = F.layer_norm(y, y.shape[-1:], ln_weight, ln_bias, LAYER_NORM_EPS)
    return simnorm(y, simnorm_dim) if simnorm_dim else mish(y)
