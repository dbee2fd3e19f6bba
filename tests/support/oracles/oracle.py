"""What the tests of layer and head kernels share: cases, and the memory they lie in.

Each `check_*` draws a case, runs the kernel into poisoned outputs, and has its error judged by that
of plain torch, which is given more rows of the same law than the kernel where these are few, so that
its maximum means something. Inputs lie misaligned between NaN, outputs too, and these must stay.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from judge import ENOUGH, judge, pooled
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import How, Precision, cdiv, interpreting, native, why_not
from tdmpc2_fast.kernels.layers.grouped_layer import activate_rows, grouped_layer, grouped_layer_reference
from tdmpc2_fast.kernels.layers.rows import LEAST_COLUMNS, Layer, Rows, Slabs
from tdmpc2_fast.kernels.layers.tiles import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")
KERNELS = "cpu" if native() else "triton"
"""The backend that tests of kernels are of."""
# numpy says so where infinite values meet, which the interpreter computes with
QUIET = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered|All-NaN slice:RuntimeWarning"
)
MARKS = [pytest.mark.skipif(why_not(DEVICE) is not None, reason=str(why_not(DEVICE))), QUIET]


def in_precisions(cases: list[dict[str, Any]]) -> list[Any]:
    """Return (precision, options) of each case: float32 always, bfloat16 for every other one, tf32 for every fourth."""
    return [
        pytest.param(p, case, id=f"{p}-" + ",".join(f"{k}={v}" for k, v in case.items()))
        for i, case in enumerate(cases)
        for p, every in (("float32", 1), ("bfloat16", 2), ("tf32", 4))
        if i % every == 0 and not (p == "tf32" and native())  # a CPU has none
    ]


def reseed(test: str, file: str) -> int:
    """Seed torch, by FUZZ_SEED or by chance, and print how to repeat the test."""
    seed = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**31)))
    print(f"reproduce: FUZZ_SEED={seed} pytest '{file}::{test}'")
    torch.manual_seed(seed)
    return seed


def randn(*size: int) -> Tensor:
    return torch.randn(size, device=DEVICE)


def poisoned(*size: int, dtype: torch.dtype = torch.float32, inner: int = 1) -> tuple[Tensor, Tensor]:
    """Return a NaN buffer and a misaligned view of `size` in it, with gaps before all but the last `inner` - 1 dims."""
    gaps = len(size) - inner + 1
    room = [n + 3 if i < gaps else n for i, n in enumerate(size)]
    buffer = torch.full((1 + math.prod(room),), torch.nan, dtype=dtype, device=DEVICE)[1:].view(room)
    return buffer, buffer[tuple(slice(2, 2 + n) if i < gaps else slice(None) for i, n in enumerate(size))]


def placed(x: Tensor, inner: int = 1) -> Tensor:
    """Return a copy of x, NaN around it."""
    return poisoned(*x.shape, dtype=x.dtype, inner=inner)[1].copy_(x)


def packed(x: Tensor) -> Tensor:
    """Return a contiguous copy of x (S, ...), misaligned, a slab of NaN before and after it."""
    room = torch.full((2 + len(x), x[0].numel()), torch.nan, dtype=x.dtype, device=DEVICE).flatten()
    room = torch.cat([room, room[:1]])[1:]
    start = x[0].numel()
    return room[start : start + x.numel()].view(x.shape).copy_(x)


def rows_for_plain(e: int, n: int, results: int, width: int) -> int:
    """Return rows an environment for plain torch: at least n, and results enough for a maximum to mean something."""
    return max(n, cdiv(64, e), min(cdiv(4 * ENOUGH, e * results), 2**19 // (e * width)))


def assert_written(buffer: Tensor, view: Tensor) -> None:
    """Assert that all of the view was written, and nothing else of its buffer."""
    written = ~buffer.isnan()
    view.fill_(torch.nan)
    assert int(written.sum()) == view.numel(), "entries of the output were left out, or others written"
    assert buffer.isnan().all(), "entries beside the output were written"


def random_slabs(kind: str, groups: int) -> tuple[Slabs, int]:
    """Draw which slab each group takes; return that, and the number of slabs it needs."""
    if kind == "members":
        count = groups + 3
        members = torch.full((groups + 2,), count - 1, device=DEVICE)  # of others: a slab of NaN
        members[1:-1] = torch.randint(-1, count - 1, (groups,), device=DEVICE)
        return Slabs(1, members=members[1:-1]), count
    step = int(kind)
    return Slabs(1, step), 2 + step * (groups - 1)


def random_layer(
    precision: Precision, slabs: int, d: int, k: int, side: int = 0, act: str = "mish", v: int = 8
) -> Layer:
    """Draw a layer, its outputs of size one; act: "mish", "simnorm" or "" for no LayerNorm."""
    return Layer(
        weight=packed(precision.operand(randn(slabs, d, k) / k**0.5)),
        bias=packed(randn(slabs, d)),
        ln_weight=packed(1 + 0.3 * randn(slabs, d)) if act else None,
        ln_bias=packed(0.3 * randn(slabs, d)) if act else None,
        side=packed(precision.operand(randn(slabs, d, side) / side**0.5)) if side else None,
        simnorm_dim=v if act == "simnorm" else 0,
    )


def statistics(x: Tensor, tile: int) -> Tensor:
    """Return what a layer of this tile width leaves for its readers, unused slots NaN."""
    room = torch.full((*x.shape[:-1], cdiv(x.shape[-1], LEAST_COLUMNS), 2), torch.nan, device=DEVICE)
    for i, t in enumerate(x.double().split(tile, -1)):
        mean = t.mean(-1, keepdim=True)
        room[..., i, 0], room[..., i, 1] = mean.squeeze(-1), (t - mean).square().sum(-1)
    return placed(room, inner=2)


def random_rows(
    precision: Precision,
    groups: int,
    e: int,
    n: int,
    width: int,
    due: str = "mish",
    v: int = 8,
    tile: int = 32,
    slabs: str = "1",
    offset: float = 0.0,
    scale: float = 1.0,
) -> Rows:
    """Draw rows that wait for an activation, or for none."""
    x = placed((offset + scale * randn(groups, e, n, width)).to(precision.dtype))
    if not due:
        return Rows(x)
    which, count = random_slabs(slabs, groups)
    return Rows(x, statistics(x, tile), random_layer(precision, count, width, 1, act=due, v=v), which, tile)


def double(x: Any) -> Any:
    """Return a tensor, a layer or rows in float64; None remains."""
    if isinstance(x, Tensor):
        return x.double()
    if isinstance(x, Layer):
        return replace(x, **{f.name: double(getattr(x, f.name)) for f in fields(x) if f.name != "simnorm_dim"})
    if isinstance(x, Rows):
        return Rows(x.x.double(), None, double(x.layer), x.slabs, x.tile)
    assert x is None
    return None


def plain_activation(x: Tensor, layer: Layer | None, slabs: Slabs) -> Tensor:
    """Compute the activation due as one writes it, in the type of x: (G, E, n, D)."""
    if layer is None or layer.ln_weight is None:
        return x
    out = []
    for y, s in zip(x, slabs.of(len(x)), strict=True):
        assert layer.ln_bias is not None
        y = F.layer_norm(y, y.shape[-1:], layer.ln_weight[s].to(x), layer.ln_bias[s].to(x), 1e-5)
        out.append(y.unflatten(-1, (-1, layer.simnorm_dim)).softmax(-1).flatten(-2) if layer.simnorm_dim else F.mish(y))
    return torch.stack(out)


def plain_layer(
    x: Rows | None, a: Tensor | None, layer: Layer, slabs: Slabs, groups: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute a layer as one writes it, all in one type: (G, E, n, D)."""
    dense = None if x is None else plain_activation(x.x.to(dtype), x.layer, x.slabs)
    out = []
    for g, s in enumerate(slabs.of(groups)):
        parts = [] if dense is None else [(dense[min(g, len(dense) - 1)], layer.weight[s])]
        if a is not None:
            assert layer.side is not None
            parts.append((a, layer.side[s]))
        inputs, weights = (torch.cat([p[i].to(dtype) for p in parts], -1) for i in (0, 1))
        y = F.linear(inputs, weights, layer.bias[s].to(dtype) if bias is None else None)
        out.append(y if bias is None else y + bias[s].unsqueeze(1).to(dtype))
    return torch.stack(out)


def assert_nearest_tf32(got: Tensor, x: Tensor) -> None:
    """Assert that each entry has 10 stored bits and is within half a unit of the last of them."""
    assert (got.view(torch.int32) & 0x1FFF == 0).all()
    unit = 2.0 ** (x.double().abs().log2().floor() - 10)
    assert ((got.double() - x.double()).abs() <= unit / 2).all()


def agree(reference: Tensor, plain: Tensor) -> None:
    """Assert that the reference says what one would write, in float64."""
    torch.testing.assert_close(reference, plain, rtol=1e-9, atol=1e-9 * float(plain.abs().max()))


@pooled
def check_layer(
    precision: str = "float32",
    *,
    groups: int = 2,
    e: int = 2,
    n: int = 33,
    k: int = 24,
    d: int = 40,
    a: int = 0,
    x: str = "own",
    due: str = "mish",
    act: str = "mish",
    v: int = 8,
    in_tile: int = 32,
    in_slabs: str = "1",
    slabs: str = "1",
    env_bias: bool = False,
    bias_offset: float = 0.0,
    offset: float = 0.0,
    scale: float = 1.0,
    wide: bool = False,
    tile: Tile | None = None,
) -> None:
    """Check `grouped_layer`, and `activate_rows` on what it wrote.

    a: width of the side input. x: each group its "own", "shared" by all, "expanded" from one row
    an environment, or "" for none. due, act: of the input, of the layer. offset, scale: of x.
    wide: float32 inputs and results whatever the precision.
    """
    p = Precision(precision)
    rows = rows_for_plain(e, n, groups * d, groups * max(k, d))
    which, count = random_slabs(slabs, groups)
    layer = random_layer(p, count, d, k, a, act, v)
    layer.bias.add_(bias_offset)
    bias = placed(randn(count, e, d) + bias_offset) if env_bias else None
    side = placed(randn(e, rows, a)) if a else None
    main = None
    if x:
        stored = Precision("float32") if wide and not due else p
        sizes = (1 if x == "shared" else groups, e, 1 if x == "expanded" else rows, k)
        main = random_rows(stored, *sizes, due, v, in_tile, in_slabs, offset, scale)
    if x == "expanded":
        assert main is not None
        main = main.expand(rows) if due else Rows(main.x.expand(-1, -1, rows, -1))

    wanted = Rows(torch.empty(groups, e, rows, d, dtype=torch.float64, device=DEVICE))
    args: Any = dict(how=How(p), slabs=which)
    exact = grouped_layer_reference(double(main), double(side), double(layer), wanted, bias=double(bias), **args)
    agree(exact.x, plain_layer(double(main), side, layer, which, groups, bias, torch.float64))
    agree(exact.activated(), plain_activation(exact.x, layer, which))
    if precision == "bfloat16":
        plain = plain_layer(main, side, layer, which, groups, bias, torch.bfloat16)
        plain_act = plain_activation(plain, layer, which)
    else:
        reference = grouped_layer_reference(main, side, layer, Rows(wanted.x.float()), bias=bias, **args)
        plain, plain_act = reference.x, reference.activated()

    buffer, view = poisoned(groups, e, n, d, dtype=torch.float32 if wide else p.dtype)
    stats_buffer, stats = poisoned(groups, e, n, cdiv(d, LEAST_COLUMNS), 2, inner=2)
    got = grouped_layer(
        None if main is None else main[:, :n],
        None if side is None else side[:, :n],
        layer,
        Rows(view, stats),
        bias=bias,
        tile=tile,
        **args,
    )
    assert got.x is view
    judge("layer", got.x, exact.x[:, :, :n], plain, exact.x)
    if act:
        read_buffer, read = poisoned(groups, e, n, d)
        activate_rows(got, read, how=args["how"], exact=read)
        judge("its reader", read, exact.activated()[:, :, :n], plain_act, exact.activated())
        assert_written(read_buffer, read)
    for keep in (False, True) if act else ():
        check_finished(args, main, side, layer, bias, view, keep, exact, plain_act)
    assert_written(buffer, view)
    stats.fill_(torch.nan)
    assert stats_buffer.isnan().all(), "statistics of other rows were written"


def check_finished(
    args: dict[str, Any],
    main: Rows | None,
    side: Tensor | None,
    layer: Layer,
    bias: Tensor | None,
    before: Tensor,
    keep: bool,
    exact: Rows,
    plain: Tensor,
) -> None:
    """Check `grouped_layer` where it finishes.

    keep: beside the pre-activation, which was `before`. exact, plain: the layer in float64, its
    activation in plain torch.
    """
    p, (groups, e, n, d) = args["how"].precision, before.shape
    buffer, view = poisoned(groups, e, n, d, dtype=before.dtype)
    active_buffer, active = poisoned(groups, e, n, d, dtype=p.dtype)
    stats = poisoned(groups, e, n, cdiv(d, LEAST_COLUMNS), 2, inner=2)[1]
    out = Rows(view, stats, active=active if keep else None)
    main = None if main is None else main[:, :n]
    got = grouped_layer(main, None if side is None else side[:, :n], layer, out, bias=bias, finish=True, **args)
    if keep:
        assert got.x is view
        # Its tile may be another, and so the order of its sums.
        ulp = 2**-7 if p.name == "bfloat16" else 2**-18
        assert (view.float() - before.float()).abs().max() <= ulp * before.float().abs().max()
        assert got.ready().x is active
    else:
        assert got.operand
        assert got.x is view
    rounded = p.operand(plain.float()) if p.name == "tf32" else plain
    judge("finished", active if keep else view, exact.activated()[:, :, :n], rounded, exact.activated())
    assert_written(buffer, view)
    if keep:
        assert_written(active_buffer, active)


@pooled
def check_activation(
    precision: str = "float32",
    *,
    groups: int = 2,
    e: int = 2,
    n: int = 33,
    k: int = 24,
    due: str = "mish",
    v: int = 8,
    in_tile: int = 32,
    in_slabs: str = "1",
    offset: float = 0.0,
    scale: float = 1.0,
    in_place: bool = False,
    expand: bool = False,
) -> None:
    """Check `activate_rows`; expand: one row an environment, shared."""
    p = Precision(precision)
    rows = rows_for_plain(e, n, groups * k, groups * k)
    x = random_rows(p, groups, e, 1 if expand else rows, k, due, v, in_tile, in_slabs, offset, scale)
    exact = double(x).activated()
    agree(exact, plain_activation(x.x.double(), x.layer, x.slabs))
    plain = plain_activation(x.x, x.layer, x.slabs) if precision == "bfloat16" else x.activated()
    buffer, view = poisoned(groups, e, n, k, dtype=p.dtype)
    source = x.expand(n) if expand else x[:, :n]
    if in_place:
        source = replace(source, x=view.copy_(source.x))
    got = activate_rows(source, view, how=How(p), exact=view)
    assert got.x is view
    assert got.layer is None
    judge("activation", view, exact.expand(-1, -1, rows, -1)[:, :, :n], plain, exact)
    assert_written(buffer, view)
