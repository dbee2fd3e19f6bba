"""LayerNorm statistics that pass between kernels: mean and squared deviations of each row's column tiles.

Whoever writes rows leaves them beside; whoever reads the rows merges them (Chan et al.), so that no
program needs a complete row.
"""

from __future__ import annotations

from .launch import jit, tl

LAYER_NORM_EPS = 1e-5

_LN_EPS = tl.constexpr(LAYER_NORM_EPS)


@jit
def merge_statistics(stats_ptrs, row_ok, K, TILE: tl.constexpr, TILES: tl.constexpr, FROM_L2: tl.constexpr = False):
    """Return mean and 1/std of rows of width K from those of their column tiles of width TILE: [BM] each."""
    t = tl.arange(0, TILES)
    count = tl.minimum(tl.maximum(K - t * TILE, 0), TILE).to(tl.float32)[None, :]
    ok = row_ok[:, None] & (count > 0)
    ptrs = stats_ptrs[:, None] + 2 * t[None, :]  # [BM, TILES]
    tile_mean = tl.load(ptrs, mask=ok, other=0.0, cache_modifier=".cg" if FROM_L2 else "")
    tile_m2 = tl.load(ptrs + 1, mask=ok, other=0.0, cache_modifier=".cg" if FROM_L2 else "")
    mean = tl.sum(count * tile_mean, axis=1) / K
    d = tile_mean - mean[:, None]
    var = tl.sum(tile_m2 + count * d * d, axis=1) / K
    return mean, 1.0 / tl.sqrt(var + _LN_EPS)


@jit
def store_statistics(y, stats_ptrs, row_ok, col_ok, tile, D):
    """Store mean and squared deviations of each row of a tile y [BM, BN] of D columns."""
    BN: tl.constexpr = y.shape[1]
    count = tl.minimum(D - tile * BN, BN).to(tl.float32)
    mean = tl.sum(tl.where(col_ok[None, :], y, 0.0), axis=1) / count
    d = tl.where(col_ok[None, :], y - mean[:, None], 0.0)
    ptrs = stats_ptrs + 2 * tile
    tl.store(ptrs, mean, mask=row_ok)
    tl.store(ptrs + 1, tl.sum(d * d, axis=1), mask=row_ok)
