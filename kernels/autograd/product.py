"""A product x Wᵀ in a differentiable op: its checks, its tensors as kernels take them, its gradients."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backward.gradient_tile import Gradient
from ..backward.input_gradient import input_gradient
from ..backward.weight_gradient import LayerGradient, weight_gradient
from ..device.launch import How, Precision, interpreting, natively, why_not
from ..layers.rows import Layer, Rows

_TYPES = (torch.float32, torch.bfloat16)


class Sizes(NamedTuple):
    """The sizes of a call on G layers."""

    groups: int
    shared: bool  # one input for all groups
    rows: int  # of each group
    width: int
    depth: int
    result: list[int]  # shape


def check_types(tensors: dict[str, Tensor]) -> None:
    """Refuse other types than float32 and bfloat16, and other devices than the first tensor's."""
    first, like = next(iter(tensors.items()))
    for name, t in tensors.items():
        if t.dtype not in _TYPES:
            raise ValueError(f"{name}: got {t.dtype}, allowed: torch.float32, torch.bfloat16")
        if t.device != like.device:
            raise ValueError(f"{name}: got device {t.device}, allowed: that of {first}, {like.device}")


@contextlib.contextmanager
def launching(name: str, t: Tensor) -> Iterator[None]:
    """Have launches within run on a tensor's device, a CPU's by its own kernels; refuse one that has none."""
    with torch.cuda.device_of(t), natively(t.device.type == "cpu" and not interpreting()):
        if reason := why_not(t.device):
            raise ValueError(f"{name}: got device {t.device}, allowed: one that runs the kernels; {reason}")
        yield


def check(x: Tensor, weight: Tensor, vectors: dict[str, Tensor], precision: str) -> Sizes:
    """Return the sizes of x Wᵀ, `vectors` being as long as its rows, or raise a `ValueError`."""
    Precision(precision)
    check_types(dict(x=x, weight=weight, **vectors))
    if weight.ndim not in (2, 3) or 0 in weight.shape:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, allowed: (D, K) or (G, D, K), none of them 0")
    *lead, d, k = weight.shape
    groups = lead[0] if lead else 1
    if x.ndim <= len(lead) or x.shape[-1] != k or (lead and x.shape[0] not in (1, groups)):
        allowed = f"({groups} or 1, ..., {k})" if lead else f"(..., {k})"
        raise ValueError(f"x: got shape {tuple(x.shape)}, allowed: {allowed}")
    for name, t in vectors.items():
        if t.shape != weight.shape[:-1]:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, allowed: {tuple(weight.shape[:-1])}")
    inner = list(x.shape[len(lead) : -1])
    return Sizes(groups, bool(lead) and x.shape[0] == 1, math.prod(inner), d, k, [*lead, *inner, d])


def in_rows(t: Tensor, groups: int, rows: int) -> Tensor:
    """View a tensor as (groups, 1, rows, columns), contiguous in its last dim; copies it where that needs a copy."""
    t = t.reshape(groups, 1, rows, t.shape[-1])
    # Not `contiguous`: that leaves the stride of a last dim of 1 as it is.
    return t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


def input_rows(x: Tensor, s: Sizes, p: Precision) -> Rows:
    """Return the input as kernels read it: they round float32 to bfloat16 themselves, and cannot do the reverse."""
    return Rows(in_rows(x if p.name == "bfloat16" else x.float(), 1 if s.shared else s.groups, s.rows))


def packed(parameters: Iterable[Tensor], s: Sizes, p: Precision, simnorm_dim: int = 0) -> Layer:
    """Pack a weight, and a bias, with the weight and bias of a LayerNorm where there is one."""
    weight, *vectors = parameters
    operand = p.operand(weight.reshape(s.groups, s.width, s.depth)).contiguous()
    bias, *norm = (v.reshape(s.groups, s.width).float().contiguous() for v in vectors)
    gamma, beta = norm or (None, None)
    return Layer(operand, bias, gamma, beta, simnorm_dim=simnorm_dim)


def gradients(
    gradient: Gradient,
    layer: Layer,
    x: Tensor,
    parameters: tuple[Tensor, ...],
    s: Sizes,
    p: Precision,
    to_x: bool,
    to_parameters: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of x and of the parameters, in their types; of no entries where they are not wanted."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if to_x else x.new_empty(0)
    found = [t.new_empty(t.shape if to_parameters else 0, dtype=torch.float32) for t in parameters]
    if to_x:
        out = dx.view(1 if s.shared else s.groups, 1, s.rows, s.depth)
        input_gradient(gradient, layer, None, Gradient(out), how=How(p))
    if to_parameters:
        weight, *vectors = found
        places = LayerGradient(weight.view(s.groups, s.width, s.depth), *(t.view(s.groups, s.width) for t in vectors))
        weight_gradient(gradient, input_rows(x, s, p), layer, places, how=How(p))
    return dx, *(g.to(t.dtype) for g, t in zip(found, parameters, strict=True))


def empty_gradients(x: Tensor, parameters: tuple[Tensor, ...], to_x: bool, to_parameters: bool) -> tuple[Tensor, ...]:
    """Return tensors like those of `gradients`, for torch to trace."""
    wanted = [to_x, *len(parameters) * [to_parameters]]
    return tuple(t.new_empty(t.shape if want else 0) for t, want in zip((x, *parameters), wanted, strict=True))


def refusing(op: str) -> Callable[..., None]:
    """Return the derivative of an op's backward: it raises a `RuntimeError`."""

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{op}: got a second derivative to compute, allowed: first derivatives")

    return refuse
