"""What the processes that share an update do together; each computes its slices of the batch.

Gradients of all ranks are added up: the world model's before its step, and the policy's before its own. That one
is taken through the critics that the first step has changed, so these two cannot be one collective. Between them
the Q values are gathered whose range is the running scale's, one a slice, and at the end means and metrics are
averaged, some hundred numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..device.draw import PAIRS, Run, draw
from ..device.launch import host
from .buffers import UpdateInputs, UpdateSizes


class Together(Protocol):
    """The ranks of an update. All of them make the same calls in the same order, or wait for each other for ever.

    On a GPU a call is queued, and can be captured in a CUDA graph.
    """

    def sum(self, x: Tensor) -> None:
        """Add up x, contiguous and of one shape on all ranks, in place; all get the same sum, bit for bit."""
        ...

    def gather(self, x: Tensor, out: Tensor) -> None:
        """Write x (B, ...) of all ranks into `out` (ranks B, ...), both contiguous, in the order of the ranks."""
        ...


class Shared:
    """An update's part that is done together; of an update of one process, nothing or the plain thing.

    Args:
        sizes: `batch` slices on each of `ranks`.
        together: the ranks; None for one process.
        device: that of the update.

    Raises:
        ValueError: ranks without others, or others without ranks.
    """

    def __init__(self, sizes: UpdateSizes, together: Together | None, device: torch.device) -> None:
        if (sizes.ranks > 1) != (together is not None):
            raise ValueError(f"together: got {together}, allowed: the ranks where sizes.ranks is above 1, else None")
        self._together, self._ranks = together, sizes.ranks
        b = 0 if together is None else sizes.batch
        self._own, self._all = torch.zeros(b, device=device), torch.zeros(b * sizes.ranks, device=device)

    def draw(self, inputs: UpdateInputs, runs: Sequence[Run], pdl: bool) -> None:
        """Draw the runs: the same critics on all ranks, and all else for the slices of each."""
        if self._together is None:
            draw(inputs.rng, runs, pdl=pdl)
            return
        draw(inputs.rng, [run for run in runs if run.law == PAIRS], pdl=pdl)
        draw(inputs.own_rng, [run for run in runs if run.law != PAIRS], pdl=pdl)

    def sum(self, grad: Tensor) -> None:
        """Add up a gradient, in place."""
        if self._together is not None:
            host(partial(self._together.sum, grad))

    def values(self, q: Tensor) -> Tensor:
        """Return Q values (2, B) of two critics, or of the slices of all ranks the means of both: (ranks B,)."""
        together = self._together
        if together is None:
            return q

        def gather() -> None:
            torch.mean(q, 0, out=self._own)
            together.gather(self._own, self._all)

        host(gather)
        return self._all

    def finish(self, told: Tensor, inputs: UpdateInputs) -> None:
        """Average what is told of the rows, and let the next draws of this rank go on where `rng` stands."""
        together = self._together
        if together is None:
            return

        def average() -> None:
            together.sum(told)
            told.div_(self._ranks)
            inputs.own_rng[1:].copy_(inputs.rng[1:])

        host(average)
