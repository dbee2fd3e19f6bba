"""What passes between fused layers: packed weights, and rows whose activation may still be due.

`source`, `packed` and `keeping` say how a kernel takes them: as a NamedTuple of pointers and strides;
what is constant about rows, and so compiled in, is a `Due`. In these tuples plain entries come before tuples: behind
one, Triton 3.6 forgets in loops which entries of that are constants.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device.launch import cdiv, pow2
from ..device.pointers import Slab, Strided, strided
from ..device.statistics import LAYER_NORM_EPS
from .activations import mish, simnorm

# What a reader does to the rows: nothing, or LayerNorm and then Mish or SimNorm.
PLAIN, MISH, SIMNORM = 0, 1, 2

_COLUMNS = 16  # widths that are padded are multiples of this: rows that are loaded many entries at a time

# Narrowest column tile, which sets the room for statistics.
LEAST_COLUMNS = 32


def padded(width: int) -> int:
    """Return how many columns rows of any width take, with zeros behind."""
    return cdiv(width, _COLUMNS) * _COLUMNS


@dataclass(frozen=True)
class Slabs:
    """Tells which slab of a packed layer each group g uses: base + members[g], or base + step g."""

    base: int = 0
    step: int = 1
    members: Tensor | None = None  # (G,) int64 on the device: critics drawn there

    def stride(self, shared: bool = False) -> int:
        """Return the step from one group's slab, or entry of `members`, to the next; 0 where one serves all."""
        if shared:
            return 0
        return self.step if self.members is None else self.members.stride(0)

    def of(self, groups: int) -> list[int]:
        """Return the slab of each group; reads `members` back, so for the plain-torch references only."""
        if self.members is not None:
            return [self.base + int(m) for m in self.members[:groups]]
        return [self.base + self.step * g for g in range(groups)]


EACH = Slabs()


@dataclass(frozen=True)
class Dropout:
    """Tells which entries of a pre-activation stay, in groups from `first` on; those are multiplied by `scale`."""

    keep: Tensor  # (G - first, E, n, D) uint8, 0 or 1
    scale: float  # 1 / (1 - p)
    first: int = 0

    def multiplier(self, groups: int, dtype: torch.dtype) -> Tensor:
        """Return the factors of all groups in plain torch: (G, E, n, D)."""
        out = torch.ones(groups, *self.keep.shape[1:], dtype=dtype, device=self.keep.device)
        out[self.first :] = self.keep[: groups - self.first].to(dtype) * self.scale
        return out


@dataclass(frozen=True)
class Layer:
    """S layers of equal shape, packed: contiguous weights of the main and of a narrow side input.

    The side input is the action, or the task embedding of an encoder. A layer without LayerNorm
    (the last one of a head) has no `ln_weight`.
    """

    weight: Tensor  # (S, D, K) as the precision's `operand`
    bias: Tensor  # (S, D) float32
    ln_weight: Tensor | None = None  # (S, D) float32
    ln_bias: Tensor | None = None  # (S, D) float32
    side: Tensor | None = None  # (S, D, A) as the precision's `operand`
    simnorm_dim: int = 0  # 0: Mish

    @property
    def activation(self) -> int:
        """What is due after this layer: `PLAIN`, `MISH` or `SIMNORM`."""
        if self.ln_weight is None:
            return PLAIN
        return SIMNORM if self.simnorm_dim else MISH

    def tensors(self) -> list[Tensor]:
        """Return all tensors it holds."""
        return [x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)]

    @property
    def width(self) -> int:
        """The number of outputs, D."""
        return self.weight.shape[1]


@dataclass(frozen=True)
class Rows:
    """Rows of E environments in G groups, and what is due before they are read.

    `x` is contiguous in its last dim; other strides are free, so samples, steps and groups can
    be slices of one buffer. Where `layer` is given, `x` is its pre-activation and `stats` has
    mean and squared deviations of each row's column tiles of width `tile`.
    """

    x: Tensor  # (G, E, n, D)
    stats: Tensor | None = None  # (G, E, n, T, 2) float32
    layer: Layer | None = None
    slabs: Slabs = EACH
    tile: int = 0
    dropout: Dropout | None = None  # that was applied to x
    active: Tensor | None = None  # (G, E, n, D): the activation, where it was computed for all readers
    operand: bool = False  # whether x is as products take it, and nothing due

    def __getitem__(self, key: tuple[slice, slice]) -> Rows:
        """Return some groups and some rows of each environment."""
        groups, rows = key
        if self.operand:
            return Rows(self.x[groups, :, rows], operand=True)
        stats = None if self.stats is None else self.stats[groups, :, rows]
        start, _, step = groups.indices(self.x.shape[0])
        s = self.slabs
        slabs = (
            Slabs(s.base + s.step * start, s.step * step)
            if s.members is None
            else replace(s, members=s.members[groups])
        )
        return Rows(self.x[groups, :, rows], stats, self.layer, slabs, self.tile)

    def steps(self, which: slice) -> Rows:
        """Return some environments (time steps, in an update)."""
        stats = None if self.stats is None else self.stats[:, which]
        dropout = None if self.dropout is None else replace(self.dropout, keep=self.dropout.keep[:, which])
        active = None if self.active is None else self.active[:, which]
        return replace(self, x=self.x[:, which], stats=stats, dropout=dropout, active=active)

    def expand(self, n: int) -> Rows:
        """Return the one row of each environment n times, without a copy."""
        stats = None if self.stats is None else self.stats.expand(-1, -1, n, -1, -1)
        return replace(self, x=self.x.expand(-1, -1, n, -1), stats=stats)

    def ready(self) -> Rows:
        """Return the activation as rows with nothing due, where it was computed; else these."""
        return self if self.active is None else Rows(self.active, operand=True)

    @classmethod
    def empty(
        cls, groups: int, envs: int, n: int, width: int, dtype: torch.dtype, device: torch.device, active: bool = False
    ) -> Rows:
        """Make room for pre-activations and statistics, maybe for activations."""
        tiles = cdiv(width, LEAST_COLUMNS)
        x = torch.empty(groups, envs, n, width, dtype=dtype, device=device)
        stats = torch.empty(groups, envs, n, tiles, 2, dtype=torch.float32, device=device)
        return cls(x, stats, active=torch.empty_like(x) if active else None)

    def activated(self) -> Tensor:
        """Compute act(LN(x)) in plain torch, in the type of the statistics' precision: (G, E, n, D)."""
        if self.layer is None or self.layer.ln_weight is None:
            return self.x
        return self.activation_of(self.normalised())

    def normalised(self) -> Tensor:
        """Compute LN(x) in plain torch."""
        x = self.x if self.x.dtype == torch.float64 else self.x.float()
        out = torch.empty_like(x)
        assert self.layer is not None
        for g, s in enumerate(self.slabs.of(x.shape[0])):
            assert self.layer.ln_weight is not None
            assert self.layer.ln_bias is not None
            gamma, beta = self.layer.ln_weight[s].to(x), self.layer.ln_bias[s].to(x)
            out[g] = torch.nn.functional.layer_norm(x[g], x.shape[-1:], gamma, beta, LAYER_NORM_EPS)
        return out

    def activation_of(self, x: Tensor) -> Tensor:
        """Compute the activation that is due, in plain torch."""
        assert self.layer is not None
        return simnorm(x, self.layer.simnorm_dim) if self.layer.simnorm_dim else mish(x)


class Source(NamedTuple):
    """Rows that a kernel reads, and the statistics and parameters of a LayerNorm that is due before."""

    gamma_ptr: Any
    beta_ptr: Any
    x: Strided
    stats: Strided
    slab: Slab


class Due(NamedTuple):
    """What is due on the rows of a `Source`: constants of a kernel."""

    IN_ACT: int  # PLAIN, MISH or SIMNORM
    V: int  # columns of a SimNorm group
    IN_TILE: int  # width of the column tiles that statistics are of
    IN_TILES: int  # their number, to a power of two
    IN_MEMBERS: bool  # whether slabs are drawn
    READY: bool  # whether the rows are as products take them, and nothing is due


class Finish(NamedTuple):
    """What a layer does with its own rows: constants of a kernel."""

    KEEP: bool  # whether it stores the pre-activation
    ACT: int  # the activation it stores: PLAIN for none, MISH or SIMNORM
    V: int  # columns of a SimNorm group
    CLUSTER: int  # programs that have a row between them
    TILES: int  # their number, to a power of two
    STORE: bool  # whether the activation is rounded as products take it, and stored unless it has one reader
    EXACT: bool  # whether it is stored as it is


class Weights(NamedTuple):
    """A packed layer that a kernel reads; its bias has strides over slab and environment."""

    ptr: Any
    side_ptr: Any
    bias_ptr: Any
    bias_s: Any
    bias_e: Any
    gamma_ptr: Any
    beta_ptr: Any
    slab: Slab


class Keep(NamedTuple):
    """Dropout: which entries stay (bytes, 0 or 1), their factor, and the group it begins with."""

    scale: Any
    first: Any
    rows: Strided


def source(x: Rows) -> tuple[Source, Due]:
    """Return how a kernel reads rows, and what is due on them."""
    layer = x.layer if x.layer is not None and x.layer.activation != PLAIN else None
    gamma, beta, stats = (x.x, x.x, x.x) if layer is None else (layer.ln_weight, layer.ln_bias, x.stats)
    assert stats is not None
    slab = _slab(x.slabs, x.x, shared=x.x.shape[0] == 1)
    due = Due(
        IN_ACT=PLAIN if layer is None else layer.activation,
        V=max(layer.simnorm_dim, 1) if layer is not None else 1,
        IN_TILE=max(x.tile, 1),
        IN_TILES=pow2(cdiv(x.x.shape[-1], x.tile)) if x.tile else 1,
        IN_MEMBERS=layer is not None and x.slabs.members is not None,
        READY=x.operand,
    )
    return Source(gamma, beta, strided(x.x), strided(stats), slab), due


def _slab(slabs: Slabs, unread: Tensor, shared: bool = False) -> Slab:
    """Return slabs as kernels take them; `unread` stands where there are no members."""
    members = slabs.members
    return Slab(unread if members is None else members, slabs.base, slabs.stride(shared))


def packed(layer: Layer, slabs: Slabs, bias: Tensor | None = None) -> Weights:
    """Return a layer as kernels take it; bias: (slabs, E, D) in place of its own."""
    own = layer.bias if bias is None else bias
    side = layer.weight if layer.side is None else layer.side
    e_stride = 0 if bias is None or bias.shape[1] == 1 else bias.stride(1)
    gamma, beta = (own, own) if layer.ln_weight is None else (layer.ln_weight, layer.ln_bias)
    return Weights(layer.weight, side, own, own.stride(0), e_stride, gamma, beta, _slab(slabs, layer.weight))


def keeping(dropout: Dropout | None, unread: Tensor) -> Keep:
    """Return dropout as kernels take it; `unread` stands where there is none."""
    if dropout is None:
        return Keep(1.0, 0, strided(unread))
    return Keep(float(dropout.scale), dropout.first, strided(dropout.keep))
