"""The other side: what a process does that steps environments for the trainer's."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError, InputError

from ...signals import SIGNALS
from .. import patience
from ..answers import EnvError, NotHereError
from ..base import Actions, Env, EnvState, RenderError, Step, close_all, in_a_line, step
from ..multitask import placed, task_of
from .held import Held

BEGUN = "begun"
"""Said by a process when its imports are done."""
NO_TASK = -1
"""The task in a row of shared memory whose environment has begun no episode."""
Error = tuple[Exception | None, str, str]
"""Itself where it is ours and can be sent; in a line; where it came from."""
Failed = dict[int, Error]
_OURS = (EnvError, ConfigError, NotHereError, InputError, RenderError)


def portable(e: Exception) -> Error:
    """Return an error as another process can have it."""
    ours = type(e)(*e.args) if isinstance(e, _OURS) else None
    return ours, in_a_line(e), traceback.format_exc()


def rows_of(memory: Any, row: np.dtype[Any]) -> NDArray[Any]:
    """Return shared memory, of either kind, as rows."""
    return np.frombuffer(getattr(memory, "buffer", memory), row)


class Obey(Held):
    """Several environments and their rows of shared memory; its methods are the trainer's commands."""

    def __init__(
        self,
        cfg: Config,
        make: Callable[[Config, int], Env],
        which: Sequence[int],
        anew: int,
        memory: Any,
        row: np.dtype[Any],
    ) -> None:
        self._cfg, self._make = cfg, make
        self._rows = rows_of(memory, row)
        # Of a process that replaces a lost one, the rows say what was played; else none.
        lost = {i: task for i in which if (task := int(self._rows["task"][i])) != NO_TASK}
        super().__init__({i: placed(make, cfg, i, anew, lost.get(i)) for i in which})

    def make_anew(self, i: int, anew: int) -> None:
        """Replace environment i; `anew` is as for `placed`."""
        failed = task_of(self.envs[i])
        close_all([self.envs[i]])
        self.envs[i] = placed(self._make, self._cfg, i, anew, failed)

    def reset(self, which: Sequence[int]) -> Failed:
        """Start episodes and write their observations; return the errors of those that failed."""

        def begin(i: int) -> None:
            try:
                self._rows["obs"][i] = self.begin(i)
            finally:  # an error names it, too
                self._rows["task"][i] = task_of(self.envs[i])

        return self._each(which, begin)

    def step(self) -> Failed:
        """Make a decision in each and write what comes of it; return the errors of those that failed."""

        def decide(i: int) -> None:
            found = step(self.envs[i], self._rows["action"][i].copy())
            for name, value in found._asdict().items():
                self._rows[name][i] = value

        return self._each(self.envs, decide)

    @override
    def restore(self, states: Mapping[int, EnvState], actions: Mapping[int, Actions]) -> dict[int, list[Step]]:
        found = super().restore(states, actions)
        for i, env in self.envs.items():
            self._rows["task"][i] = task_of(env)
        return found

    def _each(self, which: Iterable[int], do: Callable[[int], None]) -> Failed:
        failed: Failed = {}
        for i in which:
            try:
                do(i)
            except Exception as e:
                failed[i] = portable(e)
        return failed


def serve(pipe: Connection, made: Callable[[], Any], orphaned: Callable[[], None] | None = None) -> None:
    """Answer each command with its error, or None, and what it returned, until the trainer closes the pipe.

    Args:
        pipe: commands come as the name of a method and its arguments.
        made: makes the object that has those methods, when the first command comes.
        orphaned: returns when the trainer's process is gone; default by multiprocessing.
    """
    # Ctrl-C, a closed terminal and what ends a job on a cluster reach all processes; the trainer says when to end.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, args=(orphaned or _join_parent,), daemon=True).start()
    _compute_on_one_core()
    patience.SECONDS = None
    with contextlib.suppress(OSError):  # a trainer that is gone already is noticed below
        pipe.send(BEGUN)
    served: Any = None
    with contextlib.suppress(EOFError, ConnectionError):  # of the pipe: the trainer closed its end
        while True:
            name, *args = pipe.recv()
            error = answer = None
            try:
                served = served or made()
                answer = getattr(served, name)(*args)
            except Exception as e:
                error = portable(e)
            pipe.send((error, answer))
    if served is not None:
        served.close()


def _compute_on_one_core() -> None:
    """Leave the other cores to the other environments, should one of them compute with torch.

    This module does not import it: of a process that only steps a simulator it would be most of the memory.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def _join_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()


def _leave_with_parent(orphaned: Callable[[], None]) -> None:
    """End this process when the trainer's is gone, even from the middle of a step."""
    orphaned()
    os._exit(1)
