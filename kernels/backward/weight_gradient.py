"""dL/dW, dL/db, dL/dγ and dL/dβ of a layer for several heads, in one launch.

    dW[g] = sum over rows of dL/dy[g]ᵀ x[g],    db = sum dL/dy,    dγ = sum h x̂,    dβ = sum h

`gradient_tile.py` says what is due on dL/dy and what h and x̂ are; an activation due on x is applied.
One program has a tile of W and goes over all rows, so nothing is accumulated in memory and the
result does not depend on an order of programs; those of the first column tile sum up the vectors
beside. 2 M D K FLOP a group. Written, not added: gradients need no zeroing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..device.arithmetic import operand
from ..device.launch import How, await_producers, cdiv, jit, launch, tl
from ..device.pointers import entry_ptrs, flattened, row_ptrs, slab_of
from ..device.reference import reference_of
from ..device.statistics import LAYER_NORM_EPS, merge_statistics
from ..layers.grouped_layer import check_input
from ..layers.linear_tile import activate
from ..layers.rows import Layer, Rows, source
from ..layers.tiles import Tile, weight_gradient_tile
from .gradient_tile import Gradient, check_gradient, product_gradient, row_factors, upstream


@dataclass(frozen=True)
class LayerGradient:
    """Tells where gradients of G layers of equal shape go; float32, contiguous but for their groups."""

    weight: Tensor  # (G, D, K)
    bias: Tensor | None  # (G, D)
    ln_weight: Tensor | None = None  # (G, D)
    ln_bias: Tensor | None = None  # (G, D)


@jit
def weight_gradient_kernel(
    up, x, w_ptr, w_g, bias_ptr, gamma_ptr, beta_ptr, vector_g, M, n, D, K,
    UP: tl.constexpr, DUE: tl.constexpr, BIAS: tl.constexpr, BFLOAT16: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Compute a tile [BM, BN] of one group's weight, BK rows a step; grid (tiles of D x tiles of K, groups)."""
    tiles_n = tl.cdiv(K, TILE.BN)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    g = tl.program_id(1).to(tl.int64)
    outs = tile_m * TILE.BM + tl.arange(0, TILE.BM)
    cols = tile_n * TILE.BN + tl.arange(0, TILE.BN)
    out_ok, col_ok = outs < D, cols < K
    await_producers(PDL)
    if UP.NORM:
        norm_gamma = tl.load(
            up.rows.gamma_ptr + slab_of(up.rows.slab, g, UP.Y_MEMBERS) * D + outs, mask=out_ok, other=0.0
        )
    if DUE.IN_ACT:
        slab = slab_of(x.slab, g, DUE.IN_MEMBERS)
        in_gamma = tl.load(x.gamma_ptr + slab * K + cols, mask=col_ok, other=0.0)
        in_beta = tl.load(x.beta_ptr + slab * K + cols, mask=col_ok, other=0.0)
    BM: tl.constexpr = TILE.BM  # in a shape Triton 3.6 takes names of constants, not fields
    BN: tl.constexpr = TILE.BN
    BK: tl.constexpr = TILE.BK
    acc = tl.zeros((BM, BN), tl.float32)
    # A sum of what is on its way into wide products has them wait; in bfloat16 a product with ones is as exact.
    BY_PRODUCT: tl.constexpr = BIAS and BFLOAT16 and not UP.NORM and not UP.DROPOUT and TILE.BM >= 64
    ones = tl.full((BK, 16), 1.0, tl.float32 if TILE.INTERPRETED else tl.bfloat16)
    sums = tl.zeros((BM, 16), tl.float32)
    bias = tl.zeros((BM,), tl.float32)
    gamma = tl.zeros((BM,), tl.float32)
    beta = tl.zeros((BM,), tl.float32)
    for start in range(0, M, TILE.BK):
        rows = start + tl.arange(0, TILE.BK)
        row_ok = rows < M
        ok = out_ok[:, None] & row_ok[None, :]
        there = (outs < up.columns)[:, None] & row_ok[None, :]
        d = tl.load(row_ptrs(up.x, g, rows, n)[None, :] + outs[:, None], mask=there, other=0.0)  # [BM, BK]
        if UP.NORM:
            d = d.to(tl.float32)
            mean, rstd, s1, s2 = row_factors(up, g, rows, n, row_ok, D, UP)
            before = tl.load(row_ptrs(up.rows.x, g, rows, n)[None, :] + outs[:, None], mask=ok, other=0.0)
            xhat = (before.to(tl.float32) - mean[None, :]) * rstd[None, :]
            gamma += tl.sum(d * xhat, axis=1)
            beta += tl.sum(d, axis=1)
            d = product_gradient(d, xhat, rstd[None, :], s1[None, :], s2[None, :], norm_gamma[:, None])
            d = tl.where(ok, d, 0.0)
        if UP.DROPOUT:
            drops = (rows * 0 + g >= up.keep.first)[None, :]
            kept = row_ptrs(up.keep.rows, g - up.keep.first, rows, n)[None, :] + outs[:, None]
            kept = tl.load(kept, mask=ok & drops, other=1)
            d = tl.where(kept != 0, d * tl.where(drops, up.keep.scale, 1.0), 0.0)
        if BIAS and not BY_PRODUCT:
            bias += tl.sum(d.to(tl.float32), axis=1)
        d = operand(d, BFLOAT16, TILE)
        value_ok = row_ok[:, None] & col_ok[None, :]
        value = tl.load(entry_ptrs(x.x, g, rows, n, cols), mask=value_ok, other=0.0)  # [BK, BN]
        if DUE.IN_ACT:
            in_mean, in_rstd = merge_statistics(row_ptrs(x.stats, g, rows, n), row_ok, K, DUE.IN_TILE, DUE.IN_TILES)
            value = activate(
                value.to(tl.float32), in_mean, in_rstd, in_gamma, in_beta, DUE.IN_ACT, DUE.V, TILE.INTERPRETED
            )
        value = operand(value, BFLOAT16, TILE)
        if TILE.INTERPRETED:
            d, value = d.to(tl.float32), value.to(tl.float32)
        acc = tl.dot(d, value, acc, input_precision=TILE.DOT)
        if BY_PRODUCT:
            sums = tl.dot(d, ones, sums, input_precision=TILE.DOT)
    at = w_ptr + g * w_g + outs[:, None].to(tl.int64) * K + cols[None, :]
    tl.store(at, acc, mask=out_ok[:, None] & col_ok[None, :])
    if tile_n == 0:
        if BY_PRODUCT:
            bias = tl.sum(sums, axis=1) / 16
        if BIAS:
            tl.store(bias_ptr + g * vector_g + outs, bias, mask=out_ok)
        if UP.NORM:
            tl.store(gamma_ptr + g * vector_g + outs, gamma, mask=out_ok)
            tl.store(beta_ptr + g * vector_g + outs, beta, mask=out_ok)


def weight_gradient(
    gradient: Gradient, x: Rows, layer: Layer, out: LayerGradient, *, how: How, tile: Tile | None = None
) -> None:
    """Write the gradients of a layer's parameters.

    Args:
        gradient: of the layer's rows, (G, E, n, D).
        x: main input (G or 1, E, n, K); an activation due is applied.
        layer: packed, for its sizes.
        out: where to; no bias where `norm_gradient` gave it.
        how: precision of the product, and whether the launch may start early.
        tile: BM of D, BN of K, BK rows a step; None takes the table's.
    """
    groups, e, n, d = gradient.x.shape
    check_gradient(gradient, layer)
    k = layer.weight.shape[-1]
    check_input(x, layer, groups, e, n)
    wanted = [out.bias] if out.bias is not None or gradient.rows is not None else []
    vectors = wanted if gradient.rows is None else [*wanted, out.ln_weight, out.ln_bias]
    strides = {v.stride(0) if v is not None and v.shape == (groups, d) and v.stride(1) == 1 else -1 for v in vectors}
    if out.weight.shape != (groups, d, k) or out.weight.stride()[1:] != (k, 1) or len(strides) > 1 or -1 in strides:
        got = [None if v is None else tuple(v.shape) for v in (out.weight, *vectors)]
        raise ValueError(f"out: got {got}, allowed: ({groups}, {d}, {k}) and ({groups}, {d}), contiguous in each group")
    tile = tile or weight_gradient_tile(d, groups, k, e * n, how.precision.name)
    if tile.BN % (group := max(x.layer.simnorm_dim, 1) if x.layer is not None else 1):
        raise ValueError(f"tile: got BN={tile.BN}, allowed: multiples of simnorm_dim ({group})")
    reads, due = upstream(gradient)
    inputs, act = source(x)
    bias = out.weight if out.bias is None else out.bias
    norm = (bias, bias) if gradient.rows is None else (out.ln_weight, out.ln_bias)
    m, (n, (reads, inputs)) = e * n, flattened(e, n, reads, inputs)
    launch(
        weight_gradient_kernel, (cdiv(d, tile.BM) * cdiv(k, tile.BN), groups),
        reads, inputs, out.weight, out.weight.stride(0), bias, *norm, bias.stride(0), m, n, d, k,
        UP=due, DUE=act, BIAS=out.bias is not None, BFLOAT16=how.precision.name == "bfloat16",
        **tile.options(m, how),
    )  # fmt: skip


@reference_of(weight_gradient)
def weight_gradient_reference(gradient: Gradient, x: Rows, out: LayerGradient) -> None:
    """Compute `weight_gradient` in plain torch."""
    dy, inputs = gradient.products(), x.activated()
    for g, d in enumerate(dy):
        value = inputs[min(g, len(inputs) - 1)].to(d)
        out.weight[g] = d.flatten(0, 1).T @ value.flatten(0, 1)
        if out.bias is not None:
            out.bias[g] = d.sum((0, 1))
    if gradient.rows is None:
        return
    assert out.ln_weight is not None
    assert out.ln_bias is not None
    h, y = gradient.x.to(dy), gradient.rows.x.to(dy)
    rstd = (y.var(-1, unbiased=False, keepdim=True) + LAYER_NORM_EPS).rsqrt()
    out.ln_weight.copy_((h * (y - y.mean(-1, keepdim=True)) * rstd).sum((1, 2)))
    out.ln_bias.copy_(h.sum((1, 2)))
