"""Ctrl-C, SIGTERM and a closed terminal as a wish: the run ends after the step it is in."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(Exception):
    """A run ended because it was asked to; its checkpoint is written.

    signal: by which signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Stop:
    """Whether a run is to end. A second Ctrl-C is no wish: it raises `KeyboardInterrupt` at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def asked(self) -> bool:
        """Whether the run is to end after its step."""
        return self.signal is not None

    def check(self) -> None:
        """Raise `Stopped` if so."""
        if self.signal is not None:
            raise Stopped(self.signal)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within: signals are wishes, but for those ignored so far, as background jobs of a shell ignore Ctrl-C."""
        if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
            yield
            return
        taken = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        before = {s: signal.signal(s, self._ask) for s in taken}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
