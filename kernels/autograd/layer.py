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

from typing import Any

import torch
from torch import Tensor

from ..backward.activation_gradient import activation_gradient
from ..backward.gradient_tile import Gradient
from ..device.launch import How, Precision, precision_here
from ..layers.grouped_layer import activate_rows, grouped_layer
from ..layers.rows import Dropout, Rows
from ..layers.tiles import layer_tile
from . import product

# Columns of the narrowest tile that a SimNorm group must fit into, the one of `activation_gradient`.
_WIDEST_GROUP = 64


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
    """Compute act(LN(scale keep (x Wᵀ + b))); Mish, or SimNorm where `simnorm_dim` > 0.

    Differentiable once, in x and in all parameters; gradients have their types. With a leading
    dimension G of the parameters it is G layers at once.

    Args:
        x: (..., K), or (G or 1, ..., K) for G layers; 1 gives all the same. Any strides.
        weight: (D, K) or (G, D, K). All tensors but `keep` are float32 or bfloat16, each as it likes.
        bias, ln_weight, ln_bias: (D,) or (G, D).
        simnorm_dim: 0, or a power of two up to 64 that divides D.
        keep: (..., D) uint8, as the result: dropout, 0 where an entry of the pre-activation goes; or None.
        scale: what `keep` leaves is multiplied by, 1 / (1 - p).
        precision: of the products, "float32", "tf32" (on a CPU float32) or "bfloat16"; bfloat16 keeps the
            pre-activation in it. All else is computed in float32.

    Returns:
        (..., D) or (G, ..., D) in the type of x.

    Raises:
        ValueError: naming the argument, what came and what is allowed.
        RuntimeError: where a second derivative is asked for.
    """
    y: Tensor = _forward(x, weight, bias, ln_weight, ln_bias, keep, float(scale), simnorm_dim, precision)[0]
    return y


def _checked(
    x: Tensor,
    weight: Tensor,
    vectors: dict[str, Tensor],
    keep: Tensor | None,
    simnorm_dim: int,
    precision: str,
) -> product.Sizes:
    """Return the sizes of a call, or raise a `ValueError`."""
    s, v = product.check(x, weight, vectors, precision), simnorm_dim
    if v and (not 0 < v <= _WIDEST_GROUP or v & (v - 1) or s.width % v):
        allowed = f"0 or a power of two up to {_WIDEST_GROUP} that divides {s.width}"
        raise ValueError(f"simnorm_dim: got {v}, allowed: {allowed}")
    if keep is not None and (keep.dtype != torch.uint8 or list(keep.shape) != s.result or keep.device != x.device):
        got = f"{tuple(keep.shape)} {keep.dtype} on {keep.device}"
        raise ValueError(f"keep: got {got}, allowed: {tuple(s.result)} torch.uint8 on {x.device}")
    return s


def _dropout(keep: Tensor | None, scale: float, s: product.Sizes) -> Dropout | None:
    return None if keep is None else Dropout(product.in_rows(keep, s.groups, s.rows), scale)


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
    """Return the result; pre-activation (G, 1, rows, D) and statistics (G, 1, rows, T, 2), which backward reads."""
    vectors = dict(bias=bias, ln_weight=ln_weight, ln_bias=ln_bias)
    s = _checked(x, weight, vectors, keep, simnorm_dim, precision)
    y, before, statistics = _room(x, s, precision)
    # How many tiles a row is cut into depends on the number of rows; unused slots are part of the result, too.
    statistics.zero_()
    with product.launching("x", x):
        p = precision_here(precision)
        rows = grouped_layer(
            product.input_rows(x, s, p),
            None,
            product.packed((weight, *vectors.values()), s, p, simnorm_dim),
            Rows(before, statistics),
            how=How(p),
            dropout=_dropout(keep, scale, s),
            tile=layer_tile(s.rows, s.groups, s.width, s.depth, p.name),
        )
        activated = y.view(before.shape)
        activate_rows(rows, activated, how=How(p), exact=activated)
    return y, before, statistics


def _room(x: Tensor, s: product.Sizes, precision: str) -> tuple[Tensor, Tensor, Tensor]:
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
    """Return the gradients of x, weight, bias, ln_weight and ln_bias; of no entries where they are not wanted."""
    vectors = dict(bias=bias, ln_weight=ln_weight, ln_bias=ln_bias)
    s = _checked(x, weight, vectors, keep, simnorm_dim, precision)
    parameters = (weight, *vectors.values())
    with product.launching("x", x):
        p = precision_here(precision)
        layer = product.packed(parameters, s, p, simnorm_dim)
        tile = layer_tile(s.rows, s.groups, s.width, s.depth, p.name)
        rows = Rows(before, statistics, layer, tile=tile.BN, dropout=_dropout(keep, scale, s))
        room = Gradient.empty(s.groups, 1, s.rows, s.width, p.dtype, x.device)
        gradient = activation_gradient(product.in_rows(d, s.groups, s.rows), rows, room)
        dx, dw, db, dgamma, dbeta = product.gradients(gradient, layer, x, parameters, s, p, to_x, to_parameters)
    return dx, dw, db, dgamma, dbeta


@_backward.register_fake
def _(d, before, statistics, x, weight, bias, ln_weight, ln_bias, keep, scale, simnorm_dim, precision, to_x, to_all):
    return product.empty_gradients(x, (weight, bias, ln_weight, ln_bias), to_x, to_all)


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


_forward.register_autograd(_gradients, setup_context=_keep_for_backward)
_backward.register_autograd(product.refusing("normed_linear"))
