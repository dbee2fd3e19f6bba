"""Signals that ask a command to end, Ctrl-C, SIGTERM and a closed terminal; and processes that are told of them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None], signals: Sequence[int] | None = None) -> Iterator[None]:
    """Have `handler` called with these signals inside the `with`; only the main thread may do so.

    signals: default `SIGNALS` but for those ignored so far: `nohup` ignores a closed terminal, and background jobs
        Ctrl-C. Given ones are heard in any case.
    """
    if signals is None:
        signals = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, handler) for s in signals}
    try:
        yield
    finally:
        for s, earlier in before.items():
            signal.signal(s, earlier)


class Children:
    """Processes to which the signals go that this one gets.

    signal: the last one that came; a command that begins processes begins no other then.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._begun: list[subprocess.Popen[bytes]] = []

    def heeding(self) -> contextlib.AbstractContextManager[None]:
        """Pass signals on inside the `with`; only the main thread may do so."""
        return handled(self._pass_on)

    def run(self, command: Sequence[str], **options: Any) -> int:
        """Run a command without input to its end, with options of `Popen`; returns its exit status."""
        # A process group of its own: Ctrl-C in a terminal reaches this process only, which passes it on once.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, **options)
        self._begun.append(child)
        if self.signal is not None:  # it came while the process was being made
            child.send_signal(self.signal)
        return child.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for child in self._begun:
            if child.poll() is None:
                child.send_signal(number)
