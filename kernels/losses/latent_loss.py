"""Latent consistency, forward and backward, and the TD target: one small launch each (paper, eq. 3).

    loss[t] = mean over L of (z[t+1] - next_z[t])²,    d[t+1] = weight[t] 2 (z[t+1] - next_z[t])
    target = r + discount (1 - terminated) min(q0, q1)

Cost: the rows read twice, written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.launch import await_producers, cdiv, interpreting, jit, launch, pow2, tl
from ..device.pointers import entry_ptrs, row_ptrs, strided
from ..device.reference import reference_of

_COLUMNS = 128


@jit
def consistency_kernel(
    z, goal, weight_ptr, loss_ptr, d, M, added, n, L, BM: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr
):
    """Compute BM rows of z[1:], all columns; grid (row tiles,)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = rows < M
    await_producers(PDL)
    weight = 2.0 * tl.load(weight_ptr + rows // n, mask=ok, other=0.0)[:, None]
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, L, BN):
        cols = start + tl.arange(0, BN)
        both = ok[:, None] & (cols < L)[None, :]
        x = tl.load(entry_ptrs(z, 0, rows, n, cols), mask=both, other=0.0).to(tl.float32)
        y = tl.load(entry_ptrs(goal, 0, rows, n, cols), mask=both, other=0.0).to(tl.float32)
        total += tl.sum((x - y) * (x - y), axis=1)
        at = entry_ptrs(d, 0, rows, n, cols)
        before = tl.load(at, mask=both & (rows < added)[:, None], other=0.0)
        tl.store(at, before + weight * (x - y), mask=both)
    tl.store(loss_ptr + rows, total / L, mask=ok)


def consistency(
    z: Tensor, next_z: Tensor, weight: Tensor, loss: Tensor, d: Tensor, *, added: int = 0, pdl: bool = False
) -> None:
    """Write the mean squared difference of each row, and its weighted gradient.

    Args:
        z, next_z: (H, B, L), contiguous in the last dim.
        weight: (H,) float32: of one entry's square in the loss.
        loss: out: (H, B) float32, contiguous: mean over L, not weighted.
        d: out: (H, B, L) float32, gradient to z, weighted.
        added: of so many steps, from the first on, the gradient is added to what `d` holds.
        pdl: programmatic dependent launch.
    """
    h, n, width = z.shape
    if next_z.shape != z.shape or d.shape != z.shape or z.stride(-1) != 1 or next_z.stride(-1) != 1:
        got = f"{tuple(z.shape)}, {tuple(next_z.shape)} and {tuple(d.shape)}"
        raise ValueError(f"z, next_z and d: got {got}, allowed: one shape, contiguous in the last dim")
    if weight.shape != (h,) or loss.shape != (h, n) or not loss.is_contiguous():
        got = f"{tuple(weight.shape)} and {tuple(loss.shape)}"
        raise ValueError(f"weight and loss: got {got}, allowed: ({h},) and contiguous ({h}, {n})")
    bm, bn = (min(pow2(h * n), 1024), pow2(width)) if interpreting() else (8, min(pow2(width), _COLUMNS))
    launch(
        consistency_kernel, (cdiv(h * n, bm),), strided(z[None]), strided(next_z[None]), weight, loss, strided(d[None]),
        h * n, added * n, n, width, BM=bm, BN=bn, pdl=pdl, num_warps=4,
    )  # fmt: skip


@reference_of(consistency)
def consistency_reference(z: Tensor, next_z: Tensor, weight: Tensor, loss: Tensor, d: Tensor, added: int) -> None:
    """Compute `consistency` in plain torch."""
    difference = z.to(d) - next_z.to(d)
    loss.copy_(difference.square().mean(-1))
    gradient = 2 * weight.to(d)[:, None, None] * difference
    gradient[:added] += d[:added]
    d.copy_(gradient)


@jit
def td_target_kernel(q_ptr, reward_ptr, terminated_ptr, discount, out_ptr, M, n, BM: tl.constexpr, PDL: tl.constexpr):
    """Compute the targets of BM rows; grid (row tiles,)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = rows < M
    await_producers(PDL)
    q0, q1 = tl.load(q_ptr + rows, mask=ok, other=0.0), tl.load(q_ptr + M + rows, mask=ok, other=0.0)
    q = tl.minimum(q0, q1, propagate_nan=tl.PropagateNan.ALL)
    factor = tl.load(row_ptrs(discount, 0, rows, n), mask=ok, other=0.0)
    alive = 1.0 - tl.load(terminated_ptr + rows, mask=ok, other=0.0)
    tl.store(out_ptr + rows, tl.load(reward_ptr + rows, mask=ok, other=0.0) + factor * alive * q, mask=ok)


def td_target(
    q: Tensor, reward: Tensor, terminated: Tensor, discount: Tensor, out: Tensor, *, pdl: bool = False
) -> None:
    """Write TD targets.

    Args:
        q: (2, H, B) float32, two target critics at the policy's action.
        reward, terminated: (H, B) float32.
        discount: (B,) float32, of each row's task.
        out: (H, B) float32; it and the others contiguous.
        pdl: programmatic dependent launch.
    """
    h, n = out.shape
    for name, x, shape in (("q", q, (2, h, n)), ("reward", reward, (h, n)), ("terminated", terminated, (h, n))):
        if x.shape != shape or not x.is_contiguous():
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, allowed: contiguous {shape}")
    if discount.shape != (n,) or not out.is_contiguous():
        raise ValueError(f"discount: got shape {tuple(discount.shape)}, allowed: ({n},), and out contiguous")
    bm = min(pow2(h * n), 4096 if interpreting() else 256)
    launch(
        td_target_kernel, (cdiv(h * n, bm),), q, reward, terminated, strided(discount.expand(1, h, n)), out, h * n, n,
        BM=bm, pdl=pdl, num_warps=4,
    )  # fmt: skip


@reference_of(td_target)
def td_target_reference(q: Tensor, reward: Tensor, terminated: Tensor, discount: Tensor, out: Tensor) -> None:
    """Compute `td_target` in plain torch."""
    out.copy_(reward.to(q) + discount.to(q) * (1 - terminated.to(q)) * torch.minimum(q[0], q[1]))
