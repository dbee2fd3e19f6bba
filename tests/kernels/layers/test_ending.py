"""What becomes of an activation: the end of a head, of a cluster's row, or kept as it is beside what products take."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from judge import judge, judge_scalars, pooled
from oracle import (
    DEVICE,
    assert_written,
    double,
    plain_activation,
    plain_layer,
    poisoned,
    randn,
    random_layer,
    random_rows,
    random_slabs,
    rows_for_plain,
)
from torch import Tensor

from tdmpc2_fast.kernels.device.cluster_check import how_on
from tdmpc2_fast.kernels.device.launch import How, Precision, cdiv, interpreting, log_launches, native
from tdmpc2_fast.kernels.layers.ending import End, room_for_parts
from tdmpc2_fast.kernels.layers.grouped_layer import activate_rows, grouped_layer, grouped_layer_reference
from tdmpc2_fast.kernels.layers.last_layer import last_layer_reference
from tdmpc2_fast.kernels.layers.policy_head import policy_action
from tdmpc2_fast.kernels.layers.policy_layer import PolicyEnd
from tdmpc2_fast.kernels.layers.rows import EACH, Layer, Rows, Slabs
from tdmpc2_fast.kernels.layers.scalar_head import ScalarEnd
from tdmpc2_fast.kernels.layers.tiles import Tile
from tdmpc2_fast.kernels.layers.two_hot import Code, two_hot_inv

pytestmark = oracle.MARKS

LOW, HIGH = -3.0, 1.0


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Draw other numbers each run, and show the line that repeats them where a test fails."""
    return oracle.reseed(request.node.name, "tests/kernels/layers/test_ending.py")


def how_of(precision: str) -> How:
    """Return how layers are launched: over clusters, where these can be had or need not be."""
    on_gpu = how_on(DEVICE, Precision(precision))
    return on_gpu._replace(clusters=on_gpu.clusters or interpreting())


def settled(launch: Any, across: int) -> Any:
    """Launch; where the interpreter runs neighbours one after another, once more for each time they wait."""
    for _ in range(2 if interpreting() and across > 1 else 0):
        launch()
    return launch()


def rows_of(groups: int, e: int, n: int, d: int, dtype: torch.dtype, keep: bool = False) -> Rows:
    """Make room for a layer's rows; what neighbours in the interpreter read too early are numbers."""
    rows = Rows.empty(groups, e, n, d, dtype, DEVICE, active=keep)
    assert rows.stats is not None
    rows.stats.fill_(1.0)
    return rows


def ends_of(d: int, how: How, tile: Tile | None, parts: Tensor | None) -> bool:
    """Tell whether a layer of d columns makes the results of its head itself."""
    most = 8 if how.clusters else 1
    return parts is not None and not native() and (tile is None or cdiv(d, tile.BN) <= most)


@pooled
def check_end(
    precision: str,
    *,
    bins: int | None = 101,
    a: int = 3,
    groups: int = 2,
    e: int = 2,
    n: int = 33,
    k: int = 40,
    d: int = 136,
    due: str = "mish",
    act: str = "mish",
    slabs: str = "1",
    masked: bool = False,
    apart: bool = False,
    tile: Tile | None = None,
) -> None:
    """Check a layer and its end; bins: of scalars, None for actions of width a; apart: no room for parts."""
    p, how = Precision(precision), how_of(precision)
    rows = rows_for_plain(e, n, groups * max(bins or 1, a), groups * max(k, d))
    (which, count), (last_slabs, last_count) = random_slabs(slabs, groups), random_slabs(slabs, groups)
    if bins is None:
        last_slabs, last_count = EACH, 1
    outputs = 2 * a if bins is None else max(bins, 1)
    layer, last = random_layer(p, count, d, k, act=act), random_layer(p, last_count, outputs, d, act="")
    main = random_rows(p, groups, e, rows, k, due)
    eps = randn(e, rows, a)
    mask = (torch.rand(e, a, device=DEVICE) > 0.4).float() if masked else None

    def result_of(logits: Tensor) -> Tensor:
        """Return scalars (G, E, n) or actions (E, n, A) of logits."""
        if bins is not None:
            return two_hot_inv(logits, bins, -10.0, 10.0).squeeze(-1)
        plain = torch.cat([logits[0, ..., 0::2], logits[0, ..., 1::2]], -1)
        live = None if mask is None else mask.to(logits).unsqueeze(1)
        return policy_action(plain, eps.to(logits), LOW, HIGH, live)

    def by_reference(dtype: torch.dtype, of: Any) -> Tensor:
        given: Any = dict(how=how, slabs=which)
        hidden = Rows(torch.empty(groups, e, rows, d, dtype=dtype, device=DEVICE))
        hidden = grouped_layer_reference(of(main), None, of(layer), hidden, finish=True, **given)
        out = torch.empty(groups, e, rows, dtype=dtype, device=DEVICE)
        return result_of(last_layer_reference(hidden, of(last), out, how, last_slabs))

    exact = by_reference(torch.float64, double)
    if precision == "bfloat16":
        y = plain_layer(main, None, layer, which, groups, None, torch.bfloat16)
        hidden = Rows(plain_activation(y, layer, which))
        plain = result_of(plain_layer(hidden, None, last, last_slabs, groups, None, torch.bfloat16))
    else:
        plain = by_reference(torch.float32, lambda x: x)

    room = 0 if apart else room_for_parts(e * n, groups, outputs, p)
    parts = torch.full((room,), torch.nan, device=DEVICE) if room else None
    buffer, view = poisoned(*((e, n, a) if bins is None else (groups, e, n)))
    end: End = (
        PolicyEnd(last, parts, view, eps[:, :n], LOW, HIGH, mask)
        if bins is None
        else ScalarEnd(last, parts, view, Code(bins, -10.0, 10.0), last_slabs)
    )
    out = rows_of(groups, e, n, d, p.dtype)
    out.x.fill_(torch.nan)
    with log_launches() as log:
        given: Any = dict(how=how, slabs=which, finish=not native(), end=end, tile=tile)
        settled(lambda: grouped_layer(main[:, :n], None, layer, out, **given), 1 if tile is None else cdiv(d, tile.BN))
    ended = ends_of(d, how, tile, parts)
    assert [x.name for x in log if "head" in x.name or "policy" in x.name] == [] if ended else len(log) > 1
    assert bool(out.x.isnan().all()) == ended, "the activation is stored for nobody"
    wanted = exact[:, :n] if bins is None else exact[:, :, :n]
    if bins is None:
        judge("actions", view, wanted, plain, exact)
    else:
        judge_scalars("scalars", bins, view, wanted, plain, exact)
    assert_written(buffer, view)


CASES: list[dict[str, Any]] = [
    dict(bins=101),
    dict(bins=0, groups=3, e=1, n=37, d=24),
    dict(bins=1, e=7, n=5, d=64, act="simnorm"),
    dict(bins=101, slabs="members", d=256, e=1, n=70),
    dict(bins=255),  # wider than a program has room for
    dict(bins=101, apart=True),
    dict(bins=101, tile=Tile(32, 64, 16), d=200, e=1, n=37),  # four programs a row
    dict(bins=5, tile=Tile(16, 32, 16), d=160, e=3, n=11),  # five, so that some finish two shares
    dict(bins=101, tile=Tile(16, 32, 16), d=232, groups=1, slabs="members"),  # eight
    dict(bins=101, tile=Tile(16, 32, 16), d=264, groups=1),  # nine are too many
    dict(bins=None, groups=1, a=6),
    dict(bins=None, groups=1, a=38, e=7, n=5, masked=True),
    dict(bins=None, groups=1, a=1, e=1, n=1),
    dict(bins=None, groups=1, a=61, d=72, masked=True, tile=Tile(32, 32, 16)),  # three programs a row
    dict(bins=None, groups=1, a=65),
    dict(bins=None, groups=1, a=3, tile=Tile(16, 32, 16), d=250, e=2, n=9),
]


@pytest.mark.parametrize("precision", ["bfloat16", "tf32", "float32"])
@pytest.mark.parametrize("options", CASES, ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()))
def test_a_layer_that_ends_a_head(precision: str, options: dict[str, Any]) -> None:
    if precision == "tf32" and native():
        pytest.skip("a CPU has no tf32")
    if native() and options.get("tile"):
        pytest.skip("tiles are for compilers")
    check_end(precision, **options)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("d", "act"), [(96, "mish"), (200, "simnorm"), (256, "mish")])
def test_the_programs_of_a_row_share_its_statistics(d: int, act: str, keep: bool) -> None:
    how, p = how_of("float32"), Precision("float32")
    if not how.clusters:
        pytest.skip("no clusters here")
    layer, main = random_layer(p, 2, d, 40, act=act), random_rows(p, 2, 3, 11, 40)
    exact = Rows(torch.empty(2, 3, 11, d, dtype=torch.float64, device=DEVICE))
    exact = grouped_layer_reference(double(main), None, double(layer), exact, how=how, finish=True)
    out = rows_of(2, 3, 11, d, p.dtype, keep)
    tile = Tile(16, 32, 16)
    got = settled(
        lambda: grouped_layer(main, None, layer, out, how=how, finish=True, tile=tile).ready(), cdiv(d, tile.BN)
    )
    torch.testing.assert_close(got.x.double(), exact.x, rtol=1e-5, atol=1e-5)


def test_where_the_results_of_two_groups_go_is_their_own() -> None:
    layer: Layer = random_layer(Precision("bfloat16"), 2, 64, 40)
    last = random_layer(Precision("bfloat16"), 2, 7, 64, act="")
    main, how = random_rows(Precision("bfloat16"), 2, 1, 5, 40), how_of("bfloat16")
    found = []
    for groups in (Slabs(0, 1), Slabs(1, -1)):
        parts = torch.empty(room_for_parts(5, 2, 7, how.precision), device=DEVICE)
        out = torch.empty(2, 1, 5, device=DEVICE)
        end = ScalarEnd(last, parts, out, Code(7, -10.0, 10.0), groups)
        x = Rows(main.x.flip(0)) if groups.base else Rows(main.x)
        rows = Rows.empty(2, 1, 5, 64, torch.bfloat16, DEVICE)
        grouped_layer(x, None, layer, rows, how=how, slabs=groups, finish=not native(), end=end)
        found.append(out)
    assert torch.equal(found[0], found[1].flip(0))


@pytest.mark.skipif(native(), reason="a head's last layer has a launch of its own here")
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (dict(out=torch.empty(2, 1, 4, device=DEVICE)), "results"),
        (dict(layer=random_layer(Precision("bfloat16"), 2, 6, 64, act="")), "a layer"),
        (dict(layer=random_layer(Precision("bfloat16"), 2, 7, 72, act="")), "a layer"),
        (dict(parts=torch.empty(2 * 5 * 7 - 1, device=DEVICE)), "room for 69 parts"),
    ],
)
def test_an_end_of_other_rows_is_refused(changes: dict[str, Any], what: str) -> None:
    p = Precision("bfloat16")
    layer, main = random_layer(p, 2, 64, 40), random_rows(p, 2, 1, 5, 40)
    given: dict[str, Any] = dict(layer=random_layer(p, 2, 7, 64, act=""))
    given |= dict(parts=torch.empty(2 * 5 * 7, device=DEVICE), out=torch.empty(2, 1, 5, device=DEVICE))
    rows = Rows.empty(2, 1, 5, 64, torch.bfloat16, DEVICE)
    code, one = Code(7, -1.0, 1.0), Tile(16, 64, 32)

    def end(**given: Any) -> None:
        last = ScalarEnd(**given, code=code)
        grouped_layer(main, None, layer, rows, how=how_of("bfloat16"), finish=True, end=last, tile=one)

    end(**given)
    with pytest.raises(ValueError, match=rf"^end: got {what}.*allowed: "):
        end(**given | changes)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "tf32"])
def test_an_activation_as_it_is_beside_what_products_take(precision: str) -> None:
    if precision == "tf32" and native():
        pytest.skip("a CPU has no tf32")
    p = Precision(precision)
    x, layer = random_rows(p, 2, 3, 7, 40), random_layer(p, 2, 72, 40, act="simnorm")
    rows = Rows.empty(2, 3, 7, 72, p.dtype, DEVICE)
    before = grouped_layer(x, None, layer, rows, how=How(p))

    def from_rows(out: Tensor, exact: Tensor) -> Rows:
        return activate_rows(before, out, how=How(p), exact=exact)

    def from_layer(out: Tensor, exact: Tensor) -> Rows:
        given: Any = dict(how=How(p), finish=True, exact=exact)
        return grouped_layer(x, None, layer, Rows(rows.x, rows.stats, active=out), **given).ready()

    for write in (from_rows, from_layer):
        buffer, view = poisoned(2, 3, 7, 72, dtype=p.dtype)
        beside_buffer, beside = poisoned(2, 3, 7, 72)
        got = write(view, beside)
        assert got.x is view
        assert got.operand
        assert torch.equal(view, p.operand(beside).to(p.dtype)), "not what products take of it"
        alone = torch.full((2, 3, 7, 72), torch.nan, device=DEVICE)
        write(alone, alone)
        assert torch.equal(alone, beside)
        assert_written(buffer, view)
        assert_written(beside_buffer, beside)
    bad = torch.empty(2, 3, 7, 72, dtype=torch.float64, device=DEVICE)
    for write in (from_rows, from_layer):
        with pytest.raises(ValueError, match=r"^exact: got .*float64, allowed: "):
            write(torch.empty_like(rows.x), bad)
