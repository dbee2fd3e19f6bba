"""Gradient of an activation that is read by more than one product, to that of its LayerNorm: h with sums.

    h = d ∂act/∂(LN(x) γ + β)

Elsewhere this is the end of `input_gradient`. Cost: two reads and a write of the rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..device.launch import cdiv, interpreting, jit, launch, pow2, tl
from ..layers.grouped_layer import source, strided
from ..layers.linear_tile import await_producers, row_ptrs
from ..layers.rows import LEAST_COLUMNS, Rows
from .gradient_tile import Gradient, through_activation

_COLUMNS = 64


@jit
def activation_gradient_kernel(
    d,
    below,
    y,
    sums,
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
    """One tile [BM, BN]; grid (row tiles, column tiles, groups)."""
    g = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row_ok, col_ok = rows < M, cols < D
    await_producers(PDL)
    incoming = tl.load(
        row_ptrs(d, g, rows, n)[:, None] + cols[None, :], mask=row_ok[:, None] & col_ok[None, :], other=0.0
    )
    # fmt: off
    through_activation(
        incoming.to(tl.float32), below, g, rows, n, row_ok, cols, col_ok, tl.program_id(1), D, y, sums, IN_ACT, V,
        IN_TILE, IN_TILES, IN_MEMBERS, INTERPRETED,
    )
    # fmt: on


def activation_gradient(
    d: Tensor, below: Rows, out: Gradient, *, columns: int | None = None, pdl: bool = False
) -> Gradient:
    """Gradient of rows with an activation due, from that of the activation; written in place.

    Args:
        d: (G, E, n, D), contiguous in its last dim.
        below: (G, E, n, D) rows, Mish or SimNorm due.
        out: where to; same shape, with sums.
        columns: width of a tile, and so of its sums; None takes this kernel's own.
        pdl: programmatic dependent launch.
    """
    groups, e, n, width = below.x.shape
    if below.layer is None or below.layer.ln_weight is None:
        raise ValueError("below: nothing is due, allowed: rows a layer with LayerNorm wrote")
    if d.shape != below.x.shape or out.x.shape != below.x.shape or out.sums is None or d.stride(-1) != 1:
        got = f"{tuple(d.shape)} and {tuple(out.x.shape)}"
        raise ValueError(f"d and out: got {got}, allowed: {tuple(below.x.shape)}, out with sums")
    reads, due = source(below)
    if interpreting():
        bm, bn = min(pow2(e * n), 512), min(pow2(width, LEAST_COLUMNS), 512)
    else:
        bm, bn = 16, min(pow2(width, LEAST_COLUMNS), _COLUMNS)
    bn = columns or bn
    launch(
        activation_gradient_kernel,
        (cdiv(e * n, bm), cdiv(width, bn), groups),
        strided(d),
        reads,
        strided(out.x),
        strided(out.sums),
        e * n,
        n,
        width,
        BM=bm,
        BN=bn,
        INTERPRETED=interpreting(),
        pdl=pdl,
        num_warps=4,
        **due,
    )
    return replace(out, rows=below, tile=bn)


def activation_gradient_reference(
    d: Tensor, below: Rows, out: Gradient, *, columns: int | None = None, pdl: bool = False
) -> Gradient:
    """`activation_gradient` in plain torch; sums left out."""
    del columns, pdl
    leaf = below.normalised().requires_grad_()
    with torch.enable_grad():
        (h,) = torch.autograd.grad(below.activation_of(leaf), leaf, d.to(leaf))
    out.x.copy_(h)
    return Gradient(out.x, None, below)
