"""The gradient of a layer's product, finished once for all who read it.

    dL/dy = rstd (h γ - s1/D - x̂ s2/D),    db = sum dL/dy,    dγ = sum h x̂,    dβ = sum h    (gradient_tile.py)

Where layers are small, the products with W and with x finish it on their way in. Each of their
programs does so for all it reads, D / BN times in total, which costs more than the products where
layers are wide; then this launch does it before them. It writes over h, and leaves db, dγ and
dβ of a chunk of rows each for `add_up`, so that nothing depends on an order of programs. The products find
their operands ready and load them ahead. Cost: two reads and a write.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.arithmetic import store_rounded
from ..device.launch import PROCESSORS, await_producers, cdiv, interpreting, jit, launch, pow2, tl
from ..device.pointers import entry_ptrs, slab_of
from ..device.reference import reference_of
from ..device.statistics import LAYER_NORM_EPS
from ..layers.linear_tile import dropped
from .gradient_tile import Gradient, chunk_rows, product_gradient, row_factors, upstream
from .weight_gradient import LayerGradient

_ROWS = 16


@jit
def norm_gradient_kernel(
    up, sums_ptr, sums_g, sums_e, n, D, chunks,
    UP: tl.constexpr, VECTORS: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Finish ROWS rows of one environment, BN columns; grid (environments x chunks, column tiles, groups)."""
    tl.static_assert(UP.NORM)
    g = tl.program_id(2).to(tl.int64)
    e, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_ok = cols < D
    await_producers(PDL)
    norm_gamma = tl.load(up.rows.gamma_ptr + slab_of(up.rows.slab, g, UP.Y_MEMBERS) * D + cols, mask=col_ok, other=0.0)
    bias = tl.zeros((BM, BN), tl.float32)
    gamma = tl.zeros((BM, BN), tl.float32)
    beta = tl.zeros((BM, BN), tl.float32)
    for start in range(0, ROWS, BM):
        row = chunk * ROWS + start + tl.arange(0, BM)
        row_ok = row < n
        rows = e * n + row
        ok = row_ok[:, None] & col_ok[None, :]
        at = entry_ptrs(up.x, g, rows, n, cols)
        d = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        before = tl.load(entry_ptrs(up.rows.x, g, rows, n, cols), mask=ok, other=0.0).to(tl.float32)
        mean, rstd, s1, s2 = row_factors(up, g, rows, n, row_ok, D, UP)
        xhat = (before - mean[:, None]) * rstd[:, None]
        if VECTORS:
            gamma += d * xhat
            beta += d
        d = product_gradient(d, xhat, rstd[:, None], s1[:, None], s2[:, None], norm_gamma[None, :])
        if UP.DROPOUT:
            d = dropped(d, up.keep, g, rows, n, ok, cols)
        if VECTORS:
            bias += tl.where(ok, d, 0.0)
        store_rounded(at, d, ok, INTERPRETED)
    if VECTORS:
        out = sums_ptr + g * sums_g + e.to(tl.int64) * sums_e + chunk * 3 * D + cols
        tl.store(out, tl.sum(bias, axis=0), mask=col_ok)
        tl.store(out + D, tl.sum(gamma, axis=0), mask=col_ok)
        tl.store(out + 2 * D, tl.sum(beta, axis=0), mask=col_ok)


@jit
def add_up_kernel(
    sums_ptr, sums_g, sums_e, bias_ptr, gamma_ptr, beta_ptr, out_g, E, D, chunks,
    BM: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add up BN columns of the three vectors of a group, BM chunks a step; grid (column tiles, groups)."""
    g = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    col_ok = cols < D
    await_producers(PDL)
    bias = tl.zeros((BM, BN), tl.float32)
    gamma = tl.zeros((BM, BN), tl.float32)
    beta = tl.zeros((BM, BN), tl.float32)
    for start in range(0, E * chunks, BM):
        i = start + tl.arange(0, BM)
        ok = (i < E * chunks)[:, None] & col_ok[None, :]
        at = sums_ptr + g * sums_g + (i // chunks).to(tl.int64) * sums_e + (i % chunks) * 3 * D
        at = at[:, None] + cols[None, :]
        bias += tl.load(at, mask=ok, other=0.0)
        gamma += tl.load(at + D, mask=ok, other=0.0)
        beta += tl.load(at + 2 * D, mask=ok, other=0.0)
    tl.store(bias_ptr + g * out_g + cols, tl.sum(bias, axis=0), mask=col_ok)
    tl.store(gamma_ptr + g * out_g + cols, tl.sum(gamma, axis=0), mask=col_ok)
    tl.store(beta_ptr + g * out_g + cols, tl.sum(beta, axis=0), mask=col_ok)


def norm_gradient(gradient: Gradient, *, pdl: bool = False) -> Gradient:
    """Write the gradient of a layer's product over that of its LayerNorm's result.

    Args:
        gradient: with the rows it is the gradient of and their sums; (G, E, n, D). Where it has
            `vectors`, db, dγ and dβ of its chunks are written there.
        pdl: programmatic dependent launch.
    """
    rows, vectors = gradient.rows, gradient.vectors
    groups, e, n, d = gradient.x.shape
    if rows is None or gradient.sums is None or not gradient.tile or rows.x.shape != gradient.x.shape:
        got = "no rows" if rows is None else f"rows {tuple(rows.x.shape)}"
        raise ValueError(f"gradient: got {got}, allowed: rows {tuple(gradient.x.shape)} with a LayerNorm, and sums")
    chunks = cdiv(n, _ROWS) if vectors is None else vectors.shape[2]
    chunk = _ROWS if vectors is None else chunk_rows(n, chunks)
    if vectors is not None:
        check_vectors(vectors, (groups, e, chunks, 3, d))
    reads, due = upstream(gradient)
    bm, bn = _ROWS, min(pow2(d), 512 if interpreting() else 128)
    if bn == 128 and gradient.x.dtype == torch.bfloat16 and e * chunks * cdiv(d, bn) * groups >= 2 * PROCESSORS:
        # What is merged for a row serves more columns.
        bm, bn = bm // 2, min(pow2(d), 512)
    launch(
        norm_gradient_kernel, (e * chunks, cdiv(d, bn), groups), reads, gradient.sums if vectors is None else vectors,
        0 if vectors is None else vectors.stride(0), 0 if vectors is None else vectors.stride(1), n, d, chunks,
        UP=due, VECTORS=vectors is not None, ROWS=chunk, BM=bm, BN=bn, INTERPRETED=interpreting(), pdl=pdl,
        # It writes in place, where no thread may store what another has yet to load: not more of them than entries.
        num_warps=max(1, min(8 if bn > 128 else 4, bm * bn // 32)),
    )  # fmt: skip
    return Gradient(gradient.x)


@reference_of(norm_gradient)
def norm_gradient_reference(gradient: Gradient) -> Gradient:
    """Compute `norm_gradient` in plain torch."""
    assert gradient.rows is not None
    h, y, products = gradient.x.clone(), gradient.rows.x.to(gradient.x), gradient.products()
    if gradient.vectors is not None:
        xhat = (y - y.mean(-1, keepdim=True)) * (y.var(-1, unbiased=False, keepdim=True) + LAYER_NORM_EPS).rsqrt()
        rows = chunk_rows(products.shape[2], gradient.vectors.shape[2])
        for i in range(gradient.vectors.shape[2]):
            chunk = slice(i * rows, (i + 1) * rows)
            shares = (products, h * xhat, h)
            gradient.vectors[:, :, i] = torch.stack([x[:, :, chunk].sum(2) for x in shares], 2)
    gradient.x.copy_(products)
    return Gradient(gradient.x)


def add_up(vectors: Tensor, out: LayerGradient, *, pdl: bool = False) -> None:
    """Write db, dγ and dβ of a layer.

    Args:
        vectors: (G, E, chunks, 3, D), of all chunks.
        out: where to; its weight is left as it is.
        pdl: programmatic dependent launch.
    """
    groups, e, chunks, _, d = vectors.shape
    check_vectors(vectors, (groups, e, chunks, 3, d))
    outs = [x for x in (out.bias, out.ln_weight, out.ln_bias) if x is not None and x.shape == (groups, d)]
    if len(outs) < 3 or len({x.stride() for x in outs}) > 1 or outs[0].stride(1) != 1:
        got = [None if x is None else tuple(x.shape) for x in (out.bias, out.ln_weight, out.ln_bias)]
        raise ValueError(f"out: got vectors {got}, allowed: ({groups}, {d}), strides alike, contiguous in each group")
    bm, bn = (min(pow2(e * chunks), 512), min(pow2(d), 512)) if interpreting() else (8, min(pow2(d), 64))
    launch(
        add_up_kernel, (cdiv(d, bn), groups), vectors, *vectors.stride()[:2], *outs, outs[0].stride(0), e, d, chunks,
        BM=bm, BN=bn, pdl=pdl, num_warps=2,
    )  # fmt: skip


@reference_of(add_up)
def add_up_reference(vectors: Tensor, out: LayerGradient) -> None:
    """Compute `add_up` in plain torch."""
    for i, x in enumerate((out.bias, out.ln_weight, out.ln_bias)):
        assert x is not None
        x.copy_(vectors[:, :, :, i].sum((1, 2)))


def check_vectors(vectors: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse shares of a layer's vectors that are laid out otherwise than by the kernels."""
    d = shape[-1]
    if vectors.shape != shape or vectors.stride()[2:] != (3 * d, d, 1) or vectors.dtype != torch.float32:
        got = f"{tuple(vectors.shape)} {vectors.dtype}"
        raise ValueError(f"vectors: got {got}, allowed: {shape} torch.float32, chunks contiguous")
