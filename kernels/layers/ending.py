"""The last layer of a head as the end of the layer before it: no launch of its own, no activation in memory.

    y = act(LN(x Wᵀ + b)),    logits = y Vᵀ + c = sum over column tiles t of y[:, t] V[:, t]ᵀ + c

Each program of a cluster multiplies its tile of y, which it has in registers, by its columns of V. The
parts of the sum pass through L2. After a second wait for its neighbours each program adds up the parts of its
share of the rows, always in the same order, and makes scalars or actions of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..device.arithmetic import symexp, tanh
from ..device.cluster import LARGEST
from ..device.launch import How, Precision, await_neighbours, interpreting, jit, pow2, tl
from ..device.pointers import Strided, entry_ptrs, row_offsets, row_ptrs, slab_of
from .rows import Layer, Rows, Slabs, Weights, packed

NO_END, SCALARS, ACTIONS = 0, 1, 2
"""What logits become."""

_MOST_ROWS = 4096  # With more rows the parts are more to move than the activation, and a launch matters little.
_WIDEST = 128
_MOST_WEIGHTS = 2**16  # bytes of V that a program takes at once

_SCALARS = tl.constexpr(SCALARS)


class Ending(NamedTuple):
    """A last layer that a kernel ends with."""

    parts_ptr: Any
    mask_ptr: Any  # read with `HAS_MASK`
    outputs: Any  # columns of the last layer
    low: Any  # the first bin, or the least log std
    high: Any
    w: Weights
    out: Strided
    eps: Strided  # read for actions


class Ends(NamedTuple):
    """What a layer does with its activation: constants of a kernel."""

    END: int  # NO_END, SCALARS or ACTIONS
    BO: int = 1  # columns of the last layer
    OF_BINS: int = 0
    HAS_MASK: bool = False
    OF_MEMBERS: bool = False  # whether slabs of the last layer are drawn


@dataclass(frozen=True)
class End(ABC):
    """A last layer, and where its results go.

    parts: room for parts of its sums (`room_for_parts`); None for a launch of its own.
    """

    layer: Layer  # packed (S, outputs, D), no LayerNorm
    parts: Tensor | None
    out: Tensor

    @abstractmethod
    def alone(self, x: Rows, how: How) -> None:
        """Launch it alone, on the rows of the layer before."""

    @abstractmethod
    def given(self, rows: tuple[int, int, int, int], tiles: int) -> tuple[Ending, Ends]:
        """Return it as a kernel that ends with it takes it: one of `rows` (G, E, n, D) in so many column tiles."""

    def fits(self, columns: int) -> bool:
        """Tell whether a layer cut into tiles of so many columns may end with it."""
        weights = columns * pow2(self.layer.width, 16) * self.layer.weight.element_size()
        return self.parts is not None and (interpreting() or weights <= _MOST_WEIGHTS)

    def _weights(
        self, rows: tuple[int, int, int, int], tiles: int, out: tuple[int, ...], outputs: int, slabs: Slabs
    ) -> Weights:
        """Return the last layer, if it is one of these rows; out: the shape of its results."""
        groups, e, n, d = rows
        if self.out.shape != out:
            raise ValueError(f"end: got results {tuple(self.out.shape)}, allowed: {out}")
        if self.layer.weight.shape[1:] != (outputs, d):
            raise ValueError(f"end: got a layer {tuple(self.layer.weight.shape[1:])}, allowed: {(outputs, d)}")
        room = groups * tiles * e * n * outputs
        assert self.parts is not None
        if self.parts.numel() < room:
            raise ValueError(f"end: got room for {self.parts.numel()} parts, allowed: at least {room}")
        return packed(self.layer, slabs)


def room_for_parts(rows: int, groups: int, outputs: int, precision: Precision) -> int:
    """Return how many float32 numbers the parts of a last layer take; 0 where it gets a launch of its own.

    Without tensor cores its product takes more registers than there are.
    """
    small = rows <= _MOST_ROWS and pow2(outputs) <= _WIDEST
    return groups * LARGEST * rows * outputs if small and precision.name != "float32" else 0


@jit
def bin_values(cols, K, vmin, vmax):
    """Return the centres of the K bins in columns `cols`, 0 beyond."""
    width = (vmax - vmin) / (K - 1)
    # From the nearer end, as torch.linspace: both ends and the middle are exact.
    bins = tl.where(cols < K // 2, vmin + width * cols, vmax - width * (K - 1 - cols))
    return tl.where(cols < K, bins, 0.0)


@jit
def scalar_of(logits, cols, K, vmin, vmax, BINS: tl.constexpr):
    """Return the scalar that each row of logits [BM, BK] stands for: [BM], and its gradient [BM, BK].

    BINS as `num_bins` in two_hot.py. A gradient that is not used is not computed.
    """
    if BINS > 1:
        logits = tl.where((cols < K)[None, :], logits, float("-inf"))
        p = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        bins = bin_values(cols, K, vmin, vmax)
        total = tl.sum(p, axis=1)
        v = tl.sum(p * bins[None, :], axis=1) / total
        d = tl.exp(tl.abs(v))[:, None] * (p / total[:, None]) * (bins[None, :] - v[:, None])
        return symexp(v), d
    x = tl.sum(tl.where((cols < 1)[None, :], logits, 0.0), axis=1)
    slope = tl.zeros_like(x) + 1.0
    if BINS == 1:
        slope = tl.exp(tl.abs(x))
        x = symexp(x)
    return x, tl.broadcast_to(slope[:, None], (logits.shape[0], logits.shape[1]))


@jit
def store_scalars(logits, cols, K, y, g, rows, row_ok, n, vmin, vmax, BINS: tl.constexpr):
    """Store the scalar of each row of logits [BM, BK]; return their gradients [BM, BK]."""
    scalar, gradient = scalar_of(logits, cols, K, vmin, vmax, BINS)
    tl.store(row_ptrs(y, g, rows, n), scalar, mask=row_ok)
    return gradient


@jit
def store_actions(logits, A, eps, mask_ptr, y, rows, row_ok, n, low, high, HAS_MASK: tl.constexpr):
    """Store the action of each row of logits [BM, 2 BA], which are mean 0, log std 0, mean 1 and so on."""
    BM: tl.constexpr = logits.shape[0]
    BA: tl.constexpr = logits.shape[1] // 2
    center, log_std = tl.split(tl.reshape(logits, (BM, BA, 2)))  # [BM, BA] each
    log_std = low + 0.5 * (high - low) * (tanh(log_std) + 1.0)
    dims = tl.arange(0, BA)
    ok = row_ok[:, None] & (dims < A)[None, :]
    noise = tl.load(entry_ptrs(eps, 0, rows, n, dims), mask=ok, other=0.0)
    if HAS_MASK:
        live = tl.load(mask_ptr + row_offsets(rows, n, A, 0)[:, None] + dims[None, :], mask=ok, other=0.0)
        center, log_std, noise = center * live, log_std * live, noise * live
    action = tanh(center + noise * tl.exp(log_std))
    tl.store(entry_ptrs(y, 0, rows, n, dims), action, mask=ok)


@jit
def end_on_tile(
    y, tile_m, tile_n, g, rows, row_ok, cols, col_ok, end, M, n, D,
    CLUSTER: tl.constexpr, TILES: tl.constexpr, ENDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """End a layer of group g: a tile y [BM, BN] of its activation, as products take it, to results of BM rows."""
    outs = tl.arange(0, ENDS.BO)
    out_ok = outs < end.outputs
    slab = slab_of(end.w.slab, g, ENDS.OF_MEMBERS)
    v_ptrs = end.w.ptr + slab * end.outputs * D + outs[None, :] * D + cols[:, None]
    v = tl.load(v_ptrs, mask=col_ok[:, None] & out_ok[None, :], other=0.0)  # [BN, BO]
    if TILE.INTERPRETED:
        y, v = y.to(tl.float32), v.to(tl.float32)
    part = tl.dot(y, v, input_precision=TILE.DOT)
    parts_ptr = end.parts_ptr + g * CLUSTER * M * end.outputs
    part_ptrs = parts_ptr + (tile_n * M + rows)[:, None] * end.outputs + outs[None, :]
    tl.store(part_ptrs, part, mask=row_ok[:, None] & out_ok[None, :])
    bias = tl.load(end.w.bias_ptr + slab * end.w.bias_s + outs, mask=out_ok, other=0.0)
    await_neighbours(CLUSTER, TILE.INTERPRETED)
    SHARE: tl.constexpr = TILE.BM // TILES
    BO: tl.constexpr = ENDS.BO  # in a shape Triton 3.6 takes names of constants, not fields
    # Where the programs are no power of two, some have two shares.
    for i in tl.static_range((TILES + CLUSTER - 1) // CLUSTER):
        share = tile_n + i * CLUSTER
        own = tile_m * TILE.BM + share * SHARE + tl.arange(0, SHARE)
        own_ok = own < tl.minimum(M, (tile_m + 1) * TILE.BM)
        logits = tl.zeros((SHARE, BO), tl.float32) + bias[None, :]
        for t in tl.static_range(CLUSTER):
            ptrs = parts_ptr + (t * M + own)[:, None] * end.outputs + outs[None, :]
            logits += tl.load(ptrs, mask=own_ok[:, None] & out_ok[None, :], other=0.0, cache_modifier=".cg")
        if ENDS.END == _SCALARS:
            store_scalars(logits, outs, end.outputs, end.out, g, own, own_ok, n, end.low, end.high, ENDS.OF_BINS)
        else:
            store_actions(
                logits, end.outputs // 2, end.eps, end.mask_ptr, end.out, own, own_ok, n, end.low, end.high,
                ENDS.HAS_MASK,
            )  # fmt: skip
