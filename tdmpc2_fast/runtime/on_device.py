"""What planning and learning by kernels share: the device they were built on, turns, captures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from tdmpc2_fast.kernels.cpu.tape import TapedFunction
from tdmpc2_fast.kernels.device.launch import native, natively

from ..errors import InputError
from .cuda_graph import GraphedFunction


class OnDevice:
    """The device of a planner's or an updater's kernels, on which one call follows the other.

    who: "Planner" or "Updater", for messages.
    """

    def __init__(self, device: torch.device, who: str) -> None:
        self.device, self._who, self._native = device, who, native()
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Send kernels within to the device, after those of the turn before, whatever its stream."""
        if self._done is None:
            with natively(self._native):
                yield
            return
        index = self.device.index  # a number is found in no time
        with torch.cuda.device(index):
            stream = torch.cuda.current_stream(index)
            stream.wait_event(self._done)
            try:
                yield
            finally:  # what was sent before an error is at work, too
                self._done.record(stream)

    def is_done(self, wait: bool) -> bool:
        """Tell whether the kernels of the last turn are through, or `wait` until they are."""
        if self._done is None:
            return True
        if wait:
            self._done.synchronize()
        return wait or self._done.query()

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise `InputError` where the model is no longer what the kernels were built for."""
        if device != self.device or dtype != torch.float32:
            raise InputError(
                f"model: got {dtype} on {device}, allowed: torch.float32 on {self.device}, "
                f"where this {self._who.lower()} was built; build another after moving the model"
            )

    def captured(self, run: Callable[[], None], written: Iterable[Tensor]) -> GraphedFunction | TapedFunction:
        """Return `run` as a CUDA graph, or a tape; its warm-up runs leave the tensors in `written` as they were."""
        if self._native:
            return TapedFunction(run)
        kept = [(x, x.clone()) for x in written]
        try:
            return GraphedFunction(run, self.device, self._who)
        finally:
            for x, before in kept:
                x.copy_(before)
