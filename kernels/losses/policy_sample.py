"""The policy head on logits, forward for learning, and backward: one launch each (paper, eq. 5).

    a = tanh(mean + eps exp(log_std)),    log_prob and scaled entropy as in policy_head.py

Backward takes the gradient of the critics' sum to the action, adds that of the entropy, and ends at
the logits. The loss of a row is -(q / scale + entropy_coef * scaled_entropy) with a weight by its
time step; what reached the action is linear in the weight, so it is multiplied only here, when the
running scale is known. Cost: a few reads and writes of (rows, A).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.launch import cdiv, interpreting, jit, launch, pow2, tl
from ..layers.grouped_layer import strided
from ..layers.linear_tile import await_producers, row_ptrs, store_rounded
from ..layers.policy_head import LOG_SQRT_2PI, policy_head
from ..layers.policy_layer import tanh

_LOG_SQRT_2PI = tl.constexpr(LOG_SQRT_2PI)
_ELEMENTS = 512


@jit
def gaussian_on_tile(
    logits, eps, live, rows, n, row_ok, A, low, high, HAS_MASK: tl.constexpr, BM: tl.constexpr, BA: tl.constexpr
):
    """Mean, log std, its squashed logit, noise and live dims of rows: [BM, BA] each."""
    dims = tl.arange(0, BA)[None, :]
    ok = row_ok[:, None] & (dims < A)
    at = row_ptrs(logits, 0, rows, n)[:, None] + dims
    mean = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    squashed = tanh(tl.load(at + A, mask=ok, other=0.0).to(tl.float32))
    noise = tl.load(row_ptrs(eps, 0, rows, n)[:, None] + dims, mask=ok, other=0.0)
    alive = ok.to(tl.float32)
    if HAS_MASK:
        alive = tl.load(row_ptrs(live, 0, rows, n)[:, None] + dims, mask=ok, other=0.0)
    log_std = (low + 0.5 * (high - low) * (squashed + 1.0)) * alive
    return mean * alive, log_std, squashed, noise * alive, alive


@jit
def log_probs(noise, log_std, action, ok):
    """Gaussian log-probability and squash correction of rows: [BM] each."""
    gaussian = tl.sum(tl.where(ok, -0.5 * noise * noise - log_std - _LOG_SQRT_2PI, 0.0), axis=1)
    room = tl.maximum(1.0 - action * action, 0.0) + 1e-6
    return gaussian, tl.sum(tl.where(ok, tl.log(room), 0.0), axis=1)


@jit
def policy_sample_kernel(
    logits,
    eps,
    live,
    action,
    log_prob,
    entropy,
    M,
    n,
    A,
    low,
    high,
    HAS_MASK: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BM: tl.constexpr,
    BA: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """BM rows; grid (row tiles,)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok, dims = rows < M, tl.arange(0, BA)[None, :]
    ok = row_ok[:, None] & (dims < A)
    await_producers(PDL)
    mean, log_std, _, noise, alive = gaussian_on_tile(
        logits, eps, live, rows, n, row_ok, A, low, high, HAS_MASK, BM, BA
    )
    a = tanh(mean + noise * tl.exp(log_std))
    store_rounded(row_ptrs(action, 0, rows, n)[:, None] + dims, a, ok, INTERPRETED)
    if HAS_ENTROPY:
        gaussian, correction = log_probs(noise, log_std, a, ok)
        corrected = gaussian - correction
        dims_live = tl.sum(alive, axis=1)
        tl.store(row_ptrs(log_prob, 0, rows, n), corrected, mask=row_ok)
        scaled = -corrected * (gaussian * dims_live / (corrected + 1e-8))
        tl.store(row_ptrs(entropy, 0, rows, n), scaled, mask=row_ok)


@jit
def logits_gradient(mean, log_std, squashed, noise, alive, ok, low, high, to_action, to_log_prob, to_entropy):
    """From gradients of action [BM, BA], log-probability and scaled entropy [BM] to those of both logits: [BM, BA]."""
    std = tl.exp(log_std)
    a = tanh(mean + noise * std)
    gaussian, correction = log_probs(noise, log_std, a, ok)
    corrected = gaussian - correction
    dims_live = tl.sum(alive, axis=1)
    # scaled entropy = -c g k / (c + 1e-8) with c = g - correction: its derivatives to g and to c.
    shifted = corrected + 1e-8
    to_corrected = -gaussian * dims_live * 1e-8 / (shifted * shifted)
    to_gaussian = to_corrected - corrected * dims_live / shifted
    room = 1.0 - a * a
    bent = tl.where(room > 0, 2.0 * a / (tl.maximum(room, 0.0) + 1e-6), 0.0)
    to_action += (to_log_prob + to_entropy * to_corrected)[:, None] * bent
    to_sample = to_action * room
    to_log_std = to_sample * noise * std - (to_log_prob + to_entropy * to_gaussian)[:, None]
    return to_sample * alive, to_log_std * alive * (0.5 * (high - low)) * (1.0 - squashed * squashed)


@jit
def policy_gradient_kernel(
    logits,
    eps,
    live,
    d_action,
    weight_ptr,
    scale_ptr,
    d,
    M,
    n,
    A,
    low,
    high,
    entropy_coef,
    HAS_MASK: tl.constexpr,
    BM: tl.constexpr,
    BA: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """BM rows; grid (row tiles,)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok, dims = rows < M, tl.arange(0, BA)[None, :]
    ok = row_ok[:, None] & (dims < A)
    await_producers(PDL)
    mean, log_std, squashed, noise, alive = gaussian_on_tile(
        logits, eps, live, rows, n, row_ok, A, low, high, HAS_MASK, BM, BA
    )
    weight = -tl.load(weight_ptr + rows // n, mask=row_ok, other=0.0)
    to_action = tl.load(row_ptrs(d_action, 0, rows, n)[:, None] + dims, mask=ok, other=0.0)
    # The mean of two critics, over the running scale.
    to_action *= (weight * 0.5 / tl.load(scale_ptr))[:, None]
    to_mean, to_logit = logits_gradient(
        mean, log_std, squashed, noise, alive, ok, low, high, to_action, 0.0, weight * entropy_coef
    )
    at = row_ptrs(d, 0, rows, n)[:, None] + dims
    store_rounded(at, to_mean, ok, INTERPRETED)
    store_rounded(at + A, to_logit, ok, INTERPRETED)


def rows_tile(rows: int, a: int) -> tuple[int, int]:
    """Rows of a program, and its columns for A dims."""
    width = pow2(a, 4)
    return (min(pow2(rows), 1024) if interpreting() else max(_ELEMENTS // width, 1)), width


def check_sample(logits: Tensor, eps: Tensor, mask: Tensor | None, others: dict[str, Tensor | None]) -> None:
    """Refuse shapes that are not of one sample; `others`: (E, n, ...)."""
    e, n, a = eps.shape
    if logits.shape != (1, e, n, 2 * a) or logits.stride(-1) != 1 or eps.stride(-1) != 1:
        got = f"{tuple(logits.shape)} and {tuple(eps.shape)}"
        raise ValueError(f"logits and eps: got {got}, allowed: (1, E, n, 2A) and (E, n, A)")
    if mask is not None and (mask.shape != (n, a) or mask.stride(-1) != 1):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, allowed: ({n}, {a})")
    for name, x in others.items():
        if x is not None and x.shape[:2] != (e, n):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, allowed: ({e}, {n}, ...)")


def policy_sample(
    logits: Tensor,
    eps: Tensor,
    mask: Tensor | None,
    action: Tensor,
    log_prob: Tensor | None = None,
    scaled_entropy: Tensor | None = None,
    *,
    low: float,
    high: float,
    pdl: bool = False,
) -> None:
    """Sampled actions, and what the policy loss needs of them, written in place.

    Args:
        logits: (1, E, n, 2A): means, then log stds before squashing.
        eps: (E, n, A) standard normal, float32.
        mask: (n, A) of 0/1, live action dims of each row, float32, or None.
        action: out: (E, n, A), any float type and strides but the last.
        log_prob, scaled_entropy: out: (E, n) float32, or None for both.
        low, high: range of the log std.
        pdl: programmatic dependent launch.
    """
    check_sample(logits, eps, mask, dict(action=action, log_prob=log_prob, scaled_entropy=scaled_entropy))
    e, n, a = eps.shape
    bm, ba = rows_tile(e * n, a)
    launch(
        policy_sample_kernel,
        (cdiv(e * n, bm),),
        strided(logits),
        strided(eps[None]),
        strided(eps[None] if mask is None else mask.expand(1, e, n, a)),
        strided(action[None]),
        strided((eps[..., 0] if log_prob is None else log_prob)[None]),
        strided((eps[..., 0] if scaled_entropy is None else scaled_entropy)[None]),
        e * n,
        n,
        a,
        float(low),
        float(high),
        HAS_MASK=mask is not None,
        HAS_ENTROPY=log_prob is not None,
        BM=bm,
        BA=ba,
        INTERPRETED=interpreting(),
        pdl=pdl,
        num_warps=4,
    )


def policy_gradient(
    logits: Tensor,
    eps: Tensor,
    mask: Tensor | None,
    d_action: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor,
    *,
    low: float,
    high: float,
    entropy_coef: float,
    pdl: bool = False,
) -> None:
    """Gradient of the policy loss to the logits, written in place.

    Args:
        logits, eps, mask: as `policy_sample` was given them.
        d_action: (E, n, A) float32, of the sum of both critics to the action.
        weight: (E,) float32, of each step's rows in the loss.
        scale: (1,) float32, the running scale.
        out: (1, E, n, 2A).
        low, high: range of the log std.
        entropy_coef: weight of the scaled entropy.
        pdl: programmatic dependent launch.
    """
    check_sample(logits, eps, mask, dict(d_action=d_action))
    e, n, a = eps.shape
    if out.shape != logits.shape or out.stride(-1) != 1 or weight.shape != (e,):
        raise ValueError(
            f"out and weight: got {tuple(out.shape)} and {tuple(weight.shape)}, allowed: as logits, ({e},)"
        )
    bm, ba = rows_tile(e * n, a)
    launch(
        policy_gradient_kernel,
        (cdiv(e * n, bm),),
        strided(logits),
        strided(eps[None]),
        strided(eps[None] if mask is None else mask.expand(1, e, n, a)),
        strided(d_action[None]),
        weight,
        scale,
        strided(out),
        e * n,
        n,
        a,
        float(low),
        float(high),
        float(entropy_coef),
        HAS_MASK=mask is not None,
        BM=bm,
        BA=ba,
        INTERPRETED=interpreting(),
        pdl=pdl,
        num_warps=4,
    )


def policy_sample_reference(
    logits: Tensor,
    eps: Tensor,
    mask: Tensor | None,
    action: Tensor,
    log_prob: Tensor | None = None,
    scaled_entropy: Tensor | None = None,
    *,
    low: float,
    high: float,
    pdl: bool = False,
) -> None:
    """`policy_sample` in plain torch."""
    del pdl
    out = policy_head(logits[0], eps.to(logits), low, high, None if mask is None else mask.to(logits))
    action.copy_(out.action)
    if log_prob is not None and scaled_entropy is not None:
        log_prob.copy_(out.log_prob.squeeze(-1))
        scaled_entropy.copy_(out.scaled_entropy.squeeze(-1))


def policy_gradient_reference(
    logits: Tensor,
    eps: Tensor,
    mask: Tensor | None,
    d_action: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor,
    *,
    low: float,
    high: float,
    entropy_coef: float,
    pdl: bool = False,
) -> None:
    """`policy_gradient` in plain torch, by autograd."""
    del pdl
    leaf = logits[0].detach().clone().requires_grad_()
    with torch.enable_grad():
        found = policy_head(leaf, eps.to(leaf), low, high, None if mask is None else mask.to(leaf))
        q = (found.action * d_action.to(leaf)).sum(-1, keepdim=True) / 2
        loss = -(weight.to(leaf)[:, None, None] * (q / scale.to(leaf) + entropy_coef * found.scaled_entropy)).sum()
        (d,) = torch.autograd.grad(loss, leaf)
    out.copy_(d[None])
