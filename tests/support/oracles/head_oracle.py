"""Checks of the heads' last layers, as those of layers in oracle.py."""

from __future__ import annotations

from typing import Any

import torch
from judge import judge, judge_scalars, pooled
from oracle import (
    DEVICE,
    agree,
    assert_written,
    double,
    packed,
    placed,
    plain_layer,
    poisoned,
    randn,
    random_layer,
    random_rows,
    random_slabs,
    rows_for_plain,
)
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import How, Precision
from tdmpc2_fast.kernels.layers.policy_head import policy_action
from tdmpc2_fast.kernels.layers.policy_layer import interleave, policy_layer, policy_layer_reference
from tdmpc2_fast.kernels.layers.rows import Slabs
from tdmpc2_fast.kernels.layers.scalar_head import scalar_head, scalar_head_reference
from tdmpc2_fast.kernels.layers.tiles import Tile
from tdmpc2_fast.kernels.layers.two_hot import Code, two_hot_inv


@pooled
def check_scalars(
    precision: str = "float32",
    *,
    groups: int = 2,
    e: int = 2,
    n: int = 33,
    k: int = 24,
    bins: int = 101,
    ends: tuple[float, float] = (-10.0, 10.0),
    x: str = "own",
    due: str = "mish",
    v: int = 8,
    in_tile: int = 32,
    in_slabs: str = "1",
    slabs: str = "1",
    logits: float = 1.0,
    tile: Tile | None = None,
) -> None:
    """Check `scalar_head`; logits: their size."""
    p = Precision(precision)
    rows = rows_for_plain(e, n, groups, groups * max(k, bins))
    which, count = random_slabs(slabs, groups)
    layer = random_layer(p, count, max(bins, 1), k, act="")
    layer.weight.copy_(p.operand(layer.weight * logits))
    layer.bias.mul_(logits)
    main = random_rows(p, 1 if x == "shared" else groups, e, rows, k, due, v, in_tile, in_slabs)
    args: Any = dict(how=How(p), code=Code(bins, *ends), slabs=which)
    exact = torch.empty(groups, e, rows, dtype=torch.float64, device=DEVICE)
    plain = torch.empty(groups, e, rows, device=DEVICE)
    scalar_head_reference(double(main), double(layer), exact, **args)

    def by_hand(dtype: torch.dtype) -> Tensor:
        y = plain_layer(main, None, layer, which, groups, None, dtype)
        return two_hot_inv(y, bins, *ends).squeeze(-1)

    agree(exact, by_hand(torch.float64))
    if precision == "bfloat16":
        plain = by_hand(torch.bfloat16)
    else:
        scalar_head_reference(main, layer, plain, **args)
    buffer, view = poisoned(groups, e, n)
    expanded = x == "expanded"
    scalar_head(main[:, :1].expand(n) if expanded else main[:, :n], layer, view, tile=tile, **args)
    wanted = exact[:, :, :1].expand(-1, -1, n) if expanded else exact[:, :, :n]
    judge_scalars("scalars", bins, view, wanted, plain, exact)
    assert_written(buffer, view)


def random_mask(e: int, a: int) -> Tensor:
    return packed((torch.rand(e, a, device=DEVICE) > 0.4).float())


@pooled
def check_policy(
    precision: str = "float32",
    *,
    e: int = 2,
    n: int = 33,
    k: int = 24,
    a: int = 3,
    masked: bool = False,
    x: str = "own",
    due: str = "mish",
    v: int = 8,
    in_tile: int = 32,
    in_slabs: str = "1",
    low: float = -10.0,
    high: float = 2.0,
    eps: float = 1.0,
    log_std: float = 0.0,
    logits: float = 1.0,
    tile: Tile | None = None,
) -> None:
    """Check `policy_layer`; eps, logits: their size; log_std: added to its logits."""
    p = Precision(precision)
    rows = rows_for_plain(e, n, a, max(k, a))
    layer = random_layer(p, 1, 2 * a, k, act="")
    layer.weight.copy_(p.operand(layer.weight * logits))
    layer.bias.mul_(logits)[:, 1::2] += log_std
    main = random_rows(p, 1, e, rows, k, due, v, in_tile, in_slabs)
    source = main[:, :1].expand(n) if x == "expanded" else main[:, :n]
    noise = placed(eps * randn(e, rows, a))
    mask = random_mask(e, a) if masked else None
    args: Any = dict(how=How(p), low=low, high=high)
    exact = torch.empty(e, rows, a, dtype=torch.float64, device=DEVICE)
    plain = torch.empty(e, rows, a, device=DEVICE)
    policy_layer_reference(double(main), double(layer), noise.double(), exact, mask=double(mask), **args)
    wanted = exact[:, :n].clone()
    policy_layer_reference(double(source), double(layer), noise[:, :n].double(), wanted, mask=double(mask), **args)

    order = interleave(torch.arange(2 * a, device=DEVICE)).argsort()

    def by_hand(dtype: torch.dtype) -> Tensor:
        y = plain_layer(main, None, layer, Slabs(), 1, None, dtype)[0][..., order]
        return policy_action(y, noise.to(dtype), low, high, None if mask is None else mask.to(dtype).unsqueeze(1))

    agree(exact, by_hand(torch.float64))
    if precision == "bfloat16":
        plain = by_hand(torch.bfloat16)
    else:
        policy_layer_reference(main, layer, noise, plain, mask=mask, **args)
    buffer, view = poisoned(e, n, a)
    policy_layer(source, layer, noise[:, :n], view, mask=mask, tile=tile, **args)
    judge("actions", view, wanted, plain, exact)
    assert (view.abs() <= 1).all(), "an action is beyond 1"
    if mask is not None:
        assert (view.masked_select(mask.unsqueeze(1) == 0) == 0).all(), "a dead dim acts"
    assert_written(buffer, view)
