"""The end of an MPPI iteration in one launch: values, elites, mean, std, next samples or the choice.

Every program of an environment computes all its values and finds the elites anew and takes one step
and one tile of action dims from there: multiprocessors idle here, and the chain of dependent launches is
what costs. The K-th largest value is found by its bits, from the first to the last that matters, with a
count of what is above it each; only elites are ranked, by K^2 comparisons, exactly and stably. A program
writes no slice another one reads (paper, section 3.2 and eq. 6).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..device.arithmetic import clamp
from ..device.launch import await_producers, cdiv, check_tensor, jit, launch, pow2, tl
from ..device.pointers import Strided
from ..device.reference import reference_of
from .mppi import SUM_EPS, Elites, Rule, Samples, explore, pick_elite, refine, sample_actions, take_samples
from .mppi_begin import check_samples, drawn_from


class Choice(NamedTuple):
    """What the choice of the action needs and gives; `mppi_refine` fills the outputs."""

    elite_noise: Tensor  # (E, num_elites) Exp(1), by rank
    action_noise: Tensor  # (E, A) normal, exploration
    eval_mode: Tensor  # (E,) bool, leaves exploration out
    action: Tensor  # out: (E, A) in [-1, 1]
    prev_mean: Tensor  # out: (E, H, A), the new mean
    picked: Tensor  # out: (E,) int64, index into the elites
    chosen: Tensor  # out: (E, H, A), the sequence picked
    counter: Tensor | None = None  # (2,) int64 [seed, plans so far]: the plan is counted here


@jit
def values_of(scalars, discount_ptr, termination, e, n, live, H: tl.constexpr, EPISODIC: tl.constexpr):
    """Return the values of samples n of one environment: rewards, then the mean of two critics, discounted."""
    value = tl.zeros(n.shape, tl.float32)
    weight = value + 1.0
    discount = tl.load(discount_ptr + e)
    scalar = scalars.ptr + e * scalars.e + n * scalars.r
    if EPISODIC:
        end = termination.ptr + e * termination.e + n * termination.r
    for _ in tl.static_range(H):
        value += weight * tl.load(scalar, mask=live, other=0.0)
        weight *= discount
        if EPISODIC:
            # sigmoid(logit) <= 0.5, rounded alike; false for NaN
            goes_on = 1.0 + tl.exp(-tl.load(end, mask=live, other=0.0)) >= 2.0
            weight = tl.where(goes_on, weight, 0.0)
            end += termination.g
        scalar += scalars.g
    q = tl.load(scalar, mask=live, other=0.0)
    q += tl.load(scalar + scalars.g, mask=live, other=0.0)
    return value + weight * (q * 0.5)


@jit
def as_number(x):
    """Return x as torch's nan_to_num(0) does, and 0 for -0: the two are equal."""
    x = tl.where(x == x, x, 0.0)
    x = tl.minimum(tl.maximum(x, -3.4028234663852886e38), 3.4028234663852886e38)
    return tl.where(x == 0.0, 0.0, x)


@jit
def is_elite(value, live, K):
    """Tell which of numbers [BN] are the K largest that are live, of equal ones those with the lower index."""
    # Integers in the order of the numbers; what is not live is below all.
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(live, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)
    # The largest number that at least K are not below, less 2^31: from its first bit on.
    least = tl.full((), -0x80000000, tl.int32)
    count = tl.full((), 0, tl.int32)
    bit = tl.full((), 31, tl.int32)
    while (bit >= 0) & (count != K):
        more = least ^ (1 << bit)
        found = tl.sum((key >= more).to(tl.int32), 0)
        count = tl.where(found >= K, found, count)
        least = tl.where(found >= K, more, least)
        bit -= 1
    above, equal = key > least, (key == least) & live
    missing = K - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))


@jit
def refine_kernel(
    scalars,
    discount_ptr,
    termination,
    samples,
    mask_ptr,
    elites,
    noise_ptr,
    choice,
    temperature,
    min_std,
    max_std,
    N,
    P,
    A,
    K,
    H: tl.constexpr,
    EPISODIC: tl.constexpr,
    MASKED: tl.constexpr,
    NEXT: tl.constexpr,
    CHOICE: tl.constexpr,
    COUNT: tl.constexpr,
    SUM_EPS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BA: tl.constexpr,
    PDL: tl.constexpr,
):
    """Refine from all N <= BN samples and K <= BK elites of one environment, one step, BA action dims.

    Grid (E, H, action tiles). `Strided` rows of scalars and termination logits by step; `Samples`, `Elites`
    and `Choice` as of the op.
    """
    await_producers(PDL)
    e, t, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first = (t == 0) & (tile == 0)
    n = tl.arange(0, BN)  # [BN]
    live = n < N
    value = values_of(scalars, discount_ptr, termination, e, n, live, H, EPISODIC)
    if first:
        tl.store(elites.returns + e * N + n, value, mask=live)
    elite = is_elite(as_number(value), live, K)
    # Elites come together in memory, in the order of their indices: all programs of an environment write the same.
    place = tl.cumsum(elite.to(tl.int32), 0) - 1
    tl.store(elites.order + e * K + place, n.to(tl.int64), mask=elite)
    tl.debug_barrier()

    i = tl.arange(0, BK)  # [BK]
    exists = i < K
    best = tl.load(elites.order + e * K + i, mask=exists, other=0, cache_modifier=".cg")
    value = as_number(values_of(scalars, discount_ptr, termination, e, best, exists, H, EPISODIC))
    value = tl.where(exists, value, float("-inf"))
    above = (value[None, :] > value[:, None]) | ((value[None, :] == value[:, None]) & (i[None, :] < i[:, None]))
    rank = tl.sum(above.to(tl.int32), 1)
    score = tl.where(exists, tl.exp(temperature * (value - tl.max(value, 0))), 0.0)
    score = tl.div_rn(score, tl.sum(score, 0))
    by_rank = e * K + rank
    if first:
        tl.store(elites.best + by_rank, best, mask=exists)
        tl.store(elites.scores + by_rank, score, mask=exists)

    a = tile * BA + tl.arange(0, BA)  # [BA]
    ok = a < A
    row = (e * H + t) * A + a
    slice_ptr = samples.actions + (e * H + t) * N * A
    x = tl.load(slice_ptr + best[None, :] * A + a[:, None], mask=exists[None, :] & ok[:, None], other=0.0)  # [BA, BK]
    norm = tl.sum(score, 0) + SUM_EPS
    mean = tl.div_rn(tl.sum(score[None, :] * x, 1), norm)
    off = tl.where(exists[None, :], x - mean[:, None], 0.0)
    std = clamp(tl.sqrt_rn(tl.div_rn(tl.sum(score[None, :] * (off * off), 1), norm)), min_std, max_std)
    if MASKED:
        mask = tl.load(mask_ptr + e * A + a, mask=ok, other=0.0)
        mean, std = mean * mask, std * mask
    tl.store(samples.mean + row, mean, mask=ok)
    tl.store(samples.std + row, std, mask=ok)

    if NEXT:
        # All threads have read the slice before any of it is overwritten.
        tl.debug_barrier()
        fresh = live & (n >= P)
        fresh_ok = fresh[None, :] & ok[:, None]
        noise = noise_ptr + ((e * H + t) * (N - P) + n[None, :] - P) * A + a[:, None]
        drawn = clamp(mean[:, None] + std[:, None] * tl.load(noise, mask=fresh_ok, other=0.0), -1.0, 1.0)
        if MASKED:
            drawn *= mask[:, None]
        tl.store(slice_ptr + n[None, :] * A + a[:, None], drawn, mask=fresh_ok)

    if CHOICE:
        # A score of 0 is never picked, not even where its draw is 0 too.
        key = tl.log(score) - tl.log(tl.load(choice.elite_noise + by_rank, mask=exists, other=1.0))
        key = tl.where(exists & (score > 0) & (key == key), key, float("-inf"))
        pick = tl.min(tl.where(exists & (key == tl.max(key, 0)), rank, BK), 0)
        x = tl.sum(tl.where((exists & (rank == pick))[None, :], x, 0.0), 1)  # [BA]
        tl.store(choice.chosen + row, x, mask=ok)
        tl.store(choice.prev_mean + row, mean, mask=ok)
        if t == 0:
            explore = tl.load(choice.action_noise + e * A + a, mask=ok, other=0.0) * std
            x += tl.where(tl.load(choice.eval_mode + e), 0.0, explore)
            tl.store(choice.action + e * A + a, clamp(x, -1.0, 1.0), mask=ok)
        if first:
            tl.store(choice.picked + e, pick.to(tl.int64))
    if COUNT and first and e == 0:
        tl.store(choice.counter + 1, tl.load(choice.counter + 1) + 1)


def refine_tile(n: int, k: int, a: int) -> tuple[int, int, int, int]:
    """Return (BN, BK, BA, warps): all samples and all elites are in one program, which is what ranking needs."""
    bn, bk = pow2(n, 32), pow2(k)
    # 8192 entries of new samples, 64 registers a thread of 4 warps.
    ba = max(1, min(pow2(a), 8, 8192 // bn))
    return bn, bk, ba, 4 if bn < 512 else 8 if bn < 4096 and bk < 256 else 16


def _check_choice(choice: Choice, elites: Elites, samples: Samples) -> None:
    """Refuse what the choice would read or write wrongly."""
    actions, (e, h, a) = samples.actions, samples.mean.shape
    for name, shape in dict(
        elite_noise=elites.scores.shape, action_noise=(e, a), action=(e, a), prev_mean=(e, h, a), chosen=(e, h, a)
    ).items():
        check_tensor(f"choice.{name}", getattr(choice, name), tuple(shape), actions)
    check_tensor("choice.eval_mode", choice.eval_mode, (e,), actions, torch.bool)
    check_tensor("choice.picked", choice.picked, (e,), actions, torch.int64)
    if choice.counter is not None:
        check_tensor("choice.counter", choice.counter, (2,), actions, torch.int64)


def mppi_refine(
    scalars: Tensor,
    discount: Tensor,
    termination: Tensor | None,
    samples: Samples,
    mask: Tensor | None,
    rule: Rule,
    elites: Elites,
    *,
    next_noise: Tensor | None = None,
    choice: Choice | None = None,
    pdl: bool = False,
) -> None:
    """Write values, elites, new mean and std, then the next samples or the choice: in place and in one launch.

    Args:
        scalars: (H+2, E, N) rewards of the steps, then two critics' values of the terminal action.
        discount: (E,).
        termination: (H, E, N) logits for the latent after each step; None: nothing terminates.
        samples: the sequences; out: mean and std, and where `next_noise` is given the samples after the first P.
        mask: (E, A) of 0/1, live action dims.
        rule: what elites are, and what they make of mean and std.
        elites: out.
        next_noise: (E, H, N-P, A) standard normal, for the next iteration.
        choice: draws and outputs of the last iteration instead.
        pdl: programmatic dependent launch.

    All float32 unless said; contiguous but for `scalars` and `termination`.
    """
    e, h, n, a = check_samples(samples, mask)
    actions, k = samples.actions, rule.num_elites
    if not 1 <= k <= n:
        raise ValueError(f"num_elites: got {k}, allowed: 1 to {n}")
    if next_noise is not None and choice is not None:
        raise ValueError("choice: got one beside next_noise, allowed: one of the two")
    check_tensor("scalars", scalars, (h + 2, e, n), actions, contiguous=False)
    check_tensor("discount", discount, (e,), actions)
    if termination is not None:
        check_tensor("termination", termination, (h, e, n), actions, contiguous=False)
    check_tensor("values", elites.returns, (e, n), actions)
    check_tensor("elites", elites.best, (e, k), actions, torch.int64)
    check_tensor("scores", elites.scores, (e, k), actions)
    check_tensor("order", elites.order, (e, k), actions, torch.int64)
    p = n if next_noise is None else drawn_from("next_noise", next_noise, actions)
    if choice is not None:
        _check_choice(choice, elites, samples)
    bn, bk, ba, warps = refine_tile(n, k, a)
    launch(
        refine_kernel,
        (e, h, cdiv(a, ba)),
        Strided(scalars, *scalars.stride()),
        discount,
        None if termination is None else Strided(termination, *termination.stride()),
        samples,
        mask,
        elites,
        next_noise,
        choice,
        float(rule.temperature),
        float(rule.min_std),
        float(rule.max_std),
        n,
        p,
        a,
        k,
        H=h,
        EPISODIC=termination is not None,
        MASKED=mask is not None,
        NEXT=p < n,
        CHOICE=choice is not None,
        COUNT=choice is not None and choice.counter is not None,
        SUM_EPS=SUM_EPS,
        BN=bn,
        BK=bk,
        BA=ba,
        pdl=pdl,
        num_warps=warps,
    )


@reference_of(mppi_refine)
def mppi_refine_reference(
    scalars: Tensor,
    discount: Tensor,
    termination: Tensor | None,
    samples: Samples,
    mask: Tensor | None,
    rule: Rule,
    elites: Elites,
    next_noise: Tensor | None,
    choice: Choice | None,
) -> None:
    """Do as `mppi_refine` in plain torch, in the type of the arguments."""
    actions, mean, std = samples
    *rewards, q0, q1 = scalars
    value, weight = torch.zeros_like(q0), torch.ones_like(q0)
    for t, reward in enumerate(rewards):
        value = value + weight * reward
        weight = weight * discount.unsqueeze(1)
        if termination is not None:
            weight = weight * (torch.sigmoid(termination[t]) <= 0.5)
    returns, best, scores, order = elites
    returns.copy_(value + weight * ((q0 + q1) / 2))
    new = refine(returns, actions, rule, mask)
    for out, x in zip((best, scores, mean, std), new, strict=True):
        out.copy_(x)
    order.copy_(best.sort().values)
    if next_noise is not None:
        p = actions.shape[2] - next_noise.shape[2]
        actions[:, :, p:] = sample_actions(mean, std, next_noise, mask)
    if choice is not None:
        pick = pick_elite(scores, choice.elite_noise)
        choice.picked.copy_(pick)
        choice.chosen.copy_(take_samples(actions, best.gather(1, pick.unsqueeze(1))).squeeze(2))
        choice.action.copy_(explore(choice.chosen[:, 0], std[:, 0], choice.action_noise, choice.eval_mode))
        choice.prev_mean.copy_(mean)
        if choice.counter is not None:
            choice.counter[1] += 1
