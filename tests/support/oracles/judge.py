"""The judge of kernels: against float64, errors at most twice those of plain torch at the same precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ParamSpec

import torch
from torch import Tensor

from tdmpc2_fast.kernels.layers.two_hot import symlog

P = ParamSpec("P")

DRAWS = 16
# Entries from which an RMS means something where a few badly conditioned ones have most of the error.
ENOUGH = 2048


@dataclass
class Comparison:
    """Errors of a kernel and of plain torch, of one draw of a case or of several."""

    what: str
    errors: Tensor
    allowed: Tensor
    floor: float
    with_rms: bool

    def excess(self) -> str:
        """Return what is beyond the limit, or nothing: max and RMS at most twice plain torch's, and the floor."""
        pairs = {"max": (self.errors.max(), self.allowed.max())}
        if self.with_rms:
            pairs["rms"] = (self.errors.square().mean().sqrt(), self.allowed.square().mean().sqrt())
        return "; ".join(
            f"{self.what}: {name} error {value:.3g}, allowed {2 * other + self.floor:.3g}"
            for name, (value, other) in pairs.items()
            if not value <= 2 * other + self.floor
        )


_drawn: list[Comparison] | None = None
"""What the draw of a `pooled` check compared so far."""


def pooled(check: Callable[P, None]) -> Callable[P, None]:
    """Return the check; its errors are judged over DRAWS of its case where one exceeds its limit.

    The largest of few errors is luck. A limit exceeded in one draw has to hold over all of them
    together, that one included: luck does not last, and no error is forgotten.
    """

    def draw(*args: P.args, **kwargs: P.kwargs) -> list[Comparison]:
        global _drawn
        outer, _drawn = _drawn, []
        try:
            check(*args, **kwargs)
            return _drawn
        finally:
            _drawn = outer

    @functools.wraps(check)
    def pooling(*args: P.args, **kwargs: P.kwargs) -> None:
        first = draw(*args, **kwargs)
        assert first, "the check compared nothing"
        if not any(x.excess() for x in first):
            return
        draws = [first, *(draw(*args, **kwargs) for _ in range(DRAWS - 1))]
        for found in zip(*draws, strict=True):
            errors, allowed = torch.cat([x.errors for x in found]), torch.cat([x.allowed for x in found])
            excess = replace(found[0], errors=errors, allowed=allowed, floor=max(x.floor for x in found)).excess()
            assert not excess, excess

    return pooling


def _compare(what: str, error: Tensor, allowed: Tensor, floor: float, with_rms: bool) -> None:
    """Judge errors now, or with their `pooled` check."""
    comparison = Comparison(what, error.flatten(), allowed.flatten(), floor, with_rms)
    if _drawn is not None:
        _drawn.append(comparison)
    else:
        assert not comparison.excess(), comparison.excess()


def judge(what: str, got: Tensor, exact: Tensor, plain: Tensor, plain_exact: Tensor, terms: int = 1) -> None:
    """Assert a max and RMS error of at most twice plain torch's, and half an ulp of the largest result.

    terms: how many each result is a sum of. Of a few results plain torch's may all be lucky; they
    are allowed the rounding of a random walk over the terms.
    """
    error, allowed = (got.double() - exact).abs(), (plain.double() - plain_exact).abs()
    floor = (2**-9 if got.dtype == torch.bfloat16 else 2**-24) * float(plain_exact.abs().max())
    floor *= terms**0.5 if got.numel() < 64 else 1
    _compare(what, error, allowed, floor, got.numel() >= ENOUGH)


def judge_scalars(what: str, bins: int, got: Tensor, exact: Tensor, plain: Tensor, plain_exact: Tensor) -> None:
    """Judge what a head gives, where its code is even: symexp makes the largest error one row's luck."""
    if bins > 0:
        got, exact, plain, plain_exact = (symlog(x.double()) for x in (got, exact, plain, plain_exact))
    judge(what, got, exact, plain, plain_exact)


def within_twice(got: Tensor, plain: Tensor, exact: Tensor, floor: float = 2**-24) -> None:
    """Assert a max and RMS error of at most twice plain torch's, and `floor` of the largest number."""
    error, allowed = ((x.double() - exact).abs() for x in (got, plain))
    _compare("result", error, allowed, floor * float(exact.detach().abs().max()), True)
