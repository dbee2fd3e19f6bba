"""The last layer of the policy prior down to the sampled action; no logits in memory.

    mean, log_std = act(LN(x[e, r])) Wᵀ + b,    a[e, r] = tanh(mean + eps exp(log_std))

with log_std squashed into its range and dead action dims of a task masked, as `policy_action`.
Rows of W are interleaved (mean 0, log_std 0, mean 1, ...), so that one product gives both and a
program splits them in registers. Cost: 4 A D FLOP a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device.launch import How, await_producers, jit, launch, pow2, tl
from ..device.pointers import flattened, strided
from ..device.reference import reference_of
from .ending import ACTIONS, End, Ending, Ends, store_actions
from .last_layer import last_layer, last_layer_reference
from .linear_tile import logits_on_tile
from .policy_head import policy_action
from .rows import EACH, Layer, Rows
from .tiles import Tile


@jit
def policy_layer_kernel(
    x, w, eps, mask_ptr, y, M, n, K, A, low, high,
    HAS_MASK: tl.constexpr, DUE: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute the actions of BM rows, all 2A <= BN columns; grid (row tiles, 1)."""
    rows, cols = tl.program_id(0) * TILE.BM + tl.arange(0, TILE.BM), tl.arange(0, TILE.BN)
    row_ok = rows < M
    await_producers(PDL)
    logits = logits_on_tile(rows, cols, 0, x, w, row_ok, n, 2 * A, K, DUE, TILE)
    store_actions(logits, A, eps, mask_ptr, y, rows, row_ok, n, low, high, HAS_MASK)


def interleave(x: Tensor) -> Tensor:
    """Reorder rows of means, then of log stds (..., 2A, .) to mean 0, log std 0, mean 1 and so on."""
    a = x.shape[0] // 2
    return x.view(2, a, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def _check_draws(eps: Tensor, out: Tensor, mask: Tensor | None) -> None:
    """Refuse draws or a mask that are none of actions `out` (E, n, A)."""
    e, _, a = out.shape
    if eps.shape != out.shape:
        raise ValueError(f"eps: got shape {tuple(eps.shape)}, allowed: {tuple(out.shape)}")
    if mask is not None and (mask.shape != (e, a) or not mask.is_contiguous()):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, allowed: contiguous ({e}, {a})")


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
    _check_draws(eps, out, mask)
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


@dataclass(frozen=True)
class PolicyEnd(End):
    """A `policy_layer` that a layer may end with; out, eps, low, high and mask as there."""

    eps: Tensor
    low: float
    high: float
    mask: Tensor | None

    def alone(self, x: Rows, how: How) -> None:
        """Launch it alone."""
        given: Any = dict(low=self.low, high=self.high, mask=self.mask)
        policy_layer(x, self.layer, self.eps, self.out, how=how, **given)

    def given(self, rows: tuple[int, int, int, int], tiles: int) -> tuple[Ending, Ends]:
        """Return it as a kernel takes it."""
        _, e, n, _ = rows
        a = self.out.shape[-1]
        w = self._weights(rows, tiles, (e, n, a), 2 * a, EACH)
        _check_draws(self.eps, self.out, self.mask)
        out, eps = strided(self.out[None]), strided(self.eps[None])
        mask = self.eps if self.mask is None else self.mask
        ending = Ending(self.parts, mask, 2 * a, float(self.low), float(self.high), w, out, eps)
        return ending, Ends(ACTIONS, 2 * pow2(a, 8), HAS_MASK=self.mask is not None)
