"""Backward kernels of a layer against float64 autograd: every gradient, any size, tile, form and precision."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from gradient_oracle import check_gradients
from judge import judge, pooled
from oracle import DEVICE, MARKS, in_precisions, placed, poisoned, random_layer

from tdmpc2_fast.kernels.backward.activation_gradient import activation_gradient, activation_gradient_reference
from tdmpc2_fast.kernels.backward.gradient_tile import Gradient
from tdmpc2_fast.kernels.backward.input_gradient import input_gradient
from tdmpc2_fast.kernels.backward.weight_gradient import LayerGradient, weight_gradient
from tdmpc2_fast.kernels.device.launch import How, Precision, cdiv
from tdmpc2_fast.kernels.layers.grouped_layer import grouped_layer, grouped_layer_reference
from tdmpc2_fast.kernels.layers.rows import LEAST_COLUMNS, Dropout, Rows
from tdmpc2_fast.kernels.layers.tiles import Tile

pytestmark = MARKS
FLOAT32 = Precision("float32")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    return oracle.reseed(request.node.name, "tests/kernels/backward/test_gradient_kernels.py")


SHAPES: list[dict[str, Any]] = [
    dict(),
    dict(e=1, n=1, k=24, d=136, y_tile=64),
    dict(e=7, n=13, k=56, d=24, due="simnorm", v=2, groups=3),
    dict(e=1, n=37, k=5, d=40, due=""),
    dict(e=3, n=11, k=136, d=56, g_tile=64, in_tile=64),
    dict(norm=False, d=101, k=40),
    dict(norm=False, d=1, k=24, groups=1),
    dict(e=2, n=5, k=67, d=24, due="", groups=4, x="shared", summed=True),
    dict(e=2, n=9, k=40, d=56, due="simnorm", v=8, x="shared", summed=True, groups=3, add="other"),
    dict(e=2, n=9, k=40, d=56, due="simnorm", v=4, groups=1, add="own"),
    dict(due="", columns=(16, 40), k=43, add="other"),
    dict(due="", columns=(37, 43), k=43, x="shared", summed=True, slabs="members", add="own"),
    dict(dropout=0, groups=2),
    dict(dropout=1, groups=3, x="shared", due="", summed=True),
    dict(slabs="members", in_slabs="members", dropout=0),
    dict(slabs="2", in_slabs="0", groups=3),
    dict(e=1, n=2, k=384, d=512, groups=1),
    dict(e=1, n=3, k=512, d=512, groups=1, due="simnorm"),
    dict(e=1, n=2, k=1376, d=24, groups=1, due="simnorm", v=16),
    dict(offset=1000.0, groups=1),
]


@pytest.mark.parametrize(("precision", "options"), in_precisions(SHAPES))
def test_gradients_of_any_layer(precision: str, options: dict[str, Any]) -> None:
    check_gradients(precision, **options)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("d", [1, 16, 37, 101])
def test_gradients_of_logits_lie_in_wider_rows(precision: str, d: int) -> None:
    p = Precision(precision)
    how, layer = How(p), random_layer(p, 2, d, 40, act="")
    plain = Gradient(torch.randn(2, 3, 11, d, device=DEVICE).to(p.dtype))
    wide = Gradient.of_logits(2, 3, 11, d, p.dtype, DEVICE)
    assert (wide.columns, wide.x.shape) == (cdiv(d, 16) * 16, plain.x.shape)
    wide.x.copy_(plain.x)
    x = Rows(torch.randn(2, 3, 11, 40, device=DEVICE).to(p.dtype))
    found = []
    for gradient in (plain, wide):
        d_x, d_w = torch.empty(2, 3, 11, 40, device=DEVICE), torch.empty(2, d, 40, device=DEVICE)
        d_b = torch.empty(2, d, device=DEVICE)
        input_gradient(gradient, layer, None, Gradient(d_x), how=how)
        weight_gradient(gradient.steps(slice(0, 3)), x, layer, LayerGradient(d_w, d_b), how=how)
        found.append((d_x, d_w, d_b))
    for narrow, of_wide in zip(*found, strict=True):
        torch.testing.assert_close(narrow, of_wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(tile=Tile(16, 32, 16), weight_tile=Tile(16, 32, 32), groups=1, e=3, n=11, k=40, d=40),
        dict(tile=Tile(32, 64, 32), weight_tile=Tile(32, 32, 16), groups=1, n=17, k=72, d=136, g_tile=64, y_tile=128,
             in_tile=64),
        dict(precision="bfloat16", tile=Tile(16, 64, 64), weight_tile=Tile(64, 64, 32), n=17, k=72, d=72, dropout=1),
        dict(tile=Tile(16, 32, 32), weight_tile=Tile(32, 32, 64), due="simnorm", v=8, n=17, k=64, d=40, x="shared",
             summed=True, groups=3, add="own"),
    ],
    ids=str,
)  # fmt: skip
def test_gradients_in_any_tiles(options: dict[str, Any]) -> None:
    check_gradients(**options)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("due", ["mish", "simnorm"])
@pooled
def test_gradient_of_an_activation(due: str, precision: str) -> None:
    p = Precision(precision)
    below = oracle.random_rows(p, 2, 3, 33, 72, due, 8, 32, "members")
    # Of normal numbers the largest error is that of the few products of two large ones.
    d = placed(2 * torch.rand(below.x.shape, device=DEVICE) - 1)
    exact = Gradient(torch.empty(below.x.shape, dtype=torch.float64, device=DEVICE))
    activation_gradient_reference(d.double(), oracle.double(below), exact)
    if precision == "bfloat16":
        low = Rows(below.x, None, below.layer, below.slabs)
        leaf = low.normalised().to(torch.bfloat16).requires_grad_()
        (plain,) = torch.autograd.grad(oracle_act(leaf, low), leaf, d.to(torch.bfloat16))
    else:
        kept = Gradient(torch.empty(below.x.shape, device=DEVICE))
        assert activation_gradient_reference(d, below, kept).rows is below
        plain = kept.x
    buffer, view = poisoned(*below.x.shape, dtype=p.dtype)
    _, sums = poisoned(*below.x.shape[:3], cdiv(72, LEAST_COLUMNS), 2, inner=2)
    got = activation_gradient(d, below, Gradient(view, sums))
    assert got.rows is below
    judge("h", view, exact.x, plain, exact.x)
    oracle.assert_written(buffer, view)


def oracle_act(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    assert rows.layer is not None
    v = rows.layer.simnorm_dim
    return x.unflatten(-1, (-1, v)).softmax(-1).flatten(-2) if v else torch.nn.functional.mish(x)


@pytest.mark.parametrize("first", [0, 1])
def test_dropout_comes_before_the_layer_norm(first: int) -> None:
    layer = oracle.random_layer(FLOAT32, 3, 40, 24)
    x = oracle.random_rows(FLOAT32, 3, 2, 33, 24)
    keep = (torch.rand(3 - first, 2, 33, 40, device=DEVICE) < 0.8).to(torch.uint8)
    dropout = Dropout(keep, 1.25, first)
    want = Rows(torch.empty(3, 2, 33, 40, dtype=torch.float64, device=DEVICE))
    args: Any = dict(how=How(FLOAT32), dropout=dropout)
    exact = grouped_layer_reference(oracle.double(x), None, oracle.double(layer), want, **args)
    assert torch.equal(exact.x[first:] == 0, keep == 0)
    assert not bool((exact.x[:first] == 0).any())
    got = grouped_layer(x, None, layer, Rows.empty(3, 2, 33, 40, torch.float32, DEVICE), **args)
    # A kept float32 sum may round to 0 where float64 has 1e-8: only what was dropped has to be 0.
    assert not bool(got.x[first:][keep == 0].any())
    torch.testing.assert_close(got.x.double(), exact.x, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"dropout\.keep: got"):
        grouped_layer(x, None, layer, Rows.empty(3, 2, 33, 40, torch.float32, DEVICE), how=How(FLOAT32),
                      dropout=Dropout(keep[..., 1:], 1.25, first))  # fmt: skip
