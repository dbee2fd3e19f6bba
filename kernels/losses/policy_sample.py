"""The policy head on logits, forward for learning, and backward: one launch each (paper, eq. 5).

    a = tanh(mean + eps exp(log_std)),    log_prob and scaled entropy as in policy_head.py

Backward starts from any gradients of the three (`policy_sample_gradient`), or from the policy's own
loss (`policy_gradient`): it takes the gradient of the critics' sum to the action, adds that of the
entropy, and ends at the logits. The loss of a row is -(q / scale + entropy_coef * scaled_entropy)
with a weight by its time step; what reached the action is linear in the weight, so it is multiplied
only here, when the running scale is known. Cost: a few reads and writes of (rows, A).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device.arithmetic import store_rounded, tanh
from ..device.launch import await_producers, cdiv, interpreting, jit, launch, pow2, tl
from ..device.pointers import Strided, row_ptrs, strided
from ..device.reference import reference_of
from ..layers.policy_head import LOG_SQRT_2PI, PolicyOutput, policy_head

_LOG_SQRT_2PI = tl.constexpr(LOG_SQRT_2PI)
_ELEMENTS = 512


class Sample(NamedTuple):
    """What actions are drawn from; noise and mask are constants."""

    logits: Tensor  # (1, E, n, 2A): means, then log stds before squashing
    eps: Tensor  # (E, n, A) standard normal, float32
    mask: Tensor | None  # (n, A) of 0/1, live action dims of each row, float32
    low: float  # range of the log std
    high: float

    def check(self, **others: Tensor | None) -> None:
        """Refuse shapes that are not of one sample; `others`: (E, n, ...)."""
        logits, eps, mask = self[:3]
        e, n, a = eps.shape
        if logits.shape != (1, e, n, 2 * a) or logits.stride(-1) != 1 or eps.stride(-1) != 1:
            got = f"{tuple(logits.shape)} and {tuple(eps.shape)}"
            raise ValueError(f"logits and eps: got {got}, allowed: (1, E, n, 2A) and (E, n, A)")
        if mask is not None and (mask.shape != (n, a) or mask.stride(-1) != 1):
            raise ValueError(f"mask: got shape {tuple(mask.shape)}, allowed: ({n}, {a})")
        for name, x in others.items():
            if x is not None and x.shape[:2] != (e, n):
                raise ValueError(f"{name}: got shape {tuple(x.shape)}, allowed: ({e}, {n}, ...)")

    def launch(self, kernel: Any, *given: Any, numbers: tuple[float, ...] = (), pdl: bool, **constants: Any) -> None:
        """Launch a kernel on rows of the sample, with what else it is given; its `numbers` come last."""
        e, n, a = self.eps.shape
        width, eps = pow2(a, 4), strided(self.eps[None])
        live = eps if self.mask is None else strided(self.mask.expand(1, e, n, a))
        bm = min(pow2(e * n), 1024) if interpreting() else max(_ELEMENTS // width, 1)
        launch(
            kernel, (cdiv(e * n, bm),), Drawn(strided(self.logits), eps, live), *given, e * n, n, a, float(self.low),
            float(self.high), *numbers, HAS_MASK=self.mask is not None, BM=bm, BA=width, INTERPRETED=interpreting(),
            pdl=pdl, num_warps=4, **constants,
        )  # fmt: skip

    def output(self, logits: Tensor) -> PolicyOutput:
        """Compute all that the policy gives in plain torch, in the type of logits (E, n, 2A)."""
        mask = None if self.mask is None else self.mask.to(logits)
        return policy_head(logits, self.eps.to(logits), self.low, self.high, mask)


class Drawn(NamedTuple):
    """A `Sample` that a kernel reads."""

    logits: Strided
    eps: Strided
    live: Strided


@jit
def gaussian_on_tile(s, rows, n, row_ok, A, low, high, HAS_MASK: tl.constexpr, BA: tl.constexpr):
    """Return mean, log std, its squashed logit, noise and live dims of rows: [BM, BA] each."""
    dims = tl.arange(0, BA)[None, :]
    ok = row_ok[:, None] & (dims < A)
    at = row_ptrs(s.logits, 0, rows, n)[:, None] + dims
    mean = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    squashed = tanh(tl.load(at + A, mask=ok, other=0.0).to(tl.float32))
    noise = tl.load(row_ptrs(s.eps, 0, rows, n)[:, None] + dims, mask=ok, other=0.0)
    alive = ok.to(tl.float32)
    if HAS_MASK:
        alive = tl.load(row_ptrs(s.live, 0, rows, n)[:, None] + dims, mask=ok, other=0.0)
    log_std = (low + 0.5 * (high - low) * (squashed + 1.0)) * alive
    return mean * alive, log_std, squashed, noise * alive, alive


@jit
def log_probs(noise, log_std, action, ok):
    """Return Gaussian log-probability and squash correction of rows: [BM] each."""
    gaussian = tl.sum(tl.where(ok, -0.5 * noise * noise - log_std - _LOG_SQRT_2PI, 0.0), axis=1)
    room = tl.maximum(1.0 - action * action, 0.0) + 1e-6
    return gaussian, tl.sum(tl.where(ok, tl.log(room), 0.0), axis=1)


@jit
def policy_sample_kernel(
    s, action, log_prob, entropy, M, n, A, low, high,
    HAS_MASK: tl.constexpr, HAS_ENTROPY: tl.constexpr, BM: tl.constexpr, BA: tl.constexpr, INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Sample the actions of BM rows; grid (row tiles,)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok, dims = rows < M, tl.arange(0, BA)[None, :]
    ok = row_ok[:, None] & (dims < A)
    await_producers(PDL)
    mean, log_std, _, noise, alive = gaussian_on_tile(s, rows, n, row_ok, A, low, high, HAS_MASK=HAS_MASK, BA=BA)
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
def store_gradient(
    drawn, d, rows, n, ok, dims, A, low, high, to_action, to_log_prob, to_entropy, INTERPRETED: tl.constexpr
):
    """Store the gradients of both logits, given those of action [BM, BA], log-probability and scaled entropy [BM].

    drawn: as `gaussian_on_tile` returned it.
    """
    mean, log_std, squashed, noise, alive = drawn
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
    to_mean = to_sample * alive
    to_logit = to_log_std * alive * (0.5 * (high - low)) * (1.0 - squashed * squashed)
    at = row_ptrs(d, 0, rows, n)[:, None] + dims
    store_rounded(at, to_mean, ok, INTERPRETED)
    store_rounded(at + A, to_logit, ok, INTERPRETED)


@jit
def policy_gradient_kernel(
    s, d_action, weight_ptr, scale_ptr, d, M, n, A, low, high, entropy_coef,
    HAS_MASK: tl.constexpr, BM: tl.constexpr, BA: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the policy's loss for BM rows; grid (row tiles,)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok, dims = rows < M, tl.arange(0, BA)[None, :]
    ok = row_ok[:, None] & (dims < A)
    await_producers(PDL)
    drawn = gaussian_on_tile(s, rows, n, row_ok, A, low, high, HAS_MASK=HAS_MASK, BA=BA)
    weight = -tl.load(weight_ptr + rows // n, mask=row_ok, other=0.0)
    to_action = tl.load(row_ptrs(d_action, 0, rows, n)[:, None] + dims, mask=ok, other=0.0)
    # The mean of two critics, over the running scale.
    to_action *= (weight * 0.5 / tl.load(scale_ptr))[:, None]
    to_entropy = weight * entropy_coef
    store_gradient(drawn, d, rows, n, ok, dims, A, low, high, to_action, 0.0, to_entropy, INTERPRETED=INTERPRETED)


@jit
def policy_sample_gradient_kernel(
    s, d_action, d_log_prob, d_entropy, d, M, n, A, low, high,
    HAS_MASK: tl.constexpr, BM: tl.constexpr, BA: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of any loss for BM rows; grid (row tiles,)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok, dims = rows < M, tl.arange(0, BA)[None, :]
    ok = row_ok[:, None] & (dims < A)
    await_producers(PDL)
    drawn = gaussian_on_tile(s, rows, n, row_ok, A, low, high, HAS_MASK=HAS_MASK, BA=BA)
    to_action = tl.load(row_ptrs(d_action, 0, rows, n)[:, None] + dims, mask=ok, other=0.0)
    to_log_prob = tl.load(row_ptrs(d_log_prob, 0, rows, n), mask=row_ok, other=0.0)
    to_entropy = tl.load(row_ptrs(d_entropy, 0, rows, n), mask=row_ok, other=0.0)
    store_gradient(
        drawn, d, rows, n, ok, dims, A, low, high, to_action, to_log_prob, to_entropy, INTERPRETED=INTERPRETED
    )


def policy_sample(
    sample: Sample,
    action: Tensor,
    log_prob: Tensor | None = None,
    scaled_entropy: Tensor | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Write sampled actions, and what the policy loss needs of them.

    Args:
        sample: what they are drawn from.
        action: out: (E, n, A), any float type and strides but the last.
        log_prob, scaled_entropy: out: (E, n) float32, or None for both.
        pdl: programmatic dependent launch.
    """
    sample.check(action=action, log_prob=log_prob, scaled_entropy=scaled_entropy)
    logs = [sample.eps[..., 0] if x is None else x for x in (log_prob, scaled_entropy)]
    outs = [strided(x[None]) for x in (action, *logs)]
    sample.launch(policy_sample_kernel, *outs, HAS_ENTROPY=log_prob is not None, pdl=pdl)


@reference_of(policy_sample)
def policy_sample_reference(
    sample: Sample, action: Tensor, log_prob: Tensor | None, scaled_entropy: Tensor | None
) -> None:
    """Compute `policy_sample` in plain torch."""
    out = sample.output(sample.logits[0])
    action.copy_(out.action)
    if log_prob is not None and scaled_entropy is not None:
        log_prob.copy_(out.log_prob.squeeze(-1))
        scaled_entropy.copy_(out.scaled_entropy.squeeze(-1))


def policy_gradient(
    sample: Sample,
    d_action: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor,
    *,
    entropy_coef: float,
    pdl: bool = False,
) -> None:
    """Write the gradient of the policy loss to the logits.

    Args:
        sample: as `policy_sample` was given it.
        d_action: (E, n, A) float32, of the sum of both critics to the action.
        weight: (E,) float32, of each step's rows in the loss.
        scale: (1,) float32, the running scale.
        out: (1, E, n, 2A).
        entropy_coef: weight of the scaled entropy.
        pdl: programmatic dependent launch.
    """
    sample.check(d_action=d_action)
    e = len(sample.eps)
    if out.shape != sample.logits.shape or out.stride(-1) != 1 or weight.shape != (e,):
        got = f"{tuple(out.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"out and weight: got {got}, allowed: as logits, ({e},)")
    given = strided(d_action[None]), weight, scale, strided(out)
    sample.launch(policy_gradient_kernel, *given, numbers=(float(entropy_coef),), pdl=pdl)


@reference_of(policy_gradient)
def policy_gradient_reference(
    sample: Sample, d_action: Tensor, weight: Tensor, scale: Tensor, out: Tensor, entropy_coef: float
) -> None:
    """Compute `policy_gradient` in plain torch, by autograd."""
    leaf = sample.logits[0].detach().clone().requires_grad_()
    with torch.enable_grad():
        found = sample.output(leaf)
        q = (found.action * d_action.to(leaf)).sum(-1, keepdim=True) / 2
        loss = -(weight.to(leaf)[:, None, None] * (q / scale.to(leaf) + entropy_coef * found.scaled_entropy)).sum()
        (d,) = torch.autograd.grad(loss, leaf)
    out.copy_(d[None])


def policy_sample_gradient(
    sample: Sample, d_action: Tensor, d_log_prob: Tensor, d_entropy: Tensor, out: Tensor, *, pdl: bool = False
) -> None:
    """Write the gradient of any loss to the logits.

    Args:
        sample: as `policy_sample` was given it.
        d_action: (E, n, A) float32, contiguous in the last dim.
        d_log_prob, d_entropy: (E, n) float32, of log-probability and scaled entropy.
        out: (1, E, n, 2A), any float type.
        pdl: programmatic dependent launch.
    """
    logits, eps = sample[:2]
    sample.check(d_action=d_action, d_log_prob=d_log_prob, d_entropy=d_entropy)
    if out.shape != logits.shape or out.stride(-1) != 1 or d_action.shape != eps.shape or d_action.stride(-1) != 1:
        got = f"{tuple(out.shape)} and {tuple(d_action.shape)}"
        raise ValueError(f"out and d_action: got {got}, allowed: as logits and eps, contiguous in the last dim")
    arriving = (strided(x[None]) for x in (d_action, d_log_prob, d_entropy))
    sample.launch(policy_sample_gradient_kernel, *arriving, strided(out), pdl=pdl)


@reference_of(policy_sample_gradient)
def policy_sample_gradient_reference(
    sample: Sample, d_action: Tensor, d_log_prob: Tensor, d_entropy: Tensor, out: Tensor
) -> None:
    """Compute `policy_sample_gradient` in plain torch, by autograd."""
    leaf = sample.logits[0].detach().clone().requires_grad_()
    with torch.enable_grad():
        found = sample.output(leaf)
        results = (found.action, found.log_prob, found.scaled_entropy)
        arriving = (d_action.to(leaf), d_log_prob.to(leaf).unsqueeze(-1), d_entropy.to(leaf).unsqueeze(-1))
        (d,) = torch.autograd.grad(results, leaf, arriving)
    out.copy_(d[None])
