"""The last layer of reward, critics and termination, down to a scalar; no logits in memory.

    s[g, e, r] = two_hot_inv(act(LN(x[g, e, r])) W[s]ᵀ + b[s])      (paper, section 3.1)
    ∂s/∂logits = exp(|v|) p (bins - v),    p = softmax(logits),  v = sum p bins,  s = symexp(v)

One program has all K bins of its rows, so softmax and expectation stay in registers. The gradient
is for the policy loss, which goes through critics that are constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.launch import How, cdiv, jit, launch, tl
from .grouped_layer import arithmetic, check_tile, grouped_layer_reference, packed, source, strided
from .linear_tile import add_product, await_producers, row_ptrs, slab_of, store_rounded
from .rows import EACH, Layer, Rows, Slabs
from .tiles import Tile, head_tile
from .two_hot import two_hot_inv


@jit
def symexp(x):
    """sign(x) (exp(|x|) - 1)."""
    y = tl.exp(tl.abs(x)) - 1.0
    return tl.where(x < 0, -y, y)


@jit
def bin_values(cols, K, vmin, vmax):
    """Centres of the K bins in columns `cols`, 0 beyond."""
    width = (vmax - vmin) / (K - 1)
    # From the nearer end, as torch.linspace: both ends and the middle are exact.
    bins = tl.where(cols < K // 2, vmin + width * cols, vmax - width * (K - 1 - cols))
    return tl.where(cols < K, bins, 0.0)


@jit
def scalar_of(logits, cols, K, vmin, vmax, BINS: tl.constexpr):
    """Scalar that each row of logits [BM, BK] stands for: [BM], and its gradient [BM, BK].

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
def logits_on_tile(
    rows,
    cols,
    g,
    x,
    w,
    row_ok,
    n,
    D,
    K,
    IN_ACT: tl.constexpr,
    V: tl.constexpr,
    IN_TILE: tl.constexpr,
    IN_TILES: tl.constexpr,
    IN_MEMBERS: tl.constexpr,
    MEMBERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    FROM_L2: tl.constexpr,
):
    """All D <= BN outputs of a last layer for BM rows of group g: [BM, BN]."""
    col_ok = cols < D
    slab = slab_of(w.slab, g, MEMBERS)
    # fmt: off
    logits = add_product(
        tl.zeros((BM, BN), tl.float32), x, g, rows, n, row_ok, w.ptr + slab * D * K, cols, col_ok, K, IN_ACT, V,
        IN_TILE, IN_TILES, IN_MEMBERS, BK, EVEN_K, DOT, INTERPRETED, FROM_L2,
    )
    # fmt: on
    return logits + tl.load(w.bias_ptr + slab * w.bias_s + cols, mask=col_ok, other=0.0)[None, :]


@jit
def scalars_on_tile(
    tile_m,
    g,
    x,
    w,
    y,
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
    FROM_L2: tl.constexpr = False,
    d=None,
    GRADIENT: tl.constexpr = False,
):
    """BM rows of group g, all D <= BN columns, down to a scalar each, maybe with its gradient."""
    rows, cols = tile_m * BM + tl.arange(0, BM), tl.arange(0, BN)
    row_ok = rows < M
    # fmt: off
    logits = logits_on_tile(
        rows, cols, g, x, w, row_ok, n, D, K, IN_ACT, V, IN_TILE, IN_TILES, IN_MEMBERS, MEMBERS, BM, BN, BK, EVEN_K,
        DOT, INTERPRETED, FROM_L2,
    )
    # fmt: on
    scalar, gradient = scalar_of(logits, cols, D, vmin, vmax, BINS)
    tl.store(row_ptrs(y, g, rows, n), scalar, mask=row_ok)
    if GRADIENT:
        ok = row_ok[:, None] & (cols < D)[None, :]
        store_rounded(row_ptrs(d, g, rows, n)[:, None] + cols[None, :], gradient, ok, INTERPRETED)


@jit
def scalar_head_kernel(
    x,
    w,
    y,
    M,
    n,
    D,
    K,
    vmin,
    vmax,
    d,
    IN_ACT: tl.constexpr,
    V: tl.constexpr,
    IN_TILE: tl.constexpr,
    IN_TILES: tl.constexpr,
    IN_MEMBERS: tl.constexpr,
    MEMBERS: tl.constexpr,
    BINS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """BM rows of one group, all D <= BN columns; grid (row tiles, groups)."""
    await_producers(PDL)
    # fmt: off
    scalars_on_tile(
        tl.program_id(0), tl.program_id(1).to(tl.int64), x, w, y, M, n, D, K, vmin, vmax, IN_ACT, V, IN_TILE, IN_TILES,
        IN_MEMBERS, MEMBERS, BINS, BM, BN, BK, EVEN_K, DOT, INTERPRETED, False, d, GRADIENT,
    )
    # fmt: on


def scalar_head(
    x: Rows,
    layer: Layer,
    out: Tensor,
    *,
    how: How,
    num_bins: int,
    vmin: float,
    vmax: float,
    slabs: Slabs = EACH,
    gradient: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Scalars of every group, written in place.

    Args:
        x: (G or 1, E, n, K) rows; an activation due is applied.
        layer: packed (S, max(num_bins, 1), K), no LayerNorm.
        out: (G, E, n) float32, contiguous in its last dim.
        how: precision of the product, and whether the launch may start early.
        num_bins, vmin, vmax: the code, as in two_hot.py; 0 bins give the logit itself.
        slabs: slab of `layer` of each group.
        gradient: out: (G, E, n, max(num_bins, 1)), of each scalar to its logits; None for none.
        tile: None takes the table's.
    """
    groups, e, n = out.shape
    d, k = layer.weight.shape[1:]
    check_last_layer(x, layer, (groups, e, n), max(num_bins, 1))
    tile = tile or head_tile(e * n, groups, d, k, how.precision.name)
    check_tile(tile, d, x)
    if gradient is not None and (gradient.shape != (groups, e, n, d) or gradient.stride(-1) != 1):
        raise ValueError(f"gradient: got shape {tuple(gradient.shape)}, allowed: {(groups, e, n, d)}")
    reads, due = source(x)
    launch(
        scalar_head_kernel,
        (cdiv(e * n, tile.BM), groups),
        reads,
        packed(layer, slabs),
        strided(out),
        e * n,
        n,
        d,
        k,
        float(vmin),
        float(vmax),
        strided(x.x if gradient is None else gradient),
        MEMBERS=slabs.members is not None,
        BINS=min(num_bins, 2),
        GRADIENT=gradient is not None,
        pdl=how.pdl,
        **due,
        **tile.options(k),
        **arithmetic(how.precision),
    )


def scalar_head_reference(
    x: Rows,
    layer: Layer,
    out: Tensor,
    *,
    how: How,
    num_bins: int,
    vmin: float,
    vmax: float,
    slabs: Slabs = EACH,
    gradient: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """`scalar_head` in plain torch, its gradient by autograd."""
    logits = last_layer_reference(x, layer, out, how, slabs).requires_grad_(gradient is not None)
    with torch.set_grad_enabled(gradient is not None):
        value = two_hot_inv(logits, num_bins, vmin, vmax)
    out.copy_(value.detach().squeeze(-1))
    if gradient is not None:
        gradient.copy_(torch.autograd.grad(value.sum(), logits)[0])


def last_layer_reference(x: Rows, layer: Layer, out: Tensor, how: How, slabs: Slabs) -> Tensor:
    """Logits (G, E, n, D) of a head's last layer, in the type of `out`; G, E, n are `out`'s first."""
    logits = out.new_empty(*out.shape[:3], layer.width)
    return grouped_layer_reference(x, None, layer, Rows(logits), how=how, slabs=slabs).x


def check_last_layer(x: Rows, layer: Layer, lead: tuple[int, int, int], outputs: int) -> None:
    """The shapes a last layer needs, or a `ValueError` naming the argument."""
    groups, e, n = lead
    d, k = layer.weight.shape[1:]
    if x.x.shape[1:] != (e, n, k) or x.x.shape[0] not in (1, groups):
        raise ValueError(f"x: got shape {tuple(x.x.shape)}, allowed: (1 or {groups}, {e}, {n}, {k})")
    if x.layer is not None and x.stats is None:
        raise ValueError("x: got rows of a layer without statistics, allowed: with them, or rows with nothing due")
    if d != outputs:
        raise ValueError(f"layer: got {d} outputs, allowed: {outputs}")
