"""`scalar_head` and `policy_layer` against their references in float64; the fuzzer is in test_layer_kernels.py."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from head_oracle import check_policy, check_scalars
from oracle import DEVICE, in_precisions, randn, random_layer, random_rows
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import How, Precision
from tdmpc2_fast.kernels.layers import policy_layer as policies
from tdmpc2_fast.kernels.layers import scalar_head as scalars
from tdmpc2_fast.kernels.layers.policy_layer import interleave, policy_layer
from tdmpc2_fast.kernels.layers.rows import Layer
from tdmpc2_fast.kernels.layers.scalar_head import scalar_head
from tdmpc2_fast.kernels.layers.tiles import Tile
from tdmpc2_fast.kernels.layers.two_hot import Code

pytestmark = oracle.MARKS

FLOAT32 = Precision("float32")
ULP = 2**-24


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Draw other numbers each run, and show the line that repeats them where a test fails."""
    return oracle.reseed(request.node.name, "tests/kernels/layers/test_head_kernels.py")


@pytest.mark.parametrize(
    ("precision", "options"),
    in_precisions(
        [
            dict(bins=0),
            dict(bins=1, e=7, n=5),
            dict(bins=2, k=40, e=1, n=37, slabs="2"),
            dict(bins=101, e=1, n=1, groups=3, k=136, slabs="members", in_slabs="members"),
            dict(bins=101, e=7, n=13, in_slabs="0", slabs="0", ends=(-3.0, 7.0)),
            dict(bins=255, k=8, in_tile=64),
            dict(bins=101, x="shared", due="simnorm", v=4, groups=8, n=3),
            dict(bins=7, x="expanded", e=7, groups=8),
            dict(bins=101, k=512, n=5, in_tile=128),
            dict(bins=0, k=1792, n=3, groups=1, in_tile=64),
            dict(bins=101, k=384, n=3, groups=1, logits=5.0),
            dict(bins=101, logits=0.01),
            dict(bins=101, due="", x="shared"),
            dict(bins=101, e=7, n=150),
            dict(bins=2, tile=Tile(16, 16, 16), e=1, n=37, k=40),
            dict(bins=101, tile=Tile(32, 128, 16), e=7, n=9, k=40, groups=1),
            dict(bins=101, tile=Tile(32, 128, 32), e=3, n=11, k=48, groups=1, due="simnorm", v=16, in_tile=64),
            dict(bins=255, tile=Tile(64, 256, 32, 8, 2), n=5, k=136, in_slabs="2"),
        ]
    ),
)
def test_scalars_at_any_size(precision: str, options: dict[str, Any]) -> None:
    check_scalars(precision, **options)


@pytest.mark.parametrize(
    ("precision", "options"),
    in_precisions(
        [
            dict(a=1),
            dict(a=1, e=1, n=1, k=136),
            dict(a=2, e=7, n=5, masked=True, x="expanded"),
            dict(a=6, e=1, n=37, k=40, due="simnorm", v=8, in_slabs="2"),
            dict(a=21, e=7, n=3, masked=True, in_tile=64),
            dict(a=38, k=512, e=2, n=5, in_tile=128),
            dict(a=61, e=1, n=13, k=8, masked=True),
            dict(a=6, k=1792, e=1, n=3, in_tile=64),
            dict(a=3, x="expanded", e=7, n=24, in_slabs="members"),
            dict(a=3, low=-5.0, high=1.0, logits=5.0),
            dict(a=3, logits=0.001, log_std=-5.0, eps=0.01),
            dict(a=6, e=7, n=150),
            dict(a=3, log_std=30.0),
            dict(a=3, log_std=-30.0, masked=True),
            dict(a=3, eps=1e4),
            dict(a=3, tile=Tile(16, 16, 16), e=1, n=37, k=40),
            dict(a=21, tile=Tile(32, 64, 32), e=7, n=9, k=72, masked=True, in_tile=64),
            dict(a=38, tile=Tile(16, 128, 64), e=3, n=11, k=136, due="simnorm", v=2),
        ]
    ),
)
def test_policy_at_any_size(precision: str, options: dict[str, Any]) -> None:
    check_policy(precision, **options)


def test_heads_in_tf32() -> None:
    check_scalars("tf32")
    check_policy("tf32")


def scalars_of_logits(logits: Tensor, bins: int, vmin: float = -10.0, vmax: float = 10.0) -> Tensor:
    """Return scalars where the logits of each of R groups are given: (R, bins) -> (R,)."""
    groups = len(logits)
    zero = replace(random_layer(FLOAT32, groups, logits.shape[1], 8, act=""), bias=logits.contiguous())
    zero.weight.zero_()
    out = torch.full((groups, 1, 1), torch.nan, device=DEVICE)
    x = random_rows(FLOAT32, 1, 1, 1, 8)
    scalar_head(x, zero, out, how=How(FLOAT32), code=Code(bins, vmin, vmax))
    return out[:, 0, 0]


@pytest.mark.parametrize("bins", [2, 3, 101, 255])
def test_a_certain_bin_gives_its_own_scalar(bins: int) -> None:
    logits = torch.full((3, bins), -1e4, device=DEVICE)
    for row, column in enumerate((0, bins - 1, bins // 2)):
        logits[row, column] = 1e4
    got = scalars_of_logits(logits, bins)
    end = torch.tensor(10.0, device=DEVICE).expm1()
    torch.testing.assert_close(got[:2], torch.stack([-end, end]), rtol=8 * ULP, atol=0)
    if bins % 2:
        assert abs(got[2]) <= 8 * ULP


@pytest.mark.parametrize("bins", [2, 101, 255])
def test_no_preference_is_zero(bins: int) -> None:
    assert scalars_of_logits(torch.full((1, bins), 3.0, device=DEVICE), bins).abs() <= 40 * ULP


def test_without_bins_the_logit_is_the_scalar() -> None:
    logits = torch.tensor([[-30.0], [-1e-3], [0.0], [20.0]], device=DEVICE)
    assert torch.equal(scalars_of_logits(logits, 0), logits[:, 0])
    symexp = logits.double().sign() * logits.double().abs().expm1()
    # symexp as the official code has it, exp(|x|) - 1, cancels near 0. A GPU's exp rounds x log2(e)
    # first, which is worth |x| log2(e) units of the result.
    units = 4 if DEVICE.type == "cpu" else 4 + 30 * 1.45
    torch.testing.assert_close(scalars_of_logits(logits, 1).double(), symexp[:, 0], rtol=units * ULP, atol=2 * ULP)


def actions_of(
    mean: Tensor, log_std: Tensor, eps: Tensor, low: float = -10.0, high: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    """Return actions (A,) where mean and log std logits (A,) are given."""
    a = len(mean)
    layer = random_layer(FLOAT32, 1, 2 * a, 8, act="")
    layer.weight.zero_()
    layer.bias.copy_(interleave(torch.cat([mean, log_std])).unsqueeze(0))
    out = torch.full((1, 1, a), torch.nan, device=DEVICE)
    policy_layer(
        random_rows(FLOAT32, 1, 1, 1, 8),
        layer,
        eps.view(1, 1, a),
        out,
        how=How(FLOAT32),
        low=low,
        high=high,
        mask=None if mask is None else mask.view(1, a),
    )
    return out[0, 0]


def test_log_std_spans_its_range() -> None:
    logit = torch.tensor([-100.0, -20.0, 0.0, 20.0, 100.0], device=DEVICE)
    zero, eps, low, high = torch.zeros(5, device=DEVICE), torch.full((5,), 0.1, device=DEVICE), -3.0, 1.0
    log_std = torch.tensor([low, low, (low + high) / 2, high, high], dtype=torch.float64, device=DEVICE)
    expected = (eps * log_std.exp()).tanh()
    got = actions_of(zero, logit, eps, low, high)
    torch.testing.assert_close(got.double(), expected, rtol=8 * ULP, atol=0)


def test_extreme_draws_and_means_saturate_at_one() -> None:
    big = torch.tensor([1e30, -1e30, 3e38, -3e38, 50.0, -50.0], device=DEVICE)
    sign, zero = big.sign(), torch.zeros(6, device=DEVICE)
    assert torch.equal(actions_of(zero, zero + 100, big), sign)
    assert torch.equal(actions_of(big, zero, zero), sign)
    assert torch.equal(actions_of(zero, zero + 100, torch.inf * sign), sign)
    assert torch.equal(actions_of(zero, zero, zero), zero)
    small = torch.tensor([1e-30, -1e-10, 1e-5, -1e-3, 0.19, 0.21], device=DEVICE)
    torch.testing.assert_close(actions_of(small, zero, zero).double(), small.double().tanh(), rtol=4 * ULP, atol=0)


def test_dead_dims_act_zero_whatever_the_logits() -> None:
    big = torch.tensor([1e30, -1e30, 5.0, -5.0], device=DEVICE)
    mask = torch.tensor([0.0, 0.0, 0.0, 1.0], device=DEVICE)
    got = actions_of(big, big, big, mask=mask)
    assert (got[:3] == 0).all()
    assert got[3] != 0


def test_interleave_pairs_means_and_log_stds() -> None:
    x = torch.arange(12.0).view(6, 2)
    assert interleave(x)[:, 0].tolist() == [0, 6, 2, 8, 4, 10]
    assert interleave(x[:, 0]).tolist() == [0, 6, 2, 8, 4, 10]


@pytest.mark.parametrize(("module", "name"), [(scalars, "scalar_head"), (policies, "policy_layer")])
def test_references_have_the_same_signature(module: Any, name: str) -> None:
    assert inspect.signature(getattr(module, name)) == inspect.signature(getattr(module, f"{name}_reference"))


def head(outputs: int) -> Layer:
    return random_layer(FLOAT32, 2, outputs, 24, act="")


def bad_scalars() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return arguments that are refused: the name in the message, and what comes."""
    return {
        "x of three groups": ("x", dict(x=random_rows(FLOAT32, 3, 3, 5, 24))),
        "x of four rows": ("x", dict(x=random_rows(FLOAT32, 2, 3, 4, 24))),
        "x of another width": ("x", dict(x=random_rows(FLOAT32, 2, 3, 5, 25))),
        "no statistics": ("x", dict(x=replace(random_rows(FLOAT32, 2, 3, 5, 24), stats=None))),
        "other bins": ("layer", dict(code=Code(8, -1, 1))),
        "outputs for no bins": ("layer", dict(code=Code(0, -1, 1))),
        "out of another size": ("x", dict(out=torch.empty(2, 3, 4, device=DEVICE))),
    }


@pytest.mark.parametrize("what", bad_scalars())
def test_bad_arguments_of_scalars_are_named(what: str) -> None:
    name, changes = bad_scalars()[what]
    args: dict[str, Any] = dict(x=random_rows(FLOAT32, 2, 3, 5, 24), layer=head(7))
    args |= dict(out=torch.empty(2, 3, 5, device=DEVICE), how=How(FLOAT32), code=Code(7, -1, 1))
    scalar_head(**args)
    with pytest.raises(ValueError, match=rf"^{name}: .*allowed: "):
        scalar_head(**{**args, **changes})


def bad_policy() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return arguments as `bad_scalars` does."""
    return {
        "two groups": ("x", dict(x=random_rows(FLOAT32, 2, 3, 5, 24))),
        "x of two environments": ("x", dict(x=random_rows(FLOAT32, 1, 2, 5, 24))),
        "no statistics": ("x", dict(x=replace(random_rows(FLOAT32, 1, 3, 5, 24), stats=None))),
        "other outputs": ("layer", dict(layer=head(6))),
        "out of another width": ("layer", dict(out=torch.empty(3, 5, 3, device=DEVICE))),
        "eps of another width": ("eps", dict(eps=randn(3, 5, 3))),
        "eps of four rows": ("eps", dict(eps=randn(3, 4, 4))),
        "mask of another width": ("mask", dict(mask=torch.ones(3, 3, device=DEVICE))),
        "mask for all environments": ("mask", dict(mask=torch.ones(4, device=DEVICE))),
        "mask with gaps": ("mask", dict(mask=torch.ones(3, 8, device=DEVICE)[:, ::2])),
    }


@pytest.mark.parametrize("what", bad_policy())
def test_bad_arguments_of_the_policy_are_named(what: str) -> None:
    name, changes = bad_policy()[what]
    args: dict[str, Any] = dict(x=random_rows(FLOAT32, 1, 3, 5, 24), layer=head(8), eps=randn(3, 5, 4))
    args |= dict(out=torch.empty(3, 5, 4, device=DEVICE), how=How(FLOAT32), low=-10, high=2)
    policy_layer(**args)
    with pytest.raises(ValueError, match=rf"^{name}: .*allowed: "):
        policy_layer(**{**args, **changes})
