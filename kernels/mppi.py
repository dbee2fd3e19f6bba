"""The sampling side of MPPI: warm start, sampling, elites, new mean and std, choice of action.

All ops are batched over E environments that never mix (paper, section 3.2 and eq. 6). First the
torch ops, then two launches composed of them for fused plans, `mppi_begin` and `mppi_update`.

The update computes values, ranks, mean and std, then the next samples or the action chosen. Every
program of an environment computes all its values and ranks anew and takes one step and one tile
of action dims from there: multiprocessors idle here, and the chain of dependent launches is what
costs. N^2 comparisons a program rank exactly and stably; it writes no slice another one reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import cdiv, interpreting, jit, launch, pow2, tl
from .linear_tile import await_producers

_SUM_EPS = 1e-9


def shift_mean(prev_mean: Tensor, t0: Tensor) -> Tensor:
    """Warm start: the previous mean one step on, zeros last; zeros where an episode starts.

    prev_mean: (E, H, A); t0: (E,) bool. Returns a new (E, H, A).
    """
    mean = torch.zeros_like(prev_mean)
    mean[:, :-1] = prev_mean[:, 1:]
    return mean.masked_fill_(t0.view(-1, 1, 1), 0.0)


def sample_actions(mean: Tensor, std: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """clamp(mean + std noise, -1, 1), times the action mask.

    mean, std: (E, H, A); noise: (E, H, N', A) standard normal; mask: (E, A) of 0/1.
    """
    actions = torch.addcmul(mean.unsqueeze(2), std.unsqueeze(2), noise).clamp_(-1, 1)
    return actions if mask is None else actions.mul_(mask[:, None, None])


def elite_update(
    values: Tensor,
    actions: Tensor,
    num_elites: int,
    temperature: float,
    min_std: float,
    max_std: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Elites, their scores, and the new mean and std.

    values: (E, N), NaN counts as 0; actions: (E, H, N, A); mask: (E, A) or None. Returns
    elite indices (E, K) by descending value with ties to the lower index, scores (E, K) that
    sum to one, mean and std (E, H, A). The std is clamped before it is masked, so dead
    dimensions end at 0.
    """
    values = values.nan_to_num(0)
    order = torch.sort(values, dim=-1, descending=True, stable=True)
    index = order.indices[:, :num_elites]
    elite_values = order.values[:, :num_elites]
    elites = take_samples(actions, index)
    score = torch.exp(temperature * (elite_values - elite_values[:, :1]))
    score = score / score.sum(-1, keepdim=True)
    weight = score[:, None, :, None]
    norm = score.sum(-1)[:, None, None] + _SUM_EPS
    mean = (weight * elites).sum(2) / norm
    std = ((weight * (elites - mean.unsqueeze(2)).square()).sum(2) / norm).sqrt()
    std = std.clamp(min_std, max_std)
    if mask is not None:
        mean, std = mean * mask[:, None], std * mask[:, None]
    return index, score, mean, std


def take_samples(actions: Tensor, index: Tensor) -> Tensor:
    """Sequences `index` (E, K) out of actions (E, H, N, A): (E, H, K, A)."""
    e, h, _, a = actions.shape
    return actions.gather(2, index[:, None, :, None].expand(e, h, index.shape[1], a))


def pick_elite(score: Tensor, exponential: Tensor) -> Tensor:
    """One elite per environment with probability `score`, by the Gumbel trick.

    score, exponential: (E, K), the latter Exp(1) draws. Returns (E,) indices into the elites.
    """
    return (score.log() - exponential.log()).argmax(-1)


@dataclass(frozen=True)
class Choice:
    """What the choice of the action needs and gives; `mppi_update` fills the outputs."""

    elite_noise: Tensor  # (E, num_elites) Exp(1), by rank
    action_noise: Tensor  # (E, A) normal, exploration
    eval_mode: Tensor  # (E,) bool, leaves exploration out
    action: Tensor  # out: (E, A) in [-1, 1]
    prev_mean: Tensor  # out: (E, H, A), the new mean
    picked: Tensor  # out: (E,) int64, index into the elites
    chosen: Tensor  # out: (E, H, A), the sequence picked
    counter: Tensor | None = None  # (2,) int64 [seed, plans so far]: the plan is counted here


@jit
def _clamp(x, low, high):
    """x in [low, high]; NaN stays NaN, as in torch."""
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


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
    """One step of one environment, BN of its N-P samples; grid (E, H, row tiles)."""
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
    x = _clamp(mean[None, :] + max_std * tl.load(noise, mask=tile_ok, other=0.0), -1.0, 1.0)  # [BN, BA]
    if MASKED:
        x *= tl.load(mask_ptr + e * A + a, mask=ok, other=0.0)[None, :]
    actions = actions_ptr + ((e * H + t) * N + P + n[:, None]) * A + a[None, :]
    tl.store(actions, x, mask=tile_ok)


@jit
def update_kernel(
    scalars_ptr,
    discount_ptr,
    termination_ptr,
    actions_ptr,
    mask_ptr,
    values_ptr,
    elites_ptr,
    scores_ptr,
    mean_ptr,
    std_ptr,
    noise_ptr,
    elite_noise_ptr,
    action_noise_ptr,
    eval_ptr,
    action_ptr,
    prev_mean_ptr,
    picked_ptr,
    chosen_ptr,
    counter_ptr,
    temperature,
    min_std,
    max_std,
    N,
    P,
    A,
    K,
    scalars_t,
    scalars_e,
    scalars_n,
    termination_t,
    termination_e,
    termination_n,
    H: tl.constexpr,
    EPISODIC: tl.constexpr,
    MASKED: tl.constexpr,
    NEXT: tl.constexpr,
    CHOICE: tl.constexpr,
    COUNT: tl.constexpr,
    SUM_EPS: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
    BA: tl.constexpr,
    PDL: tl.constexpr,
):
    """All N <= BN samples of one environment, one step, BA action dims; grid (E, H, action tiles)."""
    await_producers(PDL)
    e, t, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first = (t == 0) & (tile == 0)
    n = tl.arange(0, BN)  # [BN]
    live = n < N

    value = tl.zeros((BN,), tl.float32)
    weight = tl.full((BN,), 1.0, tl.float32)
    discount = tl.load(discount_ptr + e)
    scalar = scalars_ptr + e * scalars_e + n * scalars_n
    end = termination_ptr + e * termination_e + n * termination_n
    for _ in tl.static_range(H):
        value += weight * tl.load(scalar, mask=live, other=0.0)
        weight *= discount
        if EPISODIC:
            # sigmoid(logit) <= 0.5, rounded alike; false for NaN
            goes_on = 1.0 + tl.exp(-tl.load(end, mask=live, other=0.0)) >= 2.0
            weight = tl.where(goes_on, weight, 0.0)
            end += termination_t
        scalar += scalars_t
    q = tl.load(scalar, mask=live, other=0.0)
    q += tl.load(scalar + scalars_t, mask=live, other=0.0)
    value += weight * (q * 0.5)
    if first:
        tl.store(values_ptr + e * N + n, value, mask=live)

    # As nan_to_num(0): what lies beyond N is below every number it leaves.
    value = tl.where(value == value, value, 0.0)
    value = tl.minimum(tl.maximum(value, -3.4028234663852886e38), 3.4028234663852886e38)
    value = tl.where(live, value, float("-inf"))
    # Counted in float32, two instructions a pair; integers take four.
    mine = value[:, None]
    above = tl.zeros((BN, BJ), tl.float32)
    for start in range(0, N, BJ):
        rival = tl.gather(value, start + tl.arange(0, BJ), 0)[None, :]
        above += tl.where(rival > mine, 1.0, 0.0)  # [BN, BJ]
    rank = tl.sum(above.to(tl.int32), 1)
    # Ranks of distinct values add up to this; ties need a second look, and are rare.
    if tl.sum(tl.where(live, rank, 0), 0) < N * (N - 1) // 2:
        above = tl.zeros((BN, BJ), tl.float32)
        for start in range(0, N, BJ):
            j = start + tl.arange(0, BJ)  # [BJ]
            rival = tl.gather(value, j, 0)[None, :]
            above += tl.where((rival == mine) & (j[None, :] < n[:, None]), 1.0, 0.0)
        rank += tl.sum(above.to(tl.int32), 1)
    elite = live & (rank < K)

    score = tl.where(elite, tl.exp(temperature * (value - tl.max(value, 0))), 0.0)
    score = tl.div_rn(score, tl.sum(score, 0))
    by_rank = e * K + rank
    if first:
        tl.store(elites_ptr + by_rank, n.to(tl.int64), mask=elite)
        tl.store(scores_ptr + by_rank, score, mask=elite)

    a = tile * BA + tl.arange(0, BA)  # [BA]
    ok = a < A
    row = (e * H + t) * A + a
    # The whole slice is read, by reductions over it, before any of it is overwritten below.
    actions = actions_ptr + ((e * H + t) * N + n[None, :]) * A + a[:, None]
    x = tl.load(actions, mask=elite[None, :] & ok[:, None], other=0.0)  # [BA, BN]
    norm = tl.sum(score, 0) + SUM_EPS
    mean = tl.div_rn(tl.sum(score[None, :] * x, 1), norm)
    off = tl.where(elite[None, :], x - mean[:, None], 0.0)
    std = _clamp(tl.sqrt_rn(tl.div_rn(tl.sum(score[None, :] * (off * off), 1), norm)), min_std, max_std)
    if MASKED:
        mask = tl.load(mask_ptr + e * A + a, mask=ok, other=0.0)
        mean, std = mean * mask, std * mask
    tl.store(mean_ptr + row, mean, mask=ok)
    tl.store(std_ptr + row, std, mask=ok)

    if NEXT:
        fresh = live & (n >= P)
        fresh_ok = fresh[None, :] & ok[:, None]
        noise = noise_ptr + ((e * H + t) * (N - P) + n[None, :] - P) * A + a[:, None]
        x = _clamp(mean[:, None] + std[:, None] * tl.load(noise, mask=fresh_ok, other=0.0), -1.0, 1.0)
        if MASKED:
            x *= mask[:, None]
        tl.store(actions, x, mask=fresh_ok)

    if CHOICE:
        # A score of 0 is never picked, not even where its draw is 0 too.
        key = tl.log(score) - tl.log(tl.load(elite_noise_ptr + by_rank, mask=elite, other=1.0))
        key = tl.where(elite & (score > 0) & (key == key), key, float("-inf"))
        best = elite & (key == tl.max(key, 0))
        pick = tl.min(tl.where(best, rank, BN), 0)
        x = tl.sum(tl.where((elite & (rank == pick))[None, :], x, 0.0), 1)  # [BA]
        tl.store(chosen_ptr + row, x, mask=ok)
        tl.store(prev_mean_ptr + row, mean, mask=ok)
        if t == 0:
            explore = tl.load(action_noise_ptr + e * A + a, mask=ok, other=0.0) * std
            x += tl.where(tl.load(eval_ptr + e), 0.0, explore)
            tl.store(action_ptr + e * A + a, _clamp(x, -1.0, 1.0), mask=ok)
        if first:
            tl.store(picked_ptr + e, pick.to(tl.int64))
    if COUNT and first and e == 0:
        tl.store(counter_ptr + 1, tl.load(counter_ptr + 1) + 1)


_MAX_SAMPLES = 32768  # the sum of their ranks is an int32


def _check(
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    like: Tensor,
    dtype: torch.dtype = torch.float32,
    contiguous: bool = True,
) -> None:
    """Refuse another shape, type, device or layout than the kernels work on."""
    got = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
    allowed = f"{shape} {str(dtype).removeprefix('torch.')} on {like.device}"
    if got != allowed:
        raise ValueError(f"{name}: got {got}, allowed: {allowed}")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name}: got strides {x.stride()}, allowed: contiguous")


def _check_noise(name: str, noise: Tensor, actions: Tensor) -> int:
    """P, the number of samples that are not drawn."""
    e, h, n, a = actions.shape
    m = noise.shape[2] if noise.ndim == 4 else -1
    if not 0 <= m <= n:
        raise ValueError(f"{name}: got shape {tuple(noise.shape)}, allowed: ({e}, {h}, at most {n}, {a})")
    _check(name, noise, (e, h, m, a), actions)
    return n - m


def _check_actions(actions: Tensor) -> None:
    if actions.ndim != 4 or 0 in actions.shape or actions.shape[2] > _MAX_SAMPLES:
        allowed = f"(E, H, N, A), each at least 1, N at most {_MAX_SAMPLES}"
        raise ValueError(f"actions: got shape {tuple(actions.shape)}, allowed: {allowed}")
    _check("actions", actions, tuple(actions.shape), actions)


def mppi_begin(
    prev_mean: Tensor,
    t0: Tensor,
    noise: Tensor,
    mask: Tensor | None,
    max_std: float,
    *,
    actions: Tensor,
    mean: Tensor,
    std: Tensor,
    pdl: bool = False,
) -> None:
    """Warm start and first samples of a plan in one launch, written in place.

    Args:
        prev_mean: (E, H, A).
        t0: (E,) bool, an episode starts.
        noise: (E, H, N-P, A) standard normal; N-P may be 0.
        mask: (E, A) of 0/1, live action dims.
        max_std: the std to start with.
        actions: (E, H, N, A); out: the samples after the first P, which are left alone.
        mean: out: (E, H, A) shifted mean, no part of `prev_mean`.
        std: out: (E, H, A).
        pdl: programmatic dependent launch.

    All float32 unless said, and contiguous.
    """
    _check_actions(actions)
    e, h, n, a = actions.shape
    p = _check_noise("noise", noise, actions)
    _check("t0", t0, (e,), actions, torch.bool)
    for name, x in (("prev_mean", prev_mean), ("mean", mean), ("std", std)):
        _check(name, x, (e, h, a), actions)
    if mask is not None:
        _check("mask", mask, (e, a), actions)
    if mean.data_ptr() == prev_mean.data_ptr():
        raise ValueError("mean: got prev_mean itself, allowed: memory of its own, steps are shifted")
    ba = pow2(a)
    bn = min(pow2(max(n - p, 1), 16), max(2048 // ba, 16))
    launch(
        begin_kernel,
        (e, h, max(cdiv(n - p, bn), 1)),
        prev_mean,
        t0,
        noise if p < n else actions,
        mean if mask is None else mask,
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
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )


def mppi_begin_reference(
    prev_mean: Tensor,
    t0: Tensor,
    noise: Tensor,
    mask: Tensor | None,
    max_std: float,
    *,
    actions: Tensor,
    mean: Tensor,
    std: Tensor,
    pdl: bool = False,
) -> None:
    """`mppi_begin` in plain torch, in the type of its arguments."""
    mean.copy_(shift_mean(prev_mean, t0))
    std.fill_(max_std)
    p = actions.shape[2] - noise.shape[2]
    actions[:, :, p:] = sample_actions(mean, std, noise, mask)


def update_tile(n: int, a: int) -> tuple[int, int, int, int]:
    """(BN, BJ, BA, warps) of an update: all samples in one program, which is what ranking needs."""
    bn = pow2(n, 32)
    # 8192 entries of actions and 16384 pairs: 16 and 32 registers a thread of 16 warps.
    bj, ba = (max(1, min(most, budget // bn)) for most, budget in ((32, 16384), (min(pow2(a), 8), 8192)))
    warps = 16 if bn >= 512 else 8 if bn >= 256 else 4
    return bn, bn if interpreting() and bn <= 1024 else bj, ba, warps


def mppi_update(
    scalars: Tensor,
    discount: Tensor,
    termination: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    num_elites: int,
    temperature: float,
    min_std: float,
    max_std: float,
    *,
    values: Tensor,
    elites: Tensor,
    scores: Tensor,
    mean: Tensor,
    std: Tensor,
    next_noise: Tensor | None = None,
    choice: Choice | None = None,
    pdl: bool = False,
) -> None:
    """Values, elites, new mean and std, then the next samples or the choice: one launch, in place.

    Args:
        scalars: (H+2, E, N) rewards of the steps, then two critics' values of the terminal action.
        discount: (E,).
        termination: (H, E, N) logits for the latent after each step; None: nothing terminates.
        actions: (E, H, N, A); out, where `next_noise` is given: the samples after the first P.
        mask: (E, A) of 0/1, live action dims.
        num_elites: 1 to N.
        temperature: of the scores.
        min_std: least std of a live dimension.
        max_std: largest std.
        values: out: (E, N) returns, NaN and infinities as they came.
        elites: out: (E, num_elites) int64 indices by descending value, ties to the lower index.
        scores: out: (E, num_elites), sum to one.
        mean: out: (E, H, A).
        std: out: (E, H, A), clamped, then masked.
        next_noise: (E, H, N-P, A) standard normal, for the next iteration.
        choice: draws and outputs of the last iteration instead.
        pdl: programmatic dependent launch.

    All float32 unless said; contiguous but for `scalars` and `termination`.
    """
    _check_actions(actions)
    e, h, n, a = actions.shape
    if not 1 <= num_elites <= n:
        raise ValueError(f"num_elites: got {num_elites}, allowed: 1 to {n}")
    if next_noise is not None and choice is not None:
        raise ValueError("choice: got one beside next_noise, allowed: one of the two")
    _check("scalars", scalars, (h + 2, e, n), actions, contiguous=False)
    _check("discount", discount, (e,), actions)
    if termination is not None:
        _check("termination", termination, (h, e, n), actions, contiguous=False)
    if mask is not None:
        _check("mask", mask, (e, a), actions)
    _check("values", values, (e, n), actions)
    _check("elites", elites, (e, num_elites), actions, torch.int64)
    _check("scores", scores, (e, num_elites), actions)
    _check("mean", mean, (e, h, a), actions)
    _check("std", std, (e, h, a), actions)
    p = n if next_noise is None else _check_noise("next_noise", next_noise, actions)
    if choice is not None:
        for name, shape in dict(
            elite_noise=(e, num_elites), action_noise=(e, a), action=(e, a), prev_mean=(e, h, a), chosen=(e, h, a)
        ).items():
            _check(f"choice.{name}", getattr(choice, name), shape, actions)
        _check("choice.eval_mode", choice.eval_mode, (e,), actions, torch.bool)
        _check("choice.picked", choice.picked, (e,), actions, torch.int64)
        if choice.counter is not None:
            _check("choice.counter", choice.counter, (2,), actions, torch.int64)
    unused = mean  # stands where a kernel of this form reads nothing
    bn, bj, ba, warps = update_tile(n, a)
    launch(
        update_kernel,
        (e, h, cdiv(a, ba)),
        scalars,
        discount,
        unused if termination is None else termination,
        actions,
        unused if mask is None else mask,
        values,
        elites,
        scores,
        mean,
        std,
        unused if next_noise is None or p == n else next_noise,
        choice.elite_noise if choice else unused,
        choice.action_noise if choice else unused,
        choice.eval_mode if choice else unused,
        choice.action if choice else unused,
        choice.prev_mean if choice else unused,
        choice.picked if choice else unused,
        choice.chosen if choice else unused,
        unused if choice is None or choice.counter is None else choice.counter,
        float(temperature),
        float(min_std),
        float(max_std),
        n,
        p,
        a,
        num_elites,
        *scalars.stride(),
        *((0, 0, 0) if termination is None else termination.stride()),
        H=h,
        EPISODIC=termination is not None,
        MASKED=mask is not None,
        NEXT=p < n,
        CHOICE=choice is not None,
        COUNT=choice is not None and choice.counter is not None,
        SUM_EPS=_SUM_EPS,
        BN=bn,
        BJ=bj,
        BA=ba,
        PDL=pdl,
        num_warps=warps,
        launch_pdl=pdl,
    )


def mppi_update_reference(
    scalars: Tensor,
    discount: Tensor,
    termination: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    num_elites: int,
    temperature: float,
    min_std: float,
    max_std: float,
    *,
    values: Tensor,
    elites: Tensor,
    scores: Tensor,
    mean: Tensor,
    std: Tensor,
    next_noise: Tensor | None = None,
    choice: Choice | None = None,
    pdl: bool = False,
) -> None:
    """`mppi_update` in plain torch, in the type of its arguments."""
    *rewards, q0, q1 = scalars
    value, weight = torch.zeros_like(q0), torch.ones_like(q0)
    for t, reward in enumerate(rewards):
        value = value + weight * reward
        weight = weight * discount.unsqueeze(1)
        if termination is not None:
            weight = weight * (torch.sigmoid(termination[t]) <= 0.5)
    values.copy_(value + weight * ((q0 + q1) / 2))
    new = elite_update(values, actions, num_elites, temperature, min_std, max_std, mask)
    for out, x in zip((elites, scores, mean, std), new, strict=True):
        out.copy_(x)
    if next_noise is not None:
        p = actions.shape[2] - next_noise.shape[2]
        actions[:, :, p:] = sample_actions(mean, std, next_noise, mask)
    if choice is not None:
        pick = pick_elite(scores, choice.elite_noise)
        choice.picked.copy_(pick)
        choice.chosen.copy_(take_samples(actions, elites.gather(1, pick.unsqueeze(1))).squeeze(2))
        explore = (~choice.eval_mode).unsqueeze(1) * std[:, 0] * choice.action_noise
        choice.action.copy_((choice.chosen[:, 0] + explore).clamp(-1, 1))
        choice.prev_mean.copy_(mean)
        if choice.counter is not None:
            choice.counter[1] += 1
