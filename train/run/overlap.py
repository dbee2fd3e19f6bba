"""Updates beside the environments: launched in order, waited for only where something needs them.

The replay takes whole episodes, so no update needs the step that is being taken. Launching the
updates of a decision before its step and waiting for them after it changes no number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from tdmpc2_fast.errors import NonFiniteError
from tdmpc2_fast.learn.updater import Updater


class Updates(Protocol):
    """Runs what it is given, one after the other, in the order given."""

    def launch(self, update: Callable[[], None]) -> None:
        """Run `update` after all launched so far; may return before it has run."""
        ...

    def join(self) -> None:
        """What the caller gives the agent's device from here on runs after all launched so far.

        Raises what an update raised.
        """
        ...

    def wait(self) -> None:
        """Return when all launched so far is done and memory may be read and written.

        Raises what an update raised.
        """
        ...

    def close(self) -> None:
        """Drop what has not begun, wait for what has; raises nothing."""
        ...


class InCallersThread:
    """`launch` calls the update.

    On the CPU it has run when `launch` returns. On a GPU it is queued: the device runs what
    it is given in order, and the host goes on.
    """

    def __init__(self, synchronise: Callable[[], None]) -> None:
        self._synchronise = synchronise

    def launch(self, update: Callable[[], None]) -> None:
        """Call it."""
        update()

    def join(self) -> None:
        """The device keeps the order by itself."""

    def wait(self) -> None:
        """On a GPU, wait for the device, and for what it says of the updates."""
        self._synchronise()

    def close(self) -> None:
        """Nothing is held back; what failed has changed no weight."""
        with contextlib.suppress(NonFiniteError):
            self._synchronise()


class InThread:
    """What a GPU's queue is, on the CPU: one thread that runs the updates in order.

    After one that raises the rest are skipped, until the error has been raised to the caller:
    what they would have trained on is what the error is about.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "updates")
        self._last: Future[None] | None = None
        self._error: BaseException | None = None

    def launch(self, update: Callable[[], None]) -> None:
        """Hand it to the thread."""
        self._last = self._pool.submit(self._run, update, torch.get_num_threads())

    def _run(self, update: Callable[[], None], threads: int) -> None:
        if self._error is not None:
            return
        # torch counts its threads per calling thread; another count is another rounding.
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        try:
            update()
        except BaseException as e:
            self._error = e

    def join(self) -> None:
        """The caller's thread is the device: wait."""
        self.wait()

    def wait(self) -> None:
        """Wait for the thread."""
        if self._last is not None:
            self._last.result()
            self._last = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """End the thread after the update it is in."""
        self._pool.shutdown(cancel_futures=True)
        self._last = self._error = None


def updates_on(updater: Updater, overlap: bool) -> Updates:
    """What runs the updates of an agent."""
    on_cpu = updater.model.device.type == "cpu"
    return InThread() if overlap and on_cpu else InCallersThread(updater.synchronise)
