"""Backward of the policy head on logits for gradients of any loss: action, log-probability and scaled entropy.

The mathematics are those of `policy_gradient`, whose loss is the policy's; here all three gradients
arrive from outside. Noise and mask are constants. Cost: reads and writes of (rows, A).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.launch import cdiv, interpreting, jit, launch, tl
from ..layers.grouped_layer import strided
from ..layers.linear_tile import await_producers, row_ptrs, store_rounded
from ..layers.policy_head import policy_head
from .policy_sample import check_sample, gaussian_on_tile, logits_gradient, rows_tile


@jit
def policy_sample_gradient_kernel(
    logits,
    eps,
    live,
    d_action,
    d_log_prob,
    d_entropy,
    d,
    M,
    n,
    A,
    low,
    high,
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
    to_action = tl.load(row_ptrs(d_action, 0, rows, n)[:, None] + dims, mask=ok, other=0.0)
    to_log_prob = tl.load(row_ptrs(d_log_prob, 0, rows, n), mask=row_ok, other=0.0)
    to_entropy = tl.load(row_ptrs(d_entropy, 0, rows, n), mask=row_ok, other=0.0)
    to_mean, to_logit = logits_gradient(
        mean, log_std, squashed, noise, alive, ok, low, high, to_action, to_log_prob, to_entropy
    )
    at = row_ptrs(d, 0, rows, n)[:, None] + dims
    store_rounded(at, to_mean, ok, INTERPRETED)
    store_rounded(at + A, to_logit, ok, INTERPRETED)


def policy_sample_gradient(
    logits: Tensor,
    eps: Tensor,
    mask: Tensor | None,
    d_action: Tensor,
    d_log_prob: Tensor,
    d_entropy: Tensor,
    out: Tensor,
    *,
    low: float,
    high: float,
    pdl: bool = False,
) -> None:
    """Gradient of the logits, written in place.

    Args:
        logits, eps, mask: as `policy_sample` was given them.
        d_action: (E, n, A) float32, contiguous in the last dim.
        d_log_prob, d_entropy: (E, n) float32, of log-probability and scaled entropy.
        out: (1, E, n, 2A), any float type.
        low, high: range of the log std.
        pdl: programmatic dependent launch.
    """
    check_sample(logits, eps, mask, dict(d_action=d_action, d_log_prob=d_log_prob, d_entropy=d_entropy))
    e, n, a = eps.shape
    if out.shape != logits.shape or out.stride(-1) != 1 or d_action.shape != eps.shape or d_action.stride(-1) != 1:
        got = f"{tuple(out.shape)} and {tuple(d_action.shape)}"
        raise ValueError(f"out and d_action: got {got}, allowed: as logits and eps, contiguous in the last dim")
    bm, ba = rows_tile(e * n, a)
    launch(
        policy_sample_gradient_kernel,
        (cdiv(e * n, bm),),
        strided(logits),
        strided(eps[None]),
        strided(eps[None] if mask is None else mask.expand(1, e, n, a)),
        strided(d_action[None]),
        strided(d_log_prob[None]),
        strided(d_entropy[None]),
        strided(out),
        e * n,
        n,
        a,
        float(low),
        float(high),
        HAS_MASK=mask is not None,
        BM=bm,
        BA=ba,
        INTERPRETED=interpreting(),
        pdl=pdl,
        num_warps=4,
    )


def policy_sample_gradient_reference(
    logits: Tensor,
    eps: Tensor,
    mask: Tensor | None,
    d_action: Tensor,
    d_log_prob: Tensor,
    d_entropy: Tensor,
    out: Tensor,
    *,
    low: float,
    high: float,
    pdl: bool = False,
) -> None:
    """`policy_sample_gradient` in plain torch, by autograd."""
    del pdl
    leaf = logits[0].detach().clone().requires_grad_()
    with torch.enable_grad():
        found = policy_head(leaf, eps.to(leaf), low, high, None if mask is None else mask.to(leaf))
        results = (found.action, found.log_prob, found.scaled_entropy)
        arriving = (d_action.to(leaf), d_log_prob.to(leaf).unsqueeze(-1), d_entropy.to(leaf).unsqueeze(-1))
        (d,) = torch.autograd.grad(results, leaf, arriving)
    out.copy_(d[None])
