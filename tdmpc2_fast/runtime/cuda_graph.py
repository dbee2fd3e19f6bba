"""One function of static buffers, captured in a CUDA graph and replayed.

Contract: the function reads inputs and parameters from tensors whose addresses stay, allocates
nothing that outlives it except in the graph's own pool, and never waits for the device. Whoever
replays copies inputs in before and results out after, on the same stream.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch

_WARM_UP_RUNS = 3


class GraphedFunction:
    """Calls `fn` by replaying a CUDA graph of it, or eagerly, with a warning, where warm-up or capture fails.

    Args:
        fn: what to capture. It is run a few times first, so its buffers must be ready and its
            effects on them are the caller's to undo.
        device: a CUDA device, or any other for eager calls throughout.
        name: for the warning.

    Raises:
        RuntimeError: `fn` fails eagerly, too, or the device goes on with nothing.
    """

    def __init__(self, fn: Callable[[], None], device: torch.device, name: str) -> None:
        self._fn = fn
        self._graph: torch.cuda.CUDAGraph | None = None
        self.why_eager: str | None = None
        if device.type != "cuda":
            self.why_eager = f"CUDA graphs need a CUDA device, this one is {device.type!r}"
            return
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            # Errors of the driver, and of too little memory, are such; what Triton cannot compile is not.
            try:
                self._warm_up(side, device)
            except RuntimeError as e:
                self.why_eager = f"warm-up failed: {e}"
            if self.why_eager is not None:
                self._run_eagerly(device, name)
            else:
                try:
                    self._graph = self._capture(self._fn, side)
                except RuntimeError as e:
                    self.why_eager = f"capture failed: {e}"
                    self._end_failed_capture(side, device)
        if self.why_eager is not None:
            text = f"{name}: {self.why_eager}; running eagerly, which is slower"
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    @property
    def captured(self) -> bool:
        """True where a call is a replay."""
        return self._graph is not None

    def _warm_up(self, side: torch.cuda.Stream, device: torch.device) -> None:
        """Let the first calls compile and allocate, on a stream that a capture may use."""
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_RUNS):
                self._fn()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)

    def _run_eagerly(self, device: torch.device, name: str) -> None:
        """Run once as calls will, since the warm-up failed: they may only where this passes.

        It is no longer handled then: its frames would keep the memory that they took.
        """
        try:
            torch.cuda.synchronize(device)  # a device that failed for good says so here
            torch.cuda.empty_cache()
            self._fn()
            torch.cuda.synchronize(device)
        except RuntimeError as e:
            e.add_note(f"{name}: its kernels cannot run on {device}, captured or not; {self.why_eager}")
            raise

    @staticmethod
    def _capture(fn: Callable[[], object], side: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # The outer context puts the stream back where a failed capture does not. Thread-local:
        # what other threads do meanwhile is no business of this capture.
        with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            fn()
        return graph

    def _end_failed_capture(self, side: torch.cuda.Stream, device: torch.device) -> None:
        """Let a capture end well: until one does, torch's default generator stays in capture mode."""
        # Where this one fails, too, the warning about the first says all there is to say.
        with contextlib.suppress(RuntimeError):
            x = torch.zeros((), device=device)
            side.wait_stream(torch.cuda.current_stream(device))
            self._capture(lambda: x.add_(1), side)
        torch.cuda.synchronize(device)  # eager runs would fail as well on a device that failed for good

    def __call__(self, stale: bool = True) -> None:
        """Run on the current stream, without waiting for it; `stale`, of weights, is for tapes."""
        if self._graph is None:
            self._fn()
        else:
            self._graph.replay()
