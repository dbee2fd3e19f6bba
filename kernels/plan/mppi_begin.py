"""How a plan begins: warm start of the mean, and the first samples, in one launch (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.arithmetic import clamp
from ..device.launch import await_producers, cdiv, check_tensor, jit, launch, pow2, tl
from ..device.reference import reference_of
from .mppi import Samples, sample_actions, shift_mean


@jit
def begin_kernel(
    prev_ptr,
    t0_ptr,
    noise_ptr,
    mask_ptr,
    actions_ptr,
    mean_ptr,
    std_ptr,
    max_std,
    H,
    N,
    P,
    A,
    MASKED: tl.constexpr,
    BN: tl.constexpr,
    BA: tl.constexpr,
    PDL: tl.constexpr,
):
    """Begin one step of one environment, BN of its N-P samples; grid (E, H, row tiles)."""
    await_producers(PDL)
    e, t = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, a = tl.program_id(2) * BN + tl.arange(0, BN), tl.arange(0, BA)  # [BN], [BA]
    ok = a < A
    row = (e * H + t) * A + a
    # The step after this one, which the last step does not have.
    mean = tl.load(prev_ptr + row + A, mask=a < tl.where(t + 1 < H, A, 0), other=0.0)
    mean = tl.where(tl.load(t0_ptr + e), 0.0, mean)
    if tl.program_id(2) == 0:
        tl.store(mean_ptr + row, mean, mask=ok)
        tl.store(std_ptr + row, tl.zeros((BA,), tl.float32) + max_std, mask=ok)
    tile_ok = (n < N - P)[:, None] & ok[None, :]
    noise = noise_ptr + ((e * H + t) * (N - P) + n[:, None]) * A + a[None, :]
    x = clamp(mean[None, :] + max_std * tl.load(noise, mask=tile_ok, other=0.0), -1.0, 1.0)  # [BN, BA]
    if MASKED:
        x *= tl.load(mask_ptr + e * A + a, mask=ok, other=0.0)[None, :]
    actions = actions_ptr + ((e * H + t) * N + P + n[:, None]) * A + a[None, :]
    tl.store(actions, x, mask=tile_ok)


_MAX_SAMPLES = 32768  # the sum of their ranks is an int32


def drawn_from(name: str, noise: Tensor, actions: Tensor) -> int:
    """Return P, the number of samples that are not drawn."""
    e, h, n, a = actions.shape
    m = noise.shape[2] if noise.ndim == 4 else -1
    if not 0 <= m <= n:
        raise ValueError(f"{name}: got shape {tuple(noise.shape)}, allowed: ({e}, {h}, at most {n}, {a})")
    check_tensor(name, noise, (e, h, m, a), actions)
    return n - m


def check_samples(samples: Samples, mask: Tensor | None) -> tuple[int, int, int, int]:
    """Return E, H, N and A; refuse other shapes, and more samples than ranks can be counted for."""
    actions = samples.actions
    if actions.ndim != 4 or 0 in actions.shape or actions.shape[2] > _MAX_SAMPLES:
        allowed = f"(E, H, N, A), each at least 1, N at most {_MAX_SAMPLES}"
        raise ValueError(f"actions: got shape {tuple(actions.shape)}, allowed: {allowed}")
    e, h, n, a = actions.shape
    check_tensor("actions", actions, (e, h, n, a), actions)
    for name in ("mean", "std"):
        check_tensor(name, getattr(samples, name), (e, h, a), actions)
    if mask is not None:
        check_tensor("mask", mask, (e, a), actions)
    return e, h, n, a


def mppi_begin(
    prev_mean: Tensor,
    t0: Tensor,
    noise: Tensor,
    mask: Tensor | None,
    max_std: float,
    out: Samples,
    *,
    pdl: bool = False,
) -> None:
    """Write the warm start and the first samples of a plan, in place and in one launch.

    Args:
        prev_mean: (E, H, A).
        t0: (E,) bool, an episode starts.
        noise: (E, H, N-P, A) standard normal; N-P may be 0.
        mask: (E, A) of 0/1, live action dims.
        max_std: the std to start with.
        out: the mean, no part of `prev_mean`, and the std; the samples after the first P, which are left alone.
        pdl: programmatic dependent launch.

    All float32 unless said, and contiguous.
    """
    actions, mean, std = out
    e, h, n, a = check_samples(out, mask)
    p = drawn_from("noise", noise, actions)
    check_tensor("t0", t0, (e,), actions, torch.bool)
    check_tensor("prev_mean", prev_mean, (e, h, a), actions)
    if mean.data_ptr() == prev_mean.data_ptr():
        raise ValueError("mean: got prev_mean itself, allowed: memory of its own, steps are shifted")
    ba = pow2(a)
    bn = min(pow2(max(n - p, 1), 16), max(2048 // ba, 16))
    launch(
        begin_kernel,
        (e, h, max(cdiv(n - p, bn), 1)),
        prev_mean,
        t0,
        noise,
        mask,
        actions,
        mean,
        std,
        float(max_std),
        h,
        n,
        p,
        a,
        MASKED=mask is not None,
        BN=bn,
        BA=ba,
        pdl=pdl,
        num_warps=4,
    )


@reference_of(mppi_begin)
def mppi_begin_reference(
    prev_mean: Tensor, t0: Tensor, noise: Tensor, mask: Tensor | None, max_std: float, out: Samples
) -> None:
    """Do as `mppi_begin` in plain torch, in the type of the arguments."""
    actions, mean, std = out
    mean.copy_(shift_mean(prev_mean, t0))
    std.fill_(max_std)
    p = actions.shape[2] - noise.shape[2]
    actions[:, :, p:] = sample_actions(mean, std, noise, mask)
