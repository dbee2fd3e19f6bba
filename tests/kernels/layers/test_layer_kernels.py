"""`grouped_layer` and `activate_rows` against their references in float64, and a fuzzer over these and both heads."""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from head_oracle import check_policy, check_scalars
from judge import judge, pooled
from oracle import (
    DEVICE,
    check_activation,
    check_layer,
    in_precisions,
    randn,
    random_layer,
    random_rows,
)
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import How, Precision, log_launches, pow2
from tdmpc2_fast.kernels.layers import grouped_layer as layers
from tdmpc2_fast.kernels.layers.grouped_layer import activate_rows, grouped_layer
from tdmpc2_fast.kernels.layers.policy_layer import policy_layer
from tdmpc2_fast.kernels.layers.rows import Layer, Rows, Slabs
from tdmpc2_fast.kernels.layers.scalar_head import scalar_head
from tdmpc2_fast.kernels.layers.tiles import Tile
from tdmpc2_fast.kernels.layers.two_hot import Code

pytestmark = oracle.MARKS

FLOAT32 = Precision("float32")
PRECISIONS = ("float32", "bfloat16")


def named(options: object) -> str | None:
    return ",".join(f"{k}={v}" for k, v in options.items()) if isinstance(options, dict) else None


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Draw other numbers each run, and show the line that repeats them where a test fails."""
    return oracle.reseed(request.node.name, "tests/kernels/layers/test_layer_kernels.py")


# Small sizes for the edges of tiles, then every width of the official models with few rows.
SHAPES: list[dict[str, Any]] = [
    dict(e=1, n=1, k=24, d=136),
    dict(e=7, n=1, k=8, d=8, due="simnorm", v=8),
    dict(e=1, n=37, k=5, d=40, due=""),
    dict(e=7, n=13, k=40, d=56, a=1),
    dict(e=3, n=11, k=56, d=24, a=21, act="simnorm", v=2, groups=3),
    dict(e=2, n=5, k=136, d=24, a=38, groups=4, due="simnorm", v=4),
    dict(e=1, n=31, k=24, d=40, a=61, groups=1, act=""),
    dict(e=7, n=3, k=67, d=128, due="", groups=1),
    dict(e=1, n=3, k=128, d=384, act="simnorm", v=8),
    dict(e=2, n=2, k=384, d=512, a=6, groups=1),
    dict(e=1, n=2, k=512, d=768, groups=1, due="simnorm", v=8),
    dict(e=1, n=3, k=768, d=24, groups=1),
    dict(e=1, n=2, k=24, d=1792, groups=1),
    dict(e=1, n=2, k=1024, d=1376, groups=1, act="simnorm", v=16),
    dict(e=1, n=2, k=1792, d=40, groups=1),
    dict(e=1, n=3, k=1376, d=1024, groups=1, due="simnorm", v=16, a=1),
]


@pytest.mark.parametrize(("precision", "options"), in_precisions(SHAPES))
def test_layer_at_any_size(precision: str, options: dict[str, Any]) -> None:
    check_layer(precision, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "options",
    [
        dict(x="", a=5),
        dict(x="", a=1, groups=3, slabs="members", wide=True),
        dict(x="", a=67, e=7, n=1, act="", env_bias=True),
        dict(x="shared", a=3, slabs="2", in_slabs="0"),
        dict(x="shared", due="", wide=True, groups=3),
        dict(x="expanded", a=6, d=136, e=7, groups=3, env_bias=True),
        dict(x="expanded", due="", a=2, d=136, e=7, wide=True),
        dict(env_bias=True, slabs="0", in_slabs="2", groups=3),
        dict(env_bias=True, slabs="members", in_slabs="members", groups=3, a=2),
        dict(d=1, k=28, in_tile=64),  # of one column LayerNorm leaves its bias
    ],
    ids=named,
)
def test_layer_with_any_inputs_bias_and_slabs(options: dict[str, Any], precision: str) -> None:
    check_layer(precision, **options)


def test_layer_in_tf32() -> None:
    check_layer("tf32", a=3)


@pytest.mark.parametrize(
    "options",
    [
        dict(tile=Tile(16, 32, 16), e=1, n=17, k=40, d=40, a=21, in_tile=64),
        dict(tile=Tile(16, 32, 16), e=3, n=7, k=48, d=80, groups=1, in_tile=32, due="simnorm", v=16, act="simnorm"),
        dict(
            precision="bfloat16",
            tile=Tile(16, 64, 32),
            e=7,
            n=5,
            k=40,
            d=72,
            groups=1,
            x="expanded",
            a=3,
            env_bias=True,
        ),
        dict(tile=Tile(32, 64, 32), e=1, n=37, k=72, d=136, groups=1, in_tile=32),
        dict(
            precision="bfloat16",
            tile=Tile(32, 32, 64),
            e=7,
            n=5,
            k=136,
            d=40,
            groups=1,
            in_tile=128,
            due="simnorm",
            v=2,
        ),
        dict(tile=Tile(64, 32, 128), e=2, n=35, k=136, d=56, groups=1, in_tile=64),
    ],
    ids=named,
)
def test_layer_in_any_tiles(options: dict[str, Any]) -> None:
    check_layer(**options)


@pytest.mark.parametrize(
    ("precision", "options"),
    in_precisions(
        [
            dict(bias_offset=1000.0, d=136, in_tile=64),
            dict(bias_offset=-1000.0, d=136, groups=1, e=1, n=16, tile=Tile(16, 32, 32)),
            dict(offset=1000.0, k=136),
            dict(offset=1000.0, k=136, groups=1, in_tile=64, due="simnorm"),
            dict(scale=1e15),
            dict(scale=1e-15, due="simnorm"),
            dict(scale=1e15, due=""),
            dict(scale=1e-30, due="", wide=True),
        ]
    ),
)
def test_layer_of_large_means_huge_and_tiny_numbers(precision: str, options: dict[str, Any]) -> None:
    check_layer(precision, **options)


@pytest.mark.parametrize(
    ("precision", "options"),
    in_precisions(
        [
            dict(e=1, n=1, k=24),
            dict(e=7, n=13, k=40, in_place=True),
            dict(e=1, n=37, k=56, due="simnorm", v=2, groups=3, in_tile=64, in_slabs="2", in_place=True),
            dict(e=2, n=5, k=8, due="simnorm", v=4, groups=8, in_slabs="members"),
            dict(e=7, n=9, k=136, due="simnorm", v=8, groups=1, expand=True, in_tile=128),
            dict(e=2, n=300, k=48, due="simnorm", v=16, groups=2, in_slabs="0"),
            dict(e=1, n=3, k=1376, in_tile=64, groups=1, due="simnorm", v=16),
            dict(e=1, n=3, k=1792),
            dict(offset=1000.0, k=136),
            dict(offset=1000.0, k=384, due="simnorm", in_tile=128),
            dict(scale=1e15),
            dict(scale=1e-15),
            dict(scale=3e-3),  # LayerNorm's epsilon is of the size of the variance
        ]
    ),
)
def test_activation_of_rows(precision: str, options: dict[str, Any]) -> None:
    check_activation(precision, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pooled
def test_a_chain_is_as_exact_as_torch(precision: str) -> None:
    p, slabs, e, n = Precision(precision), Slabs(1), 3, 11
    widths, acts, tiles = (67, 136, 72, 40), ("mish", "simnorm", "mish"), ((64, 64, 64), (32, 32, 32), (64, 32, 64))
    packed = [random_layer(p, 2, d, k, 0, act) for k, d, act in zip(widths, widths[1:], acts, strict=False)]
    start = Rows(oracle.placed(randn(1, e, n, widths[0])))
    x, exact = start, oracle.double(start)
    plain = start.x if precision == "float32" else start.x.bfloat16()
    for layer, tile in zip(packed, tiles, strict=True):
        room = Rows.empty(1, e, n, layer.width, p.dtype, DEVICE)
        x = grouped_layer(x, None, layer, room, how=How(p), slabs=slabs, tile=Tile(*tile))
        y = oracle.plain_layer(exact, None, layer, slabs, 1, None, torch.float64)
        exact = Rows(y, None, oracle.double(layer), slabs)
        plain = F.linear(plain, layer.weight[1].to(plain), layer.bias[1].to(plain))
        plain = oracle.plain_activation(plain, layer, slabs)
    got = activate_rows(x, torch.full((1, e, n, widths[-1]), torch.nan, device=DEVICE, dtype=p.dtype), how=How(p)).x
    judge("chain", got, exact.activated(), plain, exact.activated())


def test_bfloat16_is_rounded_once_and_to_nearest() -> None:
    p, x = Precision("bfloat16"), Rows(randn(2, 3, 5, 24))
    layer = random_layer(p, 2, 40, 24)
    narrow, wide, same = (
        grouped_layer(r, None, layer, Rows.empty(2, 3, 5, 40, dtype, DEVICE), how=How(p))
        for r, dtype in ((x, p.dtype), (x, torch.float32), (Rows(x.x.bfloat16()), torch.float32))
    )
    assert torch.equal(wide.x, same.x)
    assert torch.equal(narrow.x, wide.x.bfloat16())
    few, many = (activate_rows(wide, torch.empty_like(wide.x, dtype=t), how=How(p)).x for t in (p.dtype, torch.float32))
    assert torch.equal(few, many.bfloat16())


def test_tf32_takes_operands_to_the_nearest() -> None:
    """Through identities, what comes out is what the products took. Tensor cores alone would cut bits off."""
    p, x = Precision("tf32"), randn(1, 1, 70, 32) * 10 ** randn(32)
    one = torch.eye(32, device=DEVICE)[None]
    layer = Layer(one, torch.zeros(1, 32, device=DEVICE), side=one)
    for main, side in ((Rows(x), None), (None, x[0])):
        out = Rows.empty(1, 1, 70, 32, torch.float32, DEVICE)
        oracle.assert_nearest_tf32(grouped_layer(main, side, layer, out, how=How(p)).x, x)
    oracle.assert_nearest_tf32(p.operand(x), x)


def readers(p: Precision, e: int, n: int, k: int) -> dict[str, Callable[[Rows], Tensor]]:
    """Return every op that reads rows (2, e, n, k), all else fixed."""
    layer, heads = random_layer(p, 2, 24, k, 3), random_layer(p, 2, 7, k, act="")
    policy = random_layer(p, 1, 6, k, act="")
    a, eps = randn(e, n, 3), randn(e, n, 3)

    def through_layer(x: Rows) -> Tensor:
        y = grouped_layer(x, a, layer, Rows.empty(2, e, n, 24, p.dtype, DEVICE), how=How(p), tile=Tile(16, 32, 32))
        return activate_rows(y, y.x, how=How(FLOAT32)).x

    def through_scalars(x: Rows) -> Tensor:
        out = torch.empty(2, e, n, device=DEVICE)
        scalar_head(x, heads, out, how=How(p), code=Code(7, -2, 2))
        return out.unsqueeze(-1)

    def through_policy(x: Rows) -> Tensor:
        out = torch.empty(e, n, 3, device=DEVICE)
        policy_layer(x[:1, :], policy, eps, out, how=How(p), low=-10, high=2)
        return out.unsqueeze(0)

    return {
        "grouped_layer": through_layer,
        "activate_rows": lambda x: activate_rows(x, torch.empty_like(x.x), how=How(FLOAT32)).x,
        "scalar_head": through_scalars,
        "policy_layer": through_policy,
    }


@pytest.mark.parametrize(
    ("precision", "name", "due"),
    [("float32", name, due) for name in readers(FLOAT32, 1, 1, 8) for due in ("mish", "simnorm")]
    + [(precision, "grouped_layer", "") for precision in PRECISIONS],
)
def test_rows_never_mix(precision: str, name: str, due: str) -> None:
    p = Precision(precision)
    op, x = readers(p, 3, 5, 40)[name], random_rows(p, 2, 3, 5, 40, due)
    base = op(x)
    spoilt = x.x.clone()
    spoilt[:, 1] = randn(2, 5, 40).to(p.dtype)
    spoilt[:, 0, 2, 3], spoilt[:, 0, 3, 39], spoilt[:, 2, 4] = torch.nan, torch.inf, -torch.inf
    other = replace(x, x=spoilt, stats=oracle.statistics(spoilt, 32) if due else None)
    got = op(other)
    changed = torch.zeros(3, 5, dtype=torch.bool, device=DEVICE)
    changed[1] = True
    broken = torch.zeros_like(changed)
    broken[0, 2], broken[0, 3], broken[2, 4] = True, True, True
    same = ~changed & ~broken
    assert torch.equal(got[:, same], base[:, same])
    assert got[:, changed].isfinite().all()
    assert not torch.equal(got[:, changed], base[:, changed])
    assert not got[:, broken].isfinite().any()


def test_a_nan_action_and_bias_stay_where_they_are() -> None:
    layer, a, bias = random_layer(FLOAT32, 2, 40, 24, 3), randn(2, 5, 3), randn(2, 2, 40)
    a[0, 1, 2], bias[0, 1, 7] = torch.nan, torch.nan
    out = Rows.empty(2, 2, 5, 40, torch.float32, DEVICE)
    y = grouped_layer(None, a, layer, out, how=How(FLOAT32), bias=bias).x.isnan()
    expected = torch.zeros_like(y)
    expected[:, 0, 1], expected[0, 1, :, 7] = True, True
    assert torch.equal(y, expected)


def test_members_may_repeat_and_equal_groups_are_equal() -> None:
    layer, x = random_layer(FLOAT32, 4, 40, 24), random_rows(FLOAT32, 1, 2, 5, 24)
    out = Rows.empty(3, 2, 5, 40, torch.float32, DEVICE)
    members = torch.tensor([2, 0, 2], device=DEVICE)
    y = grouped_layer(x, None, layer, out, how=How(FLOAT32), slabs=Slabs(1, members=members)).x
    assert torch.equal(y[0], y[2])
    assert not torch.equal(y[0], y[1])


@pytest.mark.parametrize("groups", [slice(1, None), slice(2, 3), slice(0, 5, 2), slice(1, 5, 3)], ids=str)
@pytest.mark.parametrize("slabs", [Slabs(), Slabs(3, 2), Slabs(1, 0), Slabs(4, members=torch.tensor([5, -1, 3, 3, 0]))])
def test_slices_of_rows_keep_their_slabs(slabs: Slabs, groups: slice) -> None:
    rows = Rows(torch.arange(5.0).view(5, 1, 1, 1).expand(5, 2, 4, 8), slabs=slabs)
    part = rows[groups, 1:3]
    assert part.x.shape[1:] == (2, 2, 8)
    assert part.x[:, 0, 0, 0].tolist() == [float(g) for g in range(5)[groups]]
    assert part.slabs.of(len(part.x)) == slabs.of(5)[groups]


@pytest.mark.parametrize("rows", [(0, 5), (3, 0)])
def test_no_rows_are_no_launch(rows: tuple[int, int]) -> None:
    layer, out = random_layer(FLOAT32, 1, 40, 24), Rows.empty(1, *rows, 40, torch.float32, DEVICE)
    with log_launches() as log:
        y = grouped_layer(Rows(randn(1, *rows, 24)), None, layer, out, how=How(FLOAT32))
        activate_rows(y, y.x, how=How(FLOAT32))
    assert log == []


@pytest.mark.parametrize("what", ["x", "a"])
def test_strides_of_zero_share_one_row(what: str) -> None:
    layer, x, a = random_layer(FLOAT32, 2, 40, 24, 3), random_rows(FLOAT32, 2, 2, 5, 24), randn(2, 5, 3)
    one, many = (x[:, :1].expand(5), a) if what == "x" else (x, a[:, :1].expand(-1, 5, -1))
    copies = replace(one, x=one.x.contiguous(), stats=None if one.stats is None else one.stats.contiguous())
    got, base = (
        grouped_layer(r, s, layer, Rows.empty(2, 2, 5, 40, torch.float32, DEVICE), how=How(FLOAT32)).x
        for r, s in ((one, many), (copies, many.contiguous()))
    )
    assert torch.equal(got, base)


def test_a_shared_input_with_members_takes_the_first() -> None:
    check_layer(x="shared", in_slabs="members")


def test_every_other_group_of_rows_with_members() -> None:
    x = random_rows(FLOAT32, 4, 2, 5, 24)
    assert x.layer is not None
    members = torch.tensor([0, 3, 1, 2], device=DEVICE)
    x = replace(x, slabs=Slabs(1, members=members))[::2, :]
    got = activate_rows(x, torch.empty_like(x.x), how=How(FLOAT32)).x
    torch.testing.assert_close(got, x.activated())


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(grouped_layer) == inspect.signature(layers.grouped_layer_reference)


def bad() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return arguments that are refused: how the message starts, and what comes; (2, 3, 5, 24) and 3 wide is right."""
    return {
        "x of three groups": ("x", dict(x=Rows(randn(3, 3, 5, 24)))),
        "x of two environments": ("x", dict(x=Rows(randn(2, 2, 5, 24)))),
        "x of four rows": ("x", dict(x=Rows(randn(2, 3, 4, 24)))),
        "x of another width": ("x", dict(x=Rows(randn(2, 3, 5, 25)))),
        "a of another width": ("a", dict(a=randn(3, 5, 2))),
        "a of four rows": ("a", dict(a=randn(3, 4, 3))),
        "a with groups": ("a", dict(a=randn(2, 3, 5, 3))),
        "a without weights": ("a", dict(layer=random_layer(FLOAT32, 2, 40, 24))),
        "no input": ("x and a", dict(x=None, a=None)),
        "narrow tile": ("tile", dict(tile=Tile(16, 16, 32))),
        "nothing to finish": ("finish", dict(finish=True, layer=random_layer(FLOAT32, 2, 40, 24, 3, act=""))),
    }


@pytest.mark.parametrize("what", bad())
def test_bad_arguments_are_named(what: str) -> None:
    name, changes = bad()[what]
    layer: Layer = random_layer(FLOAT32, 2, 40, 24, 3)
    args: dict[str, Any] = dict(x=Rows(randn(2, 3, 5, 24)), a=randn(3, 5, 3), layer=layer, how=How(FLOAT32))
    args |= dict(out=Rows.empty(2, 3, 5, 40, torch.float32, DEVICE))
    grouped_layer(**args)
    with pytest.raises(ValueError, match=rf"^{name}: got .*allowed: "):
        grouped_layer(**{**args, **changes})


def test_rows_with_nothing_due_are_refused() -> None:
    x = Rows(randn(1, 1, 2, 8))
    for rows in (x, replace(x, layer=random_layer(FLOAT32, 1, 8, 8, act=""))):
        with pytest.raises(ValueError, match=r"^x: nothing is due"):
            activate_rows(rows, torch.empty_like(x.x), how=How(FLOAT32))


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^precision: got 'float16', allowed: float32, tf32, bfloat16"):
        Precision("float16")


def any_case(rng: random.Random) -> tuple[Callable[..., None], dict[str, Any]]:
    """Draw a check and its options, small enough for the interpreter."""
    due, v = rng.choice(["mish", "simnorm"]), rng.choice([2, 4, 8, 16])

    def width() -> int:
        w = rng.choice([8, 24, 40, 56, 136, rng.randint(1, 80)])
        return w if due == "mish" else -(-w // v) * v

    options: dict[str, Any] = dict(
        precision=rng.choice(PRECISIONS),
        e=rng.choice([1, 2, 3, 7]),
        n=rng.choice([1, 2, 3, 5, rng.randint(1, 40)]),
        k=width(),
        due=due,
        v=v,
        in_tile=rng.choice([32, 64, 128]),
        in_slabs=rng.choice(["0", "1", "2", "members"]),
    )
    check = rng.choice([check_layer, check_layer, check_activation, check_scalars, check_policy])
    if check is not check_policy:
        options["groups"] = rng.randint(1, 4)
    if check is check_activation:
        return check, options | dict(in_place=rng.random() < 0.5, scale=rng.choice([1e-3, 1.0, 30.0]))
    options["x"] = rng.choice(["own", "own", "expanded" if check is check_policy else "shared"])
    if options["x"] == "shared":
        options["in_slabs"] = "1"
    tiled = rng.random() < 0.4
    bm, bk = rng.choice([16, 32]), rng.choice([16, 32, 64])
    if check is check_layer:
        options |= dict(d=width(), a=rng.choice([0, 1, 2, 6, 21]), act=rng.choice([due, ""]))
        options |= dict(slabs=rng.choice(["0", "1", "2", "members"]), env_bias=rng.random() < 0.5)
        if rng.random() < 0.2:
            options["due"] = ""
        if options["a"] and rng.random() < 0.2:
            options["x"] = ""
        if tiled:
            options |= dict(groups=1, x=options["x"] and "own", tile=Tile(bm, rng.choice([32, 64]), bk))
        return check, options
    if check is check_scalars:
        options |= dict(bins=rng.choice([0, 1, 2, 7, 101, rng.randint(2, 300)]), logits=rng.choice([0.1, 1.0, 5.0]))
        options |= dict(slabs=rng.choice(["0", "1", "2", "members"]))
        columns = options["bins"]
    else:
        options |= dict(a=rng.randint(1, 40), masked=rng.random() < 0.5, logits=rng.choice([0.1, 1.0, 5.0]))
        columns = 2 * options["a"]
    if tiled:
        # 512 columns of 64 are more than the shared memory of any chip.
        options["tile"] = Tile(bm, pow2(columns, 16), max(16, min(bk, 8192 // pow2(columns, 16))))
    return check, options


def test_fuzz(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(int(os.environ.get("FUZZ_CASES", "12"))):
        check, options = any_case(rng)
        try:
            check(**options)
        except Exception as error:
            line = f"FUZZ_SEED={seed} pytest tests/kernels/layers/test_layer_kernels.py -k fuzz"
            raise AssertionError(f"{check.__name__}({options})\n{error}\nreproduce: {line}") from error
