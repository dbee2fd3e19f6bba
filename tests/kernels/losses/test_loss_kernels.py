"""Kernels of the losses, forward and backward, against float64 autograd."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from judge import judge, judge_scalars, pooled
from oracle import DEVICE, MARKS, placed, poisoned, randn
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import How, Precision
from tdmpc2_fast.kernels.layers.policy_head import policy_head
from tdmpc2_fast.kernels.layers.scalar_head import scalar_head, scalar_head_reference
from tdmpc2_fast.kernels.layers.two_hot import Code, soft_cross_entropy, two_hot, two_hot_inv
from tdmpc2_fast.kernels.losses import latent_loss, policy_sample
from tdmpc2_fast.kernels.losses.policy_sample import Sample
from tdmpc2_fast.kernels.losses.two_hot_loss import BINARY, two_hot_loss, two_hot_loss_reference

pytestmark = MARKS


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    return oracle.reseed(request.node.name, "tests/kernels/losses/test_loss_kernels.py")


def logits_of(x: Any, layer: Any, slabs: list[int], dtype: torch.dtype) -> Tensor:
    """Compute logits (G, E, n, D) by plain torch in one type."""
    dense = oracle.plain_activation(x.x.to(dtype), x.layer, x.slabs)
    rows = [
        F.linear(dense[min(g, len(dense) - 1)], layer.weight[s].to(dtype), layer.bias[s].to(dtype))
        for g, s in enumerate(slabs)
    ]
    return torch.stack(rows).detach().requires_grad_()


def loss_of(logits: Tensor, target: Tensor, bins: int, ends: tuple[float, float]) -> Tensor:
    """Compute the loss as one writes it: (G, E, n, 1)."""
    goal = torch.stack([target[min(g, len(target) - 1)] for g in range(len(logits))]).to(logits.dtype).unsqueeze(-1)
    if bins == BINARY:
        return F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    if bins > 1:
        return -(two_hot(goal, bins, *ends) * logits.log_softmax(-1)).sum(-1, keepdim=True)
    return soft_cross_entropy(logits, goal, bins, *ends)


LOSSES = [
    ("float32", 101, dict(groups=3)),
    ("float32", 101, dict(slabs="members", k=136)),
    ("float32", 5, dict(ends=(-1.0, 2.0), n=1, e=7)),
    ("float32", 0, {}),
    ("float32", 1, dict(groups=1)),
    ("float32", BINARY, dict(groups=1, scale=10.0)),
    ("float32", 101, dict(scale=30.0)),
    ("bfloat16", 101, dict(groups=3)),
    ("bfloat16", BINARY, dict(groups=1)),
]


@pytest.mark.parametrize(("precision", "bins", "options"), LOSSES, ids=str)
def test_loss_and_its_gradient(precision: str, bins: int, options: dict[str, Any]) -> None:
    check_loss(precision, bins, **options)


@pooled
def check_loss(
    precision: str,
    bins: int,
    groups: int = 2,
    e: int = 2,
    n: int = 33,
    k: int = 24,
    slabs: str = "1",
    ends: tuple[float, float] = (-10.0, 10.0),
    scale: float = 1.0,
) -> None:
    p = Precision(precision)
    rows = oracle.rows_for_plain(e, n, groups * max(bins, 1), groups * max(k, bins))
    which, count = oracle.random_slabs(slabs, groups)
    layer = oracle.random_layer(p, count, max(bins, 1), k, act="")
    layer.weight.mul_(scale)
    x = oracle.random_rows(p, groups, e, rows, k)
    target = torch.rand(2, e, rows, device=DEVICE).round() if bins == BINARY else 3 * randn(2, e, rows).exp() - 3
    weight = torch.rand(groups, e, device=DEVICE)
    options: Any = dict(how=How(p), code=Code(bins, *ends), slabs=which)
    found = {}
    for dtype in (torch.float64, torch.bfloat16 if precision == "bfloat16" else torch.float32):
        logits = logits_of(x, layer, which.of(groups), dtype)
        value = loss_of(logits, target, bins, ends)
        (d,) = torch.autograd.grad(value, logits, weight.to(dtype)[..., None, None].expand_as(value))
        found[dtype] = value.detach().squeeze(-1), d
    exact, plain = found.values()

    want = [torch.empty(groups, e, rows, *more, dtype=torch.float64, device=DEVICE) for more in ((), (max(bins, 1),))]
    two_hot_loss_reference(oracle.double(x), oracle.double(layer), target.double(), weight, *want, **options)
    oracle.agree(want[0], exact[0])
    oracle.agree(want[1], exact[1])
    loss_buffer, loss = poisoned(groups, e, n)
    buffer, gradient = poisoned(groups, e, n, max(bins, 1), dtype=p.dtype)
    two_hot_loss(x[:, :n], layer, placed(target[..., :n]), weight, loss, gradient, **options)
    judge("loss", loss, exact[0][..., :n], plain[0], exact[0])
    judge("gradient", gradient, exact[1][:, :, :n], plain[1], exact[1])
    oracle.assert_written(loss_buffer, loss)
    oracle.assert_written(buffer, gradient)


@pytest.mark.parametrize("value", [0.0, 22025.465794806718, 1e9, -1e9, -22025.465794806718, 0.2214])
def test_targets_at_and_beyond_the_ends(value: float) -> None:
    p = Precision("float32")
    x, layer = oracle.random_rows(p, 1, 1, 33, 24), oracle.random_layer(p, 2, 101, 24, act="")
    layer = type(layer)(layer.weight[1:], layer.bias[1:])
    target = torch.full((1, 1, 33), value, device=DEVICE)
    loss, gradient = torch.empty(1, 1, 33, device=DEVICE), torch.empty(1, 1, 33, 101, device=DEVICE)
    two_hot_loss(x, layer, target, torch.ones(1, 1, device=DEVICE), loss, gradient, how=How(p),
                 code=Code(101, -10, 10))  # fmt: skip
    logits = logits_of(x, layer, [0], torch.float64)
    want = loss_of(logits, target, 101, (-10.0, 10.0))
    torch.testing.assert_close(loss.double(), want.detach().squeeze(-1), rtol=1e-5, atol=1e-5)
    (d,) = torch.autograd.grad(want.sum(), logits)
    torch.testing.assert_close(gradient.double(), d, rtol=1e-4, atol=2e-5)


def test_a_target_that_is_nan_is_a_loss_that_is_nan() -> None:
    p = Precision("float32")
    x, layer = oracle.random_rows(p, 1, 1, 3, 24), oracle.random_layer(p, 2, 101, 24, act="")
    target = torch.tensor([[[1.0, torch.nan, 2.0]]], device=DEVICE)
    loss, gradient = torch.empty(1, 1, 3, device=DEVICE), torch.empty(1, 1, 3, 101, device=DEVICE)
    two_hot_loss(x, type(layer)(layer.weight[1:], layer.bias[1:]), target, torch.ones(1, 1, device=DEVICE), loss,
                 gradient, how=How(p), code=Code(101, -10, 10))  # fmt: skip
    assert loss.isnan().tolist() == [[[False, True, False]]]
    assert gradient.isnan().any(-1).tolist() == [[[False, True, False]]]


@pytest.mark.parametrize(
    ("precision", "bins", "slabs"),
    [("float32", 101, "members"), ("float32", 0, "1"), ("float32", 1, "1"), ("bfloat16", 101, "1")],
)
@pooled
def test_value_and_its_gradient(precision: str, bins: int, slabs: str) -> None:
    p = Precision(precision)
    which, count = oracle.random_slabs(slabs, 2)
    layer, x = oracle.random_layer(p, count, max(bins, 1), 40, act=""), oracle.random_rows(p, 2, 3, 333, 40)
    options: Any = dict(how=How(p), code=Code(bins, -10.0, 10.0), slabs=which)
    found = {}
    for dtype in (torch.float64, torch.bfloat16 if precision == "bfloat16" else torch.float32):
        logits = logits_of(x, layer, which.of(2), dtype)
        value = two_hot_inv(logits, bins, -10.0, 10.0)
        found[dtype] = value.detach().squeeze(-1), torch.autograd.grad(value.sum(), logits)[0]
    exact, plain = found.values()
    want = [torch.empty(2, 3, 333, *more, dtype=torch.float64, device=DEVICE) for more in ((), (max(bins, 1),))]
    scalar_head_reference(oracle.double(x), oracle.double(layer), want[0], gradient=want[1], **options)
    oracle.agree(want[0], exact[0])
    oracle.agree(want[1], exact[1])
    value_buffer, values = poisoned(2, 3, 333)
    buffer, gradient = poisoned(2, 3, 333, max(bins, 1), dtype=p.dtype)
    scalar_head(x, layer, values, gradient=gradient, **options)
    judge_scalars("value", bins, values, exact[0], plain[0], exact[0])
    # symexp makes the largest error one row's luck
    steepness = 1 + exact[0].abs().unsqueeze(-1) if bins > 0 else 1
    even = [x.double() / steepness for x in (gradient, exact[1], plain[1])]
    judge("gradient", *even, even[1])
    oracle.assert_written(value_buffer, values)
    oracle.assert_written(buffer, gradient)


def policy_loss(logits: Tensor, eps: Tensor, mask: Tensor | None, d: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Compute the loss as written in the paper; linear in the action, with the slope given."""
    dtype = logits.dtype
    out = policy_head(logits, eps.to(dtype), -10.0, 2.0, None if mask is None else mask.to(dtype))
    q = (out.action * d.to(dtype)).sum(-1, keepdim=True) / 2
    loss = -(0.01 * out.scaled_entropy + q / scale.to(dtype))
    return (loss * weight.to(dtype)[:, None, None]).sum()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("a", [1, 6, 38])
@pooled
def test_policy_forward_and_backward(a: int, masked: bool) -> None:
    e, n = 3, 33
    logits, eps = placed(1.5 * randn(1, e, n, 2 * a)), placed(randn(e, n, a))
    mask = None
    if masked:
        mask = placed((torch.arange(a, device=DEVICE) < torch.randint(1, a + 1, (n, 1), device=DEVICE)).float())
    # Scaled entropy divides by the log-probability: where that is near 0 all errors are luck.
    log_prob = policy_head(logits[0].double(), eps.double(), -10.0, 2.0, mask).log_prob
    eps.masked_fill_(log_prob.abs() < 0.1, 2.5)
    d, weight = placed(randn(e, n, a)), torch.rand(e, device=DEVICE)
    scale = torch.tensor([3.7], device=DEVICE)
    found = {}
    for dtype in (torch.float64, torch.float32):
        leaf = logits[0].to(dtype).detach().requires_grad_()
        out = policy_head(leaf, eps.to(dtype), -10.0, 2.0, None if mask is None else mask.to(dtype))
        (g,) = torch.autograd.grad(policy_loss(leaf, eps, mask, d, weight, scale), leaf)
        found[dtype] = dict(action=out.action, log_prob=out.log_prob[..., 0], entropy=out.scaled_entropy[..., 0], g=g)
    exact, plain = found.values()
    buffers = {"action": poisoned(e, n, a), "log_prob": poisoned(e, n), "entropy": poisoned(e, n)}
    views = [v for _, v in buffers.values()]
    sample = Sample(logits, eps, mask, -10.0, 2.0)
    policy_sample.policy_sample(sample, *views)
    want = torch.empty(1, e, n, 2 * a, dtype=torch.float64, device=DEVICE)
    doubled = sample._replace(logits=logits.double())
    policy_sample.policy_gradient_reference(doubled, d, weight, scale, want, entropy_coef=0.01)
    oracle.agree(want[0], exact["g"])
    written = [torch.empty_like(view, dtype=torch.float64) for view in views]
    policy_sample.policy_sample_reference(doubled, *written)
    for name, x in zip(buffers, written, strict=True):
        oracle.agree(x, exact[name].detach())
    buffer, g = poisoned(1, e, n, 2 * a)
    policy_sample.policy_gradient(sample, d, weight, scale, g, entropy_coef=0.01)
    for name, (room, view) in [*buffers.items(), ("g", (buffer, g))]:
        got, true = (view[0] if name == "g" else view), exact[name].detach()
        judge(name, got, true, plain[name].detach(), true)
        oracle.assert_written(room, view)
    buffer, bare = poisoned(e, n, a, dtype=torch.bfloat16)
    policy_sample.policy_sample(sample, bare)
    assert (bare.double() - exact["action"].detach()).abs().max() <= 2**-8
    oracle.assert_written(buffer, bare)


def test_saturated_policy_has_the_gradient_autograd_gives() -> None:
    logits = torch.tensor([[[[30.0, -30.0, 9.5, 5.0, 5.0, -40.0]]]], device=DEVICE)
    eps, d = torch.ones(1, 1, 3, device=DEVICE), torch.ones(1, 1, 3, device=DEVICE)
    weight, scale = torch.ones(1, device=DEVICE), torch.ones(1, device=DEVICE)
    got = torch.empty_like(logits)
    policy_sample.policy_gradient(Sample(logits, eps, None, -10.0, 2.0), d, weight, scale, got, entropy_coef=0.01)
    leaf = logits[0].detach().requires_grad_()
    (want,) = torch.autograd.grad(policy_loss(leaf, eps, None, d, weight, scale), leaf)
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("added", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_consistency(dtype: torch.dtype, added: int) -> None:
    z, goal = (placed(torch.rand(3, 13, 40, device=DEVICE).to(dtype)) for _ in range(2))
    weight = torch.rand(3, device=DEVICE)
    leaf = z.double().requires_grad_()
    square = (leaf - goal.double()).square()
    (d,) = torch.autograd.grad((square * weight.double()[:, None, None]).sum(), leaf)
    loss, (buffer, got) = torch.full((3, 13), torch.nan, device=DEVICE), poisoned(3, 13, 40)
    before = randn(3, 13, 40)
    got[:added] = before[:added]
    d[:added] += before[:added]
    latent_loss.consistency(z, goal, weight, loss, got, added=added)
    torch.testing.assert_close(loss.double(), square.detach().mean(-1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.double(), d, rtol=1e-6, atol=1e-7)
    oracle.assert_written(buffer, got)
    want = torch.empty(3, 13, device=DEVICE), before
    latent_loss.consistency_reference(z, goal, weight, *want, added=added)
    torch.testing.assert_close(want[0].double(), square.detach().mean(-1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(want[1].double(), d, rtol=1e-6, atol=1e-7)


def test_td_target() -> None:
    q, reward = randn(2, 3, 13), randn(3, 13)
    terminated, discount = torch.rand(3, 13, device=DEVICE).round(), torch.rand(13, device=DEVICE)
    q[0, 1, 2] = torch.nan
    out, want = torch.full((3, 13), 7.0, device=DEVICE), torch.empty(3, 13, device=DEVICE)
    latent_loss.td_target(q, reward, terminated, discount, out)
    latent_loss.td_target_reference(q, reward, terminated, discount, want)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert bool(out[1, 2].isnan())
    assert int(out.isnan().sum()) == 1
