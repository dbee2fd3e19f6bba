"""Packed weights follow the parameters, whoever writes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_multitask
from oracle import MARKS, assert_nearest_tf32
from torch import Tensor

from tdmpc2_fast import TDMPC2, Config, WorldModel
from tdmpc2_fast.kernels.device.launch import Precision
from tdmpc2_fast.kernels.plan.buffers import POLICY, REWARD
from tdmpc2_fast.kernels.plan.copy_table import copy_reference
from tdmpc2_fast.plan.packing import PackedModel
from tdmpc2_fast.sizes import plan_sizes

pytestmark = MARKS

Liven = Callable[[TDMPC2], TDMPC2]

# Every parameter's gradient is 1, so that a step of any optimiser moves all.
OPTIMISERS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]


def pack(model: WorldModel, precision: str = "float32") -> PackedModel:
    packed = PackedModel(model, plan_sizes(model.cfg, 1), Precision(precision))
    assert packed.refresh()
    return packed


def contents(packed: PackedModel) -> list[Tensor]:
    """Copies of all that is packed. The policy has no action to read: its side weights are not."""
    found = [x for layer in packed.weights.layers() for x in layer.tensors() if x.numel()]
    unread = packed.weights.first.side
    return [x[[s for s in range(len(x)) if s != POLICY]] if x is unread else x.clone() for x in found]


def equal(a: PackedModel, b: PackedModel) -> bool:
    return all(torch.equal(x, y) for x, y in zip(contents(a), contents(b), strict=True))


@pytest.fixture(params=["single", "multitask", "episodic"])
def model(request: pytest.FixtureRequest, livened: Liven) -> WorldModel:
    configs: dict[str, Callable[[], Config]] = dict(
        single=tiny_config, multitask=tiny_multitask, episodic=lambda: tiny_config(episodic=True)
    )
    return livened(TDMPC2(configs[request.param]())).model


def check_followed(packed: PackedModel, model: WorldModel, before: list[Tensor]) -> None:
    assert packed.refresh()
    assert not packed.refresh()
    assert equal(packed, pack(model))
    assert not any(torch.equal(x, y) for x, y in zip(before, contents(packed), strict=True))


class PlainTable:
    """A copy table without a kernel."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor, bool]], precision: Precision) -> None:
        self.copy = torch.no_grad()(partial(copy_reference, pairs, precision))


@pytest.fixture
def plain_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of when is copied, not of how: the interpreter takes seconds for that."""
    monkeypatch.setattr("tdmpc2_fast.plan.packing.CopyTable", PlainTable)


@pytest.mark.usefixtures("plain_copies")
@pytest.mark.parametrize("kind", [dict(fused=True), dict(foreach=True), dict(foreach=False)], ids=str)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_step_of_any_optimiser_is_seen(optimiser: Any, kind: dict[str, bool], model: WorldModel) -> None:
    packed = pack(model)
    assert not packed.refresh()
    before = contents(packed)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimiser(model.parameters(), lr=1e-2, **kind).step()
    check_followed(packed, model, before)


def test_parameters_put_in_place_of_others_are_seen(model: WorldModel) -> None:
    packed = pack(model)
    before = contents(packed)
    state = model.state_dict()
    state |= {k: v + 1 for k, v in state.items() if k in dict(model.named_parameters())}
    model.load_state_dict(state, assign=True)
    check_followed(packed, model, before)


def test_data_put_in_place_of_others_is_seen(model: WorldModel) -> None:
    packed = pack(model)
    before = contents(packed)
    for p in model.parameters():
        p.data = p.data + 1  # advances no counter
    check_followed(packed, model, before)


def test_nothing_is_packed_where_the_model_no_longer_fits(model: WorldModel) -> None:
    packed = pack(model)
    before = contents(packed)

    def refuse() -> None:
        raise ValueError("moved")

    assert not packed.refresh(refuse)
    model.double()
    for _ in range(2):
        with pytest.raises(ValueError, match="moved"):
            packed.refresh(refuse)
    assert all(torch.equal(x, y) for x, y in zip(before, contents(packed), strict=True))
    model.float()
    assert packed.refresh()


@pytest.mark.usefixtures("plain_copies")
def test_other_contents_at_an_address_seen_before_are_seen(model: WorldModel) -> None:
    """A parameter replaced twice between two plans may come to lie where the first one lay."""
    module, (width,) = model._reward[0], model._reward[0].bias.shape  # type: ignore[index, union-attr]
    for i in range(100):
        module.bias = torch.nn.Parameter(torch.full((width,), 3.0 * i))  # type: ignore[union-attr]
        packed = pack(model)
        for k in (1, 2):
            module.bias = torch.nn.Parameter(torch.full((width,), 3.0 * i + k))  # type: ignore[union-attr]
        assert packed.refresh()
        assert (packed.weights.first.bias[REWARD] == 3 * i + 2).all()


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_addresses_stay(precision: str, model: WorldModel) -> None:
    packed = pack(model, precision)
    before = [layer.weight.data_ptr() for layer in packed.weights.layers()]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert packed.refresh()
    assert [layer.weight.data_ptr() for layer in packed.weights.layers()] == before


def test_tf32_products_are_packed_to_the_nearest(model: WorldModel) -> None:
    exact, packed = pack(model), pack(model, "tf32")
    both = zip(exact.weights.layers(), packed.weights.layers(), strict=True)
    operands = [pair for a, b in both for pair in ((a.weight, b.weight), (a.side, b.side))]
    for x, y in operands:
        if x is None or not x.numel():
            continue
        kept = [s for s in range(len(x)) if s != POLICY or x is not exact.weights.first.side]
        assert_nearest_tf32(y[kept], x[kept])


def test_whoever_writes_past_torch_says_so(model: WorldModel) -> None:
    packed = pack(model)
    for p in model.parameters():
        p.data.add_(1)
    assert not packed.refresh()
    packed.stale()
    assert packed.refresh()
    assert equal(packed, pack(model))
