"""The last layer of reward, critics and termination, down to a scalar; no logits in memory.

    s[g, e, r] = two_hot_inv(act(LN(x[g, e, r])) W[s]ᵀ + b[s])      (paper, section 3.1)
    ∂s/∂logits = exp(|v|) p (bins - v),    p = softmax(logits),  v = sum p bins,  s = symexp(v)

One program has all K bins of its rows, so softmax and expectation stay in registers. The gradient
is for the policy loss, which goes through critics that are constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..device.arithmetic import store_rounded
from ..device.launch import How, await_producers, jit, launch, pow2, tl
from ..device.pointers import entry_ptrs, flattened, strided
from ..device.reference import reference_of
from .ending import SCALARS, End, Ending, Ends, store_scalars
from .last_layer import last_layer, last_layer_reference
from .linear_tile import logits_on_tile
from .rows import EACH, Layer, Rows, Slabs
from .tiles import Tile
from .two_hot import Code, two_hot_inv


@jit
def scalar_head_kernel(
    x, w, y, M, n, D, K, vmin, vmax, d,
    DUE: tl.constexpr, MEMBERS: tl.constexpr, BINS: tl.constexpr, GRADIENT: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Reduce BM rows of one group, all D <= BN columns; grid (row tiles, groups)."""
    g = tl.program_id(1).to(tl.int64)
    rows, cols = tl.program_id(0) * TILE.BM + tl.arange(0, TILE.BM), tl.arange(0, TILE.BN)
    row_ok = rows < M
    await_producers(PDL)
    logits = logits_on_tile(rows, cols, g, x, w, row_ok, n, D, K, DUE, TILE, MEMBERS=MEMBERS)
    gradient = store_scalars(logits, cols, D, y, g, rows, row_ok, n, vmin, vmax, BINS)
    if GRADIENT:
        ok = row_ok[:, None] & (cols < D)[None, :]
        store_rounded(entry_ptrs(d, g, rows, n, cols), gradient, ok, TILE.INTERPRETED)


def scalar_head(
    x: Rows,
    layer: Layer,
    out: Tensor,
    *,
    how: How,
    code: Code,
    slabs: Slabs = EACH,
    gradient: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Write the scalars of every group.

    Args:
        x: (G or 1, E, n, K) rows; an activation due is applied.
        layer: packed (S, max(bins, 1), K), no LayerNorm.
        out: (G, E, n) float32, contiguous in its last dim.
        how: precision of the product, and whether the launch may start early.
        code: what the logits stand for; 0 bins give the logit itself.
        slabs: slab of `layer` of each group.
        gradient: out: (G, E, n, max(bins, 1)), of each scalar to its logits; None for none.
        tile: None takes the table's.
    """
    groups, e, n = out.shape
    d, k = layer.weight.shape[1:]
    grid, inputs, constants = last_layer(
        x, layer, (groups, e, n), max(code.num_bins, 1), how=how, slabs=slabs, tile=tile
    )
    if gradient is not None and (gradient.shape != (groups, e, n, d) or gradient.stride(-1) != 1):
        raise ValueError(f"gradient: got shape {tuple(gradient.shape)}, allowed: {(groups, e, n, d)}")
    m, given = e * n, (*inputs, strided(out), strided(x.x if gradient is None else gradient))
    n, (rows, weights, scalars, slopes) = flattened(e, n, *given)
    launch(
        scalar_head_kernel, grid, rows, weights, scalars, m, n, d, k, float(code.vmin), float(code.vmax), slopes,
        MEMBERS=slabs.members is not None, BINS=min(code.num_bins, 2), GRADIENT=gradient is not None, **constants,
    )  # fmt: skip


@reference_of(scalar_head)
def scalar_head_reference(
    x: Rows, layer: Layer, out: Tensor, how: How, code: Code, slabs: Slabs, gradient: Tensor | None
) -> None:
    """Compute `scalar_head` in plain torch, its gradient by autograd."""
    logits = last_layer_reference(x, layer, out, how, slabs).requires_grad_(gradient is not None)
    with torch.set_grad_enabled(gradient is not None):
        value = two_hot_inv(logits, *code)
    out.copy_(value.detach().squeeze(-1))
    if gradient is not None:
        gradient.copy_(torch.autograd.grad(value.sum(), logits)[0])


@dataclass(frozen=True)
class ScalarEnd(End):
    """A `scalar_head` that a layer may end with; out, code and slabs as there."""

    code: Code
    slabs: Slabs = EACH

    def alone(self, x: Rows, how: How) -> None:
        """Launch it alone."""
        scalar_head(x, self.layer, self.out, how=how, code=self.code, slabs=self.slabs)

    def given(self, rows: tuple[int, int, int, int], tiles: int) -> tuple[Ending, Ends]:
        """Return it as a kernel takes it."""
        outputs, out = max(self.code.num_bins, 1), strided(self.out)
        w = self._weights(rows, tiles, rows[:3], outputs, self.slabs)
        ending = Ending(self.parts, self.out, outputs, float(self.code.vmin), float(self.code.vmax), w, out, out)
        members = self.slabs.members is not None
        return ending, Ends(SCALARS, pow2(outputs, 16), OF_BINS=min(self.code.num_bins, 2), OF_MEMBERS=members)
