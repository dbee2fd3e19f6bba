"""What a plan is made of: its sizes, packed weights, inputs, draws and working memory.

All of it is allocated once, so that the chain of launches in chain.py can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ..device.launch import Precision
from ..layers.ending import room_for_parts
from ..layers.rows import Layer, Rows
from ..layers.sizes import ModelSizes
from .mppi import Elites, Rule, Samples

# Slabs of the packed first and second layers; critic q is slab CRITICS + q.
DYNAMICS, POLICY, REWARD, CRITICS = 0, 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class PlanSizes(ModelSizes):
    """What a plan is made of, for `envs` environments at once."""

    envs: int
    iterations: int
    num_samples: int
    num_pi_trajs: int
    num_elites: int
    temperature: float
    min_std: float
    max_std: float

    @property
    def rule(self) -> Rule:
        """What elites make of the next distribution."""
        return Rule.of(self)


@dataclass(frozen=True)
class PlanWeights:
    """Packed weights of all networks a plan evaluates."""

    encoder: tuple[Layer, ...]  # empty for pixels
    first: Layer  # (3 + Q, D, L), side (3 + Q, D, A); the policy's side is never read
    second: Layer  # (3 + Q, D, D)
    third: Layer  # (1, L, D), dynamics, SimNorm
    scalars: Layer  # (1 + Q, max(K, 1), D): reward, critics
    policy: Layer  # (1, 2A, D), rows interleaved
    task: Layer | None = None  # side (3 + Q, D, T): share of the task embedding in the first layers
    termination: tuple[Layer, Layer, Layer] | None = None

    @classmethod
    def empty(cls, s: PlanSizes, precision: Precision, device: torch.device) -> PlanWeights:
        """Make room for all weights."""

        def layer(slabs: int, d: int, k: int, side: int = 0, norm: bool = True, simnorm_dim: int = 0) -> Layer:
            vector = partial(torch.empty, slabs, d, device=device)
            weight = torch.empty(slabs, d, k, dtype=precision.dtype, device=device)
            narrow = torch.empty(slabs, d, side, dtype=precision.dtype, device=device) if side else None
            gamma, beta = (vector(), vector()) if norm else (None, None)
            return Layer(weight, vector(), gamma, beta, narrow, simnorm_dim)

        d, z, heads = s.mlp_dim, s.latent_dim, CRITICS + s.num_q
        encoder = []
        for i, (k, out) in enumerate(pairwise(s.encoder_widths)):
            last = i == len(s.encoder_widths) - 2
            encoder.append(layer(1, out, k, 0 if i else s.task_dim, simnorm_dim=s.simnorm_dim if last else 0))
        return cls(
            encoder=tuple(encoder),
            first=layer(heads, d, z, s.action_dim),
            second=layer(heads, d, d),
            third=layer(1, z, d, simnorm_dim=s.simnorm_dim),
            scalars=layer(1 + s.num_q, max(s.num_bins, 1), d, norm=False),
            policy=layer(1, 2 * s.action_dim, d, norm=False),
            task=layer(heads, d, 0, s.task_dim, norm=False) if s.task_dim else None,
            termination=(layer(1, d, z), layer(1, d, d), layer(1, 1, d, norm=False)) if s.episodic else None,
        )

    def layers(self) -> list[Layer]:
        """List all of them."""
        found = (getattr(self, f.name) for f in fields(self))
        return [x for part in found for x in (part if isinstance(part, tuple) else (part,)) if x is not None]


@dataclass
class PlanInputs:
    """Buffers a plan reads; their addresses stay, their contents change from plan to plan."""

    obs: Tensor  # (E, obs_dim), empty for pixels
    z0: Tensor | None  # (E, L), only for pixels
    task_embedding: Tensor | None  # (E, T)
    mask: Tensor | None  # (E, A)
    discount: Tensor  # (E,)
    t0: Tensor  # (E,) bool
    eval_mode: Tensor  # (E,) bool
    prev_mean: Tensor  # (E, H, A)
    rng: Tensor  # (2,) int64: seed, number of plans so far

    @classmethod
    def empty(cls, s: PlanSizes, device: torch.device) -> PlanInputs:
        """Make room for all inputs; previous mean and random state are zero."""
        e = s.envs

        floats = partial(torch.zeros, device=device)
        return cls(
            obs=floats(e, s.obs_dim),
            z0=None if s.obs_dim else floats(e, s.latent_dim),
            task_embedding=floats(e, s.task_dim) if s.task_dim else None,
            mask=floats(e, s.action_dim) if s.task_dim else None,
            discount=floats(e),
            t0=torch.zeros(e, dtype=torch.bool, device=device),
            eval_mode=torch.zeros(e, dtype=torch.bool, device=device),
            prev_mean=floats(e, s.horizon, s.action_dim),
            rng=torch.zeros(2, dtype=torch.int64, device=device),
        )


@dataclass
class PlanDraws:
    """Buffers of a plan's random draws, filled by the kernel (noise.py) or from outside."""

    pi_eps: Tensor  # (E, H, P, A) normal
    samples: Tensor  # (I, E, H, N-P, A) normal
    value_eps: Tensor  # (I, E, N, A) normal
    slabs: Tensor  # (I, H + 2) int64: -1 for each reward, then the two critics of the iteration
    elite: Tensor  # (E, num_elites) Exp(1)
    action: Tensor  # (E, A) normal
    shift: Tensor | None  # (E, 1, 1, 2) int64, only for pixels

    @property
    def members(self) -> Tensor:
        """The critics drawn: (I, 2), a view."""
        return self.slabs[:, -2:]

    @classmethod
    def empty(cls, s: PlanSizes, device: torch.device) -> PlanDraws:
        """Make room for all draws."""
        e, i, h, a, n, p = s.envs, s.iterations, s.horizon, s.action_dim, s.num_samples, s.num_pi_trajs

        floats = partial(torch.zeros, device=device)
        slabs = torch.full((i, h + 2), -1, dtype=torch.int64, device=device)
        slabs[:, h + 1] = 1
        slabs[:, h] = 0
        return cls(
            pi_eps=floats(e, h, p, a),
            samples=floats(i, e, h, n - p, a),
            value_eps=floats(i, e, n, a),
            slabs=slabs,
            elite=torch.ones(e, s.num_elites, device=device),
            action=floats(e, a),
            shift=None if s.obs_dim else torch.zeros(e, 1, 1, 2, dtype=torch.int64, device=device),
        )


class PlanState:
    """Buffers a plan works in and writes its results to."""

    def __init__(self, s: PlanSizes, precision: Precision, device: torch.device) -> None:
        e, n, h, a, d = s.envs, s.num_samples, s.horizon, s.action_dim, s.mlp_dim

        def rows(groups: int, n: int, width: int, dtype: torch.dtype = precision.dtype) -> Rows:
            return Rows.empty(groups, e, n, width, dtype, device)

        floats = partial(torch.empty, device=device)
        self.encoded = [rows(1, 1, width) for width in s.encoder_widths[1:]]
        self.task_share = rows(CRITICS + s.num_q, 1, d, torch.float32) if s.task_dim else None
        self.shared = rows(3, 1, d, torch.float32)  # z0's share of the first layers
        # Dynamics, or the policy; then the reward of each step; then two critics.
        self.first = rows(1 + h + 2, n, d)
        self.second = rows(1 + h + 2, n, d)
        self.policy = rows(1, n, d)
        self.z = rows(h, n, s.latent_dim)  # z[t] is the latent after step t
        self.termination_first = rows(h, n, d) if s.episodic else None
        self.termination_second = rows(h, n, d) if s.episodic else None
        self.termination = floats(h, e, n) if s.episodic else None
        parts = max(
            room_for_parts(e * n, h + 2, max(s.num_bins, 1), precision), room_for_parts(e * n, 1, 2 * a, precision)
        )
        self.parts = floats(parts) if parts else None  # of the sums of last layers
        self.actions = floats(e, h, n, a)
        self.terminal_action = floats(e, n, a)
        self.scalars = floats(h + 2, e, n)
        self.values = floats(e, n)
        self.elites = torch.empty(e, s.num_elites, dtype=torch.int64, device=device)
        self.scores = floats(e, s.num_elites)
        self.mean = floats(e, h, a)
        self.std = floats(e, h, a)
        self.samples = Samples(self.actions, self.mean, self.std)
        self.ranked = Elites(self.values, self.elites, self.scores, torch.empty_like(self.elites))
        self.action = floats(e, a)
        self.chosen = floats(e, h, a)
        self.picked = torch.empty(e, dtype=torch.int64, device=device)
