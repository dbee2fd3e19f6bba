"""The running scale in one launch: against torch.quantile in float64, and against the torch backend's numbers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from oracle import DEVICE, MARKS, reseed
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import log_launches
from tdmpc2_fast.kernels.losses import running_scale as module
from tdmpc2_fast.kernels.losses.running_scale import running_scale, running_scale_reference
from tdmpc2_fast.learn.scale import RunningScale

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    reseed(request.node.name, request.node.path.name)


def after(q: Tensor, value: float = 1.0, tau: float = 1.0) -> Tensor:
    """Return the value after one step; at tau 1 it is the range itself."""
    out = torch.full((3,), torch.nan, device=DEVICE)
    out[1] = value
    running_scale(q, out[1:2], tau=tau)
    assert out.isnan().tolist()[::2] == [True, True]
    return out[1:2]


BATCHES = [1, 2, 3, 20, 21, 41, 100, 255, 256, 257, 1000, 1024]


@pytest.mark.parametrize("b", [*BATCHES, 4096])
def test_range_is_that_of_the_torch_backend_and_of_quantile(b: int) -> None:
    q = torch.randn(b, device=DEVICE) * 5
    plain = RunningScale(1.0, DEVICE)
    plain.update(q.unsqueeze(1))
    got = after(q)
    assert torch.equal(got, plain.value)
    low, high = q.double().quantile(torch.tensor([0.05, 0.95], dtype=torch.float64, device=DEVICE))
    # Two products and a sum for each percentile, and their difference.
    error = 8 * 2**-24 * float(q.abs().max())
    torch.testing.assert_close(got[0].double(), (high - low).clamp(min=1.0), rtol=0, atol=error)


@pytest.mark.parametrize("tau", [0.0, 0.01, 0.7, 1.0])
def test_many_steps_stay_with_the_torch_backend(tau: float) -> None:
    plain, value = RunningScale(tau, DEVICE), torch.ones(1, device=DEVICE)
    reference = torch.ones(1, dtype=torch.float64, device=DEVICE)
    for step in range(12):
        q = torch.randn(64, device=DEVICE) * (step + 1) / 4  # ranges below 1, below 2 and above
        plain.update(q.unsqueeze(1))
        running_scale(q, value, tau=tau)
        running_scale_reference(q.double(), reference, tau=tau)
        torch.testing.assert_close(value, plain.value, rtol=4 * 2**-23, atol=0)
        torch.testing.assert_close(value.double(), reference, rtol=1e-6, atol=0)
    assert value.item() == 1 if tau == 0 else value.item() > 1


@pytest.mark.parametrize(
    "values",
    [
        [3.0] * 50,
        [0.0, -0.0] * 20,
        [1.0, 5.0] * 30,
        [-7.0] * 2 + [4.0] * 17 + [9.0] * 2,
        [1e30, -1e30, 0.0, 5.0, -5.0],
        [1e-40, -1e-40, 0.0],
        [torch.inf, 1.0, 2.0, 3.0],
    ],
    ids=["equal", "signed zeros", "two", "ties at the ends", "huge", "tiny", "infinity"],
)
def test_ties_and_extremes(values: list[float]) -> None:
    q = torch.tensor(values, device=DEVICE)[torch.randperm(len(values), device=DEVICE)]
    plain = RunningScale(1.0, DEVICE)
    plain.update(q.unsqueeze(1))
    torch.testing.assert_close(after(q), plain.value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("bi", "bj"), [(32, 32), (64, 16), (16, 128), (256, 4)])
def test_tiles_are_nothing_but_a_way_to_count(bi: int, bj: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randint(-40, 40, (197,), device=DEVICE).float()
    base = after(q)
    monkeypatch.setattr(module, "scale_tile", lambda b: (bi, bj, 4))
    assert torch.equal(after(q), base)


def test_order_is_nothing() -> None:
    q = torch.randn(300, device=DEVICE) * 4
    assert torch.equal(after(q), after(q[torch.randperm(300, device=DEVICE)]))


@pytest.mark.parametrize("stride", [2, 7])
def test_a_column_of_a_wider_table(stride: int) -> None:
    table = torch.full((90, stride), torch.nan, device=DEVICE)
    table[:, 1] = torch.randn(90, device=DEVICE) * 3
    assert torch.equal(after(table[:, 1]), after(table[:, 1].clone()))


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_of_groups_the_mean_counts(groups: int) -> None:
    q, value = torch.randn(groups, 7, 100, device=DEVICE) * 4, torch.tensor([2.0], device=DEVICE)
    out = torch.full((1,), torch.nan, device=DEVICE)
    running_scale(q[:, 3], value, tau=0.25, out=out)
    assert value.item() == 2
    wanted = value.double()
    running_scale_reference(q[:, 3].double(), wanted, tau=0.25)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("at", [0, 63, 64, 99])
@pytest.mark.parametrize("op", [running_scale, running_scale_reference])
def test_one_nan_gives_nan(at: int, op: Any) -> None:
    q, value = torch.randn(100, device=DEVICE), torch.ones(1, device=DEVICE)
    q[at] = torch.nan
    op(q, value, tau=0.01)
    assert value.isnan().all()


def test_one_launch_and_the_same_signature() -> None:
    with log_launches() as log:
        after(torch.randn(9, device=DEVICE))
    assert [x.programs for x in log] == [1]
    assert inspect.signature(running_scale) == inspect.signature(running_scale_reference)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q", dict(q=torch.zeros(4, 1, 1))),
        ("q", dict(q=torch.zeros(0))),
        ("q", dict(q=torch.zeros(0, 4))),
        ("q", dict(q=torch.zeros(4097))),
        ("q", dict(q=torch.zeros(4).double())),
        ("value", dict(value=torch.zeros(2))),
        ("value", dict(value=torch.zeros(1).double())),
        ("out", dict(out=torch.zeros(2))),
        ("tau", dict(tau=1.5)),
    ],
)
def test_bad_arguments_are_named(name: str, changes: dict[str, Any]) -> None:
    args: dict[str, Any] = dict(q=torch.zeros(4), value=torch.zeros(1), tau=0.1) | changes
    args = {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in args.items()}
    with pytest.raises(ValueError, match=rf"^{name}: got .*allowed: "):
        running_scale(**args)
