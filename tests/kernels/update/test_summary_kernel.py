"""The summary of an update against its reference in float64, and what it keeps of one that failed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from oracle import DEVICE, MARKS, poisoned, randn, reseed
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import log_launches
from tdmpc2_fast.kernels.update import summary as module
from tdmpc2_fast.kernels.update.summary import Kept, summarise, summarise_reference

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    reseed(request.node.name, request.node.path.name)


def kept(flag: int = 0, dtype: torch.dtype = torch.float32) -> Kept:
    scale, new_scale = (torch.tensor([x], dtype=dtype, device=DEVICE) for x in (2.5, 3.5))
    flag_, counter = (torch.tensor([x], device=DEVICE) for x in (flag, 41))
    return Kept(flag_, scale, new_scale, counter)


def case(r: int = 40, b: int = 256, m: int = 10) -> dict[str, Any]:
    """Return arguments, outputs NaN before: some rows of other sizes, and metrics without some of them."""
    rows = randn(r, b) * torch.logspace(-3, 3, r, device=DEVICE)[:, None]
    mix = randn(m, r) * (torch.rand(m, r, device=DEVICE) > 0.5)
    means, metrics = (torch.full((n,), torch.nan, device=DEVICE) for n in (r, m + 4))
    return dict(rows=rows, mix=mix, means=means, metrics=metrics, kept=kept(), value=m // 2, entropy=m - 1)


@pytest.mark.parametrize(("r", "b", "m"), [(40, 256, 10), (1, 1, 1), (33, 100, 3), (64, 1024, 16), (70, 77, 11)])
def test_metrics_are_those_of_torch(r: int, b: int, m: int) -> None:
    given = case(r, b, m)
    exact = {k: x.double() if isinstance(x, Tensor) else x for k, x in given.items()}
    exact["kept"] = kept(dtype=torch.float64)
    summarise_reference(**exact)
    summarise(**given)
    size = given["rows"].abs().mean(1)  # a sum of b terms errs by their size, whatever is left of it
    assert ((given["means"] - exact["means"]).abs() <= 2**-20 * size).all()
    room = 2**-20 * (given["mix"].abs() @ size) + 1e-30
    assert ((given["metrics"][:m] - exact["metrics"][:m]).abs() <= room).all()
    loss = room[given["entropy"]] + room[given["value"]]
    assert (given["metrics"][m] - exact["metrics"][m]).abs() <= 2 * loss
    assert given["metrics"][m + 1] == 3.5
    assert given["metrics"][m + 2 :].isnan().all(), "metrics of others were written"


@pytest.mark.parametrize("op", [summarise, summarise_reference])
@pytest.mark.parametrize("flag", [0, 1, -(2**40)])
def test_a_failed_update_is_neither_counted_nor_kept(op: Any, flag: int) -> None:
    given = case() | dict(kept=kept(flag))
    op(**given)
    expected = (2.5, 41) if flag else (3.5, 42)
    assert (given["kept"].scale.item(), given["kept"].counter.item()) == expected
    assert given["kept"].flag.item() == flag
    assert given["kept"].new_scale.item() == 3.5


@pytest.mark.parametrize("op", [summarise, summarise_reference])
def test_what_is_not_finite_shows_in_its_mean_and_in_all_metrics(op: Any) -> None:
    given = case()
    given["rows"][3, 77] = torch.inf
    given["mix"][:, 3] = 0
    op(**given)
    assert given["means"].isfinite().logical_not().nonzero().flatten().tolist() == [3]
    assert given["metrics"][:10].isnan().all()


def test_one_launch_and_the_same_signature() -> None:
    with log_launches() as log:
        summarise(**case())
    assert [x.programs for x in log] == [1]
    assert inspect.signature(module.summarise) == inspect.signature(module.summarise_reference)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows", lambda x: x | dict(rows=x["rows"].double())),
        ("rows", lambda x: x | dict(rows=x["rows"][:, ::2])),
        ("mix", lambda x: x | dict(mix=x["mix"][:, 1:])),
        ("means", lambda x: x | dict(means=x["means"][1:])),
        ("metrics", lambda x: x | dict(metrics=x["metrics"][:11])),
        ("metrics", lambda x: x | dict(value=10)),
        ("metrics", lambda x: x | dict(entropy=-1)),
        ("flag", lambda x: x | dict(kept=kept()._replace(flag=x["means"][:1]))),
        ("new_scale", lambda x: x | dict(kept=kept()._replace(new_scale=x["means"][:2]))),
    ],
)
def test_bad_arguments_are_named(name: str, change: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got .*allowed: "):
        summarise(**change(case()))


def test_buffers_around_are_left() -> None:
    given = case(5, 9, 2)
    buffer, view = poisoned(5)
    given["means"] = view
    summarise(**given)
    assert (~buffer.isnan()).sum() == 5
