"""Modules that hold the parameters under their official names and call the ops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdmpc2_fast.kernels.layers.activations import simnorm
from tdmpc2_fast.kernels.layers.normed_linear import linear, normed_linear
from tdmpc2_fast.kernels.layers.sizes import SHIFT_PAD

_INIT_STD = 0.02


class NormedLinear(nn.Linear):
    """A linear layer, LayerNorm and an activation: Mish, or SimNorm where `simnorm_dim` > 0."""

    def __init__(self, in_features: int, out_features: int, simnorm_dim: int = 0) -> None:
        super().__init__(in_features, out_features)
        self.ln = nn.LayerNorm(out_features)
        self.simnorm_dim = simnorm_dim

    def forward(self, *parts: Tensor) -> Tensor:
        """Apply the layer to concat(parts): (..., in_features) -> (..., out_features)."""
        return normed_linear(parts, self.weight, self.bias, self.ln.weight, self.ln.bias, simnorm_dim=self.simnorm_dim)

    def extra_repr(self) -> str:
        """Return what the printed model shows of the layer."""
        act = f"SimNorm({self.simnorm_dim})" if self.simnorm_dim else "Mish"
        return f"{super().extra_repr()}, act={act}"


class MLP(nn.Sequential):
    """Normed layers and a last layer, plain or with SimNorm, which read their input in parts."""

    def __init__(self, in_dim: int, hidden: Sequence[int], out_dim: int, simnorm_dim: int = 0) -> None:
        dims = [in_dim, *hidden]
        layers: list[nn.Module] = [NormedLinear(i, o) for i, o in itertools.pairwise(dims)]
        last = NormedLinear(dims[-1], out_dim, simnorm_dim) if simnorm_dim else nn.Linear(dims[-1], out_dim)
        super().__init__(*layers, last)

    def forward(self, *parts: Tensor) -> Tensor:
        """Apply all layers to concat(parts): (..., in_dim) -> (..., out_dim); leading dims broadcast."""
        first, *rest = self
        x: Tensor = first(*parts)
        for layer in rest:
            x = layer(x)
        return x


class _Affine(nn.Module):
    """LayerNorm parameters of all members, (Q, D) each."""

    def __init__(self, members: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, dim))
        self.bias = nn.Parameter(torch.zeros(members, dim))


class StackedLinear(nn.Module):
    """The same layer of all ensemble members: weight (Q, D, K), bias (Q, D), maybe a LayerNorm."""

    def __init__(self, members: int, in_features: int, out_features: int, norm: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(members, out_features))
        if norm:
            self.ln = _Affine(members, out_features)

    def reset(self, zero: bool) -> None:
        """Initialise as the official code: each member like a linear layer of its own."""
        for member in self.weight.data:
            if zero:
                member.zero_()
            else:
                nn.init.trunc_normal_(member, std=_INIT_STD)


class Stack(nn.ModuleList):
    """The layers of an ensemble; parameters also by their path, `stack["0", "ln", "weight"]`, as in a TensorDict."""

    def __getitem__(self, key: Any) -> Any:
        """Return a layer by its number, or what lies at a path of names."""
        if isinstance(key, (int, slice)):
            return super().__getitem__(key)
        found: Any = self
        for name in (key,) if isinstance(key, str) else key:
            found = getattr(found, name)
        return found


def stacked_mlp(members: int, in_dim: int, hidden: Sequence[int], out_dim: int) -> Stack:
    """Return the parameters of an ensemble of MLPs, stacked layer by layer."""
    dims = [in_dim, *hidden, out_dim]
    last = len(dims) - 2
    return Stack(StackedLinear(members, dims[i], dims[i + 1], norm=i < last) for i in range(last + 1))


def ensemble_members(
    layers: nn.ModuleList, members: Tensor | None, detach: bool = False
) -> Iterator[list[list[Tensor]]]:
    """Yield the parameters of single members, layer by layer: all in order, or those of `members` (M,).

    On the CPU a member is a view of the stack; on other devices, and in compiled code, an index
    tensor is resolved on the device, so that no host synchronisation is needed.
    """
    names = [n for n, _ in layers.named_parameters()]
    stacks = [p.detach() if detach else p for p in layers.parameters()]
    if members is None:
        picked = [s.unbind(0) for s in stacks]
    elif members.device.type == "cpu" and not torch.compiler.is_compiling():
        index = members.tolist()
        picked = [tuple(s[i] for i in index) for s in stacks]
    else:
        picked = [s.index_select(0, members).unbind(0) for s in stacks]
    layer_of = [int(n.split(".", 1)[0]) for n in names]
    for member in zip(*picked, strict=True):
        yield [[p for p, k in zip(member, layer_of, strict=True) if k == i] for i in range(len(layers))]


def multipliers(dropout: float, parts: Sequence[Tensor], width: int) -> Tensor | None:
    """Draw what dropout multiplies a layer of this width with, (..., width): 0 or 1/(1-p); None for no dropout."""
    if dropout <= 0:
        return None
    lead = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))
    keep = torch.empty(*lead, width, device=parts[0].device, dtype=parts[0].dtype)
    return keep.bernoulli_(1 - dropout).div_(1 - dropout)


def member_forward(params: list[list[Tensor]], parts: Sequence[Tensor], dropout: Tensor | None = None) -> Tensor:
    """Run one ensemble member on concat(parts): (..., in_dim) -> (..., out_dim)."""
    first, *rest = params[:-1]
    x = normed_linear(parts, *first, dropout=dropout)
    for layer in rest:
        x = normed_linear((x,), *layer)
    return linear((x,), *params[-1])


class Ensemble(nn.Module):
    """Q critics with stacked parameters under `params`, as in the official state dict.

    dropout: in the first layer, in training mode.
    """

    def __init__(self, members: int, in_dim: int, hidden: Sequence[int], out_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.params, self.dropout = stacked_mlp(members, in_dim, hidden, out_dim), dropout
        for i, layer in enumerate(self.params):
            assert isinstance(layer, StackedLinear)
            layer.reset(zero=i == len(self.params) - 1)

    def __len__(self) -> int:
        return len(self.params[0].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of all critics at x (..., in_dim): (Q, ..., K)."""
        p, width = self.dropout if self.training else 0.0, self.params[0].weight.shape[1]
        members = ensemble_members(self.params, None)
        return torch.stack([member_forward(m, (x,), multipliers(p, (x,), width)) for m in members])


class PixelEncoder(nn.Sequential):
    """A random shift, four convolutions and SimNorm; parameters have the official names (`2`, `4`, `6`, `8`)."""

    def __init__(self, in_channels: int, num_channels: int, simnorm_dim: int) -> None:
        c = num_channels
        super().__init__(
            nn.Identity(),
            nn.Identity(),
            nn.Conv2d(in_channels, c, 7, stride=2),
            nn.ReLU(),
            nn.Conv2d(c, c, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(c, c, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(c, c, 3, stride=1),
            nn.Flatten(),
        )
        self.simnorm_dim = simnorm_dim

    def forward(self, obs: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        """Encode obs (B, C, 64, 64) of 0..255, shifted by (B, 1, 1, 2) of 0..6 -> (B, L)."""
        x = random_shift(obs, shift).div(255.0).sub(0.5)
        return simnorm(super().forward(x), self.simnorm_dim)


def random_shift(obs: Tensor, shift: Tensor, pad: int = SHIFT_PAD) -> Tensor:
    """Shift images by whole pixels after padding by replication (DrQ-v2's augmentation).

    obs: (B, C, S, S); shift: (B, 1, 1, 2), x then y, integers 0..2*pad. Done by bilinear
    resampling as in the official code, whose rounding a plain crop does not have. The
    official agent shifts always: when acting and evaluating, too.
    """
    x = F.pad(obs.float(), (pad,) * 4, "replicate")
    size, padded = obs.shape[-1], x.shape[-1]
    eps = 1.0 / padded
    axis = torch.linspace(-1.0 + eps, 1.0 - eps, padded, device=x.device, dtype=x.dtype)[:size]
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    grid = grid + shift.to(x.dtype) * (2.0 / padded)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)


def draw_shift(count: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw random shifts for `count` images: (*count, 1, 1, 2) integers 0..6."""
    size = (*count, 1, 1, 2)
    return torch.randint(0, 2 * SHIFT_PAD + 1, size, generator=generator, device=device)


def init_weights(module: nn.Module) -> None:
    """Initialise a submodule as the official code; convolutions keep torch's default.

    `trunc_normal_` cuts at ±2 in absolute terms, so this is a plain normal in effect.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=_INIT_STD)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.uniform_(module.weight, -_INIT_STD, _INIT_STD)
