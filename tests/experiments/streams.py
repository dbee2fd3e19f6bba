"""Streams and events of the rehearsed device, which know what work comes before what.

Work is done at once, in the order of the host. On a device a stream waits for another only where it is told to:
each keeps a clock, which says of every stream how much of its work is over when the next piece of its own begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

GPU = torch.device("cuda", 0)
Clock = dict[int, int]


class Work(NamedTuple):
    """A launch, a replay or a copy; `at`: its place in its stream."""

    what: str
    stream: Any
    at: int
    clock: Clock


done: list[Work] = []
"""What was sent to the device, in the order of the host."""

refuse: list[Callable[[str, bool], None]] = []
"""Is asked before the host waits, and raises where it may not."""

_streams: list[Stream] = []
_host: Clock = {}
_here = threading.local()


def _merge(into: Clock, clock: Clock) -> None:
    into.update({k: max(v, into.get(k, 0)) for k, v in clock.items()})


class Stream:
    """A stream of the device."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = GPU
        self.cuda_stream = id(self)
        self.clock: Clock = {}
        _streams.append(self)  # kept, so that ids stay theirs

    def wait_stream(self, other: Stream) -> None:
        _merge(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        _merge(self.clock, event.clock)

    def synchronize(self) -> None:
        host_waits("Stream.synchronize", self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True


class Event:
    """An event of the device."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at, self.clock = time.perf_counter(), Clock()

    def record(self, stream: Stream | None = None) -> None:
        self.at, self.clock = time.perf_counter(), dict((stream or current()).clock)

    def query(self) -> bool:
        """Say that all is done, but let no order follow from it: on a device it depends on the time."""
        return True

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current()).wait_event(self)

    def synchronize(self) -> None:
        for ask in refuse:
            ask("Event.synchronize", True)
        _merge(_host, self.clock)

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


_default = Stream()


def current(device: Any = None) -> Stream:
    """Return this thread's stream."""
    return getattr(_here, "stream", _default)


def default(device: Any = None) -> Stream:
    """Return the stream that work goes to where no other is chosen."""
    return _default


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    """Send work within to a stream."""
    before, _here.stream = current(), stream
    try:
        yield
    finally:
        _here.stream = before


def sent(what: str) -> None:
    """Note work that goes to the current stream."""
    stream = current()
    _merge(stream.clock, _host)
    at = stream.clock.get(id(stream), 0) + 1
    done.append(Work(what, stream, at, dict(stream.clock)))
    stream.clock[id(stream)] = at


def host_waits(what: str, stream: Stream | None = None, asked: bool = False) -> None:
    """Have the host wait for a stream, or for all."""
    for ask in refuse:
        ask(what, asked)
    for each in _streams if stream is None else [stream]:
        _merge(_host, each.clock)


def host_saw(work: Work) -> bool:
    """Tell whether the host has waited for a piece of work."""
    return _host.get(id(work.stream), 0) >= work.at


def ordered(before: Work, after: Work) -> bool:
    """Tell whether one piece of work is over when another begins, on any device."""
    return after.clock.get(id(before.stream), 0) >= before.at
