"""Draws of an update: the kernel against plain torch, and the laws.

Statistics use fixed seeds and limits of five standard errors.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import DEVICE, MARKS
from torch import Tensor

from tdmpc2_fast.kernels.device.draw import Run, draw, draw_reference
from tdmpc2_fast.kernels.device.launch import log_launches
from tdmpc2_fast.kernels.plan.buffers import PlanDraws
from tdmpc2_fast.kernels.plan.noise import plan_runs
from tdmpc2_fast.kernels.update.buffers import UpdateDraws
from tdmpc2_fast.kernels.update.noise import _dropped, update_runs

pytestmark = MARKS

BYTE = 77  # what a mask is poisoned with


def outputs(
    h: int = 3, b: int = 7, a: int = 5, q: int = 5, d: int = 9, p: float = 0.1, pixels: bool = True
) -> dict[str, Any]:
    """Poisoned tensors of an update, and the arguments that go with them; of `update_runs` by `runs`."""

    def poison(*size: int) -> Tensor:
        return torch.full(size, torch.nan, device=DEVICE)

    def mask(*size: int) -> Tensor | None:
        return torch.full(size, BYTE, dtype=torch.uint8, device=DEVICE) if p else None

    return dict(
        td_eps=poison(h, b, a),
        pi_eps=poison(h + 1, b, a),
        members=torch.full((2, 2), -1, device=DEVICE),
        num_q=q,
        value_keep=mask(q, h, b, d),
        pi_keep=mask(2, h + 1, b, d),
        p=p,
        shift=torch.full((h + 1, b, 1, 1, 2), -1, device=DEVICE) if pixels else None,
    )


def runs(out: dict[str, Any]) -> list[Run]:
    draws = UpdateDraws(**{name: x for name, x in out.items() if name not in ("num_q", "p")})
    return update_runs(draws, out["num_q"], out["p"])


def drawn(seed: int = 1, counter: int = 0, **sizes: Any) -> dict[str, Any]:
    out = outputs(**sizes)
    draw(torch.tensor([seed, counter], device=DEVICE), runs(out))
    return out


def tensors(out: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in out.items() if isinstance(x, Tensor)}


@pytest.mark.parametrize(
    ("seed", "counter"), [(0, 0), (1, 2**32 - 1), (-(2**63), 2**40 + 3), (2**63 - 1, 2**63 - 1), (-1, 1)]
)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(p=0.0),
        dict(pixels=False),
        dict(h=1, b=1, a=1, q=2, d=1),
        dict(h=2, b=61, a=38, d=131, p=0.5),
    ],
    ids=["odd", "no dropout", "states", "one", "several programs"],
)
def test_kernel_draws_what_the_reference_draws(sizes: dict[str, Any], seed: int, counter: int) -> None:
    state = torch.tensor([seed, counter], device=DEVICE)
    got, want = outputs(**sizes), outputs(**sizes)
    draw(state, runs(got))
    draw_reference(state, runs(want))
    assert state.tolist() == [seed, counter]
    for name, x in tensors(got).items():
        if x.dtype == torch.float32:
            # A few roundings of a logarithm, a root, and a sine of at most 1.
            torch.testing.assert_close(x, want[name], rtol=8 * 2**-23, atol=8 * 2**-23)
        else:
            assert torch.equal(x, want[name]), name


def test_one_launch() -> None:
    with log_launches() as log:
        drawn()
    assert len(log) == 1


def test_same_state_same_bits_another_state_others() -> None:
    base = drawn(3, 4, p=0.5)
    assert all(torch.equal(x, base[name]) for name, x in tensors(drawn(3, 4, p=0.5)).items())
    for other in (drawn(4, 4, p=0.5), drawn(3, 5, p=0.5), drawn(3 + 2**32, 4, p=0.5), drawn(3, 4 + 2**32, p=0.5)):
        for name, most in dict(td_eps=0.1, pi_eps=0.1, value_keep=0.6, pi_keep=0.6, shift=0.4).items():
            assert (other[name] == base[name]).float().mean() < most, name


def test_a_tensor_does_not_depend_on_the_others() -> None:
    base = drawn()
    for other in (drawn(d=700), drawn(p=0.0), drawn(pixels=False)):
        for name, x in tensors(other).items():
            if x.shape == base[name].shape:
                assert torch.equal(base[name], x), name


def test_no_stream_is_one_of_a_plan() -> None:
    sizes = dict(pi_eps=(1, 1, 1, 64), samples=(1, 1, 1, 1, 64), value_eps=(1, 1, 64), action=(1, 64), elite=(1, 1))
    plan = {name: torch.empty(size, device=DEVICE) for name, size in sizes.items()}
    slabs = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    other = plan_runs(PlanDraws(**plan, slabs=slabs, shift=None), 5)
    draw(torch.tensor([1, 0], device=DEVICE), other)
    mine = drawn(h=1, b=1, a=64)
    assert not {run.stream for run in other} & {run.stream for run in runs(outputs())}
    for x in (mine["td_eps"], mine["pi_eps"]):
        for name in ("pi_eps", "samples", "value_eps", "action"):
            assert (x.flatten()[:64] != plan[name].flatten()).all()


@pytest.fixture(scope="module")
def much() -> dict[str, Any]:
    """Enough draws of every tensor; read-only."""
    return drawn(seed=12345, counter=678, h=3, b=256, a=64, q=5, d=128, p=0.01)


def correlation(x: Tensor, y: Tensor) -> float:
    """Of two standard series, in standard errors."""
    size = min(x.numel(), y.numel())
    return abs(float((x.flatten()[:size].double() * y.flatten()[:size].double()).mean())) * size**0.5


def standard(keep: Tensor, p: float) -> Tensor:
    """A mask as a series of mean 0 and variance 1."""
    return (keep.double() - (1 - p)) / math.sqrt(p * (1 - p))


@pytest.mark.parametrize("name", ["td_eps", "pi_eps"])
def test_normals_are_normal(much: dict[str, Any], name: str) -> None:
    x = much[name].double().flatten()
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - moment) < 5 * (variance / n) ** 0.5, power
    cdf = torch.special.ndtr(x).sort().values
    steps = torch.arange(n + 1, dtype=torch.float64, device=x.device) / n
    distance = torch.maximum((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    assert distance < 2.2 / n**0.5  # exceeded once in 8,000


@pytest.mark.parametrize("p", [0.01, 0.25, 0.9])
def test_masks_drop_at_their_rate_and_independently(p: float) -> None:
    out = drawn(seed=8, counter=2, h=2, b=64, a=1, q=3, d=256, p=p)
    series = [standard(out[name], p).flatten() for name in ("value_keep", "pi_keep")]
    for name, x in zip(("value_keep", "pi_keep"), series, strict=True):
        assert set(out[name].unique().tolist()) == {0, 1}
        assert abs(x.mean()) * x.numel() ** 0.5 < 5, name
        for lag in (1, 2, 3, 4, 256, 64 * 256):
            assert correlation(x[lag:], x[:-lag]) < 5, (name, lag)
    assert correlation(*series) < 5


def test_the_rate_is_fine() -> None:
    assert _dropped(0.25) == 2**30
    assert _dropped(2**-32) == 1
    assert _dropped(1 - 2**-40) == 2**32 - 1


def test_nothing_is_correlated(much: dict[str, Any]) -> None:
    sizes: dict[str, Any] = dict(h=3, b=256, a=64, q=5, d=128, p=0.01)
    successor, neighbour = drawn(seed=12345, counter=679, **sizes), drawn(seed=12346, counter=678, **sizes)
    assert correlation(much["td_eps"], much["pi_eps"]) < 5
    for name in ("td_eps", "pi_eps"):
        x = much[name].flatten()
        for lag in (1, 2, 3, 4, 64, 1024):
            assert correlation(x[lag:], x[:-lag]) < 5
            # nor the sizes, which a Box-Muller pair shares
            assert correlation((x[lag:].square() - 1) / 2**0.5, (x[:-lag].square() - 1) / 2**0.5) < 6
        for other in (successor, neighbour):
            assert correlation(x, other[name]) < 5
        for mask in ("value_keep", "pi_keep"):
            assert correlation(x, standard(much[mask], 0.01)) < 5
    for other in (successor, neighbour):
        for mask in ("value_keep", "pi_keep"):
            assert correlation(standard(much[mask], 0.01), standard(other[mask], 0.01)) < 5


@pytest.mark.parametrize("num_q", [2, 5])
def test_members_are_independent_ordered_pairs_of_distinct_critics(num_q: int) -> None:
    # The reference draws them in a hundredth of the interpreter's time, and the same ones (see above).
    rounds = 400
    counter, out = torch.tensor([9, 0]), outputs(h=1, b=1, a=1, q=num_q, p=0.0, pixels=False)
    out = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in out.items()}
    found, all_runs = [], runs(out)
    for _ in range(rounds):
        draw_reference(counter, all_runs)
        found.append(out["members"].clone())
        counter[1] += 1
    members = torch.stack(found)  # (rounds, 2, 2)
    assert (members[..., 0] != members[..., 1]).all()
    pair = members[..., 0] * num_q + members[..., 1]
    pairs = num_q * (num_q - 1)
    for series in pair.unbind(1):
        counts = torch.bincount(series, minlength=num_q**2).double()
        assert int((counts > 0).sum()) == pairs
        assert (counts[counts > 0] - rounds / pairs).abs().max() < 5 * math.sqrt(rounds / pairs)
    same = (pair[:, 0] == pair[:, 1]).double().mean()
    assert abs(same - 1 / pairs) < 5 * math.sqrt(1 / pairs / rounds)


def test_shifts_are_uniform(much: dict[str, Any]) -> None:
    shift = much["shift"].flatten()
    counts = torch.bincount(shift, minlength=7).double()
    assert len(counts) == 7
    assert (counts - len(shift) / 7).abs().max() < 5 * math.sqrt(len(shift) / 7)
    x, y = (shift.view(-1, 2).double() - 3).unbind(1)
    assert correlation(x / 2, y / 2) < 5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("td_eps", lambda x: x.double()),
        ("td_eps", lambda x: x[0]),
        ("pi_eps", lambda x: x[1:]),
        ("pi_eps", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
        ("members", lambda x: x.int()),
        ("members", lambda x: x[:1]),
        ("num_q", lambda x: 1),
        ("p", lambda x: 1.0),
        ("p", lambda x: -0.1),
        ("value_keep", lambda x: x.float()),
        ("value_keep", lambda x: None),
        ("pi_keep", lambda x: x[:1]),
        ("shift", lambda x: x[1:]),
    ],
)
def test_bad_arguments_are_named(name: str, change: Any) -> None:
    args = outputs()
    args[name] = change(args[name])
    state = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for op in (draw, draw_reference):
        with pytest.raises(ValueError, match=rf"^{name}: got .*allowed: "):
            op(state, runs(args))


def test_a_mask_without_dropout_is_refused() -> None:
    args = dict(outputs(), p=0.0)
    with pytest.raises(ValueError, match=r"^value_keep: got a mask .*allowed: None"):
        runs(args)


@pytest.mark.parametrize("state", [torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(4).long()[::2]])
def test_a_bad_state_is_named(state: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^state: got .*allowed: "):
        draw(state.to(DEVICE), runs(outputs()))
