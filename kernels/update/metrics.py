"""The losses of an update: what each counts in the total and in the metrics, and where its rows go.

Every kernel writes the losses of its rows into one buffer, a time step a row; one launch makes the
metrics of them (summary.py).
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..device.launch import cdiv
from .buffers import UpdateSizes
from .summary import Kept, summarise

_ALIGNED = 32  # floats: where metrics begin behind the means


class Loss(NamedTuple):
    """A part of the world model's loss, of `groups` times H rows; its name is that of its metric."""

    name: str
    coef: float  # how much the metric weighs in the total
    groups: int
    weight: Tensor  # (H,) how much the loss of one entry of a row weighs in the total, for the gradient
    share: Tensor  # (H,) how much the mean over a row weighs in the metric


def world_losses(s: UpdateSizes) -> list[Loss]:
    """Return the parts of the world model's loss, in the order of their rows (paper, eq. 3).

    Weights are of the whole batch, so that the gradients of all ranks add up to its gradient; shares are of the
    rows here. Reward and values are neighbours: their heads share a launch, and so a slice of the rows.
    """
    h, b, q = s.horizon, s.batch * s.ranks, s.num_q
    rho, one = _decay(s)[:h], torch.ones(h)
    c, r, v, t = s.consistency_coef, s.reward_coef, s.value_coef, s.termination_coef
    return [
        # An entry is the square of one of the latent.
        Loss("consistency_loss", c, 1, c * rho / (h * b * s.latent_dim), rho / h),
        Loss("reward_loss", r, 1, r * rho / (h * b), rho / h),
        Loss("value_loss", v, q, v / q * rho / (h * b), rho / (h * q)),
        Loss("termination_loss", t, int(s.episodic), t / (h * b) * one, 1 / h * one),
    ]


def _decay(s: UpdateSizes) -> Tensor:
    """Return how much each of H+1 steps weighs: (H+1,)."""
    return s.rho ** torch.arange(s.horizon + 1, dtype=torch.float32)


class UpdateLosses:
    """Losses of rows, (groups, H or H+1, B) each and one behind another, and the metrics made of them."""

    def __init__(self, s: UpdateSizes, device: torch.device) -> None:
        h, b = s.horizon, s.batch
        world, rho = world_losses(s), _decay(s)
        consistency, reward, value, termination = (x.weight.to(device) for x in world)
        self.consistency_weight, self.termination_weight = consistency, termination[None]
        self.head_weight = torch.stack([reward, *[value] * s.num_q])
        self.policy_weight = (rho / ((h + 1) * b * s.ranks)).to(device)

        counts = {x.name: x.groups * h for x in world} | dict(q=2 * (h + 1), log_prob=h + 1, entropy=h + 1)
        ends = pairwise(accumulate(counts.values(), initial=0))
        at = {name: slice(*end) for name, end in zip(counts, ends, strict=True)}
        rows = self._rows = torch.zeros(sum(counts.values()), b, device=device)
        self.consistency_loss = rows[at["consistency_loss"]]
        self.head_loss = rows[at["reward_loss"].start : at["value_loss"].stop].view(1 + s.num_q, h, b)
        self.termination_loss = rows[at["termination_loss"]].view(-1, h, b)
        # Of the policy loss: two critics, log-probability, scaled entropy.
        self.q, self.log_prob, self.entropy = (rows[at[name]] for name in ("q", "log_prob", "entropy"))
        self.q = self.q.view(2, h + 1, b)

        def sum_of(name: str, share: Tensor | float) -> Tensor:
            """Return what each row counts in a metric of some of them."""
            found = torch.zeros(len(rows))
            found[at[name]] = share
            return found

        mix = {x.name: sum_of(x.name, x.share.repeat(x.groups)) for x in world}
        mix["total_loss"] = torch.tensor([x.coef for x in world]) @ torch.stack(list(mix.values()))
        mix["pi_entropy"] = sum_of("log_prob", -1 / (h + 1))
        mix["pi_scaled_entropy"] = sum_of("entropy", 1 / (h + 1))
        # Parts of the policy loss.
        mix["_value"] = sum_of("q", rho.repeat(2) / (2 * (h + 1)))
        mix["_entropy"] = sum_of("entropy", -s.entropy_coef * rho / (h + 1))
        self._mixed, self._mix = list(mix), torch.stack(list(mix.values())).to(device)
        self._names = [*mix, "pi_loss", "pi_scale", "grad_norm", "pi_grad_norm"]
        # Ranks average means and metrics in one piece.
        first = cdiv(len(rows), _ALIGNED) * _ALIGNED
        self.told = torch.zeros(first + len(self._names), device=device)
        self._means, self._metrics = self.told[: len(rows)], self.told[first:]

    def metric(self, name: str) -> Tensor:
        """Return where one metric lies: (1,)."""
        at = self._names.index(name)
        return self._metrics[at : at + 1]

    def metrics(self) -> dict[str, Tensor]:
        """Return a copy of all metrics, without parts of others."""
        found = zip(self._names, self._metrics.clone(), strict=True)
        return {name: x for name, x in found if not name.startswith("_")}

    def summarise(self, kept: Kept, pdl: bool) -> None:
        """Make the metrics of the losses of rows and the running scale; the optimisers write the norms."""
        value, entropy = map(self._mixed.index, ("_value", "_entropy"))
        given = self._rows, self._mix, self._means, self._metrics
        summarise(*given, kept, value=value, entropy=entropy, pdl=pdl)

    def not_finite(self) -> list[str]:
        """Name the metrics whose own rows were not finite at the last `summarise`; waits for the device.

        The product of `summarise` makes all of them NaN by one.
        """
        mixed = (self._mix != 0) & ~self._means.isfinite()
        return [name for name, bad in zip(self._mixed, mixed.any(1).tolist(), strict=True) if bad]
