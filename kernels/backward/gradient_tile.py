"""What backward kernels share: the gradient of a layer's product, finished on its way into the next product.

Forward, a layer writes y = x Wᵀ + b and leaves LayerNorm and activation to its readers. Backward it
is the same the other way round. A kernel that computes the gradient of an activation multiplies it
by the activation's derivative and writes h = dL/d(LN(y) γ + β), and for each row and column tile

    s1 = sum h γ,    s2 = sum h γ x̂,      x̂ = (y - mean) rstd.

Its readers, the products with W and with x, merge these and have (Ba et al. 2016)

    dL/dy = rstd (h γ - s1/D - x̂ s2/D).

So no program needs a complete row, and a layer's backward is two launches: dL/dx and dL/dW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device.arithmetic import exponential, quotient, simnorm, store_rounded
from ..device.launch import cdiv, jit, pow2, tl
from ..device.pointers import Strided, entry_ptrs, row_ptrs, slab_of, strided
from ..device.statistics import LAYER_NORM_EPS, merge_statistics
from ..layers.linear_tile import MISH
from ..layers.rows import LEAST_COLUMNS, PLAIN, Keep, Layer, Rows, Source, keeping, padded, source

_CHUNKS = (32, 16)
"""Rows of a step whose shares of db, dγ and dβ are one, where these are computed apart: of few rows, fewer."""


def chunk_rows(n: int, chunks: int) -> int:
    """Return how many of n rows a chunk has, where there are so many."""
    return next(rows for rows in _CHUNKS if cdiv(n, rows) == chunks)


@dataclass(frozen=True)
class Gradient:
    """Gradient of rows, and the LayerNorm that is due before it is read.

    Where `rows` has a LayerNorm, `x` is the gradient of its result and `sums` has s1 and s2 of each
    row's column tiles of width `tile`. Else `x` is the gradient of a layer's product as it is.
    """

    x: Tensor  # (G, E, n, D)
    sums: Tensor | None = None  # (G, E, n, T, 2) float32
    rows: Rows | None = None  # what it is the gradient of
    tile: int = 0
    vectors: Tensor | None = None  # (G, E, chunks, 3, D) float32: db, dγ and dβ of `chunk_rows` each
    columns: int = 0  # of its buffer, 0 from D on, that may be loaded at once; 0: D of them

    @classmethod
    def empty(
        cls, groups: int, envs: int, n: int, width: int, dtype: torch.dtype, device: torch.device, vectors: bool = False
    ) -> Gradient:
        """Make room for gradients and sums, maybe for the vectors of its chunks."""
        x = torch.empty(groups, envs, n, width, dtype=dtype, device=device)
        sums = torch.empty(groups, envs, n, cdiv(width, LEAST_COLUMNS), 2, device=device)
        if not vectors:
            return cls(x, sums)
        many = groups * envs * n * width >= 2**20
        chunks = cdiv(n, _CHUNKS[0] if many else _CHUNKS[1])
        return cls(x, sums, vectors=torch.empty(groups, envs, chunks, 3, width, device=device))

    @classmethod
    def of_logits(
        cls, groups: int, envs: int, n: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> Gradient:
        """Make room for gradients of logits, of any number, in rows that are loaded as those of layers are."""
        columns = padded(width)
        return cls(torch.zeros(groups, envs, n, columns, dtype=dtype, device=device)[..., :width], columns=columns)

    def steps(self, which: slice) -> Gradient:
        """Return some environments (time steps, in an update)."""
        rows = None if self.rows is None else self.rows.steps(which)
        sums, vectors = (None if x is None else x[:, which] for x in (self.sums, self.vectors))
        return Gradient(self.x[:, which], sums, rows, self.tile, vectors, self.columns)

    def products(self) -> Tensor:
        """Compute dL/dy in plain torch, in the type of `x`'s precision: (G, E, n, D)."""
        h = self.x if self.x.dtype == torch.float64 else self.x.float()
        if self.rows is None:
            return h
        y, out, layer = self.rows.x.to(h), torch.empty_like(h), self.rows.layer
        assert layer is not None
        assert layer.ln_weight is not None
        for g, s in enumerate(self.rows.slabs.of(len(h))):
            scaled = h[g] * layer.ln_weight[s].to(h)
            rstd = (y[g].var(-1, unbiased=False, keepdim=True) + LAYER_NORM_EPS).rsqrt()
            xhat = (y[g] - y[g].mean(-1, keepdim=True)) * rstd
            out[g] = rstd * (scaled - scaled.mean(-1, keepdim=True) - xhat * (scaled * xhat).mean(-1, keepdim=True))
        if self.rows.dropout is not None:
            out.mul_(self.rows.dropout.multiplier(len(out), out.dtype))
        return out


def check_gradient(gradient: Gradient, layer: Layer) -> None:
    """Refuse a gradient that is none of this layer's rows."""
    d = layer.width
    if gradient.x.shape[-1] != d or gradient.x.stride(-1) != 1:
        raise ValueError(f"gradient: got shape {tuple(gradient.x.shape)}, allowed: (G, E, n, {d}), last dim contiguous")
    rows = gradient.rows
    if rows is not None and (rows.x.shape != gradient.x.shape or gradient.sums is None or not gradient.tile):
        raise ValueError(f"gradient: got rows {tuple(rows.x.shape)}, allowed: {tuple(gradient.x.shape)}, with sums")
    if gradient.sums is not None and gradient.sums.shape[3] * LEAST_COLUMNS < d:
        raise ValueError(f"gradient: got sums {tuple(gradient.sums.shape)}, allowed: {cdiv(d, LEAST_COLUMNS)} tiles")


class Upstream(NamedTuple):
    """A `Gradient` that a kernel reads: its rows and sums, the rows it is the gradient of, their dropout."""

    columns: Any  # of x, that may be loaded: D, or more that are 0
    x: Strided
    sums: Strided
    rows: Source
    keep: Keep


class UpstreamDue(NamedTuple):
    """What is due on an `Upstream`: constants of a kernel."""

    NORM: bool
    G_TILE: int  # width of the column tiles that sums are of
    G_TILES: int  # their number, to a power of two
    Y_TILE: int  # the same of the statistics of the rows
    Y_TILES: int
    Y_MEMBERS: bool  # whether slabs are drawn
    DROPOUT: bool


def upstream(gradient: Gradient) -> tuple[Upstream, UpstreamDue]:
    """Return how a kernel reads a gradient, and what is due on it."""
    x, rows = gradient.x, gradient.rows
    sums = x if gradient.sums is None else gradient.sums
    reads, due = source(Rows(x) if rows is None else rows)
    dropout = None if rows is None else rows.dropout
    constants = UpstreamDue(
        NORM=due.IN_ACT != PLAIN,
        G_TILE=max(gradient.tile, 1),
        G_TILES=pow2(cdiv(x.shape[-1], gradient.tile)) if gradient.tile else 1,
        Y_TILE=due.IN_TILE,
        Y_TILES=due.IN_TILES,
        Y_MEMBERS=due.IN_MEMBERS,
        DROPOUT=dropout is not None,
    )
    columns = gradient.columns or x.shape[-1]
    return Upstream(columns, strided(x), strided(sums), reads, keeping(dropout, x)), constants


@jit
def merge_sums(ptrs, row_ok, D, TILE: tl.constexpr, TILES: tl.constexpr):
    """Return s1 / D and s2 / D of rows from those of their column tiles: [BM] each."""
    t = tl.arange(0, TILES)
    ok = row_ok[:, None] & (t * TILE < D)[None, :]
    at = ptrs[:, None] + 2 * t[None, :]  # [BM, TILES]
    s1 = tl.sum(tl.load(at, mask=ok, other=0.0), axis=1)
    s2 = tl.sum(tl.load(at + 1, mask=ok, other=0.0), axis=1)
    return s1 / D, s2 / D


@jit
def row_factors(up, g, rows, n, row_ok, D, UP: tl.constexpr):
    """Return mean, 1/std, s1/D and s2/D of rows of group g: [BM] each."""
    mean, rstd = merge_statistics(row_ptrs(up.rows.stats, g, rows, n), row_ok, D, UP.Y_TILE, UP.Y_TILES)
    s1, s2 = merge_sums(row_ptrs(up.sums, g, rows, n), row_ok, D, UP.G_TILE, UP.G_TILES)
    return mean, rstd, s1, s2


@jit
def mish_gradient(x, INTERPRETED: tl.constexpr):
    """Return d/dx x tanh(softplus(x)): with w = m/(m+2), m = e(e+2), e = exp(x), it is w + x 4e(e+1)/(m+2)²."""
    e = exponential(tl.minimum(x, 20.0), INTERPRETED)
    m = e * (e + 2.0)
    w = quotient(1.0, m + 2.0, INTERPRETED)
    return m * w + x * (4.0 * e * (e + 1.0) * w) * w


@jit
def simnorm_gradient(d, x, V: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return gradient d [BM, BK] taken through softmax in groups of V columns of x: p (d - sum p d)."""
    BM: tl.constexpr = x.shape[0]
    BK: tl.constexpr = x.shape[1]
    p = simnorm(x, V, INTERPRETED)
    weighted = tl.reshape(p * d, (BM, BK // V, V))
    total = tl.broadcast_to(tl.sum(weighted, axis=2, keep_dims=True), (BM, BK // V, V))
    return p * (d - tl.reshape(total, (BM, BK)))


@jit
def through_activation(
    d, below, g, rows, n, row_ok, cols, col_ok, tile, width, y, sums, DUE: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Store h, given the gradient d [BM, BN] of act(LN(below)), with the sums of this tile."""
    ok = row_ok[:, None] & col_ok[None, :]
    slab = slab_of(below.slab, g, DUE.IN_MEMBERS)
    mean, rstd = merge_statistics(row_ptrs(below.stats, g, rows, n), row_ok, width, DUE.IN_TILE, DUE.IN_TILES)
    x = tl.load(entry_ptrs(below.x, g, rows, n, cols), mask=ok, other=0.0).to(tl.float32)
    gamma = tl.load(below.gamma_ptr + slab * width + cols, mask=col_ok, other=0.0)
    beta = tl.load(below.beta_ptr + slab * width + cols, mask=col_ok, other=0.0)
    xhat = (x - mean[:, None]) * rstd[:, None]
    x = xhat * gamma[None, :] + beta[None, :]
    h = d * mish_gradient(x, INTERPRETED) if DUE.IN_ACT == MISH else simnorm_gradient(d, x, DUE.V, INTERPRETED)
    store_rounded(entry_ptrs(y, g, rows, n, cols), h, ok, INTERPRETED)
    scaled = tl.where(ok, h * gamma[None, :], 0.0)
    at = row_ptrs(sums, g, rows, n) + 2 * tile
    tl.store(at, tl.sum(scaled, axis=1), mask=row_ok)
    tl.store(at + 1, tl.sum(scaled * xhat, axis=1), mask=row_ok)


@jit
def product_gradient(h, xhat, rstd, s1, s2, gamma):
    """Return dL/dy of a LayerNorm: all [.., ..], or shapes that broadcast."""
    return rstd * (h * gamma - s1 - xhat * s2)
