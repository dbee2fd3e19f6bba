"""Everything random an agent uses, drawn up front as tensors.

A plan and an update are functions of their inputs and of a `PlanNoise` or `UpdateNoise`.
That makes them comparable draw by draw with other implementations, and one place defines
which law each draw follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Config
from .model.layers import draw_shift
from .seeds import stream_seed

COUNTER = "rng.counter"
"""Name, in a kept state, of the seed and offset of a counter-based generator."""


def generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Return a generator for one named stream of a run."""
    g = torch.Generator(device)
    g.manual_seed(stream_seed(seed, name))
    return g


def set_generator(g: torch.Generator, state: Mapping[str, Tensor], name: str = "rng") -> None:
    """Set a generator to a kept state; where that is of another kind of device, the generator stays as it is."""
    kept = state.get(f"{name}.{g.device.type}")
    if kept is not None:
        g.set_state(kept.cpu())


def generator_state(g: torch.Generator, name: str = "rng") -> dict[str, Tensor]:
    """Return the state of a generator as `set_generator` takes it."""
    return {f"{name}.{g.device.type}": g.get_state()}


def _pairs(cfg: Config, count: int, g: torch.Generator, dtype: torch.dtype | None) -> Tensor:
    """Return the first two of `count` random permutations of the critics: (count, 2) int64."""
    return torch.rand(count, cfg.num_q, generator=g, device=g.device, dtype=dtype).argsort(-1)[:, :2]


def dropout_multipliers(
    size: tuple[int, ...], p: float, g: torch.Generator, dtype: torch.dtype | None = None
) -> Tensor:
    """Draw independent multipliers: 0 with probability p, else 1/(1-p).

    The gaps between zeros are drawn, which are geometric, instead of every entry: for p = 0.01
    a hundredth of the random numbers. Eight standard deviations more gaps are drawn than
    expected, so that they reach the end.
    """
    count = torch.Size(size).numel()
    expected = count * p
    draws = int(expected + 8 * expected**0.5) + 16
    u = torch.rand(draws, generator=g, device=g.device, dtype=torch.float64)
    zeros = (torch.log1p(-u) / math.log1p(-p)).floor_().add_(1).cumsum(0).sub_(1)
    out = torch.full((count + 1,), 1 / (1 - p), device=g.device, dtype=dtype)  # the last entry takes what lies beyond
    out[zeros.clamp_(max=count).long()] = 0
    return out[:count].view(size)


@dataclass(frozen=True)
class PlanNoise:
    """Draws of one plan for E environments; I iterations, N - P sampled sequences.

    Environments of one call share the pair of critics of an iteration, so that their values
    come out of one evaluation; everything else is drawn for each.
    """

    pi_eps: Tensor  # (E, H, P, A) normal, policy-prior actions
    samples: Tensor  # (I, E, H, N-P, A) normal
    value_eps: Tensor  # (I, E, N, A) normal, terminal policy action
    members: Tensor  # (I, 2) int64, critics of the terminal value
    elite: Tensor  # (E, num_elites) Exp(1), choice of the elite
    action: Tensor  # (E, A) normal, exploration
    shift: Tensor | None = None  # (E, 1, 1, 2) pixel shifts

    @classmethod
    def draw(cls, cfg: Config, num_envs: int, g: torch.Generator, dtype: torch.dtype | None = None) -> PlanNoise:
        """Return fresh draws on the generator's device, in `dtype` or torch's default."""
        i, e, h, a = cfg.effective_iterations, num_envs, cfg.horizon, cfg.need("action_dim")
        n, p = cfg.num_samples, cfg.num_pi_trajs

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=g, device=g.device, dtype=dtype)

        return cls(
            pi_eps=normal(e, h, p, a),
            samples=normal(i, e, h, n - p, a),
            value_eps=normal(i, e, n, a),
            members=_pairs(cfg, i, g, dtype),
            elite=torch.empty(e, cfg.num_elites, device=g.device, dtype=dtype).exponential_(generator=g),
            action=normal(e, a),
            shift=draw_shift((e,), g, g.device) if cfg.obs == "rgb" else None,
        )


@dataclass(frozen=True)
class UpdateNoise:
    """Draws of one update."""

    td_eps: Tensor  # (H, B, A) normal, policy at the next latents
    td_members: Tensor  # (2,) int64, target critics of the TD target
    pi_eps: Tensor  # (H+1, B, A) normal, policy loss
    pi_members: Tensor  # (2,) int64, critics of the policy loss
    value_dropout: Tensor | None = None  # (Q, H, B, D) multipliers, world loss
    pi_dropout: Tensor | None = None  # (2, H+1, B, D) multipliers, policy loss
    shift_next: Tensor | None = None  # (H, B, 1, 1, 2) pixel shifts of obs[1:]
    shift_first: Tensor | None = None  # (B, 1, 1, 2) pixel shifts of obs[0]

    @classmethod
    def draw(
        cls, cfg: Config, g: torch.Generator, dtype: torch.dtype | None = None, own: torch.Generator | None = None
    ) -> UpdateNoise:
        """Return fresh draws on the generator's device, in `dtype` or torch's default.

        own: where all but the pairs of critics come from, on a rank that shares the update; default `g`.
        """
        h, b, a, d = cfg.horizon, cfg.batch_size, cfg.need("action_dim"), cfg.mlp_dim
        pairs = _pairs(cfg, 2, g, dtype)
        g = g if own is None else own

        def multipliers(*size: int) -> Tensor | None:
            return dropout_multipliers(size, cfg.dropout, g, dtype) if cfg.dropout > 0 else None

        pixels = cfg.obs == "rgb"
        return cls(
            td_eps=torch.randn(h, b, a, generator=g, device=g.device, dtype=dtype),
            td_members=pairs[0],
            pi_eps=torch.randn(h + 1, b, a, generator=g, device=g.device, dtype=dtype),
            pi_members=pairs[1],
            value_dropout=multipliers(cfg.num_q, h, b, d),
            pi_dropout=multipliers(2, h + 1, b, d),
            shift_next=draw_shift((h, b), g, g.device) if pixels else None,
            shift_first=draw_shift((b,), g, g.device) if pixels else None,
        )
