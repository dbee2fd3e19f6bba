"""The gradient through a LayerNorm computed once for all its readers, against float64 autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from gradient_oracle import double, draw_case, through_norm
from judge import judge, pooled
from oracle import DEVICE, MARKS, poisoned

from tdmpc2_fast.kernels.backward.gradient_tile import Gradient
from tdmpc2_fast.kernels.backward.norm_gradient import add_up, add_up_reference, norm_gradient, norm_gradient_reference
from tdmpc2_fast.kernels.backward.weight_gradient import LayerGradient
from tdmpc2_fast.kernels.device.launch import Precision, cdiv

pytestmark = MARKS


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    return oracle.reseed(request.node.name, "tests/kernels/backward/test_norm_gradient_kernel.py")


def draw(precision: str, **sizes: Any) -> Gradient:
    """Draw a gradient of rows, those of the layer's vectors wanted."""
    options: Any = dict(
        groups=2, e=2, n=33, k=24, d=40, norm=True, x="own", due="", v=8, dropout=None, slabs="1", in_slabs="1",
        g_tile=32, y_tile=32, in_tile=32, offset=0.0, chunk=16,
    )  # fmt: skip
    options |= sizes
    chunk = options.pop("chunk")
    case, _ = draw_case(Precision(precision), **options)
    groups, e, n, d = case.gradient.x.shape
    return replace(case.gradient, vectors=poisoned(groups, e, cdiv(n, chunk), 3, d, inner=3)[1])


CASES: list[dict[str, Any]] = [
    dict(),
    dict(n=130, groups=1, chunk=32),
    dict(n=16, d=136, g_tile=64, y_tile=128),
    dict(e=1, n=1, d=512, groups=1),
    dict(n=70, dropout=0, chunk=32),
    dict(n=70, e=1, dropout=1, slabs="members"),
    dict(offset=1000.0, groups=1),
]


@pytest.mark.parametrize(("precision", "options"), oracle.in_precisions(CASES))
@pooled
def test_gradient_of_the_product_and_its_norm(precision: str, options: dict[str, Any]) -> None:
    p = Precision(precision)
    width = torch.bfloat16 if precision == "bfloat16" else torch.float32
    draws = []
    for _ in range(4):  # a maximum over the vectors of one is luck
        gradient = draw(precision, **options)
        exact, plain = ([torch.stack(x) for x in through_norm(gradient, t)] for t in (torch.float64, width))
        for found in (exact, plain):
            found.insert(1, found[0].sum((1, 2)))
        draws.append((plain, exact))
    groups, e, n, d = gradient.x.shape

    want = replace(double(gradient), vectors=torch.empty(gradient.vectors.shape, dtype=torch.float64, device=DEVICE))
    oracle.agree(norm_gradient_reference(want).x, exact[0])
    out = LayerGradient(want.x, *(torch.empty(groups, d, dtype=torch.float64, device=DEVICE) for _ in range(3)))
    add_up_reference(want.vectors, out)
    for vector, wanted in zip((out.bias, out.ln_weight, out.ln_bias), exact[1:], strict=True):
        oracle.agree(vector, wanted)

    buffer, view = poisoned(groups, e, n, d, dtype=p.dtype)
    view.copy_(gradient.x)
    got = norm_gradient(replace(gradient, x=view))
    assert got.x is view
    assert got.rows is None
    rooms = {name: poisoned(groups, d) for name in ("bias", "ln_weight", "ln_bias")}
    add_up(gradient.vectors, LayerGradient(got.x, **{name: room[1] for name, room in rooms.items()}))
    pooled = [[torch.stack(x) for x in zip(*side, strict=True)] for side in zip(*draws, strict=True)]
    judge("dy", view, exact[0], pooled[0][0], pooled[1][0])
    for i, name in enumerate(rooms, 1):
        judge(name, rooms[name][1], exact[i], pooled[0][i], pooled[1][i], terms=e * n)
        oracle.assert_written(*rooms[name])

    alone = norm_gradient(replace(gradient, vectors=None))
    assert torch.equal(alone.x, view)
    oracle.assert_written(buffer, view)


def test_bad_arguments_are_named() -> None:
    gradient = draw("float32")
    with pytest.raises(ValueError, match="gradient: got no rows"):
        norm_gradient(Gradient(gradient.x))
    with pytest.raises(ValueError, match=r"vectors: got \(2, 2, 3, 3, 39\)"):
        norm_gradient(replace(gradient, vectors=gradient.vectors[..., 1:]))
    vectors = torch.empty(2, 40, device=DEVICE)
    with pytest.raises(ValueError, match=r"out: got vectors \[\(2, 40\), \(2, 40\), None\]"):
        add_up(gradient.vectors, LayerGradient(gradient.x, vectors, vectors))
