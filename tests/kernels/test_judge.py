"""The judge of kernels: luck passes, twice the error does not."""

from __future__ import annotations

from collections.abc import Callable

import judge as judging
import pytest
import torch
from judge import DRAWS, judge, pooled, within_twice
from torch import Tensor

Distort = Callable[[int, Tensor], Tensor]


def case(distort: Distort, draws: list[int]) -> Callable[[], None]:
    """Return a check of an operation that errs like plain torch, its errors distorted, which counts its draws."""

    @pooled
    def check() -> None:
        exact = torch.randn(4096, dtype=torch.float64)
        plain, error = (1e-6 * torch.randn(4096, dtype=torch.float64) for _ in range(2))
        judge("kernel", exact + distort(len(draws), error), exact, exact + plain, exact)
        draws.append(1)

    return check


def test_one_draw_is_enough_where_it_is_within_the_limit() -> None:
    draws: list[int] = []
    case(lambda _, error: error, draws)()
    assert len(draws) == 1


@pytest.mark.parametrize("factor", [3.0, 100.0])
def test_more_than_twice_the_error_fails(factor: float) -> None:
    draws: list[int] = []
    with pytest.raises(AssertionError, match=r"kernel: max error .*, allowed .*; kernel: rms error"):
        case(lambda _, error: factor * error, draws)()
    assert len(draws) == DRAWS


def test_one_bad_draw_is_not_forgotten() -> None:
    def once(i: int, error: Tensor) -> Tensor:
        if i == 0:
            error[17] = 1e-3
        return error

    draws: list[int] = []
    with pytest.raises(AssertionError, match=r"kernel: max error 0\.001, allowed"):
        case(once, draws)()
    assert len(draws) == DRAWS


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_fails(value: float) -> None:
    with pytest.raises(AssertionError, match="kernel: max error"):
        case(lambda _, error: torch.full_like(error, value), [])()


def test_errors_that_more_draws_of_plain_torch_have_too_pass() -> None:
    exact = torch.ones(4096, dtype=torch.float64)
    draws: list[int] = []

    @pooled
    def check() -> None:
        mine, plain = exact.clone(), exact.clone()
        mine[0], plain[0] = (1 + 1e-3, 1) if not draws else (1, 1 + 1e-3)
        judge("kernel", mine, exact, plain, exact)
        draws.append(1)

    check()
    assert len(draws) == DRAWS


def test_a_judge_outside_of_a_pooled_check_decides_at_once() -> None:
    exact = torch.ones(4096, dtype=torch.float64)
    with pytest.raises(AssertionError, match="result: max error"):
        within_twice(exact + 1e-3, exact, exact)
    assert judging._drawn is None


def test_a_check_that_compares_nothing_fails() -> None:
    with pytest.raises(AssertionError, match="compared nothing"):
        pooled(lambda: None)()
