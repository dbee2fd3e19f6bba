"""Draws of a plan: Philox against its published answers, the kernel against plain torch, and the laws.

Statistics use fixed seeds and limits of five standard errors.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import DEVICE, MARKS
from torch import Tensor

from tdmpc2_fast.kernels.device import philox
from tdmpc2_fast.kernels.device.draw import draw, draw_reference
from tdmpc2_fast.kernels.device.launch import jit, launch, log_launches, tl
from tdmpc2_fast.kernels.plan.buffers import PlanDraws
from tdmpc2_fast.kernels.plan.noise import plan_runs

pytestmark = MARKS

# Random123, kat_vectors: counter, key, answer of philox4x32-10
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def plan(e: int = 3, h: int = 2, p: int = 3, a: int = 5, i: int = 3, n: int = 17, k: int = 7) -> PlanDraws:
    """Poisoned tensors of a plan."""

    def poison(*size: int) -> Tensor:
        return torch.full(size, torch.nan, device=DEVICE)

    return PlanDraws(
        pi_eps=poison(e, h, p, a),
        samples=poison(i, e, h, n - p, a),
        value_eps=poison(i, e, n, a),
        action=poison(e, a),
        elite=poison(e, k),
        slabs=torch.full((i, h + 2), -1, device=DEVICE),
        shift=torch.full((e, 1, 1, 2), -1, device=DEVICE),
    )


def drawn(seed: int = 1, counter: int = 0, num_q: int = 5, **sizes: int) -> dict[str, Tensor]:
    runs = plan_runs(plan(**sizes), num_q)
    draw(torch.tensor([seed, counter], device=DEVICE), runs)
    return {run.name: run.out for run in runs}


@jit
def words_kernel(state_ptr, counter_ptr, out_ptr):
    c = tl.load(counter_ptr + tl.arange(0, 4))
    lane = tl.arange(0, 4)
    c0 = tl.sum(tl.where(lane == 0, c, 0), 0) + lane * 0
    c1 = tl.sum(tl.where(lane == 1, c, 0), 0) + lane * 0
    c2 = tl.sum(tl.where(lane == 2, c, 0), 0) + lane * 0
    c3 = tl.sum(tl.where(lane == 3, c, 0), 0) + lane * 0
    w0, w1, w2, w3 = tl.philox(tl.load(state_ptr), c0, c1, c2, c3)
    out = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    tl.store(out_ptr + lane, out.to(tl.int64))


@pytest.mark.triton
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    words = philox.philox(torch.tensor(key), tuple(torch.tensor([c]) for c in counter))  # type: ignore[arg-type]
    assert tuple(int(w) for w in words) == answer
    seed = torch.tensor([signed(key[1] << 32 | key[0], 64)], device=DEVICE)
    c = torch.tensor([signed(c, 32) for c in counter], dtype=torch.int32, device=DEVICE)
    out = torch.full((4,), -1, device=DEVICE)
    launch(words_kernel, (1,), seed, c, out)
    assert tuple(out.tolist()) == answer


STATES = [(0, 0), (1, 2**32 - 1), (-(2**63), 2**40 + 3), (2**63 - 1, 2**63 - 1), (-1, 1)]


@pytest.mark.parametrize(("seed", "counter"), STATES)
@pytest.mark.parametrize(
    "sizes",
    [dict(), dict(p=0), dict(p=17), dict(e=1, h=1, p=0, a=1, i=1, n=1, k=1), dict(e=7, a=38, n=23, i=8)],
    ids=["odd", "no prior", "prior alone", "one", "several programs"],
)
def test_kernel_draws_what_the_reference_draws(sizes: dict[str, int], seed: int, counter: int) -> None:
    state = torch.tensor([seed, counter], device=DEVICE)
    got, want = (plan_runs(plan(**sizes), 5) for _ in range(2))
    draw(state, got)
    draw_reference(state, want)
    assert state.tolist() == [seed, counter]
    assert len(got) == 7
    for x, y in zip(got, want, strict=True):
        if x.out.dtype == torch.int64:
            assert torch.equal(x.out, y.out), x.name
        else:
            # A few roundings of a logarithm, a root, and a sine of at most 1.
            torch.testing.assert_close(x.out, y.out, rtol=8 * 2**-23, atol=8 * 2**-23)


def test_one_launch_and_the_same_signature() -> None:
    with log_launches() as log:
        drawn()
    assert len(log) == 1
    assert inspect.signature(draw) == inspect.signature(draw_reference)


def test_same_state_same_bits_another_state_others() -> None:
    base = drawn(3, 4)
    assert all(torch.equal(x, base[name]) for name, x in drawn(3, 4).items())
    for other in (drawn(4, 4), drawn(3, 5), drawn(3 + 2**32, 4), drawn(3, 4 + 2**32)):
        for name in ("pi_eps", "samples", "value_eps", "action", "elite"):
            assert (other[name] == base[name]).float().mean() < 0.1, name


def test_draws_of_some_sizes_do_not_depend_on_the_others() -> None:
    base, other = drawn(n=17, p=3), drawn(n=700, p=3)
    for name in ("pi_eps", "action", "elite", "members", "shift"):
        assert torch.equal(base[name], other[name])
    assert torch.equal(base["samples"].flatten(), other["samples"].flatten()[: base["samples"].numel()])


def test_pairs_may_be_columns_of_a_wider_table() -> None:
    table = torch.full((9, 5), -1, device=DEVICE)
    draw(torch.tensor([1, 0], device=DEVICE), plan_runs(replace(plan(i=9), slabs=table), 5))
    assert torch.equal(table[:, -2:], drawn(i=9)["members"])
    assert (table[:, :-2] == -1).all()


def law(x: Tensor, cdf: Tensor, mean: float, var: float, fourth: float) -> None:
    """Mean, variance, fourth central moment's ratio, and the distance of distributions (Kolmogorov)."""
    n = x.numel()
    x = x.flatten().double()
    off = x - x.mean()
    assert abs(x.mean() - mean) < 5 * (var / n) ** 0.5
    assert abs(off.square().mean() - var) < 5 * var * ((fourth - 1) / n) ** 0.5
    # The eighth moments of both laws keep the standard error of this ratio below 60 / sqrt(n).
    assert abs(off.pow(4).mean() / off.square().mean() ** 2 - fourth) < 5 * fourth * 7 / n**0.5
    steps = torch.arange(n + 1, dtype=torch.float64, device=x.device) / n
    cdf = cdf.flatten().double().sort().values
    distance = torch.maximum((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    assert distance < 2.2 / n**0.5  # exceeded once in 8,000


@pytest.fixture(scope="module")
def much() -> dict[str, Tensor]:
    """Enough draws of every tensor; read-only."""
    return drawn(seed=12345, counter=678, e=64, h=1, p=256, a=8, i=1, n=512, k=2048)


@pytest.mark.parametrize("name", ["pi_eps", "samples", "value_eps", "action"])
def test_normals_are_normal(much: dict[str, Tensor], name: str) -> None:
    x = much[name]
    assert x.isfinite().all()
    law(x, torch.special.ndtr(x.double()), mean=0, var=1, fourth=3)


def test_exponentials_are_exponential(much: dict[str, Tensor]) -> None:
    x = much["elite"]
    assert x.min() > 0
    assert x.isfinite().all()
    law(x, -torch.expm1(-x.double()), mean=1, var=1, fourth=9)


def correlation(x: Tensor, y: Tensor) -> float:
    """Of two standard normal series, in standard errors."""
    return abs(float((x.double() * y.double()).mean())) * x.numel() ** 0.5


def test_nothing_is_correlated(much: dict[str, Tensor]) -> None:
    flat = {name: much[name].flatten() for name in ("pi_eps", "samples", "value_eps")}
    successor = drawn(seed=12345, counter=679, e=64, h=1, p=256, a=8, i=1, n=512, k=1)
    neighbour = drawn(seed=12346, counter=678, e=64, h=1, p=256, a=8, i=1, n=512, k=1)
    for name, x in flat.items():
        for lag in (1, 2, 3, 4, 8, 1024):
            assert correlation(x[lag:], x[:-lag]) < 5
            # nor the sizes, which a Box-Muller pair shares
            assert correlation((x[lag:].square() - 1) / 2**0.5, (x[:-lag].square() - 1) / 2**0.5) < 6
        assert correlation(x, successor[name].flatten()) < 5
        assert correlation(x, neighbour[name].flatten()) < 5
    names = list(flat)
    for i, a in enumerate(names):
        for b in names[:i]:
            size = min(flat[a].numel(), flat[b].numel())
            assert correlation(flat[a][:size], flat[b][:size]) < 5


@pytest.mark.triton
def test_the_largest_words_stay_finite() -> None:
    word = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    u = philox.uniform_reference(word)
    assert u.min() > 0
    assert u.max() < 1
    out = torch.full((6, 3), torch.nan, device=DEVICE)
    launch(ends_kernel, (1,), word.to(DEVICE), out, 6)
    assert torch.equal(out[:, 0].cpu(), u)
    assert out.isfinite().all()
    assert out[:, 1:].abs().max() < 7


@jit
def ends_kernel(word_ptr, out_ptr, n):
    lane = tl.arange(0, 8)
    ok = lane < n
    word = tl.load(word_ptr + lane, mask=ok, other=0).to(tl.uint32)
    x, y = philox.normal_pair(word, word)
    tl.store(out_ptr + lane * 3, philox.uniform(word), mask=ok)
    tl.store(out_ptr + lane * 3 + 1, x, mask=ok)
    tl.store(out_ptr + lane * 3 + 2, y, mask=ok)


@pytest.mark.parametrize("num_q", [2, 3, 5])
def test_members_are_ordered_pairs_of_distinct_critics(num_q: int) -> None:
    members = drawn(seed=9, i=20_000, num_q=num_q, e=1, h=1, n=1, p=1, a=1)["members"]
    assert (members[:, 0] != members[:, 1]).all()
    counts = torch.bincount(members[:, 0] * num_q + members[:, 1], minlength=num_q**2).double()
    pairs = num_q * (num_q - 1)
    assert int((counts > 0).sum()) == pairs
    expected = len(members) / pairs
    assert (counts[counts > 0] - expected).abs().max() < 5 * math.sqrt(expected)
    # the next pair does not depend on this one
    same = (members[1:] == members[:-1]).all(1).double().mean()
    assert abs(same - 1 / pairs) < 5 * math.sqrt(1 / pairs / len(members))


def test_shifts_are_uniform() -> None:
    shift = drawn(seed=2, e=10_000, h=1, i=1, n=1, p=1, a=1, k=1)["shift"].flatten()
    counts = torch.bincount(shift, minlength=7).double()
    assert len(counts) == 7
    assert (counts - len(shift) / 7).abs().max() < 5 * math.sqrt(len(shift) / 7)
    x, y = (shift.view(-1, 2).double() - 3).unbind(1)
    assert correlation(x / 2, y / 2) < 5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("state", lambda x: None),
        ("num_q", lambda x: 1),
        ("samples", lambda x: x.double()),
        ("value_eps", lambda x: x.transpose(-1, -2)),
        ("members", lambda x: x.flatten()),
        ("members", lambda x: x.int()),
        ("shift", lambda x: x.float()),
    ],
)
def test_bad_arguments_are_named(name: str, change: Any) -> None:
    runs = plan_runs(plan(), 1 if name == "num_q" else 5)
    runs = [run._replace(out=change(run.out)) if run.name == name else run for run in runs]
    state = torch.zeros(3 if name == "state" else 2, dtype=torch.int64, device=DEVICE)
    for op in (draw, draw_reference):
        with pytest.raises(ValueError, match=rf"^{name}: got .*allowed: "):
            op(state, runs)
