"""The ops against float64 oracles: error at most twice that of plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from judge import within_twice
from torch import Tensor

from tdmpc2_fast.kernels.layers.activations import mish, simnorm
from tdmpc2_fast.kernels.layers.normed_linear import linear
from tdmpc2_fast.kernels.layers.policy_head import policy_action, policy_head
from tdmpc2_fast.kernels.layers.two_hot import soft_cross_entropy, symexp, symlog, two_hot, two_hot_inv
from tdmpc2_fast.kernels.plan import mppi
from tdmpc2_fast.rng import dropout_multipliers

SHAPES = [(32, 8), (7, 24), (33, 136), (5, 3, 64)]  # enough entries for a maximum to mean something


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_mish_is_as_exact_as_torch(shape: tuple[int, ...], scale: float) -> None:
    x = torch.randn(shape) * scale
    within_twice(mish(x), F.mish(x), F.mish(x.double()))


def test_mish_gradient() -> None:
    x = torch.linspace(-30, 30, 301, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mish, (x,))


def test_mish_of_another_type_is_torchs() -> None:
    x = torch.randn(1000).bfloat16()
    assert torch.equal(mish(x), F.mish(x))


def test_mish_at_the_ends() -> None:
    x = torch.tensor([-1e4, -100.0, -0.0, 0.0, 19.9, 20.1, 100.0, 1e30, torch.nan])
    torch.testing.assert_close(mish(x), F.mish(x), equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_simnorm_groups_sum_to_one(shape: tuple[int, ...]) -> None:
    z = simnorm(torch.randn(shape) * 30, 8)
    torch.testing.assert_close(z.unflatten(-1, (-1, 8)).sum(-1), torch.ones(*shape[:-1], shape[-1] // 8))


@pytest.mark.parametrize("lead", [((4, 1), (4, 1), (4, 9)), ((4, 9), (4, 1), (4, 9)), ((1, 3), (1, 3), (5, 3))])
@pytest.mark.parametrize("grad", [False, True])
def test_linear_in_parts_equals_linear_of_the_concatenation(lead: tuple[tuple[int, ...], ...], grad: bool) -> None:
    widths = (16, 4, 3)
    parts = [torch.randn(*s, w, requires_grad=grad) for s, w in zip(lead, widths, strict=True)]
    weight, bias = torch.randn(11, sum(widths), requires_grad=grad), torch.randn(11)
    shape = torch.broadcast_shapes(*lead)
    whole = F.linear(torch.cat([p.expand(*shape, -1) for p in parts], -1), weight, bias)
    got = linear(parts, weight, bias)
    torch.testing.assert_close(got, whole)
    if grad:
        cotangent = torch.randn_like(whole)
        for a, b in zip(
            torch.autograd.grad(got, [weight, *parts], cotangent),
            torch.autograd.grad(whole, [weight, *parts], cotangent),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_two_hot_round_trip_and_edges() -> None:
    bins = (101, -10.0, 10.0)
    x = torch.cat([torch.linspace(-2e4, 2e4, 401), torch.tensor([0.0, torch.inf, -torch.inf])]).view(-1, 1)
    code = two_hot(x, *bins)
    torch.testing.assert_close(code.sum(-1), torch.ones(len(x)))
    assert ((code > 0).sum(-1) <= 2).all()
    # A distribution that is exactly the code gives the (clamped) scalar back.
    back = two_hot_inv(code.clamp(min=1e-38).log(), *bins)
    edge = symexp(torch.tensor(10.0))
    torch.testing.assert_close(back, x.clamp(-edge, edge), rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("num_bins", [2, 7, 101])
def test_soft_cross_entropy_is_the_dense_one(num_bins: int) -> None:
    logits = torch.randn(3, 17, num_bins, dtype=torch.float64, requires_grad=True)
    target = torch.randn(17, 1, dtype=torch.float64) * 20
    dense = -(two_hot(target, num_bins, -10, 10) * logits.log_softmax(-1)).sum(-1, keepdim=True)
    got = soft_cross_entropy(logits, target, num_bins, -10, 10)
    torch.testing.assert_close(got, dense)
    weight = torch.randn_like(dense)
    torch.testing.assert_close(*(torch.autograd.grad(y, logits, weight)[0] for y in (got, dense)))


@pytest.mark.parametrize("num_bins", [0, 1])
def test_regression_without_bins_is_least_where_it_is_right(num_bins: int) -> None:
    target = torch.tensor([[-30.0], [0.0], [4.0]])
    right = symlog(target) if num_bins else target
    torch.testing.assert_close(two_hot_inv(right, num_bins, -10, 10), target)
    assert soft_cross_entropy(right, target, num_bins, -10, 10).abs().max() == 0
    assert soft_cross_entropy(right + 1, target, num_bins, -10, 10).min() > 0


def test_policy_masks_dead_dimensions() -> None:
    logits, eps = torch.randn(6, 8), torch.randn(6, 4)
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0])
    out = policy_head(logits, eps, -10, 2, mask)
    assert out.action[:, 2:].abs().max() == 0
    assert out.log_std[:, 2:].abs().max() == 0
    other = policy_head(logits, eps * torch.tensor([1.0, 1.0, 9.0, 9.0]), -10, 2, mask)
    torch.testing.assert_close(other.scaled_entropy, out.scaled_entropy)
    torch.testing.assert_close(policy_action(logits, eps, -10, 2, mask), out.action)


class TestRefine:
    def run(self, values: Tensor, actions: Tensor, k: int = 4, temperature: float = 0.5) -> tuple[Tensor, ...]:
        return mppi.refine(values, actions, mppi.Rule(k, temperature, 0.05, 2.0))

    def test_scores_sum_to_one_and_mean_lies_among_elites(self) -> None:
        values, actions = torch.randn(3, 20) * 5, torch.rand(3, 2, 20, 4) * 2 - 1
        index, score, mean, std = self.run(values, actions)
        torch.testing.assert_close(score.sum(-1), torch.ones(3))
        elites = mppi.take_samples(actions, index)
        assert (mean <= elites.amax(2) + 1e-6).all()
        assert (mean >= elites.amin(2) - 1e-6).all()
        assert std.min() >= 0.05
        assert std.max() <= 2.0

    def test_ties_go_to_the_lower_index(self) -> None:
        index, score, *_ = self.run(torch.zeros(1, 9), torch.rand(1, 2, 9, 1))
        assert index.tolist() == [[0, 1, 2, 3]]
        torch.testing.assert_close(score, torch.full((1, 4), 0.25))

    def test_nan_counts_as_zero_and_infinities_do_not_spread(self) -> None:
        values = torch.tensor([[torch.nan, -1.0, 1.0, -torch.inf, 0.5, -2.0]])
        index, score, mean, std = self.run(values, torch.rand(1, 2, 6, 3), k=3)
        assert index.tolist() == [[2, 4, 0]]
        assert score.isfinite().all()
        _, score, mean, std = self.run(torch.tensor([[torch.inf, 1.0, 2.0, 3.0]]), torch.rand(1, 1, 4, 1), k=4)
        assert torch.cat([score.flatten(), mean.flatten(), std.flatten()]).isfinite().all()

    def test_all_samples_may_be_elites(self) -> None:
        index, *_ = self.run(torch.randn(2, 5), torch.rand(2, 1, 5, 2), k=5)
        assert index.sort(-1).values.tolist() == [[0, 1, 2, 3, 4]] * 2

    def test_invariant_to_sample_order_and_value_shift(self) -> None:
        values, actions = torch.randn(2, 30, dtype=torch.float64), torch.rand(2, 3, 30, 2, dtype=torch.float64)
        order = torch.randperm(30)
        base = self.run(values, actions)
        for other in (self.run(values[:, order], actions[:, :, order]), self.run(values + 7.0, actions)):
            torch.testing.assert_close(other[2], base[2])
            torch.testing.assert_close(other[3], base[3])


def test_shift_mean_moves_on_and_forgets_at_t0() -> None:
    prev = torch.arange(12.0).view(2, 3, 2)
    mean = mppi.shift_mean(prev, torch.tensor([False, True]))
    assert mean[0].tolist() == [[2.0, 3.0], [4.0, 5.0], [0.0, 0.0]]
    assert mean[1].abs().max() == 0


def test_pick_elite_follows_the_scores() -> None:
    score = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(20_000, 4)
    g = torch.Generator().manual_seed(3)
    picks = mppi.pick_elite(score, torch.empty(20_000, 4).exponential_(generator=g))
    share = torch.bincount(picks, minlength=4) / 20_000
    torch.testing.assert_close(share, score[0], atol=0.015, rtol=0)


@pytest.mark.parametrize("p", [0.01, 0.3])
def test_dropout_law(p: float) -> None:
    g = torch.Generator().manual_seed(1)
    m = torch.stack([dropout_multipliers((40, 50), p, g) for _ in range(400)])
    assert set(m.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    share = (m == 0).float()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(share.mean() - p) < 5 * sigma / share.numel() ** 0.5
    # first and last entries of the array are no special case
    for entry in (share[:, 0, 0], share[:, -1, -1]):
        assert abs(entry.mean() - p) < 5 * sigma / 400**0.5
    neighbours = (share.flatten(1)[:, 1:] * share.flatten(1)[:, :-1]).mean()
    assert abs(neighbours - p * p) < 6 * p / share.numel() ** 0.5
