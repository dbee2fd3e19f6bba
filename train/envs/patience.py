"""How long an environment of this process may think about an answer before it counts as hung."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from .answers import EnvError

SECONDS: float | None = 60.0
"""Of a step. None: without end, as in a worker process, where the trainer waits and ends it."""
RESET_SECONDS = 300.0
"""Of a reset, which may compile, load or connect."""

P = ParamSpec("P")
T = TypeVar("T")
_TICKS = 20  # of the alarm until it interrupts: what passes while the whole process is stopped counts as one of them
_left: int | None = None  # ticks; None where nothing is waited for
_inside: FrameType | None = None  # the call that is waited for
_over = -math.inf  # when the alarm was last switched off


def patiently(seconds: float | None, call: Callable[P, T], *args: P.args, **keys: P.kwargs) -> T:
    """Return what a call returns, or interrupt it when it takes longer than so many seconds.

    It is interrupted by the alarm of the system, which reaches Python code and waiting of any kind, not a
    library that computes without end; in the main thread, not where a program has an alarm of its own, nor in a
    debugger. Worker processes (`env_workers`) have no such gaps: they can be killed.

    Raises:
        EnvError: it took too long.
    """
    global _left, _over
    if seconds is None or SECONDS is None or _left is not None or not _may_set_the_alarm():
        return call(*args, **keys)
    late = False
    try:
        _left = _TICKS
        signal.setitimer(signal.ITIMER_REAL, seconds / _TICKS, seconds / _TICKS)
        found = _called(call, args, keys)
    finally:
        late, _left, _over = _left is not None and _left <= 0, None, time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    if late:  # and the call took the interruption for one of its own errors
        raise _no_answer(seconds)
    return found


def _called(call: Callable[..., T], args: Any, keys: Any) -> T:
    global _inside
    _inside = sys._getframe()
    try:
        return call(*args, **keys)
    finally:
        _inside = None


def _no_answer(seconds: float) -> EnvError:
    return EnvError(f"gave no answer in {seconds:g} s and was interrupted")


def _may_set_the_alarm() -> bool:
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        return False
    if sys.gettrace() is not None:
        return False
    now = signal.getsignal(signal.SIGALRM)
    if now is signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL)[0] == 0:
        signal.signal(signal.SIGALRM, _rung)
        return True
    return now is _rung


def _rung(number: int, frame: FrameType | None) -> None:
    """Count a tick; where none is left, interrupt the call, at every further tick again."""
    global _left
    if _left is not None:
        _left -= 1
        if _left <= 0 and _inside is not None and _runs_in(frame, _inside):
            raise _no_answer(signal.getitimer(signal.ITIMER_REAL)[1] * _TICKS)
    elif time.monotonic() - _over > 1.0:  # else the last tick of ours, which was on its way
        # An alarm that somebody set from outside, who means what it does by default.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _runs_in(frame: FrameType | None, call: FrameType) -> bool:
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None
