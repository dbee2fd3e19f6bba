"""Environments in processes of their own.

Actions, observations, rewards and flags lie in shared memory, a row per environment; a pipe
per process carries commands and answers. The memory has no name (its file is unlinked when it
is made), so nothing is left behind however a run ends. A process ends when the trainer closes
its pipe, and when the trainer is gone.

A process that dies or does not answer in time is started anew, a few times a run. The
episodes of its environments are lost as a whole; the others go on. An exception in an
environment is no such case: the trainer gets it, with the traceback, and decides.

Processes are spawned and import the program anew, so a script that trains with them needs
`if __name__ == "__main__":`, and what it registers must stand outside of that. A process that
ends in its imports, or cannot make the environment that the trainer made, is not tried again.
Suites that have an interpreter of their own are stepped by processes of that one.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.util
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError

from ..answers import EnvError
from ..base import Actions, Array, Env, Environments, EnvState, Failures, Step
from .processes import GuestProcess, SharedFile
from .serve import BEGUN, NO_TASK, Failed, Obey, rows_of, serve

ANSWER_SECONDS = 60.0  # a process that has answered before has this long to answer again
START_SECONDS = 300.0  # the first answer includes the imports and making the environments
MOST_RESTARTS = 10  # a run
CLOSE_SECONDS = 5.0

_spawn = multiprocessing.get_context("spawn")


@dataclass
class _Worker:
    """A process and the environments in it."""

    indices: list[int]
    process: SpawnProcess | GuestProcess
    pipe: Connection
    begun: bool = False
    answered: bool = False  # ever
    answer: Any = None  # the last

    def tell(self, name: str, *args: Any) -> None:
        """Send a method of `Obey` and its arguments; a dead process is noticed when it should answer."""
        with contextlib.suppress(OSError):
            self.pipe.send((name, *args))

    def end(self, patience: float) -> int | None:
        """Wait so many seconds for the process to end, kill it if it does not, and return its exit code."""
        self.pipe.close()
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode


class Workers(Environments):
    """The `num_envs` environments of a run, spread over `count` processes.

    Args:
        cfg: a completed config.
        make: makes one environment of a config and a seed; it is pickled.
        count: processes, 1 to `num_envs`.
        failures: what becomes of environments that fail; its `note` is told when a process had to be started anew.
        restarts: of the run so far.
        python: the interpreter of the processes; default this one's.

    Raises:
        ConfigError: `make` is nothing that another process can import.
    """

    def __init__(
        self,
        cfg: Config,
        make: Callable[[Config, int], Env],
        count: int,
        failures: Failures,
        restarts: int = 0,
        python: Path | None = None,
    ) -> None:
        self.cfg, self._make, self.failures, self._python = cfg, make, failures, python
        obs = ("obs", np.uint8 if cfg.obs == "rgb" else np.float32, cfg.observation_shape)
        action = ("action", np.float32, (cfg.need("action_dim"),))
        results = [("reward", np.float64), ("terminated", np.bool_), ("truncated", np.bool_), ("success", np.float64)]
        self._row = np.dtype([obs, action, *results, ("task", np.int64)], align=True)
        size = cfg.num_envs * self._row.itemsize
        self._memory: Any = SharedFile(size) if python is not None else _spawn.RawArray("b", size)
        self._rows: NDArray[Any] = rows_of(self._memory, self._row)
        self._rows["task"] = NO_TASK
        self.restarts = restarts
        self._workers: list[_Worker] = []
        # An interpreter that ends without close() ends the processes, too: before multiprocessing waits for
        # them, since they do not mind its signal.
        multiprocessing.util.Finalize(self, _close, (self._workers,), exitpriority=0)
        self._workers += [self._start(part.tolist()) for part in np.array_split(np.arange(cfg.num_envs), count)]

    def begin(self) -> None:
        """Return when every process has made its environments.

        Raises:
            ConfigError: a process cannot import the program, or make what the trainer could.
        """
        self._ask_all(lambda worker: ("reset", ()))  # of none, once they are made

    @override
    def reset(self, which: Sequence[int]) -> dict[int, Array]:
        parts = [[i for i in worker.indices if i in which] for worker in self._workers]
        for worker, part in zip(self._workers, parts, strict=True):
            if part:
                worker.tell("reset", part)
        told = time.monotonic()
        for k, part in enumerate(parts):
            start, left = told, part
            while left:
                left = self._lost(k, start)
                if left:
                    parts[k] = sorted({*parts[k], *left})
                    start = time.monotonic()
                    self._workers[k].tell("reset", left)
        return {i: self._rows["obs"][i].copy() for part in parts for i in part}

    @override
    def step_async(self, actions: NDArray[np.float32]) -> None:
        self._rows["action"][:] = actions
        for worker in self._workers:
            worker.tell("step")

    @override
    def step_wait(self) -> list[Step | None]:
        """Return what came of the step, as `Environments.step_wait`.

        Raises:
            EnvError: an environment raised, or processes died too often.
        """
        start = time.monotonic()
        found: list[Step | None] = []
        for k in range(len(self._workers)):
            lost = self._lost(k, start)
            found += [None if i in lost else self._result(i) for i in self._workers[k].indices]
        self.failures.count(found)
        return found

    @override
    def tasks(self) -> list[int]:
        found: list[int] = self._rows["task"].tolist()
        return found

    @override
    def states(self) -> list[EnvState | None]:
        found: dict[int, EnvState] = {}
        for worker, answer in self._ask_all(lambda worker: ("states",)):
            found.update(answer or dict.fromkeys(worker.indices))
        return [found[i] for i in range(self.cfg.num_envs)]

    @override
    def restore(self, states: Sequence[EnvState], actions: Mapping[int, Actions]) -> dict[int, list[Step]]:
        """Take the environments to these states, as `Environments.restore`.

        Raises:
            EnvError: an environment raised, or a process did not answer.
        """

        def command(worker: _Worker) -> tuple[Any, ...]:
            mine = {i: states[i] for i in worker.indices}
            return "restore", mine, {i: a for i, a in actions.items() if i in mine}

        found: dict[int, list[Step]] = {}
        for worker, answer in self._ask_all(command):
            if answer is None:
                raise EnvError(f"{self._name(worker)}: the process was lost while it was to play its episodes again")
            found.update(answer)
        return found

    def _ask_all(self, command: Callable[[_Worker], tuple[Any, ...]]) -> list[tuple[_Worker, Any]]:
        """Return all processes' answers to a command between two steps; None for one that was started anew instead."""
        for worker in self._workers:
            worker.tell(*command(worker))
        start, found = time.monotonic(), []
        for k, worker in enumerate(list(self._workers)):
            found.append((worker, worker.answer if self._answered(k, start) else None))
        return found

    @override
    def close(self) -> None:
        """End the processes; those in the middle of something have a few seconds."""
        _close(self._workers)

    def _start(self, indices: list[int]) -> _Worker:
        made = functools.partial(Obey, self.cfg, self._make, indices, self._anew, self._memory, self._row)
        if self._python is not None:
            guest = GuestProcess(self._python, made, self._memory)
            return _Worker(indices, guest, guest.pipe)
        program = sys.modules["__main__"]
        if program.__spec__ is None and not os.path.exists(getattr(program, "__file__", "") or os.curdir):
            raise _cannot_import("cannot import")  # what was read from standard input is gone
        ours, theirs = _spawn.Pipe()
        process = _spawn.Process(target=serve, args=(theirs, made), daemon=True)
        try:
            process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as e:
            raise ConfigError(
                f"config key 'env_workers': {self.cfg.task} cannot be made in another process ({e}), allowed: an "
                "environment whose `make` is a function of a module, or env_workers=0"
            ) from e
        theirs.close()  # the process has the only one: when it dies, our end is told
        return _Worker(indices, process, ours)

    def _lost(self, k: int, start: float) -> list[int]:
        """Wait for process k, have its environments made anew that failed, and return those whose episodes are lost."""
        if not self._answered(k, start):
            return self._workers[k].indices
        failed: Failed = self._workers[k].answer
        for i, (ours, line, trace) in failed.items():
            name = self.cfg.tasks[self._rows["task"][i]] if self.cfg.multitask else None
            self.failures.take(i, ours or EnvError(line), "" if ours else trace, name)
            self._workers[k].tell("make_anew", i, self._anew)
            if not self._answered(k, time.monotonic()):
                return self._workers[k].indices
        return list(failed)

    @property
    def _anew(self) -> int:
        return self.restarts + self.failures.dropped

    def _answered(self, k: int, start: float) -> bool:
        """Wait for the answer of process k, whose time runs from `start`; start the process anew if it fails."""
        worker = self._workers[k]
        limit = ANSWER_SECONDS if worker.answered else START_SECONDS
        try:
            while worker.pipe.poll(max(0.0, start + limit - time.monotonic())):
                message = worker.pipe.recv()
                if message == BEGUN:
                    worker.begun = True
                    continue
                error, worker.answer = message
                if error is not None:
                    raise self._error(worker, *error)
                worker.answered = True
                return True
            code, what = worker.end(patience=0.0), f"gave no answer in {limit:g} s and was killed"
        except (EOFError, OSError):
            code, what = worker.end(patience=CLOSE_SECONDS), "died"
        if not worker.begun and code is not None and code >= 0:
            if isinstance(worker.process, GuestProcess):
                raise ConfigError(f"config key 'task': {self.cfg.task}: {worker.process.ended()}")
            raise _cannot_import(f"ended (exit code {code}) when it imported")
        what = f"{self._name(worker)}: the process {what} (exit code {code})"
        if self.restarts == MOST_RESTARTS:
            raise EnvError(f"{what}; allowed: {MOST_RESTARTS} restarts a run")
        self.restarts += 1
        self.failures.note(f"{what}; its episodes are dropped, restart {self.restarts} of at most {MOST_RESTARTS}")
        self._workers[k] = self._start(worker.indices)
        return False

    def _error(self, worker: _Worker, ours: Exception | None, line: str, trace: str) -> Exception:
        """Return the error for a command that failed as a whole."""
        if not worker.answered and isinstance(ours, ConfigError) and isinstance(worker.process, GuestProcess):
            return ours
        if not worker.answered and isinstance(ours, ConfigError):
            return ConfigError(
                f"config key 'env_workers': worker processes cannot make what this one could ({line}). They "
                "import the program anew, without what stands under `if __name__ == '__main__':`; allowed: registering "
                "outside of that, task=MODULE:ID, or env_workers=0"
            )
        return EnvError(f"{self._name(worker)} raised\n{trace}")

    def _name(self, worker: _Worker) -> str:
        return f"{self.cfg.task}, environment {', '.join(map(str, worker.indices))}"

    def _result(self, i: int) -> Step:
        row = self._rows[i]
        flags = bool(row["terminated"]), bool(row["truncated"])
        return Step(row["obs"].copy(), float(row["reward"]), *flags, float(row["success"]))


def _cannot_import(what: str) -> ConfigError:
    program = getattr(sys.modules["__main__"], "__file__", None) or "the program"
    return ConfigError(
        f"config key 'env_workers': a worker process {what} {program} anew (its error stands above), allowed: a "
        "file that can be imported twice and trains only under `if __name__ == '__main__':`, or env_workers=0"
    )


def leave_if_imported_anew() -> None:
    """End this process where it is a worker that, for want of a guard, begins to train in its imports.

    multiprocessing would refuse with a page of advice in every process; the trainer's message is a line.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(1)


def _close(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()
    deadline = time.monotonic() + CLOSE_SECONDS
    while workers:
        workers.pop().end(max(0.0, deadline - time.monotonic()))
