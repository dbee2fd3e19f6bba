"""act(LayerNorm(dropout(x Wᵀ + b))) for anybody's module: the fused layer kernels as one differentiable torch op.

    class Layer(torch.nn.Linear):  # out_features: a multiple of 8
        def __init__(self, in_features, out_features):
            super().__init__(in_features, out_features)
            self.ln = torch.nn.LayerNorm(out_features)
        def forward(self, x):
            return normed_linear(x, self.weight, self.bias, self.ln.weight, self.ln.bias, simnorm_dim=8)

Forward is two launches, the product with statistics and its activation; backward is the gradient of
the activation, then dL/dx and all parameters' gradients, each where it is wanted. Kept for it are
the pre-activation and its statistics, not the activation. The ops are registered with
`torch.library`, so `torch.compile` and `torch.export` take them as they are, whole.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backward.activation_gradient import activation_gradient
from ..backward.gradient_tile import Gradient
from ..backward.input_gradient import input_gradient
from ..backward.weight_gradient import LayerGradient, weight_gradient
from ..device.launch import How, Precision, why_not
from ..layers.grouped_layer import activate_rows, grouped_layer
from ..layers.rows import Dropout, Layer, Rows
from ..layers.tiles import layer_tile

# Columns of the narrowest tile that a SimNorm group must fit into, the one of `activation_gradient`.
_WIDEST_GROUP = 64
_TYPES = (torch.float32, torch.bfloat16)


class Sizes(NamedTuple):
    """Of a call on G layers."""

    groups: int
    shared: bool  # one input for all groups
    rows: int  # of each group
    width: int
    depth: int
    result: list[int]  # shape


def normed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    simnorm_dim: int = 0,
    keep: Tensor | None = None,
    scale: float = 1.0,
    precision: str = "float32",
) -> Tensor:
    """act(LN(scale keep (x Wᵀ + b))); Mish, or SimNorm where `simnorm_dim` > 0.

    Differentiable once, in x and in all parameters; gradients have their types. With a leading
    dimension G of the parameters it is G layers at once.

    Args:
        x: (..., K), or (G or 1, ..., K) for G layers; 1 gives all the same. Any strides.
        weight: (D, K) or (G, D, K). All tensors but `keep` are float32 or bfloat16, each as it likes.
        bias, ln_weight, ln_bias: (D,) or (G, D).
        simnorm_dim: 0, or a power of two up to 64 that divides D.
        keep: (..., D) uint8, as the result: dropout, 0 where an entry of the pre-activation goes; or None.
        scale: what `keep` leaves is multiplied by, 1 / (1 - p).
        precision: of the products, "float32", "tf32" or "bfloat16"; bfloat16 keeps the pre-activation in
            it. All else is computed in float32.

    Returns:
        (..., D) or (G, ..., D) in the type of x.

    Raises:
        ValueError: naming the argument, what came and what is allowed.
        RuntimeError: where a second derivative is asked for.
    """
    y: Tensor = _forward(x, weight, bias, ln_weight, ln_bias, keep, float(scale), simnorm_dim, precision)[0]
    return y


def check_types(tensors: dict[str, Tensor]) -> None:
    """Refuse other types than float32 and bfloat16, and other devices than the first tensor's."""
    first, like = next(iter(tensors.items()))
    for name, t in tensors.items():
        if t.dtype not in _TYPES:
            raise ValueError(f"{name}: got {t.dtype}, allowed: torch.float32, torch.bfloat16")
        if t.device != like.device:
            raise ValueError(f"{name}: got device {t.device}, allowed: that of {first}, {like.device}")


def check_device(name: str, t: Tensor) -> None:
    """Refuse a device that does not run the kernels."""
    if reason := why_not(t.device):
        raise ValueError(f"{name}: got device {t.device}, allowed: one that runs the kernels; {reason}")


def check_product(x: Tensor, weight: Tensor, vectors: dict[str, Tensor], precision: str) -> Sizes:
    """Sizes of x Wᵀ, `vectors` being as long as its rows, or a `ValueError`."""
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


def _checked(
    x: Tensor,
    weight: Tensor,
    vectors: dict[str, Tensor],
    keep: Tensor | None,
    simnorm_dim: int,
    precision: str,
) -> Sizes:
    """Sizes of a call, or a `ValueError`."""
    s, v = check_product(x, weight, vectors, precision), simnorm_dim
    if v and (not 0 < v <= _WIDEST_GROUP or v & (v - 1) or s.width % v):
        allowed = f"0 or a power of two up to {_WIDEST_GROUP} that divides {s.width}"
        raise ValueError(f"simnorm_dim: got {v}, allowed: {allowed}")
    if keep is not None and (keep.dtype != torch.uint8 or list(keep.shape) != s.result or keep.device != x.device):
        got = f"{tuple(keep.shape)} {keep.dtype} on {keep.device}"
        raise ValueError(f"keep: got {got}, allowed: {tuple(s.result)} torch.uint8 on {x.device}")
    return s


def in_rows(t: Tensor, groups: int, rows: int) -> Tensor:
    """(groups, 1, rows, columns) of a tensor, contiguous in its last dim."""
    t = t.reshape(groups, 1, rows, t.shape[-1])
    # Not `contiguous`: that leaves the stride of a last dim of 1 as it is.
    return t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


def _packed(
    weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, simnorm_dim: int, s: Sizes, p: Precision
) -> Layer:
    b, gamma, beta = (v.reshape(s.groups, s.width).float().contiguous() for v in (bias, ln_weight, ln_bias))
    operand = p.operand(weight.reshape(s.groups, s.width, s.depth)).contiguous()
    return Layer(operand, b, gamma, beta, simnorm_dim=simnorm_dim)


def input_rows(x: Tensor, s: Sizes, p: Precision) -> Rows:
    """The input as kernels read it: they round float32 to bfloat16 themselves, and cannot do the reverse."""
    return Rows(in_rows(x if p.name == "bfloat16" else x.float(), 1 if s.shared else s.groups, s.rows))


def _dropout(keep: Tensor | None, scale: float, s: Sizes) -> Dropout | None:
    return None if keep is None else Dropout(in_rows(keep, s.groups, s.rows), scale)


@torch.library.custom_op("tdmpc2_fast::normed_linear", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    keep: Tensor | None,
    scale: float,
    simnorm_dim: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result; pre-activation (G, 1, rows, D) and statistics (G, 1, rows, T, 2), which backward reads."""
    vectors = dict(bias=bias, ln_weight=ln_weight, ln_bias=ln_bias)
    s = _checked(x, weight, vectors, keep, simnorm_dim, precision)
    check_device("x", x)
    y, before, statistics = _room(x, s, precision)
    # How many tiles a row is cut into depends on the number of rows; unused slots are part of the result, too.
    statistics.zero_()
    p = Precision(precision)
    with torch.cuda.device_of(x):
        rows = grouped_layer(
            input_rows(x, s, p),
            None,
            _packed(weight, **vectors, simnorm_dim=simnorm_dim, s=s, p=p),
            Rows(before, statistics),
            how=How(p),
            dropout=_dropout(keep, scale, s),
            tile=layer_tile(s.rows, s.groups, s.width, s.depth, p.name),
        )
        activate_rows(rows, y.view(before.shape))
    return y, before, statistics


def _room(x: Tensor, s: Sizes, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    before = Rows.empty(s.groups, 1, s.rows, s.width, Precision(precision).dtype, x.device)
    assert before.stats is not None
    return x.new_empty(s.result), before.x, before.stats


@_forward.register_fake
def _(x, weight, bias, ln_weight, ln_bias, keep, scale, simnorm_dim, precision):
    vectors = dict(bias=bias, ln_weight=ln_weight, ln_bias=ln_bias)
    return _room(x, _checked(x, weight, vectors, keep, simnorm_dim, precision), precision)


@torch.library.custom_op("tdmpc2_fast::normed_linear_backward", mutates_args=())
def _backward(
    d: Tensor,
    before: Tensor,
    statistics: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    keep: Tensor | None,
    scale: float,
    simnorm_dim: int,
    precision: str,
    to_x: bool,
    to_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, ln_weight and ln_bias; of no entries where they are not wanted."""
    vectors = dict(bias=bias, ln_weight=ln_weight, ln_bias=ln_bias)
    s = _checked(x, weight, vectors, keep, simnorm_dim, precision)
    p = Precision(precision)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if to_x else x.new_empty(0)
    parameters = (weight, bias, ln_weight, ln_bias)
    found = [t.new_empty(t.shape if to_parameters else 0, dtype=torch.float32) for t in parameters]
    with torch.cuda.device_of(x):
        layer = _packed(weight, **vectors, simnorm_dim=simnorm_dim, s=s, p=p)
        tile = layer_tile(s.rows, s.groups, s.width, s.depth, p.name)
        rows = Rows(before, statistics, layer, tile=tile.BN, dropout=_dropout(keep, scale, s))
        room = Gradient.empty(s.groups, 1, s.rows, s.width, p.dtype, x.device)
        gradient = activation_gradient(in_rows(d, s.groups, s.rows), rows, room)
        if to_x:
            out = dx.view(1 if s.shared else s.groups, 1, s.rows, s.depth)
            input_gradient(gradient, layer, None, Gradient(out), how=How(p))
        if to_parameters:
            sizes = ((s.groups, s.width, s.depth), *3 * [(s.groups, s.width)])
            places = LayerGradient(*(t.view(size) for t, size in zip(found, sizes, strict=True)))
            weight_gradient(gradient, input_rows(x, s, p), layer, places, how=How(p))
    dw, db, dgamma, dbeta = (g.to(t.dtype) for g, t in zip(found, parameters, strict=True))
    return dx, dw, db, dgamma, dbeta


@_backward.register_fake
def _(d, before, statistics, x, weight, bias, ln_weight, ln_bias, keep, scale, simnorm_dim, precision, to_x, to_all):
    wanted = (to_x, to_all, to_all, to_all, to_all)
    inputs = (x, weight, bias, ln_weight, ln_bias)
    return tuple(t.new_empty(t.shape if want else 0) for t, want in zip(inputs, wanted, strict=True))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, keep, ctx.scale, ctx.simnorm_dim, ctx.precision = inputs
    _, before, statistics = output
    ctx.mark_non_differentiable(before, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(before, statistics, *tensors, keep)


def _gradients(ctx: Any, d: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:5]
    options = (ctx.scale, ctx.simnorm_dim, ctx.precision, needed[0], any(needed[1:]))
    found = _backward(d, *ctx.saved_tensors, *options)
    return *(g if need else None for g, need in zip(found, needed, strict=True)), None, None, None, None


def refusing(op: str) -> Callable[..., None]:
    """The derivative of an op's backward: a `RuntimeError`."""

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{op}: got a second derivative to compute, allowed: first derivatives")

    return refuse


_forward.register_autograd(_gradients, setup_context=_keep_for_backward)
_backward.register_autograd(refusing("normed_linear"))
