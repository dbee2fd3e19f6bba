"""The last layer of the policy prior down to the sampled action; no logits in memory.

    mean, log_std = act(LN(x[e, r])) Wᵀ + b,    a[e, r] = tanh(mean + eps exp(log_std))

with log_std squashed into its range and dead action dims of a task masked, as `policy_action`.
Rows of W are interleaved (mean 0, log_std 0, mean 1, ...), so that one product gives both and a
program splits them in registers. Cost: 4 A D FLOP a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.arithmetic import tanh
from ..device.launch import How, await_producers, jit, launch, pow2, tl
from ..device.pointers import entry_ptrs, flattened, row_offsets, strided
from ..device.reference import reference_of
from .last_layer import last_layer, last_layer_reference
from .linear_tile import logits_on_tile
from .policy_head import policy_action
from .rows import EACH, Layer, Rows
from .tiles import Tile


@jit
def policy_on_tile(
    tile_m, x, w, eps, mask_ptr, y, M, n, K, A, low, high,
    HAS_MASK: tl.constexpr, DUE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute the actions of BM rows from all 2A <= BN columns."""
    rows, cols = tile_m * TILE.BM + tl.arange(0, TILE.BM), tl.arange(0, TILE.BN)
    row_ok = rows < M
    logits = logits_on_tile(rows, cols, 0, x, w, row_ok, n, 2 * A, K, DUE, TILE)
    center, log_std = tl.split(tl.reshape(logits, (TILE.BM, TILE.BN // 2, 2)))  # [BM, BA] each
    log_std = low + 0.5 * (high - low) * (tanh(log_std) + 1.0)
    dims = tl.arange(0, TILE.BN // 2)
    ok = row_ok[:, None] & (dims < A)[None, :]
    noise = tl.load(entry_ptrs(eps, 0, rows, n, dims), mask=ok, other=0.0)
    if HAS_MASK:
        live = tl.load(mask_ptr + row_offsets(rows, n, A, 0)[:, None] + dims[None, :], mask=ok, other=0.0)
        center, log_std, noise = center * live, log_std * live, noise * live
    action = tanh(center + noise * tl.exp(log_std))
    tl.store(entry_ptrs(y, 0, rows, n, dims), action, mask=ok)


@jit
def policy_layer_kernel(
    x, w, eps, mask_ptr, y, M, n, K, A, low, high,
    HAS_MASK: tl.constexpr, DUE: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute the actions of BM rows, all 2A <= BN columns; grid (row tiles, 1)."""
    await_producers(PDL)
    tile_m = tl.program_id(0)
    policy_on_tile(tile_m, x, w, eps, mask_ptr, y, M, n, K, A, low, high, HAS_MASK=HAS_MASK, DUE=DUE, TILE=TILE)


def interleave(x: Tensor) -> Tensor:
    """Reorder rows of means, then of log stds (..., 2A, .) to mean 0, log std 0, mean 1 and so on."""
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
    """Write sampled policy actions.

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
    lead, width = (1, e, n), 2 * pow2(a, 8)
    grid, inputs, constants = last_layer(x, layer, lead, 2 * a, how=how, slabs=EACH, tile=tile, columns=width)
    if eps.shape != out.shape:
        raise ValueError(f"eps: got shape {tuple(eps.shape)}, allowed: {tuple(out.shape)}")
    if mask is not None and (mask.shape != (e, a) or not mask.is_contiguous()):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, allowed: contiguous ({e}, {a})")
    m, given = e * n, (*inputs, strided(eps[None]), strided(out[None]))
    n, (rows, weights, noise, actions) = (n, given) if mask is not None else flattened(e, n, *given)
    launch(
        policy_layer_kernel, grid, rows, weights, noise, eps if mask is None else mask, actions,
        m, n, layer.weight.shape[-1], a, float(low), float(high), HAS_MASK=mask is not None, **constants,
    )  # fmt: skip


@reference_of(policy_layer)
def policy_layer_reference(
    x: Rows, layer: Layer, eps: Tensor, out: Tensor, how: How, low: float, high: float, mask: Tensor | None
) -> None:
    """Compute `policy_layer` in plain torch."""
    logits = last_layer_reference(x, layer, out.unsqueeze(0), how, EACH)[0]
    plain = torch.cat([logits[..., 0::2], logits[..., 1::2]], -1)
    out.copy_(policy_action(plain, eps.to(out), low, high, None if mask is None else mask.to(out).unsqueeze(1)))
