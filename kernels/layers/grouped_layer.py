"""x Wᵀ + b of several heads on rows of E environments, with LayerNorm and activation due or done.

    y[g, e, r] = act(LN(x[g, e, r])) W[s]ᵀ + a[e, r] A[s]ᵀ + b[s],    s = slab of group g

One launch for all groups, rows and columns. The result is a pre-activation with statistics
(linear_tile.py); `activate` finishes one where nobody downstream will. Cost of a layer: 2 M D K
FLOP a group for M = E n rows; W is read once per row tile, x once per column tile, both from L2.
Reads `K` = 0 inputs, too: the first step's rows are a shared sum (the bias) and an action.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.launch import How, Precision, cdiv, interpreting, jit, launch, pow2, tl
from .linear_tile import (
    PLAIN,
    Keep,
    Slab,
    Source,
    Strided,
    Weights,
    activate,
    await_producers,
    layer_on_tile,
    merge_statistics,
    prefetch_weights,
    row_ptrs,
    slab_of,
    store_rounded,
)
from .rows import EACH, LEAST_COLUMNS, Dropout, Layer, Rows, Slabs
from .tiles import Tile, layer_tile


@jit
def grouped_layer_kernel(
    x,
    w,
    a,
    y,
    stats,
    M,
    n,
    D,
    K,
    A,
    keep,
    HAS_X: tl.constexpr,
    HAS_SIDE: tl.constexpr,
    ENV_BIAS: tl.constexpr,
    IN_ACT: tl.constexpr,
    V: tl.constexpr,
    IN_TILE: tl.constexpr,
    IN_TILES: tl.constexpr,
    IN_MEMBERS: tl.constexpr,
    MEMBERS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BA: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile [BM, BN] of one group; grid (row tiles x column tiles, groups)."""
    tiles_n = tl.cdiv(D, BN)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    g = tl.program_id(1).to(tl.int64)
    if PDL and HAS_X and not MEMBERS:  # members are another kernel's output
        slab = slab_of(w.slab, g, MEMBERS)
        prefetch_weights(w.ptr + slab * D * K, tile_n * BN + tl.arange(0, BN), D, K, LINES)
    await_producers(PDL)
    # fmt: off
    layer_on_tile(
        tile_m, tile_n, g, x, w, a, y, stats, M, n, D, K, A, HAS_X, HAS_SIDE, ENV_BIAS, IN_ACT, V, IN_TILE, IN_TILES,
        IN_MEMBERS, MEMBERS, BM, BN, BK, BA, EVEN_K, DOT, INTERPRETED, False, keep, DROPOUT,
    )
    # fmt: on


def source(x: Rows) -> tuple[Source, dict[str, object]]:
    """How a kernel reads rows, and its constants for what is due on them."""
    layer = x.layer if x.layer is not None and x.layer.activation != PLAIN else None
    gamma, beta, stats = (x.x, x.x, x.x) if layer is None else (layer.ln_weight, layer.ln_bias, x.stats)
    assert stats is not None
    slab = _slab(x.slabs, x.x, shared=x.x.shape[0] == 1)
    reads = Source(strided(x.x), strided(stats), gamma, beta, slab)
    return reads, dict(
        IN_ACT=PLAIN if layer is None else layer.activation,
        V=max(layer.simnorm_dim, 1) if layer is not None else 1,
        IN_TILE=max(x.tile, 1),
        IN_TILES=pow2(cdiv(x.x.shape[-1], x.tile)) if x.tile else 1,
        IN_MEMBERS=layer is not None and x.slabs.members is not None,
    )


def strided(t: Tensor) -> Strided:
    """Rows (G, E, n, ...) for a kernel; one group serves all."""
    g, e, r = t.stride()[:3]
    return Strided(t, g if t.shape[0] > 1 else 0, e, r)


def _slab(slabs: Slabs, unread: Tensor, shared: bool = False) -> Slab:
    """Slabs for a kernel; `unread` stands where there are no members."""
    members = slabs.members
    return Slab(unread if members is None else members, slabs.base, slabs.stride(shared))


def packed(layer: Layer, slabs: Slabs, bias: Tensor | None = None) -> Weights:
    """A layer for a kernel; bias: (slabs, E, D) in place of its own."""
    own = layer.bias if bias is None else bias
    side = layer.weight if layer.side is None else layer.side
    e_stride = 0 if bias is None else bias.stride(1)
    return Weights(layer.weight, side, own, own.stride(0), e_stride, _slab(slabs, layer.weight))


def keeping(dropout: Dropout | None, unread: Tensor) -> Keep:
    """Dropout for a kernel; `unread` stands where there is none."""
    if dropout is None:
        return Keep(strided(unread), 1.0, 0)
    return Keep(strided(dropout.keep), float(dropout.scale), dropout.first)


def check_dropout(dropout: Dropout | None, x: Tensor) -> None:
    """The bytes dropout of rows x (G, E, n, D) needs, or a `ValueError`."""
    if dropout is None:
        return
    keep, (groups, *rest) = dropout.keep, x.shape
    if keep.dtype != torch.uint8 or list(keep.shape) != [groups - dropout.first, *rest] or keep.stride(-1) != 1:
        allowed = (groups - dropout.first, *rest)
        raise ValueError(f"dropout.keep: got {tuple(keep.shape)} {keep.dtype}, allowed: {allowed} torch.uint8")


def check_tile(tile: Tile, columns: int, x: Rows | None) -> None:
    """Refuse a tile narrower than `columns`, or one that cuts a SimNorm group of the input."""
    group = 1 if x is None or x.layer is None else max(x.layer.simnorm_dim, 1)
    if columns > tile.BN:
        raise ValueError(f"tile: got BN={tile.BN}, allowed: at least {columns}")
    if tile.BK % group:
        raise ValueError(f"tile: got BK={tile.BK}, allowed: multiples of simnorm_dim ({group})")


def arithmetic(precision: Precision) -> dict[str, object]:
    """Constants that fix how products are computed."""
    return dict(DOT=precision.dot, INTERPRETED=interpreting())


def grouped_layer(
    x: Rows | None,
    a: Tensor | None,
    layer: Layer,
    out: Rows,
    *,
    how: How,
    slabs: Slabs = EACH,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
    tile: Tile | None = None,
) -> Rows:
    """Pre-activation of `layer` for every group of `out`, written in place.

    Args:
        x: main input (G or 1, E, n, K), or None for none; an activation due is applied.
        a: side input (E, n, A), float32, or None for none. A stride of 0 shares a row.
        layer: packed weights.
        out: where to; its x is (G, E, n, D).
        how: precision of the product, and whether the launch may start early.
        slabs: slab of `layer` of each group.
        bias: (slabs, E, D) float32, per environment, in place of the layer's own.
        dropout: of the pre-activation, before its LayerNorm.
        tile: None takes the table's.

    Returns:
        `out` with the layer's activation due.
    """
    groups, e, n, d = out.x.shape
    k = layer.weight.shape[-1]
    assert out.stats is not None
    if x is not None and (x.x.shape[1:] != (e, n, k) or x.x.shape[0] not in (1, groups)):
        raise ValueError(f"x: got shape {tuple(x.x.shape)}, allowed: (1 or {groups}, {e}, {n}, {k})")
    if a is not None and (layer.side is None or a.shape != (e, n, layer.side.shape[-1])):
        width = "no side input" if layer.side is None else (e, n, layer.side.shape[-1])
        raise ValueError(f"a: got shape {tuple(a.shape)}, allowed: {width}")
    if x is None and a is None:
        raise ValueError("x and a: got None for both, allowed: at least one of them")
    tile = tile or layer_tile(e * n, groups, d, k, how.precision.name)
    check_tile(tile, LEAST_COLUMNS, x)
    if d != layer.width or out.stats.shape[:3] != (groups, e, n) or out.stats.shape[3] < cdiv(d, tile.BN):
        raise ValueError(
            f"out: got {tuple(out.x.shape)} with statistics {tuple(out.stats.shape)}, allowed: "
            f"(G, E, n, {layer.width}) with (G, E, n, at least {cdiv(layer.width, tile.BN)}, 2)"
        )
    if bias is not None and (bias.ndim != 3 or bias.shape[1:] != (e, d) or bias.stride(-1) != 1):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, allowed: (slabs, {e}, {d})")
    check_dropout(dropout, out.x)
    side = 0 if layer.side is None else layer.side.shape[-1]
    reads, due = source(Rows(out.x) if x is None else x)
    launch(
        grouped_layer_kernel,
        (cdiv(e * n, tile.BM) * cdiv(d, tile.BN), groups),
        reads,
        packed(layer, slabs, bias),
        strided(out.x if a is None else a[None]),
        strided(out.x),
        strided(out.stats),
        e * n,
        n,
        d,
        k,
        side,
        keeping(dropout, out.x),
        HAS_X=x is not None,
        HAS_SIDE=a is not None,
        ENV_BIAS=bias is not None,
        MEMBERS=slabs.members is not None,
        DROPOUT=dropout is not None,
        BA=min(pow2(max(side, 1), 16), 64),
        LINES=pow2(cdiv(k * layer.weight.element_size(), 128)) if how.pdl else 1,
        pdl=how.pdl,
        **due,
        **tile.options(k),
        **arithmetic(how.precision),
    )
    return Rows(out.x, out.stats, layer, slabs, tile.BN, dropout)


def grouped_layer_reference(
    x: Rows | None,
    a: Tensor | None,
    layer: Layer,
    out: Rows,
    *,
    how: How,
    slabs: Slabs = EACH,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
    tile: Tile | None = None,
) -> Rows:
    """`grouped_layer` in plain torch: the same result, statistics left out."""
    del tile
    dense = None if x is None else x.activated()
    for g, s in enumerate(slabs.of(out.x.shape[0])):
        y = (layer.bias[s] if bias is None else bias[s].unsqueeze(1)).to(out.x.dtype)
        if a is not None:
            assert layer.side is not None
            y = y + how.precision.operand(a).to(out.x) @ layer.side[s].to(out.x).T
        if dense is not None:
            y = y + how.precision.operand(dense[min(g, dense.shape[0] - 1)]).to(out.x) @ layer.weight[s].to(out.x).T
        out.x[g] = y
    if dropout is not None:
        out.x.mul_(dropout.multiplier(len(out.x), out.x.dtype))
    return Rows(out.x, None, layer, slabs, dropout=dropout)


@jit
def activate_kernel(
    x,
    y,
    M,
    n,
    D,
    IN_ACT: tl.constexpr,
    V: tl.constexpr,
    IN_TILE: tl.constexpr,
    IN_TILES: tl.constexpr,
    IN_MEMBERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """act(LN(x)) of one tile [BM, BN]; grid (row tiles, column tiles, groups)."""
    g = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row_ok, col_ok = rows < M, cols < D
    ok = row_ok[:, None] & col_ok[None, :]
    await_producers(PDL)
    slab = slab_of(x.slab, g, IN_MEMBERS)
    mean, rstd = merge_statistics(row_ptrs(x.stats, g, rows, n), row_ok, D, IN_TILE, IN_TILES)
    due = tl.load(row_ptrs(x.x, g, rows, n)[:, None] + cols[None, :], mask=ok, other=0.0)
    gamma = tl.load(x.gamma_ptr + slab * D + cols, mask=col_ok, other=0.0)
    beta = tl.load(x.beta_ptr + slab * D + cols, mask=col_ok, other=0.0)
    done = activate(due.to(tl.float32), mean, rstd, gamma, beta, IN_ACT, V)
    store_rounded(row_ptrs(y, g, rows, n)[:, None] + cols[None, :], done, ok, INTERPRETED)


def activate_rows(x: Rows, out: Tensor, pdl: bool = False) -> Rows:
    """act(LN(x)) written to `out` (G, E, n, D), which may be `x.x` itself; nothing is due after."""
    if x.layer is None or x.layer.activation == PLAIN:
        raise ValueError("x: nothing is due, allowed: rows a layer with LayerNorm wrote")
    groups, e, n, d = x.x.shape
    if out.shape != x.x.shape or out.stride(-1) != 1:
        raise ValueError(f"out: got shape {tuple(out.shape)}, allowed: {tuple(x.x.shape)}")
    reads, due = source(x)
    if interpreting():
        bm, bn = min(pow2(e * n), 512), min(pow2(d), 512)
    else:
        bm, bn = 8, min(pow2(d), 512)
    launch(
        activate_kernel,
        (cdiv(e * n, bm), cdiv(d, bn), groups),
        reads,
        strided(out),
        e * n,
        n,
        d,
        BM=bm,
        BN=bn,
        INTERPRETED=interpreting(),
        pdl=pdl,
        num_warps=4,
        **due,
    )
    return Rows(out)
