"""Updates beside the environments: launched in order, waited for only where something needs them.

The replay takes whole episodes, so no update needs the step that is being taken. Launching the
updates of a decision before its step and waiting for them after it changes no number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from typing_extensions import override

from tdmpc2_fast.errors import NonFiniteError
from tdmpc2_fast.learn.updater import Updater


class Updates:
    """Calls what it is given, in the order given.

    On the CPU an update has run when `launch` returns. On a GPU it is queued: the device runs
    what it is given in order, and the host goes on.

    Args:
        synchronise: waits for the device; raises what it says of the updates.
    """

    def __init__(self, synchronise: Callable[[], None]) -> None:
        self._synchronise = synchronise

    def launch(self, update: Callable[[], None]) -> None:
        """Run `update` after all launched so far; this may return before it has run."""
        update()

    def join(self) -> None:
        """Queue what the caller gives the agent's device from here on behind all updates launched so far.

        Raises what an update raised.
        """

    def wait(self) -> None:
        """Return when all launched so far is done and memory may be read and written.

        Raises what an update raised.
        """
        self._synchronise()

    def close(self) -> None:
        """Drop what has not begun and wait for what has; raise nothing."""
        with contextlib.suppress(NonFiniteError):  # what failed has changed no weight
            self._synchronise()


class InThread(Updates):
    """Does on the CPU what a GPU's queue does: one thread runs the updates in order.

    After one that raises the rest are skipped, until the error has been raised to the caller:
    what they would have trained on is what the error is about.
    """

    def __init__(self) -> None:
        super().__init__(self._finish)
        self._pool = ThreadPoolExecutor(1, "updates")
        self._last: Future[None] | None = None
        self._error: BaseException | None = None

    @override
    def launch(self, update: Callable[[], None]) -> None:
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

    @override
    def join(self) -> None:
        self.wait()  # the caller's thread is the device

    def _finish(self) -> None:
        if self._last is not None:
            self._last.result()
            self._last = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @override
    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._last = self._error = None


def updates_on(updater: Updater, overlap: bool) -> Updates:
    """Return what runs the updates of an agent."""
    on_cpu = updater.model.device.type == "cpu"
    return InThread() if overlap and on_cpu else Updates(updater.synchronise)
