"""The losses for anybody's module: fused loss kernels as differentiable torch ops.

    loss = two_hot_cross_entropy(x, head.weight, head.bias, reward, num_bins=101, vmin=-10, vmax=10)
    action, log_prob, scaled_entropy = squashed_gaussian(logits, torch.randn_like(mean), low=-10, high=2)
    loss = consistency(z, next_z)

The kernels of losses give a loss and its gradient in one pass; backward multiplies that gradient by
the one that arrives for each row. Targets, noise and masks are constants: no gradient goes there.
As `normed_linear` the ops are registered with `torch.library`, so `torch.compile` and
`torch.export` take them whole.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..backward.gradient_tile import Gradient
from ..device.launch import How, Precision, precision_here
from ..layers.two_hot import Code
from ..losses import latent_loss
from ..losses.policy_sample import Sample, policy_sample, policy_sample_gradient
from ..losses.two_hot_loss import BINARY, two_hot_loss
from . import product

# A program has all bins of its rows, and with so many no register is left.
_MOST_BINS = 256


def two_hot_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    *,
    num_bins: int,
    vmin: float,
    vmax: float,
    precision: str = "float32",
) -> Tensor:
    """Compute the cross-entropy of a last layer's logits x Wᵀ + b with two-hot targets (paper, section 3.1), by row.

    Differentiable once, in x, weight and bias; gradients have their types. Logits are never in
    memory, only their gradient is. With a leading dimension G of the parameters it is G heads.

    Args:
        x: (..., K), or (G or 1, ..., K) for G heads; 1 gives all the same. Any strides. All tensors are
            float32 or bfloat16, each as it likes.
        weight: (max(num_bins, 1), K) or (G, max(num_bins, 1), K).
        bias: (max(num_bins, 1),) or (G, max(num_bins, 1)).
        target: (...) scalars, or (G or 1, ...) for G heads; a constant.
        num_bins: 2 to 256 for two-hot targets in symlog; 1: squared error to symlog(target), 0: to target,
            -1: `BINARY`, cross-entropy of one logit with a target of 0 to 1.
        vmin, vmax: first and last bin, in symlog; targets beyond are clamped.
        precision: of the products, "float32", "tf32" (on a CPU float32) or "bfloat16"; bfloat16 keeps the
            gradient of the logits in it. All else is computed in float32.

    Returns:
        (...) or (G, ...) float32.

    Raises:
        ValueError: naming the argument, what came and what is allowed.
        RuntimeError: where a second derivative is asked for.
    """
    loss: Tensor = _two_hot(x, weight, bias, target, num_bins, float(vmin), float(vmax), precision)[0]
    return loss


def squashed_gaussian(
    logits: Tensor, eps: Tensor, mask: Tensor | None = None, *, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample actions tanh(mean + eps exp(log_std)), with log-probability and scaled entropy (paper, eq. 5).

    As in policy_head.py, all in float32. Differentiable once, in the logits, which get the gradient
    of all three; noise and mask are constants.

    Args:
        logits: (..., 2A): means, then log stds before squashing; float32 or bfloat16, any strides.
        eps: (..., A) standard normal, float32 or bfloat16.
        mask: 0/1 of any type, broadcastable to (..., A): live action dims; dead ones act 0. None: all live.
        low, high: range of the log std.

    Returns:
        Actions (..., A) in the type of the logits; log-probability and scaled entropy, (...) float32.

    Raises:
        ValueError: naming the argument, what came and what is allowed.
        RuntimeError: where a second derivative is asked for.
    """
    action, log_prob, scaled_entropy = _gaussian(logits, eps, mask, float(low), float(high))
    return action, log_prob, scaled_entropy


def consistency(z: Tensor, next_z: Tensor) -> Tensor:
    """Compute the mean squared difference of latents (paper, eq. 3), a loss a row.

    Differentiable once, in z; next_z is a constant, as if detached.

    Args:
        z, next_z: (..., L), float32 or bfloat16, any strides.

    Returns:
        (...) float32.

    Raises:
        ValueError: naming the argument, what came and what is allowed.
        RuntimeError: where a second derivative is asked for.
    """
    loss: Tensor = _consistency(z, next_z)[0]
    return loss


def _check_two_hot(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, num_bins: int, vmin: float, vmax: float, precision: str
) -> product.Sizes:
    """Return the sizes of a call, or raise a `ValueError`."""
    if not BINARY <= num_bins <= _MOST_BINS:
        raise ValueError(f"num_bins: got {num_bins}, allowed: {BINARY} to {_MOST_BINS}")
    if num_bins > 1 and not vmin < vmax:
        raise ValueError(f"vmin: got {vmin}, allowed: less than vmax, {vmax}")
    if weight.ndim > 1 and weight.shape[-2] != max(num_bins, 1):
        allowed = (*weight.shape[:-2], max(num_bins, 1), weight.shape[-1])
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, allowed: {allowed}")
    s = product.check(x, weight, dict(bias=bias), precision)
    product.check_types(dict(x=x, target=target))
    lead, inner = list(weight.shape[:-2]), s.result[weight.ndim - 2 : -1]
    if list(target.shape) not in (lead + inner, [1] * len(lead) + inner):
        sizes = ", ".join([*(f"{n} or 1" for n in lead), *map(str, inner)])
        raise ValueError(f"target: got shape {tuple(target.shape)}, allowed: ({sizes})")
    return s


def _two_hot_room(x: Tensor, s: product.Sizes, precision: str) -> tuple[Tensor, Tensor]:
    kept = x.new_empty(s.groups, 1, s.rows, s.width, dtype=Precision(precision).dtype)
    return x.new_empty(s.result[:-1], dtype=torch.float32), kept


@torch.library.custom_op("tdmpc2_fast::two_hot_cross_entropy", mutates_args=())
def _two_hot(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, num_bins: int, vmin: float, vmax: float, precision: str
) -> tuple[Tensor, Tensor]:
    """Return the loss, and each row's gradient of the logits (G, 1, rows, D)."""
    s = _check_two_hot(x, weight, bias, target, num_bins, vmin, vmax, precision)
    loss, kept = _two_hot_room(x, s, precision)
    targets = s.groups if weight.ndim == 2 else target.shape[0]
    with product.launching("x", x):
        p = precision_here(precision)
        two_hot_loss(
            product.input_rows(x, s, p),
            product.packed((weight, bias), s, p),
            target.reshape(targets, 1, s.rows).float(),
            x.new_ones(s.groups, 1, dtype=torch.float32),
            loss.view(s.groups, 1, s.rows),
            kept,
            how=How(p),
            code=Code(num_bins, vmin, vmax),
        )
    return loss, kept


@_two_hot.register_fake
def _(x, weight, bias, target, num_bins, vmin, vmax, precision):
    return _two_hot_room(x, _check_two_hot(x, weight, bias, target, num_bins, vmin, vmax, precision), precision)


@torch.library.custom_op("tdmpc2_fast::two_hot_cross_entropy_backward", mutates_args=())
def _two_hot_backward(
    d: Tensor, kept: Tensor, x: Tensor, weight: Tensor, bias: Tensor, precision: str, to_x: bool, to_parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; of no entries where they are not wanted."""
    s = product.check(x, weight, dict(bias=bias), precision)
    with product.launching("x", x):
        p = precision_here(precision)
        gradient = Gradient(kept * d.reshape(s.groups, 1, s.rows, 1))
        layer, parameters = product.packed((weight, bias), s, p), (weight, bias)
        dx, dw, db = product.gradients(gradient, layer, x, parameters, s, p, to_x, to_parameters)
    return dx, dw, db


@_two_hot_backward.register_fake
def _(d, kept, x, weight, bias, precision, to_x, to_parameters):
    return product.empty_gradients(x, (weight, bias), to_x, to_parameters)


def _keep_two_hot(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, *_, ctx.precision = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], x, weight, bias)


def _two_hot_gradients(ctx: Any, d: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    if not any(needed):
        return (None,) * 8
    found = _two_hot_backward(d, *ctx.saved_tensors, ctx.precision, needed[0], any(needed[1:]))
    return *(g if need else None for g, need in zip(found, needed, strict=True)), *[None] * 5


_two_hot.register_autograd(_two_hot_gradients, setup_context=_keep_two_hot)
_two_hot_backward.register_autograd(product.refusing("two_hot_cross_entropy"))


def _check_gaussian(logits: Tensor, eps: Tensor, mask: Tensor | None, low: float, high: float) -> tuple[int, int]:
    """Return the rows and action dims of a call, or raise a `ValueError`."""
    product.check_types(dict(logits=logits, eps=eps))
    if logits.ndim == 0 or logits.shape[-1] == 0 or logits.shape[-1] % 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, allowed: (..., 2A)")
    a = logits.shape[-1] // 2
    if eps.shape != (*logits.shape[:-1], a):
        raise ValueError(f"eps: got shape {tuple(eps.shape)}, allowed: {(*logits.shape[:-1], a)}")
    if mask is not None:
        ends = zip(reversed(mask.shape), reversed(eps.shape), strict=False)
        if mask.ndim > eps.ndim or any(m not in (1, n) for m, n in ends) or mask.device != eps.device:
            got = f"{tuple(mask.shape)} on {mask.device}"
            raise ValueError(f"mask: got {got}, allowed: what broadcasts to {tuple(eps.shape)} on {eps.device}")
    if not low <= high:
        raise ValueError(f"low: got {low}, allowed: at most high, {high}")
    return math.prod(eps.shape[:-1]), a


def _constants(eps: Tensor, mask: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
    """Return noise (1, rows, A) and mask (rows, A) as kernels read them."""
    live = None if mask is None else product.in_rows(mask.expand(eps.shape).float(), 1, rows)[0, 0]
    return product.in_rows(eps.float(), 1, rows)[0], live


@torch.library.custom_op("tdmpc2_fast::squashed_gaussian", mutates_args=())
def _gaussian(
    logits: Tensor, eps: Tensor, mask: Tensor | None, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, a = _check_gaussian(logits, eps, mask, low, high)
    action, *scalars = _gaussian_room(logits, eps)
    views = action.view(1, rows, a), *(t.view(1, rows) for t in scalars)
    with product.launching("logits", logits):
        sample = Sample(product.in_rows(logits, 1, rows), *_constants(eps, mask, rows), low, high)
        policy_sample(sample, *views)
    return action, scalars[0], scalars[1]


def _gaussian_room(logits: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_prob, entropy = (logits.new_empty(eps.shape[:-1], dtype=torch.float32) for _ in range(2))
    return logits.new_empty(eps.shape), log_prob, entropy


@_gaussian.register_fake
def _(logits, eps, mask, low, high):
    _check_gaussian(logits, eps, mask, low, high)
    return _gaussian_room(logits, eps)


@torch.library.custom_op("tdmpc2_fast::squashed_gaussian_backward", mutates_args=())
def _gaussian_backward(
    d_action: Tensor | None,
    d_log_prob: Tensor | None,
    d_entropy: Tensor | None,
    logits: Tensor,
    eps: Tensor,
    mask: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    rows, a = _check_gaussian(logits, eps, mask, low, high)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    # One row of zeros serves where nothing arrives.
    nothing = logits.new_zeros(a, dtype=torch.float32)
    to_action = nothing.expand(1, rows, a) if d_action is None else product.in_rows(d_action.float(), 1, rows)[0]
    to_log_prob, to_entropy = (nothing[:1] if d is None else d.reshape(1, rows) for d in (d_log_prob, d_entropy))
    with product.launching("logits", logits):
        policy_sample_gradient(
            Sample(product.in_rows(logits, 1, rows), *_constants(eps, mask, rows), low, high),
            to_action,
            to_log_prob.expand(1, rows),
            to_entropy.expand(1, rows),
            out.view(1, 1, rows, 2 * a),
        )
    return out


@_gaussian_backward.register_fake
def _(d_action, d_log_prob, d_entropy, logits, eps, mask, low, high):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _keep_gaussian(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.low, ctx.high = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _gaussian_gradients(ctx: Any, *arriving: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[0]
    d = _gaussian_backward(*arriving, *ctx.saved_tensors, ctx.low, ctx.high) if needed else None
    return d, None, None, None, None


_gaussian.register_autograd(_gaussian_gradients, setup_context=_keep_gaussian)
_gaussian_backward.register_autograd(product.refusing("squashed_gaussian"))


def _check_consistency(z: Tensor, next_z: Tensor) -> int:
    """Return the rows of a call, or raise a `ValueError`."""
    product.check_types(dict(z=z, next_z=next_z))
    if z.ndim == 0 or z.shape[-1] == 0:
        raise ValueError(f"z: got shape {tuple(z.shape)}, allowed: (..., L), L not 0")
    if next_z.shape != z.shape:
        raise ValueError(f"next_z: got shape {tuple(next_z.shape)}, allowed: that of z, {tuple(z.shape)}")
    return math.prod(z.shape[:-1])


def _consistency_room(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape[:-1], dtype=torch.float32), z.new_empty(z.shape, dtype=torch.float32)


@torch.library.custom_op("tdmpc2_fast::consistency", mutates_args=())
def _consistency(z: Tensor, next_z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss, and each row's gradient of z: 2 (z - next_z) / L."""
    rows, width = _check_consistency(z, next_z), z.shape[-1]
    loss, kept = _consistency_room(z)
    with product.launching("z", z):
        latent_loss.consistency(
            product.in_rows(z, 1, rows)[0],
            product.in_rows(next_z, 1, rows)[0],
            z.new_full((1,), 1 / width, dtype=torch.float32),
            loss.view(1, rows),
            kept.view(1, rows, width),
        )
    return loss, kept


@_consistency.register_fake
def _(z, next_z):
    _check_consistency(z, next_z)
    return _consistency_room(z)


# An op of its own, and with z, so that a second derivative is refused and not left out.
@torch.library.custom_op("tdmpc2_fast::consistency_backward", mutates_args=())
def _consistency_backward(d: Tensor, kept: Tensor, z: Tensor) -> Tensor:
    return (kept * d.unsqueeze(-1)).to(z.dtype)


@_consistency_backward.register_fake
def _(d, kept, z):
    return z.new_empty(z.shape)


def _keep_consistency(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], inputs[0])


def _consistency_gradients(ctx: Any, d: Tensor, *_: None) -> tuple[Tensor | None, None]:
    return _consistency_backward(d, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None, None


_consistency.register_autograd(_consistency_gradients, setup_context=_keep_consistency)
_consistency_backward.register_autograd(product.refusing("consistency"))
