"""The official data sets: `.pt` files of episodes of several tasks, of which each knows its task's number.

A file is a TensorDict of the batch (episodes, steps + 1) with `obs` and `action`, padded with zeros to those of the
widest task, `reward`, `task`, and in newer ones perhaps `terminated` (official `trainer/offline_trainer.py` and
`common/buffer.py`). A number is a place in the order of the set's tasks. Rows of an episode of mt80 are 101, of mt30
501, which tells the sets apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.compat.tensordict_file import Column, TensorDictFile
from tdmpc2_fast.errors import DataError
from tdmpc2_fast.task_sets import TASK_SETS, TASKS

from .rows import Episodes, Lengths, Rows

_BY_ROWS = {501: "mt30", 101: "mt80"}
_NEEDED = ("obs", "action", "reward", "task")
_LONGEST_EPISODE = 1 << 28  # numbers
_PIECE = 1 << 20  # numbers of a column that are read at a time


def episodes(path: Path, tasks: Sequence[str] | None = None) -> list[Episodes]:
    """Return the episodes in a file by task; nothing of it but the task numbers is kept in memory.

    tasks: by their numbers; none: those of mt30 or mt80, by the length of the episodes.

    Raises:
        DataError: no such file, damaged, with more in it than tensors, or of another form.
    """
    file = TensorDictFile(path)
    columns = _checked(file)
    names = _names(file, tasks)
    numbers = _numbers(file, columns["task"], names)
    file.check()
    crc = zlib.crc32(repr(sorted(file.checksums.items())).encode())
    origin = f"{path.name} ({path.stat().st_size} bytes, {crc:08x})"
    found: list[Episodes] = []
    for i, name in enumerate(names):
        which = np.flatnonzero(numbers == i)
        if len(which):
            found.append(_OfTask(file, columns, name, which, origin))
    return found


class _OfTask:
    """The episodes of one task in a file."""

    def __init__(
        self, file: TensorDictFile, columns: dict[str, Column], name: str, which: NDArray[np.int64], origin: str
    ) -> None:
        self._file, self._columns, self._which = file, columns, which
        known, widths = TASKS.get(name), (columns["obs"].shape[2], columns["action"].shape[2])
        self.task, self.origin, self.identity = name, origin, origin
        self.obs_dim, self.action_dim = widths
        if known is not None and known.obs_dim is not None and known.action_dim is not None:
            self.obs_dim, self.action_dim = known.obs_dim, known.action_dim
        if self.obs_dim > widths[0] or self.action_dim > widths[1]:
            raise _error(
                file,
                f"{name!r} has observations and actions of {self.obs_dim} and {self.action_dim} numbers, but there are "
                f"{widths[0]} and {widths[1]}: is it another set, or another order of tasks?",
            )
        self.lengths: Lengths = np.full(len(which), file.shape[1], np.int64)

    def rows(self, first: int, stop: int) -> Rows:
        """Return episodes from `first` to before `stop`."""
        obs = self._read("obs", first, stop)
        if obs[..., self.obs_dim :].any():
            raise _error(
                self._file,
                f"observations of {self.task!r} have numbers behind the {self.obs_dim} that the task has: is it "
                "another set, or another order of tasks?",
            )
        action, reward = self._read("action", first, stop), self._read("reward", first, stop)
        ends = np.zeros(reward.shape, bool)
        if "terminated" in self._columns:
            ends = np.nan_to_num(self._read("terminated", first, stop).astype(np.float32)) > 0.5
            ends[:, 0] = False
        with np.errstate(over="ignore"):  # what becomes infinite is told of by `judged`
            return Rows(
                _flat(obs[..., : self.obs_dim]), _flat(action[..., : self.action_dim]), _flat(reward), ends.reshape(-1)
            )

    def _read(self, name: str, first: int, stop: int) -> NDArray[Any]:
        """Return a column of these episodes, (E, T, ...): neighbours in one go."""
        which, column = self._which[first:stop], self._columns[name]
        runs = np.split(which, np.flatnonzero(np.diff(which) != 1) + 1)
        found = np.concatenate([column.read(int(run[0]), int(run[-1]) + 1) for run in runs])
        return found.reshape(found.shape[:2]) if name in ("reward", "terminated") else found


def _flat(x: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(x, np.float32).reshape(-1, *x.shape[2:])


def _checked(file: TensorDictFile) -> dict[str, Column]:
    found = file.columns
    for name in _NEEDED:
        if name not in found:
            raise _error(file, f"has the keys {sorted(found)}, allowed: {', '.join(_NEEDED)} at least")
    used = {name: found[name] for name in (*_NEEDED, "terminated") if name in found}
    for name, column in used.items():
        inner = column.shape[2:]
        one = inner in ((), (1,)) if name in ("reward", "terminated") else inner == ()
        if not (len(inner) == 1 and inner[0] > 0 if name in ("obs", "action") else one):
            form = "(episodes, steps, numbers)" if name in ("obs", "action") else "(episodes, steps)"
            raise _error(file, f"{name!r} has the shape {column.shape}, allowed: {form}")
        kinds = dict(task="iuf", terminated="fbiu").get(name, "f")
        if column.dtype.kind not in kinds:
            raise _error(
                file, f"{name!r} is of {column.dtype}, allowed: {'whole' if name == 'task' else 'real'} numbers"
            )
    if file.shape[1] < 2:
        raise _error(file, f"has episodes of {file.shape[1]} rows, allowed: at least 2, the reset and a decision")
    if file.shape[1] * (used["obs"].shape[2] + used["action"].shape[2]) > _LONGEST_EPISODE:
        raise _error(file, f"has episodes of {file.shape[1]:,} rows, more than any episode has")
    return used


def _names(file: TensorDictFile, tasks: Sequence[str] | None) -> Sequence[str]:
    if tasks is not None:
        return tasks
    rows = file.shape[1]
    if rows not in _BY_ROWS:
        raise _error(
            file, f"has episodes of {rows} rows, which is no official set (501 or 101): tasks=NAME,... says which"
        )
    return TASK_SETS[_BY_ROWS[rows]]


def _numbers(file: TensorDictFile, column: Column, names: Sequence[str]) -> NDArray[np.int64]:
    """Return the task of each episode: (E,)."""
    each = max(_PIECE // file.shape[1], 1)
    found = []
    for first in range(0, file.shape[0], each):
        x = column.read(first, min(first + each, file.shape[0]))
        number = x[:, 0].astype(np.int64)
        wrong = (x != number[:, None]).any(1) | (number < 0) | (number >= len(names))
        if wrong.any():
            i = int(wrong.argmax())
            raise _error(
                file,
                f"episode {first + i} has the tasks {np.unique(x[i])[:5].tolist()}, allowed: one number, "
                f"0 to {len(names) - 1}, of {len(names)} tasks",
            )
        found.append(number)
    return np.concatenate(found)


def _error(file: TensorDictFile, what: str) -> DataError:
    return DataError(f"data {str(file.path)!r}: {what}")
