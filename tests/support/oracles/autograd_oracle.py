"""What the tests of differentiable ops share: leaves, strides, and products rounded as kernels round them."""

from __future__ import annotations

from typing import Any

import torch
from oracle import placed
from torch import Tensor
from torch.autograd.function import once_differentiable

from tdmpc2_fast.kernels.device.launch import Precision


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def transposed(t: Tensor) -> Tensor:
    """The same values, neither contiguous nor with a last stride of 1, between NaN."""
    return placed(t.mT).mT if t.ndim > 1 else placed(t[:, None], inner=1)[:, 0]


def dense(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy, nothing around it.

    For plain torch: with AMX, oneDNN reads past rows of bfloat16 of an odd length, where `transposed` has NaN.
    """
    return t.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


class RoundedProduct(torch.autograd.Function):
    """x Wᵀ, forward and backward with operands as a precision has them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, p: Precision) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(x, weight)
        return p.operand(x) @ p.operand(weight).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight), p = ctx.saved_tensors, ctx.p
        d = p.operand(d)
        dw = d.flatten(0, -2).mT @ p.operand(x).flatten(0, -2) if d.ndim > 1 else torch.outer(d, p.operand(x))
        return d @ p.operand(weight), dw, None
