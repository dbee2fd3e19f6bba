"""Arithmetic on tiles in registers that more than one kernel needs; none of it touches memory but `store_rounded`."""

from __future__ import annotations

from .launch import jit, tl


@jit
def round_bits(x, BITS: tl.constexpr):
    """Round float32 x to nearest without its last BITS bits, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + ((1 << (BITS - 1)) - 1) + ((bits >> BITS) & 1)) & -(1 << BITS)
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@jit
def to_bfloat16(x, INTERPRETED: tl.constexpr):
    """Return x rounded to bfloat16: the interpreter's own cast cuts, so there it is float32 with those numbers."""
    return round_bits(x.to(tl.float32), 16) if INTERPRETED else x.to(tl.bfloat16)


@jit
def operand(x, BFLOAT16: tl.constexpr, TILE: tl.constexpr):
    """Return x as the product takes it: bfloat16, float32, or float32 rounded to tf32.

    Tensor cores cut float32 down to tf32, which errs twice as far and to one side.
    """
    if BFLOAT16:
        x = to_bfloat16(x, TILE.INTERPRETED)
    elif TILE.DOT == "tf32":
        x = x.to(tl.float32)
        if TILE.INTERPRETED:
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
def exponential(x, INTERPRETED: tl.constexpr):
    """Return exp(x) as one multiplication and one instruction; what is below the normal numbers is 0."""
    if INTERPRETED:
        return tl.exp(x)
    scaled = x * 1.4426950408889634
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [scaled], tl.float32, True, 1)


@jit
def quotient(x, y, INTERPRETED: tl.constexpr):
    """Return x / y by the reciprocal of y, which is from 2^-126 to 2^126: within two units in the last place."""
    if INTERPRETED:
        return x / y
    return x * tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], tl.float32, True, 1)


@jit
def mish(x, INTERPRETED: tl.constexpr):
    """Return x tanh(softplus(x)) by one exponential (see activations.mish)."""
    e = exponential(tl.minimum(x, 20.0), INTERPRETED)
    m = e * (e + 2.0)
    return x * quotient(m, m + 2.0, INTERPRETED)


@jit
def simnorm(x, V: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the softmax in groups of V columns: [BM, BK] -> [BM, BK]."""
    BM: tl.constexpr = x.shape[0]
    BK: tl.constexpr = x.shape[1]
    g = tl.reshape(x, (BM, BK // V, V))  # [BM, BK/V, V]
    e = exponential(g - tl.max(g, axis=2, keep_dims=True), INTERPRETED)
    return tl.reshape(quotient(e, tl.sum(e, axis=2, keep_dims=True), INTERPRETED), (BM, BK))


@jit
def tanh(x):
    """Return tanh by one exponential; near 0, where that would cancel, by a polynomial (Cephes, tanhf)."""
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    s = x * x
    p = 2.06390887954e-2 - 5.70498872745e-3 * s
    p = 1.33314422036e-1 + (p * s - 5.37397155531e-2) * s
    near = x + x * s * (p * s - 3.33332819422e-1)
    return tl.where(s < 0.390625, near, tl.where(x < 0, -far, far))


@jit
def symlog(x):
    """Return sign(x) log(1 + |x|)."""
    y = tl.log(1.0 + tl.abs(x))
    return tl.where(x < 0, -y, y)


@jit
def symexp(x):
    """Return sign(x) (exp(|x|) - 1)."""
    y = tl.exp(tl.abs(x)) - 1.0
    return tl.where(x < 0, -y, y)


@jit
def lerp(start, end, weight):
    """Return start + weight (end - start), exactly `end` at weight 1, as torch.lerp."""
    off = end - start
    return tl.where(weight < 0.5, start + weight * off, end - off * (1.0 - weight))


@jit
def clamp(x, low, high):
    """Return x in [low, high]; NaN stays NaN, as in torch."""
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)
