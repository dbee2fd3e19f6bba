"""Moving average of the 5%-95% range of Q values, in one program (paper, section 3.1).

    value = lerp(value, max(p95 - p5, 1), tau)

Nothing is sorted. The entry at place r of the sorted batch is the largest of those that at most r
entries are below, whatever the ties: for each entry those below it are counted, a tile of BI entries
against BJ rivals at a time. Cost: B² comparisons of two instructions on one multiprocessor, by count
a microsecond at B=256, ten at B=1024 and 150 at B=4096.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.arithmetic import lerp
from ..device.launch import await_producers, interpreting, jit, launch, pow2, tl
from ..device.reference import reference_of

PERCENTILES = (5, 95)
MAX_BATCH = 4096
"""Slices of a batch, of all ranks, that the kernels take."""


@jit
def at_place(q, below, place):
    """Return the largest of q [BI] that at most `place` entries are below."""
    return tl.max(tl.where(below <= place, q, float("-inf")), 0)


@jit
def mean_of(q_ptr, i, B, q_group, q_stride, other, GROUPS: tl.constexpr):
    """Return the mean over groups of entries i; `other` beyond B."""
    at, ok = q_ptr + i.to(tl.int64) * q_stride, i < B
    q = tl.load(at, mask=ok, other=other)
    for g in tl.static_range(1, GROUPS):
        q += tl.load(at + g * q_group, mask=ok, other=0.0)
    return q / GROUPS


@jit
def running_scale_kernel(
    q_ptr, value_ptr, out_ptr, q_group, q_stride, B, tau, place5, next5, place95, next95,
    low5, high5, low95, high95,
    GROUPS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Read all B entries in one program. low, high: the weights of the entries at a place and at the next."""
    await_producers(PDL)
    # The entries at both places and the ones after them.
    x5 = tl.full((), float("-inf"), tl.float32)
    y5, x95, y95 = x5, x5, x5
    nans = tl.zeros((BI,), tl.int32)
    for first in range(0, B, BI):
        i = first + tl.arange(0, BI)  # [BI]
        q = mean_of(q_ptr, i, B, q_group, q_stride, 0.0, GROUPS)
        nans += (q != q).to(tl.int32)
        # Counted in float32, two instructions a pair; integers take four.
        below = tl.zeros((BI, BJ), tl.float32)
        for start in range(0, B, BJ):
            j = start + tl.arange(0, BJ)  # [BJ]
            rival = mean_of(q_ptr, j, B, q_group, q_stride, float("inf"), GROUPS)
            below += tl.where(rival[None, :] < q[:, None], 1.0, 0.0)  # [BI, BJ]
        # What lies beyond the batch is at no place.
        rank = tl.where(i < B, tl.sum(below, 1), B)
        x5, y5 = tl.maximum(x5, at_place(q, rank, place5)), tl.maximum(y5, at_place(q, rank, next5))
        x95, y95 = tl.maximum(x95, at_place(q, rank, place95)), tl.maximum(y95, at_place(q, rank, next95))
    scale = (x95 * low95 + y95 * high95) - (x5 * low5 + y5 * high5)
    scale = tl.maximum(scale, 1.0, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.where(tl.sum(nans, 0) > 0, float("nan"), scale)
    tl.store(out_ptr, lerp(tl.load(value_ptr), scale, tau))


def scale_tile(b: int) -> tuple[int, int, int]:
    """Return (BI, BJ, warps): 16 pairs a thread; twice as many spill where Q values are strided."""
    if interpreting():
        return min(pow2(b), 1024), min(pow2(b), 1024), 4
    bi, warps = min(pow2(b, 32), 512), 16 if b > 64 else 4
    return bi, min(pow2(b, 32), 16 * 32 * warps // bi), warps


def _check(q: Tensor, tau: float, **places: Tensor) -> None:
    if q.ndim not in (1, 2) or not 1 <= q.shape[-1] <= MAX_BATCH or q.shape[0] < 1 or q.dtype != torch.float32:
        got = f"shape {tuple(q.shape)} {q.dtype}"
        raise ValueError(f"q: got {got}, allowed: (B,) or (G, B) torch.float32, B from 1 to {MAX_BATCH}")
    for name, x in places.items():
        if x.shape != (1,) or x.dtype != torch.float32 or x.device != q.device:
            got = f"shape {tuple(x.shape)} {x.dtype} on {x.device}"
            raise ValueError(f"{name}: got {got}, allowed: (1,) torch.float32 on {q.device}")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau: got {tau}, allowed: 0 to 1")


def places(b: int) -> list[tuple[int, int, float]]:
    """Return, for each percentile of b sorted numbers, the two places it lies between, and its share of the second."""
    last = b - 1
    positions = [percent * last / 100 for percent in PERCENTILES]
    return [(int(x), min(int(x) + 1, last), x - int(x)) for x in positions]


def running_scale(q: Tensor, value: Tensor, *, tau: float, out: Tensor | None = None, pdl: bool = False) -> None:
    """Move the scale of Q values towards the range of this batch, in one launch.

    Args:
        q: (B,) float32 of any stride, B up to 4096, or (G, B) of which the mean over G counts. A NaN gives NaN.
        value: (1,) float32.
        tau: 0 to 1.
        out: (1,) float32: lerp(value, max(p95 - p5, 1), tau), percentiles interpolated linearly. None for `value`.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: a tensor of another shape, type or device; tau out of range.
    """
    out = value if out is None else out
    _check(q, tau, value=value, out=out)
    q, b = q[None] if q.ndim == 1 else q, q.shape[-1]
    (place5, next5, share5), (place95, next95, share95) = places(b)
    bi, bj, warps = scale_tile(b)
    launch(
        running_scale_kernel, (1,), q, value, out, *q.stride(), b, float(tau), place5, next5, place95,
        next95, 1 - share5, share5, 1 - share95, share95, GROUPS=q.shape[0], BI=bi, BJ=bj, pdl=pdl, num_warps=warps,
        enable_fp_fusion=False,  # rounded as torch rounds: products first, then their sum
    )  # fmt: skip


@reference_of(running_scale)
def running_scale_reference(q: Tensor, value: Tensor, tau: float, out: Tensor | None) -> None:
    """Compute `running_scale` in plain torch, in the type of its arguments."""
    q = q if q.ndim == 1 else q.mean(0)
    ordered = q.sort().values
    low, high = (ordered[i] * (1 - share) + ordered[j] * share for i, j, share in places(q.numel()))
    scale = torch.where(q.isnan().any(), torch.nan, (high - low).clamp(min=1.0))
    (value if out is None else out).copy_(value.lerp(scale.view(1), tau))
