"""The last layer of reward, critics and termination, down to a scalar; no logits in memory.

    s[g, e, r] = two_hot_inv(act(LN(x[g, e, r])) W[s]ᵀ + b[s])      (paper, section 3.1)
    ∂s/∂logits = exp(|v|) p (bins - v),    p = softmax(logits),  v = sum p bins,  s = symexp(v)

One program has all K bins of its rows, so softmax and expectation stay in registers. The gradient
is for the policy loss, which goes through critics that are constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.arithmetic import store_rounded, symexp
from ..device.launch import How, await_producers, jit, launch, tl
from ..device.pointers import entry_ptrs, flattened, row_ptrs, strided
from ..device.reference import reference_of
from .last_layer import last_layer, last_layer_reference
from .linear_tile import logits_on_tile
from .rows import EACH, Layer, Rows, Slabs
from .tiles import Tile
from .two_hot import Code, two_hot_inv


@jit
def bin_values(cols, K, vmin, vmax):
    """Return the centres of the K bins in columns `cols`, 0 beyond."""
    width = (vmax - vmin) / (K - 1)
    # From the nearer end, as torch.linspace: both ends and the middle are exact.
    bins = tl.where(cols < K // 2, vmin + width * cols, vmax - width * (K - 1 - cols))
    return tl.where(cols < K, bins, 0.0)


@jit
def scalar_of(logits, cols, K, vmin, vmax, BINS: tl.constexpr):
    """Return the scalar that each row of logits [BM, BK] stands for: [BM], and its gradient [BM, BK].

    BINS as `num_bins` in two_hot.py. A gradient that is not used is not computed.
    """
    if BINS > 1:
        logits = tl.where((cols < K)[None, :], logits, float("-inf"))
        p = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        bins = bin_values(cols, K, vmin, vmax)
        total = tl.sum(p, axis=1)
        v = tl.sum(p * bins[None, :], axis=1) / total
        d = tl.exp(tl.abs(v))[:, None] * (p / total[:, None]) * (bins[None, :] - v[:, None])
        return symexp(v), d
    x = tl.sum(tl.where((cols < 1)[None, :], logits, 0.0), axis=1)
    slope = tl.zeros_like(x) + 1.0
    if BINS == 1:
        slope = tl.exp(tl.abs(x))
        x = symexp(x)
    return x, tl.broadcast_to(slope[:, None], (logits.shape[0], logits.shape[1]))


@jit
def scalars_on_tile(
    tile_m, g, x, w, y, M, n, D, K, vmin, vmax, d,
    DUE: tl.constexpr, MEMBERS: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
    GRADIENT: tl.constexpr = False,
):  # fmt: skip
    """Reduce BM rows of group g, all D <= BN columns, to a scalar each, with its gradient in `d` if GRADIENT."""
    rows, cols = tile_m * TILE.BM + tl.arange(0, TILE.BM), tl.arange(0, TILE.BN)
    row_ok = rows < M
    logits = logits_on_tile(rows, cols, g, x, w, row_ok, n, D, K, DUE, TILE, MEMBERS=MEMBERS)
    scalar, gradient = scalar_of(logits, cols, D, vmin, vmax, BINS)
    tl.store(row_ptrs(y, g, rows, n), scalar, mask=row_ok)
    if GRADIENT:
        ok = row_ok[:, None] & (cols < D)[None, :]
        store_rounded(entry_ptrs(d, g, rows, n, cols), gradient, ok, TILE.INTERPRETED)


@jit
def scalar_head_kernel(
    x, w, y, M, n, D, K, vmin, vmax, d,
    DUE: tl.constexpr, MEMBERS: tl.constexpr, BINS: tl.constexpr, GRADIENT: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Reduce BM rows of one group, all D <= BN columns; grid (row tiles, groups)."""
    await_producers(PDL)
    tile_m, g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    scalars_on_tile(
        tile_m, g, x, w, y, M, n, D, K, vmin, vmax, d,
        DUE=DUE, MEMBERS=MEMBERS, BINS=BINS, TILE=TILE, GRADIENT=GRADIENT,
    )  # fmt: skip


def scalar_head(
    x: Rows,
    layer: Layer,
    out: Tensor,
    *,
    how: How,
    code: Code,
    slabs: Slabs = EACH,
    gradient: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Write the scalars of every group.

    Args:
        x: (G or 1, E, n, K) rows; an activation due is applied.
        layer: packed (S, max(bins, 1), K), no LayerNorm.
        out: (G, E, n) float32, contiguous in its last dim.
        how: precision of the product, and whether the launch may start early.
        code: what the logits stand for; 0 bins give the logit itself.
        slabs: slab of `layer` of each group.
        gradient: out: (G, E, n, max(bins, 1)), of each scalar to its logits; None for none.
        tile: None takes the table's.
    """
    groups, e, n = out.shape
    d, k = layer.weight.shape[1:]
    grid, inputs, constants = last_layer(
        x, layer, (groups, e, n), max(code.num_bins, 1), how=how, slabs=slabs, tile=tile
    )
    if gradient is not None and (gradient.shape != (groups, e, n, d) or gradient.stride(-1) != 1):
        raise ValueError(f"gradient: got shape {tuple(gradient.shape)}, allowed: {(groups, e, n, d)}")
    m, given = e * n, (*inputs, strided(out), strided(x.x if gradient is None else gradient))
    n, (rows, weights, scalars, slopes) = flattened(e, n, *given)
    launch(
        scalar_head_kernel, grid, rows, weights, scalars, m, n, d, k, float(code.vmin), float(code.vmax), slopes,
        MEMBERS=slabs.members is not None, BINS=min(code.num_bins, 2), GRADIENT=gradient is not None, **constants,
    )  # fmt: skip


@reference_of(scalar_head)
def scalar_head_reference(
    x: Rows, layer: Layer, out: Tensor, how: How, code: Code, slabs: Slabs, gradient: Tensor | None
) -> None:
    """Compute `scalar_head` in plain torch, its gradient by autograd."""
    logits = last_layer_reference(x, layer, out, how, slabs).requires_grad_(gradient is not None)
    with torch.set_grad_enabled(gradient is not None):
        value = two_hot_inv(logits, *code)
    out.copy_(value.detach().squeeze(-1))
    if gradient is not None:
        gradient.copy_(torch.autograd.grad(value.sum(), logits)[0])
