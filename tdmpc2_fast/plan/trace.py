"""What happened inside a plan, for tests and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class PlanTrace:
    """What happened inside a plan: one entry per MPPI iteration unless said otherwise."""

    z: list[Tensor] = field(default_factory=list)  # (E, L), one entry
    pi_actions: list[Tensor] = field(default_factory=list)  # (E, H, P, A), one entry
    actions: list[Tensor] = field(default_factory=list)  # (E, H, N, A)
    values: list[Tensor] = field(default_factory=list)  # (E, N)
    elites: list[Tensor] = field(default_factory=list)  # (E, num_elites) indices
    scores: list[Tensor] = field(default_factory=list)  # (E, num_elites)
    means: list[Tensor] = field(default_factory=list)  # (E, H, A)
    stds: list[Tensor] = field(default_factory=list)  # (E, H, A)
    chosen: list[Tensor] = field(default_factory=list)  # (E, H, A), one entry
    picked: list[Tensor] = field(default_factory=list)  # (E,) index into the elites, one entry

    def record(self, **entries: Tensor) -> None:
        """Append a copy of each tensor to the list of its name."""
        for name, x in entries.items():
            getattr(self, name).append(x.clone())
