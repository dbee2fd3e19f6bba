"""The last layer of the policy prior down to the sampled action; no logits in memory.

    mean, log_std = act(LN(x[e, r])) Wᵀ + b,    a[e, r] = tanh(mean + eps exp(log_std))

with log_std squashed into its range and dead action dims of a task masked, as `policy_action`.
Rows of W are interleaved (mean 0, log_std 0, mean 1, ...), so that one product gives both and a
program splits them in registers. Cost: 4 A D FLOP a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grouped_layer import arithmetic, check_tile, source
from .launch import Precision, cdiv, jit, launch, pow2, tl
from .linear_tile import await_producers, merge_statistics, product, row_offsets, slab_of
from .policy_head import policy_action
from .rows import EACH, Layer, Rows
from .scalar_head import check_last_layer, last_layer_reference
from .tiles import Tile, head_tile


@jit
def tanh(x):
    """tanh by one exponential; near 0, where that would cancel, by a polynomial (Cephes, tanhf)."""
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    s = x * x
    p = 2.06390887954e-2 - 5.70498872745e-3 * s
    p = 1.33314422036e-1 + (p * s - 5.37397155531e-2) * s
    near = x + x * s * (p * s - 3.33332819422e-1)
    return tl.where(s < 0.390625, near, tl.where(x < 0, -far, far))


@jit
def policy_on_tile(
    tile_m,
    x_ptr,
    x_g,
    x_e,
    x_r,
    in_stats_ptr,
    in_stats_g,
    in_stats_e,
    in_stats_r,
    in_gamma_ptr,
    in_beta_ptr,
    in_members_ptr,
    in_base,
    in_step,
    w_ptr,
    bias_ptr,
    eps_ptr,
    eps_e,
    eps_r,
    mask_ptr,
    y_ptr,
    y_e,
    y_r,
    M,
    n,
    K,
    A,
    low,
    high,
    HAS_MASK: tl.constexpr,
    IN_ACT: tl.constexpr,
    V: tl.constexpr,
    IN_TILE: tl.constexpr,
    IN_TILES: tl.constexpr,
    IN_MEMBERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BFLOAT16: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    FROM_L2: tl.constexpr = False,
):
    """BM rows, all 2A <= BN columns, down to actions."""
    rows = tile_m * BM + tl.arange(0, BM)
    cols = tl.arange(0, BN)
    row_ok, col_ok = rows < M, cols < 2 * A
    in_slab = slab_of(in_members_ptr, in_base, in_step, 0, IN_MEMBERS)
    in_rows = row_offsets(rows, n, in_stats_e, in_stats_r)
    mean, rstd = merge_statistics(in_stats_ptr, in_rows, row_ok, K, IN_TILE, IN_TILES, FROM_L2)
    logits = product(
        tl.zeros((BM, BN), tl.float32),
        x_ptr,
        row_offsets(rows, n, x_e, x_r),
        row_ok,
        mean,
        rstd,
        in_gamma_ptr + in_slab * K,
        in_beta_ptr + in_slab * K,
        w_ptr,
        cols,
        col_ok,
        K,
        IN_ACT,
        V,
        BK,
        EVEN_K,
        BFLOAT16,
        DOT,
        INTERPRETED,
        FROM_L2,
    )
    logits += tl.load(bias_ptr + cols, mask=col_ok, other=0.0)[None, :]
    center, log_std = tl.split(tl.reshape(logits, (BM, BN // 2, 2)))  # [BM, BA] each
    log_std = low + 0.5 * (high - low) * (tanh(log_std) + 1.0)
    dims = tl.arange(0, BN // 2)
    ok = row_ok[:, None] & (dims < A)[None, :]
    eps = tl.load(eps_ptr + row_offsets(rows, n, eps_e, eps_r)[:, None] + dims[None, :], mask=ok, other=0.0)
    if HAS_MASK:
        live = tl.load(mask_ptr + row_offsets(rows, n, A, 0)[:, None] + dims[None, :], mask=ok, other=0.0)
        center, log_std, eps = center * live, log_std * live, eps * live
    action = tanh(center + eps * tl.exp(log_std))
    tl.store(y_ptr + row_offsets(rows, n, y_e, y_r)[:, None] + dims[None, :], action, mask=ok)


@jit
def policy_layer_kernel(
    x_ptr,
    x_g,
    x_e,
    x_r,
    in_stats_ptr,
    in_stats_g,
    in_stats_e,
    in_stats_r,
    in_gamma_ptr,
    in_beta_ptr,
    in_members_ptr,
    in_base,
    in_step,
    w_ptr,
    bias_ptr,
    eps_ptr,
    eps_e,
    eps_r,
    mask_ptr,
    y_ptr,
    y_e,
    y_r,
    M,
    n,
    K,
    A,
    low,
    high,
    HAS_MASK: tl.constexpr,
    IN_ACT: tl.constexpr,
    V: tl.constexpr,
    IN_TILE: tl.constexpr,
    IN_TILES: tl.constexpr,
    IN_MEMBERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BFLOAT16: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """BM rows, all 2A <= BN columns; grid (row tiles,)."""
    await_producers(PDL)
    policy_on_tile(
        tl.program_id(0),
        x_ptr,
        x_g,
        x_e,
        x_r,
        in_stats_ptr,
        in_stats_g,
        in_stats_e,
        in_stats_r,
        in_gamma_ptr,
        in_beta_ptr,
        in_members_ptr,
        in_base,
        in_step,
        w_ptr,
        bias_ptr,
        eps_ptr,
        eps_e,
        eps_r,
        mask_ptr,
        y_ptr,
        y_e,
        y_r,
        M,
        n,
        K,
        A,
        low,
        high,
        HAS_MASK,
        IN_ACT,
        V,
        IN_TILE,
        IN_TILES,
        IN_MEMBERS,
        BM,
        BN,
        BK,
        EVEN_K,
        BFLOAT16,
        DOT,
        INTERPRETED,
    )


def interleave(x: Tensor) -> Tensor:
    """Rows of means, then of log stds (..., 2A, .) -> (mean 0, log std 0, mean 1, ...)."""
    a = x.shape[0] // 2
    return x.view(2, a, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def policy_layer(
    x: Rows,
    layer: Layer,
    eps: Tensor,
    out: Tensor,
    *,
    precision: Precision,
    low: float,
    high: float,
    mask: Tensor | None = None,
    tile: Tile | None = None,
    pdl: bool = False,
) -> None:
    """Sampled policy actions, written in place.

    Args:
        x: (1, E, n, K) rows with an activation due.
        layer: packed (1, 2A, K), rows interleaved (`interleave`), no LayerNorm.
        eps: (E, n, A) standard normal, float32.
        out: (E, n, A) float32; it and `eps` contiguous in their last dim.
        precision: of the product.
        low, high: range of the log std.
        mask: (E, A) of 0/1, live action dims, float32, contiguous.
        tile: None takes the table's.
        pdl: programmatic dependent launch.
    """
    e, n, a = out.shape
    k = layer.weight.shape[-1]
    check_last_layer(x, layer, (1, e, n), 2 * a)
    if eps.shape != out.shape:
        raise ValueError(f"eps: got shape {tuple(eps.shape)}, allowed: {tuple(out.shape)}")
    if mask is not None and (mask.shape != (e, a) or not mask.is_contiguous()):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, allowed: contiguous ({e}, {a})")
    tile = tile or head_tile(e * n, 1, 2 * pow2(a, 8), k, precision.name)
    check_tile(tile, 2 * a, x)
    src = source(x, 1)
    launch(
        policy_layer_kernel,
        (cdiv(e * n, tile.BM),),
        *src.args,
        layer.weight,
        layer.bias,
        eps,
        *eps.stride()[:2],
        eps if mask is None else mask,
        out,
        *out.stride()[:2],
        e * n,
        n,
        k,
        a,
        float(low),
        float(high),
        HAS_MASK=mask is not None,
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        EVEN_K=k % tile.BK == 0,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=pdl,
        **src.constants,
        **arithmetic(precision),
    )


def policy_layer_reference(
    x: Rows,
    layer: Layer,
    eps: Tensor,
    out: Tensor,
    *,
    precision: Precision,
    low: float,
    high: float,
    mask: Tensor | None = None,
    tile: Tile | None = None,
    pdl: bool = False,
) -> None:
    """`policy_layer` in plain torch."""
    logits = last_layer_reference(x, layer, out.unsqueeze(0), precision, EACH)[0]
    plain = torch.cat([logits[..., 0::2], logits[..., 1::2]], -1)
    out.copy_(policy_action(plain, eps.to(out), low, high, None if mask is None else mask.to(out).unsqueeze(1)))
