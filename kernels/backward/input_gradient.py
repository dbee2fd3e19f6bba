"""dL/dx of a layer for several heads: dL/dy W, with the LayerNorms on both sides done on the way.

    d[g] = dL/dy[g] W[s] (+ add),    s = slab of group g;      or summed over groups that share x

`gradient_tile.py` says what is due on dL/dy. Where x is itself an activation, act(LN(y')), the result
is written as its `Gradient`: times the derivative, with sums. Only `columns` of x are computed: a
latent, an action, not what needs no gradient. One launch; 2 M D |columns| FLOP a group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..device.arithmetic import operand, store_rounded
from ..device.launch import How, await_producers, cdiv, jit, launch, tl
from ..device.pointers import entry_ptrs, flattened, row_ptrs, slab_at, slab_of, strided
from ..device.reference import reference_of
from ..layers.linear_tile import dropped
from ..layers.rows import EACH, Layer, Rows, Slabs, packed, source
from ..layers.tiles import Tile, input_gradient_tile
from .gradient_tile import Gradient, check_gradient, product_gradient, row_factors, through_activation, upstream


@jit
def input_gradient_kernel(
    up, w, add, below, y, sums, M, n, D, K, first, width, groups,
    UP: tl.constexpr, MEMBERS: tl.constexpr, HAS_ADD: tl.constexpr, DUE: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Compute a tile [BM, BN] of one group, or of the sum over `groups`; grid (row x column tiles, groups or 1)."""
    tiles_n = tl.cdiv(width, TILE.BN)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    own = tl.program_id(1).to(tl.int64)
    rows = tile_m * TILE.BM + tl.arange(0, TILE.BM)
    cols = tile_n * TILE.BN + tl.arange(0, TILE.BN)
    row_ok, col_ok = rows < M, cols < width
    BFLOAT16: tl.constexpr = w.ptr.dtype.element_ty == tl.bfloat16
    await_producers(PDL)
    BM: tl.constexpr = TILE.BM  # in a shape Triton 3.6 takes names of constants, not fields
    BN: tl.constexpr = TILE.BN
    # In a loop Triton 3.6 forgets those fields of tuples that are 1, but no names.
    members_ptr, base, step = w.slab.members_ptr, w.slab.base, w.slab.step
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(groups):
        g = own + i
        x_ptrs = row_ptrs(up.x, g, rows, n)
        if UP.NORM:
            mean, rstd, s1, s2 = row_factors(up, g, rows, n, row_ok, D, UP)
            y_ptrs = row_ptrs(up.rows.x, g, rows, n)
            gamma_ptr = up.rows.gamma_ptr + slab_of(up.rows.slab, g, UP.Y_MEMBERS) * D
        w_ptr = w.ptr + slab_at(members_ptr, base, step, g, MEMBERS) * D * K + first
        for start in range(0, D, TILE.BK):
            k = start + tl.arange(0, TILE.BK)
            k_ok = k < D
            ok = row_ok[:, None] if TILE.EVEN_K else row_ok[:, None] & (k < up.columns)[None, :]
            d = tl.load(x_ptrs[:, None] + k[None, :], mask=ok, other=0.0)  # [BM, BK]
            if UP.NORM:
                before = tl.load(y_ptrs[:, None] + k[None, :], mask=ok, other=0.0).to(tl.float32)
                gamma = tl.load(gamma_ptr + k, mask=k_ok, other=0.0)[None, :]
                xhat = (before - mean[:, None]) * rstd[:, None]
                d = product_gradient(d.to(tl.float32), xhat, rstd[:, None], s1[:, None], s2[:, None], gamma)
            if UP.DROPOUT:
                d = dropped(d, up.keep, g, rows, n, row_ok[:, None] & k_ok[None, :], k)
            d = operand(d, BFLOAT16, TILE)
            # Beyond D a LayerNorm's gradient is not 0: W is 0 there.
            w_ok = col_ok[None, :] if TILE.EVEN_K else col_ok[None, :] & k_ok[:, None]
            weight = tl.load(w_ptr + k[:, None] * K + cols[None, :], mask=w_ok, other=0.0)  # [BK, BN]
            if TILE.INTERPRETED:
                d, weight = d.to(tl.float32), weight.to(tl.float32)
            acc = tl.dot(d, weight, acc, input_precision=TILE.DOT)
    ok = row_ok[:, None] & col_ok[None, :]
    if HAS_ADD:
        acc += tl.load(entry_ptrs(add, own, rows, n, cols), mask=ok, other=0.0)
    if DUE.IN_ACT:
        through_activation(
            acc, below, own, rows, n, row_ok, cols, col_ok, tile_n, width, y, sums, DUE, TILE.INTERPRETED
        )
    else:
        store_rounded(entry_ptrs(y, own, rows, n, cols), acc, ok, TILE.INTERPRETED)


def input_gradient(
    gradient: Gradient,
    layer: Layer,
    below: Rows | None,
    out: Gradient,
    *,
    how: How,
    slabs: Slabs = EACH,
    first: int = 0,
    add: Tensor | None = None,
    tile: Tile | None = None,
) -> Gradient:
    """Write the gradient of a layer's input.

    Args:
        gradient: of the layer's rows, (G, E, n, D).
        layer: packed; its weight is (S, D, K).
        below: (1 or G, E, n, C) rows whose activation the input's first columns are; None where it is
            no activation, or the gradient is wanted as it is.
        out: (G, E, n, C) columns `first` to `first` + C of the input; (1, E, n, C) sums over groups.
        how: precision of the product, and whether the launch may start early.
        slabs: slab of `layer` of each group.
        first: first column.
        add: (1 or G, E, n, C) float32, added before the activation; may be `out.x` itself.
        tile: None takes the table's.

    Returns:
        `out`, as the gradient of `below` where that is given.
    """
    groups, e, n, d = gradient.x.shape
    check_gradient(gradient, layer)
    k, (written, *rest, width) = layer.weight.shape[-1], out.x.shape
    if written not in (1, groups) or rest != [e, n] or first < 0 or first + width > k:
        allowed = f"(1 or {groups}, {e}, {n}, at most {k - first})"
        raise ValueError(f"out: got {tuple(out.x.shape)} from column {first} on, allowed: {allowed}")
    if below is not None and (below.x.shape != out.x.shape or first or below.layer is None or out.sums is None):
        raise ValueError(f"below: got {tuple(below.x.shape)}, allowed: rows due, {tuple(out.x.shape)}, and sums in out")
    if add is not None and (add.shape[1:] != out.x.shape[1:] or add.dtype == torch.bfloat16 or add.stride(-1) != 1):
        raise ValueError(f"add: got {tuple(add.shape)} {add.dtype}, allowed: {tuple(out.x.shape)} torch.float32")
    tile = tile or input_gradient_tile(e * n, written, width, d, how.precision.name, summed=written < groups)
    reads, due = upstream(gradient)
    under, act = source(Rows(out.x) if below is None else below)
    buffers = (out.x if add is None else add, out.x, out.x if out.sums is None else out.sums)
    added, *written_to = map(strided, buffers)
    m, (n, (reads, added, under, *written_to)) = e * n, flattened(e, n, reads, added, under, *written_to)
    launch(
        input_gradient_kernel, (cdiv(m, tile.BM) * cdiv(width, tile.BN), written),
        reads, packed(layer, slabs), added, under, *written_to, m, n, d, k, first, width, groups // written,
        UP=due, MEMBERS=slabs.members is not None, HAS_ADD=add is not None, DUE=act, **tile.options(d, how),
    )  # fmt: skip
    return replace(out, rows=below, tile=tile.BN) if below is not None else Gradient(out.x)


@reference_of(input_gradient)
def input_gradient_reference(
    gradient: Gradient, layer: Layer, below: Rows | None, out: Gradient, slabs: Slabs, first: int, add: Tensor | None
) -> Gradient:
    """Compute `input_gradient` in plain torch: the same result, sums left out."""
    dy = gradient.products()
    width = out.x.shape[-1]
    parts = [dy[g] @ layer.weight[s][:, first : first + width].to(dy) for g, s in enumerate(slabs.of(len(dy)))]
    d = torch.stack(parts)
    if len(out.x) == 1:
        d = d.sum(0, keepdim=True)
    if add is not None:
        d = d + add.to(d)
    if below is not None:
        leaf = below.normalised().to(d).requires_grad_()
        with torch.enable_grad():
            (d,) = torch.autograd.grad(below.activation_of(leaf), leaf, d)
    out.x.copy_(d)
    return Gradient(out.x, None, below)
