"""A shard: one safetensors file with episodes of one task, written a piece at a time.

    action (R, A) F32, obs (R, O) F32, reward (R,) F32, terminated (R,) BOOL       in this order, without gaps

The numbers begin at a multiple of 64 bytes, so that they can be used where they are when the file is mapped.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tdmpc2_fast.errors import DataError
from tdmpc2_fast.model.files import replacing

from .index import Shard, Task
from .rows import Rows

_FIELDS = ("action", "obs", "reward", "terminated")
_LONGEST_HEADER = 64 << 10
_ALIGN = 64


def _header(task: Task, rows: int) -> dict[str, dict[str, Any]]:
    """Return what the header of a shard must say."""
    shapes = dict(action=[rows, task.action_dim], obs=[rows, task.obs_dim], reward=[rows], terminated=[rows])
    found, at = {}, 0
    for name in _FIELDS:
        size = rows * (1 if name == "terminated" else 4 * (shapes[name] + [1])[1])
        dtype = "BOOL" if name == "terminated" else "F32"
        found[name] = dict(dtype=dtype, shape=shapes[name], data_offsets=[at, at + size])
        at += size
    return found


def write(
    path: Path, task: Task, rows: int, parts: Iterable[Rows], complete: Callable[[Path], None] = lambda tmp: None
) -> int:
    """Write a shard of so many rows, flushed and renamed; return its bytes.

    parts: consecutive rows, as many in all; only one is in memory at a time.
    complete: told of the file that is about to take the place of `path`.

    Raises:
        DataError: there were more or fewer.
        OSError: it cannot be written; there is nothing at `path` then.
    """
    fields = _header(task, rows)
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    begin, done = 8 + len(text), 0
    with replacing(path) as tmp:
        with tmp.open("r+b") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(begin + fields["terminated"]["data_offsets"][1])
            for part in parts:
                count = len(part.reward)
                if done + count > rows:
                    break
                for name in _FIELDS:
                    x = getattr(part, name)
                    f.seek(begin + fields[name]["data_offsets"][0] + done * (x.nbytes // count))
                    f.write(x.data if x.flags.c_contiguous else x.tobytes())
                done += count
        if done != rows:
            raise DataError(f"data {str(path)!r}: got {done:,} rows, allowed: {rows:,}")
        size = tmp.stat().st_size
        complete(tmp)
    return size


class ShardFile:
    """A shard whose size and header are what the index says.

    starts: where in the file the numbers of each field begin.

    Raises:
        DataError: they are not; or it is no file of the folder itself.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path, shard: Shard, task: Task) -> None:
        self.path, self.shard, self.task = folder / shard.file, shard, task
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            raise self._error("is missing") from None
        if not stat.S_ISREG(found.st_mode):
            raise self._error("is a link or no file, allowed: a file in the folder itself")
        with self.path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            if size != shard.bytes:
                raise self._error(f"has {size:,} bytes, allowed: {shard.bytes:,} as the index says (truncated?)")
            length = int.from_bytes(f.read(8), "little")
            if length > _LONGEST_HEADER:
                raise self._error(f"has a header of {length:,} bytes, allowed: {_LONGEST_HEADER:,}")
            text = f.read(length)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            raise self._error("has a header that is damaged") from None
        if isinstance(header, dict):
            header.pop("__metadata__", None)
        fields = _header(task, shard.rows)
        if header != fields or 8 + length + fields["terminated"]["data_offsets"][1] != size or (8 + length) % 4:
            wrong = next((k for k in _FIELDS if not isinstance(header, dict) or header.get(k) != fields[k]), "others")
            raise self._error(f"has another header than the index describes ({wrong})")
        self.starts = {k: 8 + length + fields[k]["data_offsets"][0] for k in _FIELDS}

    def _error(self, what: str) -> DataError:
        return DataError(f"data {str(self.path)!r}: the shard {what}")
