"""Launches recorded once and replayed in one call: what a CUDA graph is on a GPU."""

from __future__ import annotations

from collections.abc import Callable

from ..device.launch import Launch, recorded
from .call import Tape


class TapedFunction:
    """Calls `fn` by replaying its launches, and what it does besides (`launch.host`), in their order.

    The function reads inputs and weights from tensors whose addresses stay.
    """

    why_eager: str | None = None

    def __init__(self, fn: Callable[[], None]) -> None:
        self._steps: list[Tape | Callable[[], None]] = []
        for step in recorded(fn):
            if not isinstance(step, Launch):
                self._steps.append(step)
                continue
            if not self._steps or not isinstance(self._steps[-1], Tape):
                self._steps.append(Tape())
            tape = self._steps[-1]
            assert isinstance(tape, Tape)
            tape.add(step.kernel, step.grid, step.args, step.options, step.samples)

    def __call__(self, stale: bool = True) -> None:
        """Run; stale: a weight may have been written by others since the last time."""
        for step in self._steps:
            if isinstance(step, Tape):
                step.run(stale)
            else:
                step()
