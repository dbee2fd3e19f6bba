"""The last layer of the policy prior down to the sampled action; no logits in memory.

    mean, log_std = act(LN(x[e, r])) Wᵀ + b,    a[e, r] = tanh(mean + eps exp(log_std))

with log_std squashed into its range and dead action dims of a task masked, as `policy_action`.
Rows of W are interleaved (mean 0, log_std 0, mean 1, ...), so that one product gives both and a
program splits them in registers. Cost: 4 A D FLOP a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.launch import How, cdiv, jit, launch, pow2, tl
from .grouped_layer import arithmetic, check_tile, packed, source, strided
from .linear_tile import await_producers, row_offsets, row_ptrs
from .policy_head import policy_action
from .rows import EACH, Layer, Rows
from .scalar_head import check_last_layer, last_layer_reference, logits_on_tile
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
    x,
    w,
    eps,
    mask_ptr,
    y,
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
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    FROM_L2: tl.constexpr = False,
):
    """BM rows, all 2A <= BN columns, down to actions."""
    rows, cols = tile_m * BM + tl.arange(0, BM), tl.arange(0, BN)
    row_ok = rows < M
    # fmt: off
    logits = logits_on_tile(
        rows, cols, 0, x, w, row_ok, n, 2 * A, K, IN_ACT, V, IN_TILE, IN_TILES, IN_MEMBERS, False, BM, BN, BK, EVEN_K,
        DOT, INTERPRETED, FROM_L2,
    )
    # fmt: on
    center, log_std = tl.split(tl.reshape(logits, (BM, BN // 2, 2)))  # [BM, BA] each
    log_std = low + 0.5 * (high - low) * (tanh(log_std) + 1.0)
    dims = tl.arange(0, BN // 2)
    ok = row_ok[:, None] & (dims < A)[None, :]
    noise = tl.load(row_ptrs(eps, 0, rows, n)[:, None] + dims[None, :], mask=ok, other=0.0)
    if HAS_MASK:
        live = tl.load(mask_ptr + row_offsets(rows, n, A, 0)[:, None] + dims[None, :], mask=ok, other=0.0)
        center, log_std, noise = center * live, log_std * live, noise * live
    action = tanh(center + noise * tl.exp(log_std))
    tl.store(row_ptrs(y, 0, rows, n)[:, None] + dims[None, :], action, mask=ok)


@jit
def policy_layer_kernel(
    x,
    w,
    eps,
    mask_ptr,
    y,
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
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """BM rows, all 2A <= BN columns; grid (row tiles,)."""
    await_producers(PDL)
    # fmt: off
    policy_on_tile(
        tl.program_id(0), x, w, eps, mask_ptr, y, M, n, K, A, low, high, HAS_MASK, IN_ACT, V, IN_TILE, IN_TILES,
        IN_MEMBERS, BM, BN, BK, EVEN_K, DOT, INTERPRETED,
    )
    # fmt: on


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
    how: How,
    low: float,
    high: float,
    mask: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Sampled policy actions, written in place.

    Args:
        x: (1, E, n, K) rows; an activation due is applied.
        layer: packed (1, 2A, K), rows interleaved (`interleave`), no LayerNorm.
        eps: (E, n, A) standard normal, float32.
        out: (E, n, A) float32; it and `eps` contiguous in their last dim.
        how: precision of the product, and whether the launch may start early.
        low, high: range of the log std.
        mask: (E, A) of 0/1, live action dims, float32, contiguous.
        tile: None takes the table's.
    """
    e, n, a = out.shape
    k = layer.weight.shape[-1]
    check_last_layer(x, layer, (1, e, n), 2 * a)
    if eps.shape != out.shape:
        raise ValueError(f"eps: got shape {tuple(eps.shape)}, allowed: {tuple(out.shape)}")
    if mask is not None and (mask.shape != (e, a) or not mask.is_contiguous()):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, allowed: contiguous ({e}, {a})")
    tile = tile or head_tile(e * n, 1, 2 * pow2(a, 8), k, how.precision.name)
    check_tile(tile, 2 * a, x)
    reads, due = source(x)
    launch(
        policy_layer_kernel,
        (cdiv(e * n, tile.BM), 1),
        reads,
        packed(layer, EACH),
        strided(eps[None]),
        eps if mask is None else mask,
        strided(out[None]),
        e * n,
        n,
        k,
        a,
        float(low),
        float(high),
        HAS_MASK=mask is not None,
        pdl=how.pdl,
        **due,
        **tile.options(k),
        **arithmetic(how.precision),
    )


def policy_layer_reference(
    x: Rows,
    layer: Layer,
    eps: Tensor,
    out: Tensor,
    *,
    how: How,
    low: float,
    high: float,
    mask: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """`policy_layer` in plain torch."""
    logits = last_layer_reference(x, layer, out.unsqueeze(0), how, EACH)[0]
    plain = torch.cat([logits[..., 0::2], logits[..., 1::2]], -1)
    out.copy_(policy_action(plain, eps.to(out), low, high, None if mask is None else mask.to(out).unsqueeze(1)))
