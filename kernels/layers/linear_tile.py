"""One tile of act(LN(x)) Wᵀ + b, the device code under all layers of the world model.

A layer writes its *pre-activation* and, for each row and each tile of columns, mean and sum of
squared deviations. The layer that reads it merges these (Chan et al.) into the row's LayerNorm
statistics, then normalises and activates each block on its way into the product. So no program
needs a complete row, one layer spreads over the whole chip, and a layer is one launch.

Rows are addressed as (environment, row of that environment), each with its own stride; a
stride of 0 shares one row among all. Sums, norms and activations are float32.
"""

from typing import Any, NamedTuple

from ..device.launch import jit, tl
from .normed_linear import LAYER_NORM_EPS

# What a reader does to the rows: nothing, or LayerNorm and then Mish or SimNorm.
PLAIN, MISH, SIMNORM = 0, 1, 2

_LN_EPS = tl.constexpr(LAYER_NORM_EPS)
_MISH = tl.constexpr(MISH)
_PLAIN = tl.constexpr(PLAIN)


class Strided(NamedTuple):
    """A buffer's rows: element strides over group, environment and row of that environment."""

    ptr: Any
    g: Any
    e: Any
    r: Any


class Slab(NamedTuple):
    """Slab of group g of a packed layer: base + step g, or base + members[step g]."""

    members_ptr: Any
    base: Any
    step: Any


class Source(NamedTuple):
    """Rows that are read, and the statistics and parameters of a LayerNorm that is due before."""

    x: Strided
    stats: Strided
    gamma_ptr: Any
    beta_ptr: Any
    slab: Slab


class Weights(NamedTuple):
    """A packed layer; its bias has strides over slab and environment."""

    ptr: Any
    side_ptr: Any
    bias_ptr: Any
    bias_s: Any
    bias_e: Any
    slab: Slab


class Keep(NamedTuple):
    """Dropout: which entries stay (bytes, 0 or 1), their factor, and the group it begins with."""

    rows: Strided
    scale: Any
    first: Any


@jit
def round_bits(x, BITS: tl.constexpr):
    """float32 x to nearest without its last BITS bits, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + ((1 << (BITS - 1)) - 1) + ((bits >> BITS) & 1)) & -(1 << BITS)
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@jit
def operand(x, BFLOAT16: tl.constexpr, DOT: tl.constexpr, INTERPRETED: tl.constexpr):
    """x as the product takes it: bfloat16, float32, or float32 rounded to tf32.

    Tensor cores cut float32 down to tf32, which errs twice as far and to one side. The
    interpreter's own cast to bfloat16 cuts, too.
    """
    if BFLOAT16:
        x = round_bits(x.to(tl.float32), 16) if INTERPRETED else x.to(tl.bfloat16)
    elif DOT == "tf32":
        x = x.to(tl.float32)
        if INTERPRETED:
            x = round_bits(x, 13)
        else:
            x = tl.inline_asm_elementwise(
                "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
            )
    return x


@jit
def store_rounded(ptrs, x, mask, INTERPRETED: tl.constexpr):
    """Store float32 x in the type of the buffer."""
    if INTERPRETED and ptrs.dtype.element_ty == tl.bfloat16:
        x = round_bits(x, 16)
    tl.store(ptrs, x, mask=mask)


@jit
def mish(x):
    """x tanh(softplus(x)) by one exponential (see activations.mish)."""
    e = tl.exp(tl.minimum(x, 20.0))
    m = e * (e + 2.0)
    return x * (m / (m + 2.0))


@jit
def simnorm(x, V: tl.constexpr):
    """Softmax in groups of V columns: [BM, BK] -> [BM, BK]."""
    BM: tl.constexpr = x.shape[0]
    BK: tl.constexpr = x.shape[1]
    g = tl.reshape(x, (BM, BK // V, V))  # [BM, BK/V, V]
    e = tl.exp(g - tl.max(g, axis=2, keep_dims=True))
    return tl.reshape(e / tl.sum(e, axis=2, keep_dims=True), (BM, BK))


@jit
def row_offsets(rows, n, e_stride, r_stride):
    """Element offsets of rows 0..E*n: environment rows // n, its row rows % n; int64."""
    e = rows // n
    return e.to(tl.int64) * e_stride + (rows - e * n).to(tl.int64) * r_stride


@jit
def row_ptrs(buffer, g, rows, n):
    """Pointers to rows of group g of a `Strided` buffer: [BM]."""
    return buffer.ptr + g * buffer.g + row_offsets(rows, n, buffer.e, buffer.r)


@jit
def slab_of(slab, g, HAS_MEMBERS: tl.constexpr):
    """Slab of group g, int64."""
    if HAS_MEMBERS:
        return slab.base + tl.load(slab.members_ptr + slab.step * g)
    return tl.full((), slab.base, tl.int64) + slab.step * g


@jit
def dropped(x, keep, g, rows, n, ok, cols):
    """x [BM, BN] of group g with dropout, which groups before the first are spared."""
    drops = (rows * 0 + g >= keep.first)[:, None]
    kept = tl.load(row_ptrs(keep.rows, g - keep.first, rows, n)[:, None] + cols[None, :], mask=ok & drops, other=1)
    return tl.where(kept != 0, x * tl.where(drops, keep.scale, 1.0), 0.0)


@jit
def merge_statistics(stats_ptrs, row_ok, K, TILE: tl.constexpr, TILES: tl.constexpr, FROM_L2: tl.constexpr = False):
    """Mean and 1/std of rows of width K from those of their column tiles of width TILE: [BM] each."""
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
def activate(x, mean, rstd, gamma, beta, ACT: tl.constexpr, V: tl.constexpr):
    """act(LN(x)): x [BM, BK], mean and rstd [BM], gamma and beta [BK]."""
    x = (x - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
    if ACT == _MISH:
        return mish(x)
    return simnorm(x, V)


@jit
def add_product(
    acc,
    source,
    g,
    rows,
    n,
    row_ok,
    w_ptr,
    cols,
    col_ok,
    K,
    IN_ACT: tl.constexpr,
    V: tl.constexpr,
    IN_TILE: tl.constexpr,
    IN_TILES: tl.constexpr,
    IN_MEMBERS: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    FROM_L2: tl.constexpr = False,
):
    """acc + act(LN(x)) Wᵀ for rows [BM] of group g of a `Source` and rows cols [BN] of W (., K)."""
    BFLOAT16: tl.constexpr = w_ptr.dtype.element_ty == tl.bfloat16
    x_ptrs = row_ptrs(source.x, g, rows, n)
    if IN_ACT != _PLAIN:
        stats_ptrs = row_ptrs(source.stats, g, rows, n)
        mean, rstd = merge_statistics(stats_ptrs, row_ok, K, IN_TILE, IN_TILES, FROM_L2)
        in_slab = slab_of(source.slab, g, IN_MEMBERS)
        gamma_ptr, beta_ptr = source.gamma_ptr + in_slab * K, source.beta_ptr + in_slab * K
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        k_ok = k < K
        x_mask = row_ok[:, None] if EVEN_K else row_ok[:, None] & k_ok[None, :]
        w_mask = col_ok[None, :] if EVEN_K else col_ok[None, :] & k_ok[:, None]
        x = tl.load(
            x_ptrs[:, None] + k[None, :], mask=x_mask, other=0.0, cache_modifier=".cg" if FROM_L2 else ""
        )  # [BM, BK]
        if IN_ACT != _PLAIN:
            gamma = tl.load(gamma_ptr + k, mask=k_ok, other=0.0)
            beta = tl.load(beta_ptr + k, mask=k_ok, other=0.0)
            x = activate(x.to(tl.float32), mean, rstd, gamma, beta, IN_ACT, V)
        x = operand(x, BFLOAT16, DOT, INTERPRETED)
        # Beyond K a SimNorm group is 1/V, not 0: W is 0 there.
        w = tl.load(w_ptr + cols[None, :] * K + k[:, None], mask=w_mask, other=0.0)  # [BK, BN]
        if INTERPRETED:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=DOT)
    return acc


@jit
def add_small_product(
    acc,
    a_ptrs,
    row_ok,
    w_ptr,
    cols,
    col_ok,
    A,
    BA: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    FROM_L2: tl.constexpr = False,
):
    """acc + a Wᵀ for a narrow float32 input a (., A), the action or the task embedding; W (., A)."""
    BFLOAT16: tl.constexpr = w_ptr.dtype.element_ty == tl.bfloat16
    for start in range(0, A, BA):
        k = start + tl.arange(0, BA)
        k_ok = k < A
        a_ok = row_ok[:, None] & k_ok[None, :]
        a = tl.load(a_ptrs[:, None] + k[None, :], mask=a_ok, other=0.0, cache_modifier=".cg" if FROM_L2 else "")
        w = tl.load(w_ptr + cols[None, :] * A + k[:, None], mask=col_ok[None, :] & k_ok[:, None], other=0.0)
        a = operand(a, BFLOAT16, DOT, INTERPRETED)
        if INTERPRETED:
            w = w.to(tl.float32)
        acc = tl.dot(a, w, acc, input_precision=DOT)
    return acc


@jit
def store_with_statistics(y, y_ptrs, stats_ptrs, row_ok, cols, col_ok, tile, D, INTERPRETED: tl.constexpr):
    """Store pre-activations y [BM, BN], and mean and squared deviations of this tile of each row.

    Statistics are of what is stored: where a row hardly varies, LayerNorm makes much of the difference.
    """
    BN: tl.constexpr = y.shape[1]
    y = operand(y, y_ptrs.dtype.element_ty == tl.bfloat16, "ieee", INTERPRETED).to(tl.float32)
    store_rounded(y_ptrs[:, None] + cols[None, :], y, row_ok[:, None] & col_ok[None, :], INTERPRETED)
    count = tl.minimum(D - tile * BN, BN).to(tl.float32)
    mean = tl.sum(tl.where(col_ok[None, :], y, 0.0), axis=1) / count
    d = tl.where(col_ok[None, :], y - mean[:, None], 0.0)
    ptrs = stats_ptrs + 2 * tile
    tl.store(ptrs, mean, mask=row_ok)
    tl.store(ptrs + 1, tl.sum(d * d, axis=1), mask=row_ok)


@jit
def await_producers(PDL: tl.constexpr):
    """Let the next kernel start, then wait for all before this one (programmatic dependent launch)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit
def prefetch_weights(w_ptr, cols, D, K, LINES: tl.constexpr):
    """Ask for rows `cols` of a weight (D, K) to be brought to L2: while the kernel before this one ends.

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
    tile_m,
    tile_n,
    g,
    x,
    w,
    a,
    y,
    stats,
    M,
    n,
    D,
    K,
    A,
    HAS_X: tl.constexpr,
    HAS_SIDE: tl.constexpr,
    ENV_BIAS: tl.constexpr,
    IN_ACT: tl.constexpr,
    V: tl.constexpr,
    IN_TILE: tl.constexpr,
    IN_TILES: tl.constexpr,
    IN_MEMBERS: tl.constexpr,
    MEMBERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BA: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    FROM_L2: tl.constexpr = False,
    keep=None,
    DROPOUT: tl.constexpr = False,
):
    """One tile [BM, BN] of group g of a layer: products, bias, dropout, store with statistics.

    x: `Source`; w: `Weights`; a, y, stats: `Strided`; keep: `Keep`.
    """
    rows = tile_m * BM + tl.arange(0, BM)
    cols = tile_n * BN + tl.arange(0, BN)
    row_ok, col_ok = rows < M, cols < D
    slab = slab_of(w.slab, g, MEMBERS)
    bias_ptr = w.bias_ptr + slab * w.bias_s
    if ENV_BIAS:
        bias_rows = row_offsets(rows, n, w.bias_e, 0)
        bias_ok = row_ok[:, None] & col_ok[None, :]
        bias = tl.load(bias_ptr + bias_rows[:, None] + cols[None, :], mask=bias_ok, other=0.0)  # [BM, BN]
    else:
        bias = tl.load(bias_ptr + cols, mask=col_ok, other=0.0)[None, :]  # [1, BN]
    acc = tl.zeros((BM, BN), tl.float32)
    # fmt: off
    if HAS_SIDE:
        acc = add_small_product(
            acc, row_ptrs(a, g, rows, n), row_ok, w.side_ptr + slab * D * A, cols, col_ok, A, BA, DOT, INTERPRETED,
            FROM_L2,
        )
    if HAS_X:
        acc = add_product(
            acc, x, g, rows, n, row_ok, w.ptr + slab * D * K, cols, col_ok, K, IN_ACT, V, IN_TILE, IN_TILES,
            IN_MEMBERS, BK, EVEN_K, DOT, INTERPRETED, FROM_L2,
        )
    # fmt: on
    acc += bias
    if DROPOUT:
        acc = dropped(acc, keep, g, rows, n, row_ok[:, None] & col_ok[None, :], cols)
    y_ptrs, stats_ptrs = row_ptrs(y, g, rows, n), row_ptrs(stats, g, rows, n)
    store_with_statistics(acc, y_ptrs, stats_ptrs, row_ok, cols, col_ok, tile_n, D, INTERPRETED)
