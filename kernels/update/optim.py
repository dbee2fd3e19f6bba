"""Gradient norm, clipping, Adam and Polyak averages over flat buffers, in two launches.

All parameters of an optimiser lie in one buffer, and so do their gradients and moments:

    norm = sqrt(sum grad²)                   g = grad min(1, max_norm / (norm + 1e-6))
    m = m + (1 - β1)(g - m)                  v = β2 v + (1 - β2) g²
    param -= lr / (1 - β1^t) m / (sqrt(v) / sqrt(1 - β2^t) + eps)
    target = target + tau (param - target)

`squared_norm` leaves one partial sum a program; in `adam_step` every program adds these up anew, in
the same order, so that no launch lies between. It also writes the *shadow*, the parameters as the
tensor-core products take them, so that no pass over them follows.

Programs take blocks of 1024 elements in turn. Bytes an element: 4 for the norm; 28 for Adam, 2 or 4
more for the shadow, 8 for a target (and its shadow's). No arithmetic counts beside these. Loads are
vectors where the number of elements (and `target_at`) is a multiple of 16.

A gradient that is not finite changes nothing: the update is masked and `flag` set on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..device.arithmetic import lerp, round_bits, store_rounded
from ..device.launch import Precision, await_producers, cdiv, check_tensor, interpreting, jit, launch, pow2, tl

_MAX_PARTIALS = 1024
_NORM_BLOCK = 2048
_BLOCK = 1024
# What a chip of 132 multiprocessors runs at once, at 16 programs each.
_PROGRAMS = 2112


@jit
def squared_norm_kernel(grad_ptr, partials_ptr, step_ptr, n, blocks, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Sum of squares of `blocks` blocks; grid (P,). Lanes add up first, the tree over lanes comes last."""
    await_producers(PDL)
    p = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    first = p.to(tl.int64) * blocks
    for block in range(blocks):
        i = (first + block) * BLOCK + lane
        g = tl.load(grad_ptr + i, mask=i < n, other=0.0)
        total += g * g
    tl.store(partials_ptr + p, tl.sum(total, 0))
    if p == 0:
        tl.store(step_ptr, tl.load(step_ptr) + 1)


@jit
def store_shadow(ptrs, x, mask, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Store x as products take it: without its last BITS bits, or in bfloat16.

    Ties go to even, as on the host; `cvt.rna.tf32` would send them away from 0.
    """
    store_rounded(ptrs, round_bits(x, BITS) if BITS else x, mask, INTERPRETED)


@jit
def adam_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    partials_ptr,
    step_ptr,
    flag_ptr,
    norm_ptr,
    shadow_ptr,
    target_ptr,
    target_shadow_ptr,
    n,
    partials,
    head,
    target_at,
    target_n,
    lr,
    head_lr,
    eps,
    max_norm,
    tau,
    code,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    SHADOW: tl.constexpr,
    TARGET: tl.constexpr,
    BITS: tl.constexpr,
    BP: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Blocks of BLOCK elements, in turn with the other programs; grid (programs,)."""
    await_producers(PDL)
    p = tl.arange(0, BP)
    norm = tl.sqrt_rn(tl.sum(tl.load(partials_ptr + p, mask=p < partials, other=0.0), 0))
    fails = (norm < float("inf")) == 0  # true for NaN
    # Program 0 may write the flag while others read it, and that is no race: it writes only where the
    # norm is not finite, and there every program finds the same norm and stops whatever it has read.
    # Where the norm is finite nobody writes, and all read the same.
    flag = tl.load(flag_ptr)
    if tl.program_id(0) == 0:
        tl.store(norm_ptr, norm)
        if fails & (flag == 0):
            tl.store(flag_ptr, code)
    if (fails == 0) & (flag == 0):
        clip = tl.minimum(tl.div_rn(max_norm, norm + 1e-6), 1.0)
        # The powers in float64: 1 - 0.999^t keeps no more than four digits in float32.
        t = tl.load(step_ptr).to(tl.float64)
        correction1 = 1.0 - tl.exp(t * tl.full((), LOG_BETA1, tl.float64))
        correction2 = 1.0 - tl.exp(t * tl.full((), LOG_BETA2, tl.float64))
        size = (lr / correction1).to(tl.float32)
        head_size = (head_lr / correction1).to(tl.float32)
        root2 = tl.sqrt(correction2).to(tl.float32)
        for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
            i = start + tl.arange(0, BLOCK).to(tl.int64)
            ok = i < n
            g = tl.load(grad_ptr + i, mask=ok, other=0.0) * clip
            m = tl.load(exp_avg_ptr + i, mask=ok, other=0.0)
            v = tl.load(exp_avg_sq_ptr + i, mask=ok, other=0.0)
            x = tl.load(param_ptr + i, mask=ok, other=0.0)
            m += (g - m) * (1.0 - BETA1)
            v = v * BETA2 + g * g * (1.0 - BETA2)
            x -= tl.where(i < head, head_size, size) * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root2) + eps)
            tl.store(exp_avg_ptr + i, m, mask=ok)
            tl.store(exp_avg_sq_ptr + i, v, mask=ok)
            tl.store(param_ptr + i, x, mask=ok)
            if SHADOW:
                store_shadow(shadow_ptr + i, x, ok, BITS, INTERPRETED)
            if TARGET:
                j = i - target_at
                own = (j >= 0) & (j < target_n)
                y = lerp(tl.load(target_ptr + j, mask=own, other=0.0), x, tau)
                tl.store(target_ptr + j, y, mask=own)
                if SHADOW:
                    store_shadow(target_shadow_ptr + j, y, own, BITS, INTERPRETED)


def _check_flat(grad: Tensor, partials: Tensor, step: Tensor) -> None:
    if grad.ndim != 1 or not 0 < grad.numel() < 2**31 - _BLOCK * _PROGRAMS:
        raise ValueError(f"grad: got shape {tuple(grad.shape)}, allowed: (N,), N from 1 to about 2**31")
    check_tensor("grad", grad, tuple(grad.shape), grad)
    if partials.ndim != 1 or not 1 <= partials.numel() <= _MAX_PARTIALS:
        raise ValueError(f"partials: got shape {tuple(partials.shape)}, allowed: (P,), P from 1 to {_MAX_PARTIALS}")
    check_tensor("partials", partials, tuple(partials.shape), grad)
    check_tensor("step", step, (1,), grad, torch.int64)


def _check_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    partials: Tensor,
    step: Tensor,
    flag: Tensor,
    norm_out: Tensor,
    head: int,
    betas: tuple[float, float],
    code: int,
    shadow: Tensor | None,
    target: Tensor | None,
    target_shadow: Tensor | None,
    target_at: int,
    precision: Precision,
) -> None:
    _check_flat(grad, partials, step)
    (n,) = grad.shape
    for name, x in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_tensor(name, x, (n,), grad)
    check_tensor("flag", flag, (1,), grad, torch.int64)
    check_tensor("norm_out", norm_out, (1,), grad)
    if not 0 <= head <= n:
        raise ValueError(f"head: got {head}, allowed: 0 to {n}")
    if not all(0 < beta < 1 for beta in betas):
        raise ValueError(f"betas: got {betas}, allowed: between 0 and 1")
    if code == 0:
        raise ValueError("code: got 0, allowed: any other, 0 says that nothing failed")
    if target is not None:
        if target.ndim != 1 or not 0 <= target_at <= n - target.numel():
            got = f"shape {tuple(target.shape)} at {target_at}"
            raise ValueError(f"target: got {got}, allowed: (M,) inside ({n},)")
        check_tensor("target", target, tuple(target.shape), grad)
    shadows = (("shadow", shadow, param), ("target_shadow", target_shadow, target))
    for name, copy, of in shadows:
        wanted = of is not None and shadow is not None and precision.name != "float32"
        if (copy is not None) != wanted:
            allowed = "a tensor" if wanted else "None: float32, or what it shadows is not there"
            raise ValueError(f"{name}: got {'None' if copy is None else 'a tensor'}, allowed: {allowed}")
        if copy is not None and of is not None:
            check_tensor(name, copy, tuple(of.shape), grad, precision.dtype)


def new_partials(grad: Tensor) -> Tensor:
    """The `partials` for a gradient (N,): as many programs as its size needs, whatever the chip."""
    return grad.new_empty(min(_MAX_PARTIALS, cdiv(grad.numel(), _NORM_BLOCK)))


def squared_norm(grad: Tensor, partials: Tensor, step: Tensor, *, pdl: bool = False) -> None:
    """Sums of squares of consecutive slices of a gradient, and one step counted.

    Args:
        grad: (N,) float32.
        partials: out: (P,) float32, P up to 1024; see `new_partials`.
        step: (1,) int64, 1 is added. It counts steps begun, those that are masked included.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: a tensor of another shape, type or layout.
    """
    _check_flat(grad, partials, step)
    n, p = grad.numel(), partials.numel()
    launch(
        squared_norm_kernel,
        (p,),
        grad,
        partials,
        step,
        n,
        cdiv(cdiv(n, _NORM_BLOCK), p),
        BLOCK=_NORM_BLOCK,
        pdl=pdl,
        num_warps=8,
    )


def squared_norm_reference(grad: Tensor, partials: Tensor, step: Tensor, *, pdl: bool = False) -> None:
    """`squared_norm` in plain torch, in the type of its arguments."""
    n, p = grad.numel(), partials.numel()
    size = cdiv(cdiv(n, _NORM_BLOCK), p) * _NORM_BLOCK
    padded = torch.nn.functional.pad(grad, (0, p * size - n))
    partials.copy_(padded.view(p, size).square().sum(1))
    step += 1


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    partials: Tensor,
    step: Tensor,
    flag: Tensor,
    norm_out: Tensor,
    *,
    lr: float,
    head_lr: float,
    head: int,
    eps: float,
    max_norm: float,
    code: int,
    precision: Precision,
    betas: tuple[float, float] = (0.9, 0.999),
    shadow: Tensor | None = None,
    target: Tensor | None = None,
    target_shadow: Tensor | None = None,
    target_at: int = 0,
    tau: float = 0.0,
    pdl: bool = False,
) -> None:
    """One clipped step of Adam and what follows it, in place and in one launch after `squared_norm`.

    Where the norm is not finite, or `flag` is not 0, only `norm_out` and `flag` are written.

    Args:
        param: (N,) parameters.
        grad: (N,), left as it is: not zeroed, not clipped.
        exp_avg: (N,) first moment.
        exp_avg_sq: (N,) second moment.
        partials: (P,) of this gradient.
        step: (1,) int64, the number of this step from 1 on, as `squared_norm` counts.
        flag: (1,) int64; `code` if it was 0 and the norm is not finite, else as it was.
        norm_out: out: (1,), the norm before clipping.
        lr: learning rate.
        head_lr: that of the first `head` parameters.
        head: 0 to N.
        eps: added to the root of the second moment.
        max_norm: the gradient is scaled down to this norm.
        code: what `flag` becomes, not 0.
        precision: of the shadows.
        betas: decay of both moments, each between 0 and 1.
        shadow: out: (N,) `precision.operand(param)`; None for float32, which is its own.
        target: (M,), moves towards param[target_at : target_at + M].
        target_shadow: out: (M,) `precision.operand(target)`; goes with shadow and target.
        target_at: 0 to N - M.
        tau: how far, 0 to 1.
        pdl: programmatic dependent launch.

    All float32 unless said, contiguous, on one device.

    Raises:
        ValueError: a tensor of another shape, type or layout; an argument out of range.
    """
    # fmt: off
    _check_step(
        param, grad, exp_avg, exp_avg_sq, partials, step, flag, norm_out, head, betas, code, shadow, target,
        target_shadow, target_at, precision,
    )
    # fmt: on
    n = grad.numel()
    launch(
        adam_kernel,
        (min(cdiv(n, _BLOCK), _PROGRAMS),),
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        partials,
        step,
        flag,
        norm_out,
        param if shadow is None else shadow,  # stands where nothing is written
        param if target is None else target,
        param if target_shadow is None else target_shadow,
        n,
        partials.numel(),
        head,
        target_at,
        0 if target is None else target.numel(),
        float(lr),
        float(head_lr),
        float(eps),
        float(max_norm),
        float(tau),
        code,
        BETA1=betas[0],
        BETA2=betas[1],
        LOG_BETA1=math.log(betas[0]),
        LOG_BETA2=math.log(betas[1]),
        SHADOW=shadow is not None,
        TARGET=target is not None,
        BITS=13 if precision.name == "tf32" else 0,
        BP=pow2(partials.numel()),
        BLOCK=_BLOCK,
        INTERPRETED=interpreting(),
        pdl=pdl,
        num_warps=4,
    )


def adam_step_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    partials: Tensor,
    step: Tensor,
    flag: Tensor,
    norm_out: Tensor,
    *,
    lr: float,
    head_lr: float,
    head: int,
    eps: float,
    max_norm: float,
    code: int,
    precision: Precision,
    betas: tuple[float, float] = (0.9, 0.999),
    shadow: Tensor | None = None,
    target: Tensor | None = None,
    target_shadow: Tensor | None = None,
    target_at: int = 0,
    tau: float = 0.0,
    pdl: bool = False,
) -> None:
    """`adam_step` in plain torch, in the type of its arguments."""
    norm_out.copy_(partials.sum().sqrt())
    if flag == 0 and not norm_out.isfinite():
        flag.fill_(code)
    if flag != 0:
        return
    g = grad * (max_norm / (norm_out + 1e-6)).clamp(max=1.0)
    correction1, correction2 = (1 - beta ** float(step) for beta in betas)
    exp_avg.lerp_(g, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    denominator = exp_avg_sq.sqrt() / math.sqrt(correction2) + eps
    for part, rate in ((slice(None, head), head_lr), (slice(head, None), lr)):
        param[part].addcdiv_(exp_avg[part], denominator[part], value=-rate / correction1)
    if shadow is not None:
        shadow.copy_(precision.operand(param))
    if target is not None:
        target.lerp_(param[target_at : target_at + target.numel()], tau)
        if target_shadow is not None:
            target_shadow.copy_(precision.operand(target))
