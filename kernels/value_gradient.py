"""The last layer of critics down to a scalar, as `scalar_head`, and the scalar's gradient to the logits.

    s = symexp(v),  v = sum p bins,  p = softmax(logits):    ∂s/∂logits = exp(|v|) p (bins - v)

For the policy loss, which goes through critics that are constants. Logits stay in registers.
Cost: 2 K D FLOP a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grouped_layer import arithmetic, check_tile, packed, source, strided
from .launch import Precision, cdiv, jit, launch, tl
from .linear_tile import await_producers, row_ptrs, store_rounded
from .rows import EACH, Layer, Rows, Slabs
from .scalar_head import bin_values, check_last_layer, last_layer_reference, logits_on_tile, symexp
from .tiles import Tile, head_tile
from .two_hot import two_hot_inv


@jit
def value_gradient_kernel(
    x,
    w,
    y,
    d,
    M,
    n,
    D,
    K,
    vmin,
    vmax,
    IN_ACT: tl.constexpr,
    V: tl.constexpr,
    IN_TILE: tl.constexpr,
    IN_TILES: tl.constexpr,
    IN_MEMBERS: tl.constexpr,
    MEMBERS: tl.constexpr,
    BINS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """BM rows of one group, all D <= BN logits; grid (row tiles, groups)."""
    g = tl.program_id(1).to(tl.int64)
    rows, cols = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    row_ok, col_ok = rows < M, (cols < D)[None, :]
    await_producers(PDL)
    # fmt: off
    logits = logits_on_tile(
        rows, cols, g, x, w, row_ok, n, D, K, IN_ACT, V, IN_TILE, IN_TILES, IN_MEMBERS, MEMBERS, BM, BN, BK, EVEN_K,
        DOT, INTERPRETED, False,
    )
    # fmt: on
    if BINS > 1:
        logits = tl.where(col_ok, logits, float("-inf"))
        p = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        p = p / tl.sum(p, axis=1)[:, None]
        bins = bin_values(cols, D, vmin, vmax)[None, :]
        v = tl.sum(p * bins, axis=1)
        gradient = tl.exp(tl.abs(v))[:, None] * p * (bins - v[:, None])  # [BM, BN]
        v = symexp(v)
    else:
        v = tl.sum(tl.where(col_ok, logits, 0.0), axis=1)
        slope = tl.zeros((BM,), tl.float32) + 1.0
        if BINS == 1:
            slope = tl.exp(tl.abs(v))
            v = symexp(v)
        gradient = tl.broadcast_to(slope[:, None], (BM, BN))
    tl.store(row_ptrs(y, g, rows, n), v, mask=row_ok)
    store_rounded(row_ptrs(d, g, rows, n)[:, None] + cols[None, :], gradient, row_ok[:, None] & col_ok, INTERPRETED)


def value_gradient(
    x: Rows,
    layer: Layer,
    out: Tensor,
    gradient: Tensor,
    *,
    precision: Precision,
    num_bins: int,
    vmin: float,
    vmax: float,
    slabs: Slabs = EACH,
    tile: Tile | None = None,
    pdl: bool = False,
) -> None:
    """Scalars of every group as `scalar_head` gives them, and their gradients, written in place.

    Args:
        x: (G or 1, E, n, K) rows with an activation due.
        layer: packed (S, max(num_bins, 1), K), no LayerNorm.
        out: (G, E, n) float32.
        gradient: out: (G, E, n, max(num_bins, 1)), of a scalar to its logits.
        precision: of the product.
        num_bins, vmin, vmax: the code, as in two_hot.py.
        slabs: slab of `layer` of each group.
        tile: None takes the table's.
        pdl: programmatic dependent launch.
    """
    groups, e, n = out.shape
    d, k = layer.weight.shape[1:]
    check_last_layer(x, layer, (groups, e, n), max(num_bins, 1))
    if gradient.shape != (groups, e, n, d) or gradient.stride(-1) != 1:
        raise ValueError(f"gradient: got shape {tuple(gradient.shape)}, allowed: {(groups, e, n, d)}")
    tile = tile or head_tile(e * n, groups, d, k, precision.name)
    check_tile(tile, d, x)
    reads, due = source(x)
    launch(
        value_gradient_kernel,
        (cdiv(e * n, tile.BM), groups),
        reads,
        packed(layer, slabs),
        strided(out),
        strided(gradient),
        e * n,
        n,
        d,
        k,
        float(vmin),
        float(vmax),
        MEMBERS=slabs.members is not None,
        BINS=min(num_bins, 2),
        pdl=pdl,
        **due,
        **tile.options(k),
        **arithmetic(precision),
    )


def value_gradient_reference(
    x: Rows,
    layer: Layer,
    out: Tensor,
    gradient: Tensor,
    *,
    precision: Precision,
    num_bins: int,
    vmin: float,
    vmax: float,
    slabs: Slabs = EACH,
    tile: Tile | None = None,
    pdl: bool = False,
) -> None:
    """`value_gradient` in plain torch, its gradient by autograd."""
    del tile, pdl
    logits = last_layer_reference(x, layer, out, precision, slabs).requires_grad_()
    with torch.enable_grad():
        value = two_hot_inv(logits, num_bins, vmin, vmax)
        (d,) = torch.autograd.grad(value.sum(), logits)
    out.copy_(value.detach().squeeze(-1))
    gradient.copy_(d)
