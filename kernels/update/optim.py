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
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..device.arithmetic import lerp, round_bits, store_rounded
from ..device.launch import (
    PROCESSORS,
    How,
    Precision,
    await_producers,
    cdiv,
    check_tensor,
    interpreting,
    jit,
    launch,
    pow2,
    tl,
)
from ..device.reference import reference_of

_MAX_PARTIALS = 1024
_NORM_BLOCK = 2048
_BLOCK = 1024
_PROGRAMS = 6 * PROCESSORS  # what a chip runs at once: each adds up the norm anew

WORLD_EPS, POLICY_EPS = 1e-8, 1e-5
"""`Rates.eps` of the world model and of the policy."""


class FlatParameters(NamedTuple):
    """Parameters of one optimiser in flat buffers, and all that Adam keeps of them: float32 unless said, contiguous."""

    param: Tensor  # (N,)
    grad: Tensor  # (N,)
    exp_avg: Tensor  # (N,) first moment
    exp_avg_sq: Tensor  # (N,) second moment
    partials: Tensor  # (P,) sums of squares of the gradient; see `new_partials`
    step: Tensor  # (1,) int64, steps begun, those that are masked included
    shadow: Tensor | None = None  # (N,) `precision.operand(param)`; None at float32, where that is `param`

    @classmethod
    def zeros(cls, size: int, precision: Precision, device: torch.device) -> FlatParameters:
        """Make buffers for `size` parameters, all 0."""
        param, grad, exp_avg, exp_avg_sq = (torch.zeros(size, device=device) for _ in range(4))
        step = torch.zeros(1, dtype=torch.int64, device=device)
        return cls(param, grad, exp_avg, exp_avg_sq, new_partials(grad), step, new_shadow(param, precision))


class FlatTarget(NamedTuple):
    """A moving average of consecutive parameters: it moves towards `param[at : at + M]` of an optimiser."""

    param: Tensor  # (M,) float32, contiguous
    at: int
    tau: float  # how far it moves, 0 to 1
    shadow: Tensor | None = None  # (M,) `precision.operand(param)`, where the optimiser has one


class Outcome(NamedTuple):
    """How a step went."""

    flag: Tensor  # (1,) int64; out: `code` if it was 0 and the norm is not finite, else as it was
    norm: Tensor  # out: (1,) float32, before clipping
    code: int  # not 0


@dataclass(frozen=True)
class Rates:
    """How far a step goes."""

    lr: float
    eps: float  # added to the root of the second moment
    max_norm: float  # the gradient is scaled down to this norm
    head: int = 0  # parameters from the first on, 0 to N, that have a rate of their own
    head_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)  # decay of both moments, each between 0 and 1


@jit
def squared_norm_kernel(grad_ptr, partials_ptr, step_ptr, n, blocks, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Add up the squares of `blocks` blocks; grid (P,). Lanes add up first, the tree over lanes comes last."""
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
    """Store x as products take it, without its last BITS bits, or in bfloat16.

    Ties go to even, as on the host; `cvt.rna.tf32` would send them away from 0.
    """
    store_rounded(ptrs, round_bits(x, BITS) if BITS else x, mask, INTERPRETED)


@jit
def adam_kernel(
    flat,
    target,
    outcome,
    n,
    partials,
    target_n,
    head,
    lr,
    head_lr,
    eps,
    max_norm,
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
    """Step BLOCK elements at a time, in turn with the other programs; grid (programs,).

    flat, target, outcome: as of `adam_step`.
    """
    await_producers(PDL)
    p = tl.arange(0, BP)
    norm = tl.sqrt_rn(tl.sum(tl.load(flat.partials + p, mask=p < partials, other=0.0), 0))
    fails = (norm < float("inf")) == 0  # true for NaN
    # Program 0 may write the flag while others read it, and that is no race: it writes only where the
    # norm is not finite, and there every program finds the same norm and stops whatever it has read.
    # Where the norm is finite nobody writes, and all read the same.
    flag = tl.load(outcome.flag)
    if tl.program_id(0) == 0:
        tl.store(outcome.norm, norm)
        if fails & (flag == 0):
            tl.store(outcome.flag, outcome.code)
    if (fails == 0) & (flag == 0):
        clip = tl.minimum(tl.div_rn(max_norm, norm + 1e-6), 1.0)
        # The powers in float64: 1 - 0.999^t keeps no more than four digits in float32.
        t = tl.load(flat.step).to(tl.float64)
        correction1 = 1.0 - tl.exp(t * tl.full((), LOG_BETA1, tl.float64))
        correction2 = 1.0 - tl.exp(t * tl.full((), LOG_BETA2, tl.float64))
        size = (lr / correction1).to(tl.float32)
        head_size = (head_lr / correction1).to(tl.float32)
        root2 = tl.sqrt(correction2).to(tl.float32)
        for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
            i = start + tl.arange(0, BLOCK).to(tl.int64)
            ok = i < n
            g = tl.load(flat.grad + i, mask=ok, other=0.0) * clip
            m = tl.load(flat.exp_avg + i, mask=ok, other=0.0)
            v = tl.load(flat.exp_avg_sq + i, mask=ok, other=0.0)
            x = tl.load(flat.param + i, mask=ok, other=0.0)
            m += (g - m) * (1.0 - BETA1)
            v = v * BETA2 + g * g * (1.0 - BETA2)
            x -= tl.where(i < head, head_size, size) * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root2) + eps)
            tl.store(flat.exp_avg + i, m, mask=ok)
            tl.store(flat.exp_avg_sq + i, v, mask=ok)
            tl.store(flat.param + i, x, mask=ok)
            if SHADOW:
                store_shadow(tl.max_contiguous(flat.shadow + i, 4), x, ok, BITS, INTERPRETED)
            if TARGET:
                j = i - target.at
                own = (j >= 0) & (j < target_n)
                y = lerp(tl.load(target.param + j, mask=own, other=0.0), x, target.tau)
                tl.store(target.param + j, y, mask=own)
                if SHADOW:
                    store_shadow(tl.max_contiguous(target.shadow + j, 4), y, own, BITS, INTERPRETED)


def _check_flat(grad: Tensor, partials: Tensor, step: Tensor) -> None:
    """Refuse a gradient, or what its norm goes into, that the kernels would read or write wrongly."""
    if grad.ndim != 1 or not 0 < grad.numel() < 2**31 - _BLOCK * _PROGRAMS:
        raise ValueError(f"grad: got shape {tuple(grad.shape)}, allowed: (N,), N from 1 to about 2**31")
    check_tensor("grad", grad, tuple(grad.shape), grad)
    if partials.ndim != 1 or not 1 <= partials.numel() <= _MAX_PARTIALS:
        raise ValueError(f"partials: got shape {tuple(partials.shape)}, allowed: (P,), P from 1 to {_MAX_PARTIALS}")
    check_tensor("partials", partials, tuple(partials.shape), grad)
    check_tensor("step", step, (1,), grad, torch.int64)


def _check_step(flat: FlatParameters, rates: Rates, target: FlatTarget | None, outcome: Outcome, how: How) -> None:
    """Refuse what `adam_step` would do wrongly."""
    grad = flat.grad
    _check_flat(grad, flat.partials, flat.step)
    (n,) = grad.shape
    for name in ("param", "exp_avg", "exp_avg_sq"):
        check_tensor(name, getattr(flat, name), (n,), grad)
    check_tensor("flag", outcome.flag, (1,), grad, torch.int64)
    check_tensor("norm_out", outcome.norm, (1,), grad)
    if not 0 <= rates.head <= n:
        raise ValueError(f"head: got {rates.head}, allowed: 0 to {n}")
    if not all(0 < beta < 1 for beta in rates.betas):
        raise ValueError(f"betas: got {rates.betas}, allowed: between 0 and 1")
    if outcome.code == 0:
        raise ValueError("code: got 0, allowed: any other, 0 says that nothing failed")
    shadows = [("shadow", flat.shadow, flat.param)]
    if target is not None:
        x = target.param
        if x.ndim != 1 or not 0 <= target.at <= n - x.numel():
            got = f"shape {tuple(x.shape)} at {target.at}"
            raise ValueError(f"target: got {got}, allowed: (M,) inside ({n},)")
        check_tensor("target", x, tuple(x.shape), grad)
        shadows.append(("target_shadow", target.shadow, x))
    wanted = flat.shadow is not None and how.precision.name != "float32"
    for name, copy, of in shadows:
        if (copy is not None) != wanted:
            allowed = "a tensor" if wanted else "None: float32, or what it shadows is not there"
            raise ValueError(f"{name}: got {'None' if copy is None else 'a tensor'}, allowed: {allowed}")
        if copy is not None:
            check_tensor(name, copy, tuple(of.shape), grad, how.precision.dtype)


def new_partials(grad: Tensor) -> Tensor:
    """Make the `partials` for a gradient (N,): as many programs as its size needs, whatever the chip."""
    return grad.new_empty(min(_MAX_PARTIALS, cdiv(grad.numel(), _NORM_BLOCK)))


def new_shadow(param: Tensor, precision: Precision) -> Tensor | None:
    """Make room for parameters (N,) as operands of products; None at float32, where they are that."""
    return None if precision.name == "float32" else torch.zeros_like(param, dtype=precision.dtype)


def squared_norm(grad: Tensor, partials: Tensor, step: Tensor, *, pdl: bool = False) -> None:
    """Add up the squares of consecutive slices of a gradient, and count one step.

    Args:
        grad: (N,) float32.
        partials: out: (P,) float32, P up to 1024; see `new_partials`.
        step: (1,) int64, 1 is added.
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
        num_warps=4,
    )


@reference_of(squared_norm)
def squared_norm_reference(grad: Tensor, partials: Tensor, step: Tensor) -> None:
    """Do as `squared_norm` in plain torch, in the type of the arguments."""
    n, p = grad.numel(), partials.numel()
    size = cdiv(cdiv(n, _NORM_BLOCK), p) * _NORM_BLOCK
    padded = torch.nn.functional.pad(grad, (0, p * size - n))
    partials.copy_(padded.view(p, size).square().sum(1))
    step += 1


def adam_step(flat: FlatParameters, rates: Rates, target: FlatTarget | None, outcome: Outcome, *, how: How) -> None:
    """Take one clipped step of Adam and what follows it, in place and in one launch after `squared_norm`.

    Where the norm is not finite, or the flag is not 0, only the outcome is written.

    Args:
        flat: what is trained; the gradient is left as it is: not zeroed, not clipped.
        rates: how far the step goes.
        target: what moves towards the new parameters, if anything does.
        outcome: where it says how the step went.
        how: the precision of the shadows, and programmatic dependent launch.

    Raises:
        ValueError: a tensor of another shape, type or layout; an argument out of range.
    """
    _check_step(flat, rates, target, outcome, how)
    n, partials = flat.grad.numel(), flat.partials.numel()
    launch(
        adam_kernel,
        (min(cdiv(n, _BLOCK), _PROGRAMS),),
        flat,
        target,
        outcome,
        n,
        partials,
        0 if target is None else target.param.numel(),
        rates.head,
        float(rates.lr),
        float(rates.head_lr),
        float(rates.eps),
        float(rates.max_norm),
        BETA1=rates.betas[0],
        BETA2=rates.betas[1],
        LOG_BETA1=math.log(rates.betas[0]),
        LOG_BETA2=math.log(rates.betas[1]),
        SHADOW=flat.shadow is not None,
        TARGET=target is not None,
        BITS=13 if how.precision.name == "tf32" else 0,
        BP=pow2(partials),
        BLOCK=_BLOCK,
        INTERPRETED=interpreting(),
        pdl=how.pdl,
        num_warps=4,
    )


@reference_of(adam_step)
def adam_step_reference(
    flat: FlatParameters, rates: Rates, target: FlatTarget | None, outcome: Outcome, how: How
) -> None:
    """Do as `adam_step` in plain torch, in the type of the arguments."""
    param, exp_avg, exp_avg_sq = flat.param, flat.exp_avg, flat.exp_avg_sq
    flag, norm, code = outcome
    norm.copy_(flat.partials.sum().sqrt())
    if flag == 0 and not norm.isfinite():
        flag.fill_(code)
    if flag != 0:
        return
    g = flat.grad * (rates.max_norm / (norm + 1e-6)).clamp(max=1.0)
    beta1, beta2 = rates.betas
    correction1, correction2 = (1 - beta ** float(flat.step) for beta in rates.betas)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = exp_avg_sq.sqrt() / math.sqrt(correction2) + rates.eps
    head = rates.head
    for part, rate in ((slice(None, head), rates.head_lr), (slice(head, None), rates.lr)):
        param[part].addcdiv_(exp_avg[part], denominator[part], value=-rate / correction1)
    if flat.shadow is not None:
        flat.shadow.copy_(how.precision.operand(param))
    if target is not None:
        target.param.lerp_(param[target.at : target.at + target.param.numel()], target.tau)
        if target.shadow is not None:
            target.shadow.copy_(how.precision.operand(target.param))
