"""Signals as wishes: heard in the main thread only, those ignored stay ignored, and all is as before afterwards."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tdmpc2_fast.train.run.stop import Stop, Stopped
from tdmpc2_fast.train.signals import SIGNALS


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Handlers of the tests' own at first: what a shell begins in the background ignores Ctrl-C."""
    before = {s: signal.signal(s, lambda *_: None) for s in SIGNALS}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_wish(number: int) -> None:
    stop, heard = Stop(), []
    signal.signal(number, lambda *_: heard.append(number))
    with stop.listening():
        stop.check()
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        assert stop.signal == number
        with pytest.raises(Stopped):
            stop.check()
    assert not heard
    os.kill(os.getpid(), number)
    assert heard == [number]


def test_the_first_signal_counts_and_a_second_ctrl_c_is_one() -> None:
    stop = Stop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGTERM


def test_what_is_ignored_stays_ignored() -> None:
    stop = Stop()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
    assert not stop.asked
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_hears_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Stop().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
