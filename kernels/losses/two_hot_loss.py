"""Last layer of reward, critics and termination with their loss, forward and backward in one launch.

    logits = act(LN(x)) Wᵀ + b,    loss = CE(logits, target),    d = weight ∂loss/∂logits

The cross-entropy with a two-hot target (paper, section 3.1) reads two bins and gives
softmax - two_hot. One program has all K bins of its rows, so logits never leave the registers:
written are a loss a row and the gradient of the logits. Cost: 2 K D FLOP a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device.arithmetic import store_rounded, symlog
from ..device.launch import How, await_producers, jit, launch, tl
from ..device.pointers import entry_ptrs, row_ptrs, strided
from ..device.reference import reference_of
from ..layers.last_layer import last_layer, last_layer_reference
from ..layers.linear_tile import logits_on_tile
from ..layers.rows import EACH, Layer, Rows, Slabs
from ..layers.tiles import Tile
from ..layers.two_hot import Code, soft_cross_entropy

BINARY = -1
"""In place of a number of bins: one logit, binary cross-entropy (termination)."""


@jit
def two_hot_loss_kernel(
    x, w, target, targets, weight_ptr, loss, d, M, n, E, D, K, vmin, vmax,
    DUE: tl.constexpr, MEMBERS: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute loss and gradient of BM rows of one group, all D <= BN logits; grid (row tiles, groups)."""
    g = tl.program_id(1).to(tl.int64)
    rows, cols = tl.program_id(0) * TILE.BM + tl.arange(0, TILE.BM), tl.arange(0, TILE.BN)
    row_ok, col_ok = rows < M, (cols < D)[None, :]
    await_producers(PDL)
    logits = logits_on_tile(rows, cols, g, x, w, row_ok, n, D, K, DUE, TILE, MEMBERS=MEMBERS)
    goal = tl.load(row_ptrs(target, tl.minimum(g, targets - 1), rows, n), mask=row_ok, other=0.0)  # [BM]
    weight = tl.load(weight_ptr + g * E + rows // n, mask=row_ok, other=0.0)[:, None]
    if BINS > 1:
        logits = tl.where(col_ok, logits, float("-inf"))
        most = tl.max(logits, axis=1)
        p = tl.exp(logits - most[:, None])
        total = tl.sum(p, axis=1)
        at = symlog(goal)
        # NaN stays in `share`, where the loss shows it, and has no bin.
        # Rounded as torch rounds: an approximate quotient may lie beyond the last bin.
        position = tl.div_rn(
            tl.minimum(tl.maximum(at, vmin), vmax) - vmin, tl.div_rn(vmax - vmin, (D - 1).to(tl.float32))
        )
        position = tl.where(at == at, position, 0.0)
        lower = tl.floor(position)
        share = tl.where(at == at, position - lower, at)
        index = lower.to(tl.int32)
        # The neighbour of the last bin is the first, with no weight.
        hot = tl.where(cols[None, :] == ((index + 1) % D)[:, None], share[:, None], 0.0)
        hot = tl.where(cols[None, :] == index[:, None], 1.0 - share[:, None], hot)  # [BM, BN]
        # Logits less their maximum, whose hot ones are all that counts: others may be -inf.
        met = tl.sum(tl.where(hot != 0.0, hot * (logits - most[:, None]), 0.0), axis=1)
        value = tl.log(total) - met
        gradient = p / total[:, None] - hot
    else:
        x0 = tl.sum(tl.where(col_ok, logits, 0.0), axis=1)
        if BINS == -1:
            e = tl.exp(-tl.abs(x0))
            value = tl.maximum(x0, 0.0) - x0 * goal + tl.log(1.0 + e)
            slope = tl.where(x0 < 0, e, 1.0) / (1.0 + e) - goal
        else:
            if BINS == 1:
                goal = symlog(goal)
            value = (x0 - goal) * (x0 - goal)
            slope = 2.0 * (x0 - goal)
        gradient = tl.broadcast_to(slope[:, None], (TILE.BM, TILE.BN))
    tl.store(row_ptrs(loss, g, rows, n), value, mask=row_ok)
    d_ptrs = entry_ptrs(d, g, rows, n, cols)
    store_rounded(d_ptrs, weight * gradient, row_ok[:, None] & col_ok, TILE.INTERPRETED)


def two_hot_loss(
    x: Rows,
    layer: Layer,
    target: Tensor,
    weight: Tensor,
    loss: Tensor,
    gradient: Tensor,
    *,
    how: How,
    code: Code,
    slabs: Slabs = EACH,
    tile: Tile | None = None,
) -> None:
    """Write the losses of every row and group, and the gradients of their logits.

    Args:
        x: (G or 1, E, n, K) rows; an activation due is applied.
        layer: packed (S, max(bins, 1), K), no LayerNorm.
        target: (T, E, n) float32; group g has target min(g, T - 1).
        weight: (G, E) float32, contiguous: of each row's loss in the whole.
        loss: out: (G, E, n) float32, not weighted.
        gradient: out: (G, E, n, max(bins, 1)), weighted.
        how: precision of the product, and whether the launch may start early.
        code: what the logits stand for; `BINARY` in place of bins is one logit and cross-entropy.
        slabs: slab of `layer` of each group.
        tile: None takes the table's.
    """
    groups, e, n = loss.shape
    d, k = layer.weight.shape[1:]
    grid, inputs, constants = last_layer(
        x, layer, (groups, e, n), max(code.num_bins, 1), how=how, slabs=slabs, tile=tile
    )
    if target.shape[1:] != (e, n) or weight.shape != (groups, e) or not weight.is_contiguous():
        got = f"{tuple(target.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"target and weight: got {got}, allowed: (T, {e}, {n}) and contiguous ({groups}, {e})")
    if gradient.shape != (groups, e, n, d) or gradient.stride(-1) != 1:
        raise ValueError(f"gradient: got shape {tuple(gradient.shape)}, allowed: {(groups, e, n, d)}")
    launch(
        two_hot_loss_kernel, grid, *inputs, strided(target), len(target), weight, strided(loss), strided(gradient),
        e * n, n, e, d, k, float(code.vmin), float(code.vmax),
        MEMBERS=slabs.members is not None, BINS=min(code.num_bins, 2), **constants,
    )  # fmt: skip


@reference_of(two_hot_loss)
def two_hot_loss_reference(
    x: Rows,
    layer: Layer,
    target: Tensor,
    weight: Tensor,
    loss: Tensor,
    gradient: Tensor,
    how: How,
    code: Code,
    slabs: Slabs,
) -> None:
    """Compute `two_hot_loss` in plain torch, its gradient by autograd."""
    logits = last_layer_reference(x, layer, loss, how, slabs).requires_grad_()
    goal = torch.stack([target[min(g, len(target) - 1)] for g in range(len(loss))]).to(logits).unsqueeze(-1)
    with torch.enable_grad():
        if code.num_bins == BINARY:
            value = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
        else:
            value = soft_cross_entropy(logits, goal, *code)
        (d,) = torch.autograd.grad(value, logits, weight.to(logits)[..., None, None].expand_as(value))
    loss.copy_(value.detach().squeeze(-1))
    gradient.copy_(d)
