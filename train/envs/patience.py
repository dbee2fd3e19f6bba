"""How long an environment of this process may think about an answer before it counts as hung."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec, TypeVar

from .answers import EnvError

SECONDS: float | None = 60.0
"""None: without end, as in a worker process, where the trainer waits and ends it."""

P = ParamSpec("P")
T = TypeVar("T")
_waiting = False


def patiently(call: Callable[P, T], *args: P.args, **keys: P.kwargs) -> T:
    """Return what a call returns, or interrupt it when it takes too long.

    It is interrupted by the alarm of the system, which reaches Python code and waiting of any kind, not a
    library that computes without end; in the main thread, and not where a program has an alarm of its own.
    Worker processes (`env_workers`) have no such gaps: they can be killed.

    Raises:
        EnvError: it took too long.
    """
    global _waiting
    if SECONDS is None or _waiting or not _may_set_the_alarm():
        return call(*args, **keys)
    _waiting = True
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return call(*args, **keys)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        _waiting = False


def _may_set_the_alarm() -> bool:
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        return False
    now = signal.getsignal(signal.SIGALRM)
    if now is signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL)[0] == 0:
        signal.signal(signal.SIGALRM, _rung)
        return True
    return now is _rung


def _rung(number: int, frame: FrameType | None) -> None:
    if _waiting:
        raise EnvError(f"gave no answer in {SECONDS:g} s and was interrupted")
    # An alarm that somebody set from outside, who means what it does by default.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.kill(os.getpid(), number)
