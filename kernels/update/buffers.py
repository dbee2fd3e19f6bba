"""What an update is made of: its sizes, parameters in flat buffers, inputs, draws and working memory.

All parameters of an optimiser lie in one flat buffer, as do their gradients and moments, so that
norm, clipping, Adam and the targets' average are two launches. A first layer's columns are padded
with zeros, which stay zeros: its inputs are 0 there, hence its gradients, hence its steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from ..backward.gradient_tile import Gradient
from ..backward.weight_gradient import LayerGradient
from ..device.launch import Precision, cdiv
from ..layers.rows import Layer, Rows, padded
from ..layers.sizes import ModelSizes

_ALIGNED = 32  # floats: where a tensor in a flat buffer begins


@dataclass(frozen=True, kw_only=True)
class UpdateSizes(ModelSizes):
    """What an update is made of; names as in the config."""

    batch: int  # slices of this process
    dropout: float
    encoder_numel: int  # parameters of an encoder of pixels
    num_tasks: int
    rho: float
    consistency_coef: float
    reward_coef: float
    value_coef: float
    termination_coef: float
    entropy_coef: float
    lr: float
    enc_lr_scale: float
    grad_clip_norm: float
    tau: float
    ranks: int = 1  # processes that share an update, of `batch` slices each

    @property
    def input_dim(self) -> int:
        """The number of columns of [z, e, a]."""
        return self.latent_dim + self.task_dim + self.action_dim


@dataclass(frozen=True)
class FlatLayer:
    """S layers of equal shape in a flat buffer: where each tensor begins."""

    slabs: int
    d: int
    k: int
    weight: int
    bias: int
    ln_weight: int | None
    ln_bias: int | None
    simnorm_dim: int = 0

    def _view(self, flat: Tensor, start: int, *size: int) -> Tensor:
        return flat[start : start + self.slabs * prod(size)].view(self.slabs, *size)

    def layer(self, param: Tensor, operand: Tensor) -> Layer:
        """Return the layer as kernels read it: weights from `operand`, vectors from `param`."""
        gamma, beta = (None if x is None else self._view(param, x, self.d) for x in (self.ln_weight, self.ln_bias))
        weight, bias = self._view(operand, self.weight, self.d, self.k), self._view(param, self.bias, self.d)
        return Layer(weight, bias, gamma, beta, simnorm_dim=self.simnorm_dim)

    def moved(self, by: int) -> FlatLayer:
        """Return the same layers elsewhere in their buffer."""
        ln_weight, ln_bias = (None if at is None else at + by for at in (self.ln_weight, self.ln_bias))
        return replace(self, weight=self.weight + by, bias=self.bias + by, ln_weight=ln_weight, ln_bias=ln_bias)

    def gradient(self, grad: Tensor) -> LayerGradient:
        """Return where its gradients go."""
        layer = self.layer(grad, grad)
        return LayerGradient(layer.weight, layer.bias, layer.ln_weight, layer.ln_bias)


class _Allocator:
    """Deals out aligned places in a flat buffer."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, count: int) -> int:
        start = self.size
        self.size += cdiv(count, _ALIGNED) * _ALIGNED
        return start

    def layer(self, slabs: int, d: int, k: int, norm: bool = True, simnorm_dim: int = 0) -> FlatLayer:
        vectors = slabs * d
        weight, bias = self.take(vectors * k), self.take(vectors)
        gamma, beta = (self.take(vectors), self.take(vectors)) if norm else (None, None)
        return FlatLayer(slabs, d, k, weight, bias, gamma, beta, simnorm_dim)

    def mlp(self, slabs: int, k: int, d: int, out: int, simnorm_dim: int = 0) -> tuple[FlatLayer, ...]:
        first, second = self.layer(slabs, d, k), self.layer(slabs, d, d)
        return first, second, self.layer(slabs, out, d, simnorm_dim > 0, simnorm_dim)


class WorldLayout:
    """Where the world model's parameters lie: the encoder first, which learns at a rate of its own."""

    def __init__(self, s: UpdateSizes) -> None:
        flat = _Allocator()
        widths = s.encoder_widths
        self.encoder = []
        for i, (k, out) in enumerate(pairwise(widths)):
            last = i == len(widths) - 2
            k = k if i else padded(k + s.task_dim)
            self.encoder.append(flat.layer(1, out, k, simnorm_dim=s.simnorm_dim if last else 0))
        self.pixels = flat.take(s.encoder_numel)
        self.encoder_end = flat.size
        self.task = flat.take(s.num_tasks * s.task_dim)
        # Slab 0 is the reward, the others the critics. The targets' buffer has this layout, too.
        self.heads_start = flat.size
        self.heads = flat.mlp(1 + s.num_q, padded(s.input_dim), s.mlp_dim, max(s.num_bins, 1))
        self.heads_end = flat.size
        self.dynamics = flat.mlp(1, padded(s.input_dim), s.mlp_dim, s.latent_dim, s.simnorm_dim)
        self.termination = flat.mlp(1, s.latent_dim, s.mlp_dim, 1) if s.episodic else None
        self.size = flat.size


class PolicyLayout:
    """Where the policy's parameters lie."""

    def __init__(self, s: UpdateSizes) -> None:
        flat = _Allocator()
        self.policy = flat.mlp(1, s.latent_dim + s.task_dim, s.mlp_dim, 2 * s.action_dim)
        self.size = flat.size


@dataclass
class UpdateInputs:
    """Buffers an update reads; their addresses stay.

    What products take is in the precision's type. The consistency loss takes latents as they are, which in float32
    are those the products take.
    """

    obs: Tensor  # (1, H+1, B, columns): [obs, e, 0]
    x: Tensor  # (1, H+1, B, columns): [z, e, a, 0]; the actions of the batch, then of the policy
    next_x: Tensor  # (1, H, B, columns): [z of the next observation, e, a of the policy, 0]
    latent: Tensor  # (H, B, L) float32: z after each step
    next_latent: Tensor  # (H, B, L) float32: z of the next observation
    target: Tensor  # (2, H, B): rewards, TD targets
    terminated: Tensor  # (1, H, B)
    discount: Tensor  # (B,)
    mask: Tensor | None  # (B, A)
    rng: Tensor  # (2,) int64: seed, number of updates so far
    own_rng: Tensor  # (2,) int64: as `rng`, for draws that are of this rank alone; `rng` itself where no one shares
    flag: Tensor  # (1,) int64: 0, or which step was not finite

    @classmethod
    def empty(cls, s: UpdateSizes, precision: Precision, device: torch.device) -> UpdateInputs:
        """Make room for all inputs, with zeros: padding is never written again."""
        h, b, z = s.horizon, s.batch, s.latent_dim

        floats = partial(torch.zeros, device=device)
        operands = partial(floats, dtype=precision.dtype)
        x, next_x = operands(1, h + 1, b, padded(s.input_dim)), operands(1, h, b, padded(s.input_dim))
        own = precision.dtype != torch.float32
        rng = torch.zeros(2, dtype=torch.int64, device=device)
        return cls(
            obs=operands(1, h + 1, b, padded(s.obs_dim + s.task_dim) if s.obs_dim else 0),
            x=x,
            next_x=next_x,
            latent=floats(h, b, z) if own else x[0, 1:, :, :z],
            next_latent=floats(h, b, z) if own else next_x[0, ..., :z],
            target=floats(2, h, b),
            terminated=floats(1, h, b),
            discount=floats(b),
            mask=floats(b, s.action_dim) if s.task_dim else None,
            rng=rng,
            own_rng=rng if s.ranks == 1 else torch.zeros_like(rng),
            flag=torch.zeros(1, dtype=torch.int64, device=device),
        )


@dataclass
class UpdateDraws:
    """Buffers of an update's random draws."""

    td_eps: Tensor  # (H, B, A) normal
    pi_eps: Tensor  # (H+1, B, A) normal
    members: Tensor  # (2, 2) int64: two critics for the TD target, two for the policy loss
    value_keep: Tensor | None  # (Q, H, B, D) uint8
    pi_keep: Tensor | None  # (2, H+1, B, D) uint8
    shift: Tensor | None  # (H+1, B, 1, 1, 2) int64, only for pixels

    @property
    def td_members(self) -> Tensor:
        """The critics of the TD target: (2,), a view."""
        return self.members[0]

    @property
    def pi_members(self) -> Tensor:
        """The critics of the policy loss: (2,), a view."""
        return self.members[1]

    @classmethod
    def empty(cls, s: UpdateSizes, device: torch.device) -> UpdateDraws:
        """Make room for all draws."""
        h, b, a, d = s.horizon, s.batch, s.action_dim, s.mlp_dim

        def keep(*size: int) -> Tensor | None:
            return torch.ones(size, dtype=torch.uint8, device=device) if s.dropout > 0 else None

        return cls(
            td_eps=torch.zeros(h, b, a, device=device),
            pi_eps=torch.zeros(h + 1, b, a, device=device),
            members=torch.arange(2, device=device).repeat(2, 1),
            value_keep=keep(s.num_q, h, b, d),
            pi_keep=keep(2, h + 1, b, d),
            shift=None if s.obs_dim else torch.zeros(h + 1, b, 1, 1, 2, dtype=torch.int64, device=device),
        )


class UpdateState:
    """Buffers an update works in: pre-activations, their gradients, losses of rows.

    once: whether activations and gradients of LayerNorms are kept, too.
    """

    def __init__(self, s: UpdateSizes, precision: Precision, device: torch.device, once: bool) -> None:
        h, b, d, z, heads = s.horizon, s.batch, s.mlp_dim, s.latent_dim, 1 + s.num_q
        bins = max(s.num_bins, 1)

        def rows(groups: int, steps: int, width: int) -> Rows:
            """Make rows of a hidden layer, whose activation is read by several."""
            return Rows.empty(groups, steps, b, width, precision.dtype, device, active=once)

        def latent(steps: int) -> Rows:
            """Make rows of a layer that ends in a latent, which is stored."""
            return Rows.empty(1, steps, b, z, precision.dtype, device)

        def gradient(groups: int, steps: int, width: int, vectors: bool = once) -> Gradient:
            return Gradient.empty(groups, steps, b, width, precision.dtype, device, vectors)

        def gradients(groups: int, steps: int, out: int, vectors: bool = once) -> list[Gradient]:
            """Make gradients of three layers, the last one without a LayerNorm."""
            hidden = [gradient(groups, steps, d, vectors) for _ in range(2)]
            return [*hidden, Gradient.of_logits(groups, steps, b, out, precision.dtype, device)]

        floats = partial(torch.zeros, device=device)
        # Gradients of a layer's rows are named as the rows.
        self.encoded = [rows(1, h + 1, width) for width in s.encoder_widths[1:-1]]
        self.encoded += [latent(h + 1)] * (len(s.encoder_widths) > 1)
        self.d_encoded = [gradient(1, 1, width) for width in s.encoder_widths[1:]]
        self.dynamics = [rows(1, h, d), rows(1, h, d), latent(h)]
        self.d_dynamics = [gradient(1, h, width) for width in (d, d, z)]
        self.heads = [rows(heads, h, d) for _ in range(2)]
        self.d_heads = gradients(heads, h, bins)
        self.termination = [rows(1, h, d) for _ in range(2)] if s.episodic else []
        self.d_termination = gradients(1, h, 1) if s.episodic else []
        # One step more in the policy loss; the TD target, which comes before, uses the first of them.
        logits = Rows.empty(1, h + 1, b, 2 * s.action_dim, torch.float32, device)
        self.policy = [rows(1, h + 1, d), rows(1, h + 1, d), logits]
        self.d_policy = gradients(1, h + 1, 2 * s.action_dim)
        self.critics = [rows(2, h + 1, d) for _ in range(2)]
        self.d_critics = gradients(2, h + 1, bins, vectors=False)
        self.target_q = floats(2, h, b)
        self.d_x = floats(1, h + 1, b, z + s.task_dim)  # of [z, e]
        self.d_obs = floats(1, 1, b, s.task_dim)  # of e in the encoder's input
        self.d_action = floats(1, h + 1, b, s.task_dim + s.action_dim)  # of [e, a], from the critics
        self.d_policy_task = floats(1, h + 1, b, s.task_dim)
        self.scale, self.new_scale = torch.ones(1, device=device), torch.ones(1, device=device)
