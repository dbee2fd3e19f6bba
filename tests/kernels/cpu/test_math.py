"""Exponential, logarithm and what is made of them, over all of float32, in units of the last place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tdmpc2_fast.kernels.cpu.build import why_not
from tdmpc2_fast.kernels.cpu.call import run

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

EXP, LOG, TANH, MISH = range(4)
NAN, INF = float("nan"), float("inf")


def math_kernel(x, y, n, which):  # type: ignore[no-untyped-def]
    """Names the arguments of the C++ kernel."""


def computed(which: int, x: Tensor) -> Tensor:
    y = torch.full_like(x, NAN)
    run(math_kernel, (1,), (x, y, x.numel(), which), {})
    return y


def all_floats() -> Tensor:
    """Every 1009th float there is, of either sign, without NaN."""
    bits = torch.arange(0, 0x7F800000, 1009, dtype=torch.int64)
    return torch.cat([bits, bits - 2**31]).to(torch.int32).view(torch.float32)


def ulps(got: Tensor, exact: Tensor) -> Tensor:
    """Errors in units of the last place of the exact result, which is at least the least normal number."""
    unit = torch.exp2(exact.abs().clamp(min=2.0**-126).log2().floor() - 23)
    return (got.double() - exact).abs() / unit


@pytest.mark.parametrize(
    ("which", "exact", "low", "high", "limit"),
    [
        (EXP, torch.exp, -103.0, 88.72, 1.1),
        (LOG, torch.log, 1e-45, 3.4e38, 1.5),
        (TANH, torch.tanh, -INF, INF, 2.5),
        (MISH, torch.nn.functional.mish, -80.0, 3.4e38, 4.0),
    ],
    ids=["exp", "log", "tanh", "mish"],
)
def test_error_over_the_whole_range(
    which: int, exact: Callable[[Tensor], Tensor], low: float, high: float, limit: float
) -> None:
    x = all_floats()
    x = x[(x >= low) & (x <= high)]
    assert len(x) > 1_000_000
    worst = ulps(computed(which, x), exact(x.double()))
    assert worst.max() <= limit, f"{worst.max()} at {x[worst.argmax()]}"


@pytest.mark.parametrize(
    ("which", "x", "y"),
    [
        (EXP, [NAN, INF, -INF, 0.0, -0.0, 89.0, -150.0], [NAN, INF, 0.0, 1.0, 1.0, INF, 0.0]),
        (LOG, [NAN, INF, -INF, 0.0, -0.0, -1.0, 1.0], [NAN, INF, NAN, -INF, -INF, NAN, 0.0]),
        (TANH, [NAN, INF, -INF, 0.0, 50.0, -50.0], [NAN, 1.0, -1.0, 0.0, 1.0, -1.0]),
        (MISH, [NAN, INF, 0.0, 100.0], [NAN, INF, 0.0, 100.0]),
    ],
)
def test_edges(which: int, x: list[float], y: list[float]) -> None:
    torch.testing.assert_close(computed(which, torch.tensor(x)), torch.tensor(y), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [0, 1, 7, 16, 17, 4096, 4111])
def test_any_number_of_entries(n: int) -> None:
    room = torch.full((n + 33,), NAN)
    x, y = torch.randn(n + 1)[1:], room[1 : n + 1]
    run(math_kernel, (1,), (x, y, n, EXP), {})
    torch.testing.assert_close(y, x.exp())
    assert room[n + 1 :].isnan().all()
