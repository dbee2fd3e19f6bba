"""Signals that ask a command to end: Ctrl-C, SIGTERM and a closed terminal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def handled(signals: Sequence[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have `handler` called with these signals inside the `with`; only the main thread may do so."""
    before = {s: signal.signal(s, handler) for s in signals}
    try:
        yield
    finally:
        for s, earlier in before.items():
            signal.signal(s, earlier)
