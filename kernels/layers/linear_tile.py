"""One tile of act(LN(x)) Wᵀ + b, the device code under all layers of the world model.

One layer spreads over the whole chip, and no program has a complete row. Each leaves statistics of
its tile of the rows (device/statistics.py). Then a layer either *finishes*: the programs of a row are
a cluster, wait for each other, merge the statistics, and store the activation as its readers' products
take it. Or it stores the *pre-activation*, and each reader merges, normalises and activates on its way
into the product: right where every row has one reader, as on a CPU. Sums, norms and activations are float32.
"""

from __future__ import annotations

from ..device.arithmetic import mish, operand, simnorm, store_rounded, to_bfloat16
from ..device.launch import await_neighbours, jit, tl
from ..device.pointers import entry_ptrs, row_offsets, row_ptrs, slab_of
from ..device.statistics import merge_statistics, store_statistics
from .ending import end_on_tile
from .rows import MISH as _MISH_ACT

MISH = tl.constexpr(_MISH_ACT)


@jit
def activate(x, mean, rstd, gamma, beta, ACT: tl.constexpr, V: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return act(LN(x)): x [BM, BK], mean and rstd [BM], gamma and beta [BK]."""
    x = (x - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
    if ACT == MISH:
        return mish(x, INTERPRETED)
    return simnorm(x, V, INTERPRETED)


@jit
def dropped(x, keep, g, rows, n, ok, cols):
    """Return x [BM, BN] of group g with dropout, which groups before the first are spared."""
    drops = (rows * 0 + g >= keep.first)[:, None]
    kept = tl.load(entry_ptrs(keep.rows, g - keep.first, rows, n, cols), mask=ok & drops, other=1)
    return tl.where(kept != 0, x * tl.where(drops, keep.scale, 1.0), 0.0)


@jit
def add_product(
    acc, source, g, rows, n, row_ok, w_ptr, cols, col_ok, K,
    DUE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return acc + act(LN(x)) Wᵀ for rows [BM] of group g of a `Source` and rows cols [BN] of W (., K)."""
    BFLOAT16: tl.constexpr = w_ptr.dtype.element_ty == tl.bfloat16
    x_ptrs = row_ptrs(source.x, g, rows, n)
    if DUE.IN_ACT:
        stats_ptrs = row_ptrs(source.stats, g, rows, n)
        mean, rstd = merge_statistics(stats_ptrs, row_ok, K, DUE.IN_TILE, DUE.IN_TILES)
        in_slab = slab_of(source.slab, g, DUE.IN_MEMBERS)
        gamma_ptr, beta_ptr = source.gamma_ptr + in_slab * K, source.beta_ptr + in_slab * K
    for start in range(0, K, TILE.BK):
        k = start + tl.arange(0, TILE.BK)
        k_ok = k < K
        x_mask = row_ok[:, None] if TILE.EVEN_K else row_ok[:, None] & k_ok[None, :]
        w_mask = col_ok[None, :] if TILE.EVEN_K else col_ok[None, :] & k_ok[:, None]
        x = tl.load(x_ptrs[:, None] + k[None, :], mask=x_mask, other=0.0)  # [BM, BK]
        if DUE.IN_ACT:
            gamma = tl.load(gamma_ptr + k, mask=k_ok, other=0.0)
            beta = tl.load(beta_ptr + k, mask=k_ok, other=0.0)
            x = activate(x.to(tl.float32), mean, rstd, gamma, beta, DUE.IN_ACT, DUE.V, TILE.INTERPRETED)
        if not DUE.READY:
            x = operand(x, BFLOAT16, TILE)
        # Beyond K a SimNorm group is 1/V, not 0: W is 0 there.
        w = tl.load(w_ptr + cols[None, :] * K + k[:, None], mask=w_mask, other=0.0)  # [BK, BN]
        if TILE.INTERPRETED:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=TILE.DOT)
    return acc


@jit
def add_small_product(
    acc, a_ptrs, row_ok, w_ptr, cols, col_ok, A, BA: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Return acc + a Wᵀ for a narrow float32 input a (., A), the action or the task embedding; W (., A)."""
    BFLOAT16: tl.constexpr = w_ptr.dtype.element_ty == tl.bfloat16
    for start in range(0, A, BA):
        k = start + tl.arange(0, BA)
        k_ok = k < A
        a_ok = row_ok[:, None] & k_ok[None, :]
        a = tl.load(a_ptrs[:, None] + k[None, :], mask=a_ok, other=0.0)
        w = tl.load(w_ptr + cols[None, :] * A + k[:, None], mask=col_ok[None, :] & k_ok[:, None], other=0.0)
        a = operand(a, BFLOAT16, TILE)
        if TILE.INTERPRETED:
            w = w.to(tl.float32)
        acc = tl.dot(a, w, acc, input_precision=TILE.DOT)
    return acc


@jit
def prefetch_weights(w_ptr, cols, D, K, LINES: tl.constexpr):
    """Ask for rows `cols` of a weight (D, K) to be brought to L2 while the kernel before this one ends.

    Weights are no kernel's output, so this needs no waiting. LINES lines of 128 bytes a row.
    """
    element: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
    line = tl.arange(0, LINES) * (128 // element)
    inside = tl.minimum(cols, D - 1)[:, None] * K + tl.minimum(line, K - 1)[None, :]  # [BN, LINES]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [(w_ptr + inside).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@jit
def layer_on_tile(
    tile_m, tile_n, g, x, w, a, y, stats, active, exact, end, M, n, D, K, A, keep,
    HAS_X: tl.constexpr, HAS_SIDE: tl.constexpr, ENV_BIAS: tl.constexpr, DUE: tl.constexpr, MEMBERS: tl.constexpr,
    DROPOUT: tl.constexpr, FINISH: tl.constexpr, ENDS: tl.constexpr, TILE: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """Compute one tile [BM, BN] of group g of a layer: products, bias, dropout, store, and what FINISH says.

    x: `Source`; w: `Weights`; a, y, stats, active, exact: `Strided`; keep: `Keep`, unread without DROPOUT; end:
    `Ending`, unread without ENDS.
    """
    rows = tile_m * TILE.BM + tl.arange(0, TILE.BM)
    cols = tile_n * TILE.BN + tl.arange(0, TILE.BN)
    row_ok, col_ok = rows < M, cols < D
    slab = slab_of(w.slab, g, MEMBERS)
    bias_ptr = w.bias_ptr + slab * w.bias_s
    if ENV_BIAS:
        bias_rows = row_offsets(rows, n, w.bias_e, 0)
        bias_ok = row_ok[:, None] & col_ok[None, :]
        bias = tl.load(bias_ptr + bias_rows[:, None] + cols[None, :], mask=bias_ok, other=0.0)  # [BM, BN]
    else:
        bias = tl.load(bias_ptr + cols, mask=col_ok, other=0.0)[None, :]  # [1, BN]
    BM: tl.constexpr = TILE.BM  # in a shape Triton 3.6 takes names of constants, not fields
    BN: tl.constexpr = TILE.BN
    acc = tl.zeros((BM, BN), tl.float32)
    if HAS_X:
        w_ptr = w.ptr + slab * D * K
        acc = add_product(acc, x, g, rows, n, row_ok, w_ptr, cols, col_ok, K, DUE, TILE)
    # Second: a sum that begins with another product has each step wait for the one before.
    if HAS_SIDE:
        a_ptrs, side_ptr = row_ptrs(a, g, rows, n), w.side_ptr + slab * D * A
        acc = add_small_product(acc, a_ptrs, row_ok, side_ptr, cols, col_ok, A, BA, TILE)
    acc += bias
    if DROPOUT:
        acc = dropped(acc, keep, g, rows, n, row_ok[:, None] & col_ok[None, :], cols)
    ok, stats_ptrs = row_ok[:, None] & col_ok[None, :], row_ptrs(stats, g, rows, n)
    if FINISH.KEEP:
        # Statistics are of what is stored: where a row hardly varies, LayerNorm makes much of the difference.
        if y.ptr.dtype.element_ty == tl.bfloat16:
            acc = to_bfloat16(acc, TILE.INTERPRETED).to(tl.float32)
        store_rounded(entry_ptrs(y, g, rows, n, cols), acc, ok, TILE.INTERPRETED)
    store_statistics(acc, stats_ptrs, row_ok, col_ok, tile_n, D)
    if FINISH.ACT:
        gamma = tl.load(w.gamma_ptr + slab * D + cols, mask=col_ok, other=0.0)
        beta = tl.load(w.beta_ptr + slab * D + cols, mask=col_ok, other=0.0)
        await_neighbours(FINISH.CLUSTER, TILE.INTERPRETED)
        mean, rstd = merge_statistics(stats_ptrs, row_ok, D, BN, FINISH.TILES, FROM_L2=True)
        done = activate(acc, mean, rstd, gamma, beta, FINISH.ACT, FINISH.V, TILE.INTERPRETED)
        if FINISH.EXACT:
            store_rounded(entry_ptrs(exact, g, rows, n, cols), done, ok, TILE.INTERPRETED)
        if FINISH.STORE:
            done = operand(done, active.ptr.dtype.element_ty == tl.bfloat16, TILE)
        if ENDS.END:
            end_on_tile(
                done, tile_m, tile_n, g, rows, row_ok, cols, col_ok, end, M, n, D,
                CLUSTER=FINISH.CLUSTER, TILES=FINISH.TILES, ENDS=ENDS, TILE=TILE,
            )  # fmt: skip
        elif FINISH.STORE:
            store_rounded(entry_ptrs(active, g, rows, n, cols), done, ok, TILE.INTERPRETED)


@jit
def logits_on_tile(
    rows, cols, g, x, w, row_ok, n, D, K,
    DUE: tl.constexpr, TILE: tl.constexpr, MEMBERS: tl.constexpr = False,
):  # fmt: skip
    """Return all D <= BN outputs of a last layer for BM rows of group g: [BM, BN]."""
    col_ok = cols < D
    slab = slab_of(w.slab, g, MEMBERS)
    BM: tl.constexpr = TILE.BM  # in a shape Triton 3.6 takes names of constants, not fields
    BN: tl.constexpr = TILE.BN
    logits, w_ptr = tl.zeros((BM, BN), tl.float32), w.ptr + slab * D * K
    logits = add_product(logits, x, g, rows, n, row_ok, w_ptr, cols, col_ok, K, DUE, TILE)
    return logits + tl.load(w.bias_ptr + slab * w.bias_s + cols, mask=col_ok, other=0.0)[None, :]
