"""The end of an update in one launch: metrics from the losses of rows, and what counts only if no step failed.

    mean[r] = mean over B of row r,    metric[m] = sum over r of mix[m, r] mean[r],    pi_loss = entropy - value / scale

Unless the flag says that a step failed, the running scale takes its new value and the update is counted. One
program reads all rows: some forty of them, so that nothing has to be put together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..device.launch import await_producers, check_tensor, interpreting, jit, launch, pow2, tl
from ..device.reference import reference_of

_ELEMENTS = 4096


class Kept(NamedTuple):
    """What an update keeps if no step failed."""

    flag: Tensor  # (1,) int64, 0 if none did
    scale: Tensor  # (1,) float32, out: `new_scale`
    new_scale: Tensor  # (1,) float32
    counter: Tensor  # (1,) int64, out: one more


@jit
def summary_kernel(
    rows_ptr, mix_ptr, means_ptr, metrics_ptr, kept, R, B, mixed, value, entropy,
    BR: tl.constexpr, BB: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Read R rows of B losses, BB at a time, in one program; value, entropy: places of these among the metrics."""
    await_producers(PDL)
    r, m = tl.arange(0, BR), tl.arange(0, BM)
    r_ok, m_ok = r < R, m < mixed
    total = tl.zeros((BR, BB), tl.float32)
    for start in range(0, B, BB):
        b = start + tl.arange(0, BB)
        ok = r_ok[:, None] & (b < B)[None, :]
        total += tl.load(rows_ptr + r[:, None] * B + b[None, :], mask=ok, other=0.0)
    mean = tl.sum(total, axis=1) / B  # [BR]
    tl.store(means_ptr + r, mean, mask=r_ok)
    mix = tl.load(mix_ptr + m[:, None] * R + r[None, :], mask=m_ok[:, None] & r_ok[None, :], other=0.0)
    # A mean that is not finite makes all metrics NaN, as a product of matrices does.
    metric = tl.sum(mix * mean[None, :], axis=1)  # [BM]
    tl.store(metrics_ptr + m, metric, mask=m_ok)
    new_scale = tl.load(kept.new_scale)
    of_value = tl.sum(tl.where(m == value, metric, 0.0), axis=0)
    of_entropy = tl.sum(tl.where(m == entropy, metric, 0.0), axis=0)
    tl.store(metrics_ptr + mixed, of_entropy - of_value / new_scale)
    tl.store(metrics_ptr + mixed + 1, new_scale)
    if tl.load(kept.flag) == 0:
        tl.store(kept.scale, new_scale)
        tl.store(kept.counter, tl.load(kept.counter) + 1)


def summarise(
    rows: Tensor,
    mix: Tensor,
    means: Tensor,
    metrics: Tensor,
    kept: Kept,
    *,
    value: int,
    entropy: int,
    pdl: bool = False,
) -> None:
    """Write means and metrics, and keep what an update keeps.

    Args:
        rows: (R, B) float32 losses.
        mix: (M, R) float32, what each mean counts in each metric.
        means: out: (R,) float32.
        metrics: out: (M + 2 or more,) float32: the metrics of `mix`, the policy's loss, the new scale.
        kept: flag, scales and counter.
        value, entropy: which metrics the policy's loss is made of.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: a tensor of another shape, type or layout.
    """
    (r, b), m = rows.shape, len(mix)
    check_tensor("rows", rows, (r, b), rows)
    check_tensor("mix", mix, (m, r), rows)
    check_tensor("means", means, (r,), rows)
    if len(metrics) < m + 2 or not (0 <= value < m and 0 <= entropy < m):
        got = f"{len(metrics)} with value {value} and entropy {entropy}"
        raise ValueError(f"metrics: got {got}, allowed: at least {m + 2}, both of the first {m}")
    check_tensor("metrics", metrics, (len(metrics),), rows)
    for name, x in kept._asdict().items():
        check_tensor(name, x, (1,), rows, torch.float32 if "scale" in name else torch.int64)
    br = pow2(r)
    launch(
        summary_kernel, (1,), rows, mix, means, metrics, kept, r, b, m, value, entropy,
        BR=br, BB=min(pow2(b), 1024 if interpreting() else max(_ELEMENTS // br, 16)), BM=pow2(m), pdl=pdl, num_warps=8,
    )  # fmt: skip


@reference_of(summarise)
def summarise_reference(
    rows: Tensor, mix: Tensor, means: Tensor, metrics: Tensor, kept: Kept, value: int, entropy: int
) -> None:
    """Do as `summarise` in plain torch, in the type of its arguments."""
    m = len(mix)
    torch.mean(rows, 1, out=means)
    torch.mv(mix, means, out=metrics[:m])
    metrics[m] = metrics[entropy] - metrics[value] / kept.new_scale[0]
    metrics[m + 1] = kept.new_scale[0]
    fine = kept.flag == 0
    kept.scale.copy_(torch.where(fine, kept.new_scale, kept.scale))
    kept.counter.add_(fine)
