"""Ctrl-C, SIGTERM and a closed terminal as a wish: the run ends after the step it is in."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from ..signals import handled


class Stopped(Exception):
    """A run ended because it was asked to; its checkpoint is written.

    signal: by which signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Stop:
    """Knows whether a run is to end. A second Ctrl-C is no wish: it raises `KeyboardInterrupt` at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def asked(self) -> bool:
        """Tells whether the run is to end after its step."""
        return self.signal is not None

    def wanted(self) -> int:
        """Return the signal by which the run is to end, or 0."""
        return self.signal or 0

    def check(self) -> None:
        """Raise `Stopped` if the run is to end."""
        if signal := self.wanted():
            raise Stopped(signal)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Treat signals as wishes inside the `with`, but for those ignored so far."""
        if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
            yield
            return
        with handled(self._ask):
            yield

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
