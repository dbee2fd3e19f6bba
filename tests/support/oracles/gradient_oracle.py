"""What the tests of backward kernels share: cases, float64 autograd, and the judge.

Everything is derived by autograd from the layer as one writes it, first in float64, which is the
oracle, then at the precision of the kernel, which says what error is allowed (twice that). Where a
case is small, plain torch computes more of the same law, so that its maximum means something; the
kernel computes the last one drawn.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import oracle
import torch
import torch.nn.functional as F
from judge import ENOUGH, judge, pooled
from oracle import DEVICE, placed, poisoned, randn
from torch import Tensor

from tdmpc2_fast.kernels.backward.gradient_tile import Gradient
from tdmpc2_fast.kernels.backward.input_gradient import input_gradient, input_gradient_reference
from tdmpc2_fast.kernels.backward.weight_gradient import LayerGradient, weight_gradient, weight_gradient_reference
from tdmpc2_fast.kernels.device.launch import How, Precision, cdiv
from tdmpc2_fast.kernels.layers.rows import LEAST_COLUMNS, Dropout, Layer, Rows
from tdmpc2_fast.kernels.layers.tiles import Tile


class Case(NamedTuple):
    """A layer with rows on both sides, and the gradient that arrives at it."""

    gradient: Gradient
    layer: Layer
    below: Rows


class Found(NamedTuple):
    """Gradients of one case: (G, E, n, K), then (G, ...) of the parameters."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    ln_weight: Tensor | None
    ln_bias: Tensor | None


def normalised(x: Tensor, layer: Layer, slabs: list[int]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Compute LN(x) of each group with its inputs as leaves: (result, x, gamma, beta)."""
    out = []
    for y, s in zip(x, slabs, strict=True):
        assert layer.ln_weight is not None
        assert layer.ln_bias is not None
        leaf, gamma, beta = (
            t.to(x).detach().clone().requires_grad_() for t in (y, layer.ln_weight[s], layer.ln_bias[s])
        )
        out.append((F.layer_norm(leaf, leaf.shape[-1:], gamma, beta, 1e-5), leaf, gamma, beta))
    return out


def act(h: Tensor, layer: Layer) -> Tensor:
    v = layer.simnorm_dim
    return h.unflatten(-1, (-1, v)).softmax(-1).flatten(-2) if v else F.mish(h)


def through_norm(g: Gradient, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Compute dL/dy, dγ and dβ of each group of a gradient, in one type, as autograd gives them."""
    dys, gammas, betas = [], [], []
    assert g.rows is not None
    assert g.rows.layer is not None
    for (out, y, gamma, beta), h in zip(
        normalised(g.rows.x.to(dtype), g.rows.layer, g.rows.slabs.of(len(g.x))), g.x.to(dtype), strict=True
    ):
        dy, dgamma, dbeta = torch.autograd.grad(out, (y, gamma, beta), h)
        dys.append(dy)
        gammas.append(dgamma)
        betas.append(dbeta)
    if g.rows.dropout is not None:
        dys = list(torch.stack(dys) * g.rows.dropout.multiplier(len(dys), dtype))
    return dys, gammas, betas


def by_autograd(
    case: Case,
    dtype: torch.dtype,
    slabs: list[int],
    first: int,
    width: int,
    add: Tensor | None,
    summed: bool,
    due: bool,
) -> Found:
    """Compute all gradients in one type, as autograd gives them."""
    g = case.gradient
    dys, gammas, betas = (list(g.x.to(dtype)), [], []) if g.rows is None else through_norm(g, dtype)
    below = case.below
    if due:
        assert below.layer is not None
        hidden = [t[0].detach() for t in normalised(below.x.to(dtype), below.layer, below.slabs.of(len(below.x)))]
        inputs = [act(h, below.layer) for h in hidden]
    else:
        inputs = list(below.x.to(dtype))
    dx, dw, db = [], [], []
    for i, dy in enumerate(dys):
        x = inputs[min(i, len(inputs) - 1)].detach().requires_grad_()
        weight = case.layer.weight[slabs[i]].to(dtype).detach().requires_grad_()
        bias = torch.zeros(len(weight), dtype=dtype, device=DEVICE, requires_grad=True)
        a, b, c = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), dy)
        dx.append(a[..., first : first + width])
        dw.append(b)
        db.append(c)
    d = torch.stack(dx)
    if summed:
        d = d.sum(0, keepdim=True)
    if add is not None:
        d = d + add.to(dtype)
    if due and width == below.x.shape[-1] and len(d) == len(below.x):
        out = []
        for h, di in zip(hidden, d, strict=True):
            assert below.layer is not None
            leaf = h.clone().requires_grad_()
            out.append(torch.autograd.grad(act(leaf, below.layer), leaf, di)[0])
        d = torch.stack(out)
    stacked = (None if not x else torch.stack(x) for x in (gammas, betas))
    return Found(d, torch.stack(dw), torch.stack(db), *stacked)


def random_gradient(precision: Precision, rows: Rows | None, sizes: tuple[int, ...], tile: int) -> Gradient:
    """Draw a gradient of rows, or of a plain product, with its sums."""
    x = placed(randn(*sizes).to(precision.dtype))
    if rows is None:
        return Gradient(x)
    assert rows.layer is not None
    y = rows.x.double()
    sums = torch.full((*sizes[:-1], cdiv(sizes[-1], LEAST_COLUMNS), 2), torch.nan, device=DEVICE)
    for i, s in enumerate(rows.slabs.of(sizes[0])):
        assert rows.layer.ln_weight is not None
        scaled = x[i].double() * rows.layer.ln_weight[s].double()
        xhat = (y[i] - y[i].mean(-1, keepdim=True)) * (y[i].var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        for t, (a, b) in enumerate(zip(scaled.split(tile, -1), xhat.split(tile, -1), strict=True)):
            sums[i, ..., t, 0], sums[i, ..., t, 1] = a.sum(-1), (a * b).sum(-1)
    return Gradient(x, placed(sums, inner=2), rows, tile)


def double(gradient: Gradient) -> Gradient:
    """Return it in float64, without sums."""
    rows = gradient.rows
    if rows is not None:
        dropout = rows.dropout
        rows = oracle.double(rows)
        rows = Rows(rows.x, None, rows.layer, rows.slabs, rows.tile, dropout)
    return Gradient(gradient.x.double(), None, rows, gradient.tile)


def draw_case(
    p: Precision,
    *,
    groups: int,
    e: int,
    n: int,
    k: int,
    d: int,
    norm: bool,
    x: str,
    due: str,
    v: int,
    dropout: int | None,
    slabs: str,
    in_slabs: str,
    g_tile: int,
    y_tile: int,
    in_tile: int,
    offset: float,
) -> tuple[Case, Any]:
    which, count = oracle.random_slabs(slabs, groups)
    layer = oracle.random_layer(p, count, d, k, act="mish" if norm else "")
    rows = None
    if norm:
        y = placed((offset + randn(groups, e, n, d)).to(p.dtype))
        drop = None
        if dropout is not None:
            keep = (torch.rand(groups - dropout, e, n, d, device=DEVICE) < 0.7).to(torch.uint8)
            drop = Dropout(keep, 1 / 0.7, dropout)
        rows = Rows(y, oracle.statistics(y, y_tile), layer, which, y_tile, drop)
    gradient = random_gradient(p, rows, (groups, e, n, d), g_tile)
    below = oracle.random_rows(p, 1 if x == "shared" else groups, e, n, k, due, v, in_tile, in_slabs)
    return Case(gradient, layer, below), which


@pooled
def check_gradients(
    precision: str = "float32",
    *,
    groups: int = 2,
    e: int = 2,
    n: int = 33,
    k: int = 24,
    d: int = 40,
    norm: bool = True,
    x: str = "own",
    due: str = "mish",
    v: int = 8,
    dropout: int | None = None,
    slabs: str = "1",
    in_slabs: str = "1",
    g_tile: int = 32,
    y_tile: int = 32,
    in_tile: int = 32,
    columns: tuple[int, int] | None = None,
    summed: bool = False,
    add: str = "",
    offset: float = 0.0,
    tile: Tile | None = None,
    weight_tile: Tile | None = None,
) -> None:
    """Check `input_gradient` and `weight_gradient` of one layer.

    norm: whether the layer has a LayerNorm. x: each group its "own" input or one "shared". due: on
    the input. dropout: the group it begins with. columns: of the input's gradient, all where None.
    summed: over groups. add: "" for nothing, "other" or "own" for a buffer, the output itself.
    """
    p = Precision(precision)
    first, stop = columns or (0, k)
    width, written = stop - first, 1 if summed else groups
    through = bool(due) and columns is None and written == (1 if x == "shared" else groups)
    draws = []
    for _ in range(cdiv(ENOUGH, written * e * n * width)):
        case, which = draw_case(
            p, groups=groups, e=e, n=n, k=k, d=d, norm=norm, x=x, due=due, v=v, dropout=dropout, slabs=slabs,
            in_slabs=in_slabs, g_tile=g_tile, y_tile=y_tile, in_tile=in_tile, offset=offset,
        )  # fmt: skip
        other = placed(randn(written, e, n, width)) if add else None
        args = (which.of(groups), first, width, other, summed, through)
        exact = by_autograd(case, torch.float64, *args)
        if precision == "tf32":
            plain = _tf32(case, args)
        else:
            plain = by_autograd(case, torch.bfloat16 if precision == "bfloat16" else torch.float32, *args)
        draws.append((plain, exact))

    def compare(what: str, field: str, got: Tensor, terms: int = 1) -> None:
        others = (torch.stack([getattr(found, field) for found in side]) for side in zip(*draws, strict=True))
        judge(what, got, getattr(exact, field), *others, terms=terms)

    below = case.below if through else None
    wanted = Gradient(torch.empty(written, e, n, width, dtype=torch.float64, device=DEVICE))
    options: Any = dict(how=How(p), slabs=which, first=first)
    full = double(case.gradient)
    input_gradient_reference(full, oracle.double(case.layer), oracle.double(below), wanted, add=other, **options)
    oracle.agree(wanted.x, exact.x)
    buffer, view = poisoned(written, e, n, width, dtype=p.dtype if through else torch.float32)
    sums_buffer, sums = poisoned(written, e, n, cdiv(width, LEAST_COLUMNS), 2, inner=2)
    if add == "own":
        assert other is not None
        other = view.copy_(other)
    got = input_gradient(case.gradient, case.layer, below, Gradient(view, sums), add=other, tile=tile, **options)
    assert got.x is view
    compare("dx", "x", view)
    if through:
        _check_sums(got, exact.x)
    oracle.assert_written(buffer, view)
    sums.fill_(torch.nan)
    assert sums_buffer.isnan().all(), "sums of other rows were written"

    exact64 = LayerGradient(*(torch.empty_like(t) if t is not None else None for t in exact[1:]))  # type: ignore[arg-type]
    weight_gradient_reference(full, oracle.double(case.below), oracle.double(case.layer), exact64, how=How(p))
    names = ("weight", "bias", "ln_weight", "ln_bias")
    buffers = {}
    for name in names[: 4 if norm else 2]:
        oracle.agree(getattr(exact64, name), getattr(exact, name))
        inner = 2 if name == "weight" else 1
        buffers[name] = poisoned(*getattr(exact, name).shape, inner=inner)
    out = LayerGradient(**{name: b[1] for name, b in buffers.items()})
    weight_gradient(case.gradient, case.below, case.layer, out, how=How(p), tile=weight_tile)
    for name, (room, part) in buffers.items():
        compare(f"d {name}", name, part, terms=e * n)
        oracle.assert_written(room, part)


def _tf32(case: Case, args: Any) -> Found:
    """Compute gradients at tf32 in plain torch: operands rounded, everything else float32."""
    p = Precision("tf32")
    dy = case.gradient.products()
    x = case.below.activated()
    slabs, first, width, add, summed, through = args
    dx, dw, db = [], [], []
    for i, d in enumerate(dy):
        weight = case.layer.weight[slabs[i]]
        rounded, value = p.operand(d), p.operand(x[min(i, len(x) - 1)])
        dx.append((rounded @ weight)[..., first : first + width])
        dw.append(rounded.flatten(0, 1).T @ value.flatten(0, 1))
        db.append(d.sum((0, 1)))
    total = torch.stack(dx)
    if summed:
        total = total.sum(0, keepdim=True)
    if add is not None:
        total = total + add
    if through:
        leaf = case.below.normalised().requires_grad_()
        (total,) = torch.autograd.grad(case.below.activation_of(leaf), leaf, total)
    plain = by_autograd(case, torch.float32, *args)
    return Found(total, torch.stack(dw), torch.stack(db), plain.ln_weight, plain.ln_bias)


def _check_sums(got: Gradient, exact: Tensor) -> None:
    """Assert that the sums of all tiles are those of the exact gradient, to the rounding of what was stored."""
    rows = got.rows
    assert rows is not None
    assert rows.layer is not None
    assert got.sums is not None
    y = rows.x.double()
    tiles = cdiv(exact.shape[-1], got.tile)
    for i, s in enumerate(rows.slabs.of(len(exact))):
        assert rows.layer.ln_weight is not None
        scaled = exact[i] * rows.layer.ln_weight[s].double()
        xhat = (y[i] - y[i].mean(-1, keepdim=True)) * (y[i].var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        unit = {torch.bfloat16: 2e-2, torch.float32: 5e-3}[got.x.dtype]
        for j, want in enumerate((scaled, scaled * xhat)):
            found = got.sums[i, ..., :tiles, j].double().sum(-1)
            limit = unit * want.abs().sum(-1) + 1e-6
            assert ((found - want.sum(-1)).abs() <= limit).all()
