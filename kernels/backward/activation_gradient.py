"""Gradient of an activation that is read by more than one product, to that of its LayerNorm: h with sums.

    h = d ∂act/∂(LN(x) γ + β)

Elsewhere this is the end of `input_gradient`. Cost: two reads and a write of the rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..device.launch import await_producers, cdiv, interpreting, jit, launch, on_cpu, pow2, tl
from ..device.pointers import entry_ptrs, flattened, strided
from ..device.reference import reference_of
from ..layers.rows import LEAST_COLUMNS, Rows, source
from .gradient_tile import Gradient, through_activation

_COLUMNS = 64


@jit
def activation_gradient_kernel(
    d, below, y, sums, M, n, D,
    DUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute one tile [BM, BN]; grid (row tiles, column tiles, groups)."""
    g = tl.program_id(2).to(tl.int64)
    rows, tile_n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    cols = tile_n * BN + tl.arange(0, BN)
    row_ok, col_ok = rows < M, cols < D
    await_producers(PDL)
    incoming = tl.load(entry_ptrs(d, g, rows, n, cols), mask=row_ok[:, None] & col_ok[None, :], other=0.0)
    incoming = incoming.to(tl.float32)
    through_activation(incoming, below, g, rows, n, row_ok, cols, col_ok, tile_n, D, y, sums, DUE, INTERPRETED)


def activation_gradient(
    d: Tensor, below: Rows, out: Gradient, *, columns: int | None = None, pdl: bool = False
) -> Gradient:
    """Write the gradient of rows with an activation due, given that of the activation.

    Args:
        d: (G, E, n, D), contiguous in its last dim; may be `out.x` itself.
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
    if on_cpu():
        bm, bn = min(pow2(e * n), 512), min(pow2(width, LEAST_COLUMNS), 512)
    else:
        bm, bn = 16, min(pow2(width, LEAST_COLUMNS), _COLUMNS)
    bn = columns or bn
    m, (n, given) = e * n, flattened(e, n, strided(d), reads, strided(out.x), strided(out.sums))
    launch(
        activation_gradient_kernel, (cdiv(m, bm), cdiv(width, bn), groups), *given, m, n, width,
        DUE=due, BM=bm, BN=bn, INTERPRETED=interpreting(), pdl=pdl, num_warps=4,
    )  # fmt: skip
    return replace(out, rows=below, tile=bn)


@reference_of(activation_gradient)
def activation_gradient_reference(d: Tensor, below: Rows, out: Gradient) -> Gradient:
    """Compute `activation_gradient` in plain torch; sums left out."""
    leaf = below.normalised().requires_grad_()
    with torch.enable_grad():
        (h,) = torch.autograd.grad(below.activation_of(leaf), leaf, d.to(leaf))
    out.x.copy_(h)
    return Gradient(out.x, None, below)
