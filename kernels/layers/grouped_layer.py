"""x Wᵀ + b of several heads on rows of E environments, with LayerNorm and activation due or done.

    y[g, e, r] = act(LN(x[g, e, r])) W[s]ᵀ + a[e, r] A[s]ᵀ + b[s],    s = slab of group g

One launch for all groups, rows and columns. The result is a pre-activation with statistics, an
activation, or both (linear_tile.py); `activate_rows` makes an activation of the first where one launch
does not. Cost of a layer: 2 M D K FLOP a group for M = E n rows; W is read once per row tile, x once per
column tile, both from L2.
Reads `K` = 0 inputs, too: the first step's rows are a shared sum (the bias) and an action.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..device.arithmetic import operand, store_rounded
from ..device.launch import How, await_producers, cdiv, interpreting, jit, launch, pow2, tl
from ..device.pointers import entry_ptrs, flattened, row_ptrs, slab_of, strided
from ..device.reference import reference_of
from ..device.statistics import merge_statistics
from .ending import NO_END, End, Ends
from .linear_tile import activate, layer_on_tile, prefetch_weights
from .rows import EACH, LEAST_COLUMNS, PLAIN, Dropout, Finish, Layer, Rows, Slabs, keeping, packed, source
from .tiles import STATISTICS, Tile, finishes, finishing_tile, layer_tile, ready_tile


@jit
def grouped_layer_kernel(
    x, w, a, y, stats, active, exact, end, M, n, D, K, A, keep,
    HAS_X: tl.constexpr, HAS_SIDE: tl.constexpr, ENV_BIAS: tl.constexpr, DUE: tl.constexpr, MEMBERS: tl.constexpr,
    DROPOUT: tl.constexpr, FINISH: tl.constexpr, ENDS: tl.constexpr, TILE: tl.constexpr, BA: tl.constexpr,
    LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute one tile [BM, BN] of one group; grid (row tiles x column tiles, groups)."""
    tiles_n = tl.cdiv(D, TILE.BN)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    g = tl.program_id(1).to(tl.int64)
    if PDL and HAS_X and not MEMBERS:  # members are another kernel's output
        slab = slab_of(w.slab, g, MEMBERS)
        prefetch_weights(w.ptr + slab * D * K, tile_n * TILE.BN + tl.arange(0, TILE.BN), D, K, LINES)
    await_producers(PDL)
    layer_on_tile(
        tile_m, tile_n, g, x, w, a, y, stats, active, exact, end, M, n, D, K, A, keep,
        HAS_X=HAS_X, HAS_SIDE=HAS_SIDE, ENV_BIAS=ENV_BIAS, DUE=DUE, MEMBERS=MEMBERS, DROPOUT=DROPOUT, FINISH=FINISH,
        ENDS=ENDS, TILE=TILE, BA=BA,
    )  # fmt: skip


def check_input(x: Rows, layer: Layer, groups: int, e: int, n: int) -> None:
    """Refuse rows that are no input of this layer."""
    k = layer.weight.shape[-1]
    if x.x.shape[1:] != (e, n, k) or x.x.shape[0] not in (1, groups):
        raise ValueError(f"x: got shape {tuple(x.x.shape)}, allowed: (1 or {groups}, {e}, {n}, {k})")


def _check_dropout(dropout: Dropout, x: Tensor) -> None:
    """Refuse other bytes than dropout of rows x (G, E, n, D) needs."""
    keep, (groups, *rest) = dropout.keep, x.shape
    if keep.dtype != torch.uint8 or list(keep.shape) != [groups - dropout.first, *rest] or keep.stride(-1) != 1:
        allowed = (groups - dropout.first, *rest)
        raise ValueError(f"dropout.keep: got {tuple(keep.shape)} {keep.dtype}, allowed: {allowed} torch.uint8")


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
    finish: bool = False,
    exact: Tensor | None = None,
    end: End | None = None,
    tile: Tile | None = None,
) -> Rows:
    """Write what `layer` makes of x and a, for every group of `out`.

    Args:
        x: main input (G or 1, E, n, K), or None for none; an activation due is applied.
        a: side input (E, n, A), float32, or None for none. A stride of 0 shares a row.
        layer: packed weights.
        out: where to; its x is (G, E, n, D).
        how: precision of the products, and whether the launch may start early.
        slabs: slab of `layer` of each group.
        bias: (slabs, E, D) float32, per environment, in place of the layer's own.
        dropout: of the pre-activation, before its LayerNorm.
        finish: write the activation, to `out.active` beside the pre-activation where there is one, else to
            `out.x` in its place. In a second launch where the programs of a row are no cluster.
        exact: (G, E, n, D) float32 or of the type of `out`, where the activation is written as it is, not as products
            take it; in place of that where it is the same memory.
        end: the last layer of a head, for which alone these rows are: where this launch makes its results, too, the
            activation is not stored, and what is returned is nothing to read.
        tile: None takes the table's.

    Returns:
        `out` with the layer's activation due, or nothing.
    """
    groups, e, n, d = out.x.shape
    k = layer.weight.shape[-1]
    side = 0 if layer.side is None else layer.side.shape[-1]
    assert out.stats is not None
    if x is not None:
        check_input(x, layer, groups, e, n)
    if a is not None and (layer.side is None or a.shape != (e, n, side)):
        width = "no side input" if layer.side is None else (e, n, side)
        raise ValueError(f"a: got shape {tuple(a.shape)}, allowed: {width}")
    if x is None and a is None:
        raise ValueError("x and a: got None for both, allowed: at least one of them")
    if exact is not None:
        _check_exact(exact, out.x)
    in_one = None
    if finish:
        if layer.activation == PLAIN:
            raise ValueError("finish: got True, allowed: False, the layer has no LayerNorm")
        in_one = finishing_tile(e * n, groups, d, k, how) if tile is None else finishes(tile, d, how)
    if in_one is None and tile is None:
        sizes = e * n, groups, d, k
        # What is stored as products take it needs no registers on its way.
        ready = x is not None and (x.operand or (x.layer is None and x.x.dtype == torch.bfloat16))
        tile = ready_tile(*sizes, how, STATISTICS) if ready else layer_tile(*sizes, how.precision.name)
    tile = in_one or tile
    assert tile is not None
    tile.check(LEAST_COLUMNS, x)
    if d != layer.width or out.stats.shape[:3] != (groups, e, n) or out.stats.shape[3] < cdiv(d, tile.BN):
        raise ValueError(
            f"out: got {tuple(out.x.shape)} with statistics {tuple(out.stats.shape)}, allowed: "
            f"(G, E, n, {layer.width}) with (G, E, n, at least {cdiv(layer.width, tile.BN)}, 2)"
        )
    if bias is not None and (bias.ndim != 3 or bias.shape[1:] != (e, d) or bias.stride(-1) != 1):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, allowed: (slabs, {e}, {d})")
    if dropout is not None:
        _check_dropout(dropout, out.x)
    reads, due = source(Rows(out.x) if x is None else x)
    active = out.x if out.active is None else out.active
    tiles = cdiv(d, tile.BN)
    finished = Finish(
        KEEP=in_one is None or out.active is not None,
        ACT=layer.activation if in_one else PLAIN,
        V=max(layer.simnorm_dim, 1),
        CLUSTER=tiles if in_one else 1,
        TILES=pow2(tiles) if in_one else 1,
        STORE=_as_operand(exact, active),
        EXACT=exact is not None,
    )
    ended = end if end is not None and in_one is not None and end.fits(tile.BN) else None
    ending: Any
    ending, ends = (0, Ends(NO_END)) if ended is None else ended.given((groups, e, n, d), tiles)
    side_rows = out.x if a is None else a[None]
    given = (
        reads,
        *map(strided, (side_rows, out.x, out.stats, active, active if exact is None else exact)),
        ending,
        keeping(dropout, out.x),
    )
    per_env = bias is not None and e > 1
    m, (n, (main, *buffers, last, keep)) = e * n, (n, given) if per_env or ends.HAS_MASK else flattened(e, n, *given)
    launch(
        grouped_layer_kernel, (cdiv(m, tile.BM) * cdiv(d, tile.BN), groups),
        main, packed(layer, slabs, bias), *buffers, last, m, n, d, k, side, keep,
        HAS_X=x is not None, HAS_SIDE=a is not None, ENV_BIAS=per_env, DUE=due,
        MEMBERS=slabs.members is not None, DROPOUT=dropout is not None, BA=min(pow2(max(side, 1), 16), 32),
        FINISH=finished, ENDS=ends, LINES=pow2(cdiv(k * layer.weight.element_size(), 128)) if how.pdl else 1,
        **tile.options(k, how),
    )  # fmt: skip
    rows = Rows(out.x, out.stats, layer, slabs, tile.BN, dropout)
    if finish:
        if not in_one:
            activate_rows(rows, active, how=how, exact=exact)
        ready = _as_operand(exact, active)
        rows = Rows(out.x, operand=ready) if out.active is None else replace(rows, active=out.active)
    if end is not None and ended is None:
        end.alone(rows, how)
    return rows


@reference_of(grouped_layer)
def grouped_layer_reference(
    x: Rows | None,
    a: Tensor | None,
    layer: Layer,
    out: Rows,
    how: How,
    slabs: Slabs,
    bias: Tensor | None,
    dropout: Dropout | None,
    finish: bool,
    exact: Tensor | None,
) -> Rows:
    """Compute `grouped_layer` in plain torch: the same result, statistics left out."""
    dense, rounded = None if x is None else x.activated(), how.precision.operand
    for g, s in enumerate(slabs.of(out.x.shape[0])):
        y = (layer.bias[s] if bias is None else bias[s].unsqueeze(1)).to(out.x.dtype)
        if a is not None:
            assert layer.side is not None
            y = y + rounded(a).to(out.x) @ layer.side[s].to(out.x).T
        if dense is not None:
            y = y + rounded(dense[min(g, dense.shape[0] - 1)]).to(out.x) @ layer.weight[s].to(out.x).T
        out.x[g] = y
    if dropout is not None:
        out.x.mul_(dropout.multiplier(len(out.x), out.x.dtype))
    rows = Rows(out.x, None, layer, slabs, dropout=dropout)
    if not finish:
        return rows
    active = out.x if out.active is None else out.active
    active.copy_(rows.activated())
    if exact is not None:
        exact.copy_(rows.activated())
    return Rows(out.x, operand=_as_operand(exact, active)) if out.active is None else replace(rows, active=active)


@jit
def activate_kernel(
    x, y, exact, M, n, D,
    DUE: tl.constexpr, STORE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute act(LN(x)) of one tile [BM, BN]; grid (row tiles, column tiles, groups)."""
    g = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row_ok, col_ok = rows < M, cols < D
    ok = row_ok[:, None] & col_ok[None, :]
    await_producers(PDL)
    slab = slab_of(x.slab, g, DUE.IN_MEMBERS)
    mean, rstd = merge_statistics(row_ptrs(x.stats, g, rows, n), row_ok, D, DUE.IN_TILE, DUE.IN_TILES)
    due = tl.load(entry_ptrs(x.x, g, rows, n, cols), mask=ok, other=0.0)
    gamma = tl.load(x.gamma_ptr + slab * D + cols, mask=col_ok, other=0.0)
    beta = tl.load(x.beta_ptr + slab * D + cols, mask=col_ok, other=0.0)
    done = activate(due.to(tl.float32), mean, rstd, gamma, beta, DUE.IN_ACT, DUE.V, TILE.INTERPRETED)
    if EXACT:
        store_rounded(entry_ptrs(exact, g, rows, n, cols), done, ok, TILE.INTERPRETED)
    if STORE:
        if TILE.DOT == "tf32":
            done = operand(done, False, TILE)
        store_rounded(entry_ptrs(y, g, rows, n, cols), done, ok, TILE.INTERPRETED)


def _as_operand(exact: Tensor | None, out: Tensor) -> bool:
    """Tell whether `out` gets an activation as products take it, and not as it is: then `exact` is the same memory."""
    return exact is None or exact.data_ptr() != out.data_ptr()


def _check_exact(exact: Tensor, out: Tensor) -> None:
    """Refuse another place for an activation as it is than one beside or in `out`."""
    if exact.shape != out.shape or exact.dtype not in (torch.float32, out.dtype) or exact.stride(-1) != 1:
        got = f"{tuple(exact.shape)} {exact.dtype}"
        raise ValueError(
            f"exact: got {got}, allowed: {tuple(out.shape)} torch.float32 or {out.dtype}, contiguous in the last dim"
        )


def activate_rows(x: Rows, out: Tensor, *, how: How, exact: Tensor | None = None) -> Rows:
    """Write act(LN(x)) to `out` (G, E, n, D), which may be `x.x` itself; nothing is due after.

    exact: as of `grouped_layer`.
    """
    if x.layer is None or x.layer.activation == PLAIN:
        raise ValueError("x: nothing is due, allowed: rows a layer with LayerNorm wrote")
    groups, e, n, d = x.x.shape
    if out.shape != x.x.shape or out.stride(-1) != 1:
        raise ValueError(f"out: got shape {tuple(out.shape)}, allowed: {tuple(x.x.shape)}")
    reads, due = source(x)
    bm, bn = min(pow2(e * n), 512) if interpreting() else 8, min(pow2(d), 512)
    ready = _as_operand(exact, out)
    if exact is not None:
        _check_exact(exact, out)
    m, given = e * n, (reads, *map(strided, (out, out if exact is None else exact)))
    n, (reads, written, beside) = flattened(e, n, *given)
    launch(
        activate_kernel, (cdiv(m, bm), cdiv(d, bn), groups), reads, written, beside, m, n, d,
        DUE=due, STORE=ready, EXACT=exact is not None, BM=bm, BN=bn,
        TILE=Tile(bm, bn, 1).product(True, how.precision), pdl=how.pdl,
        # In place, no thread may store where another has yet to load: not more of them than entries.
        num_warps=max(1, min(4, bm * bn // 32)),
    )  # fmt: skip
    return Rows(out, operand=ready)
