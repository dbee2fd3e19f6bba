"""Shards mapped into memory: read in place, larger than RAM, in bounded address space and resident size.

Pages of a mapped file are the system's cache, which it takes back when it needs memory; still they count as resident
in this process while its page table names them. So the table forgets them when they are many (`MADV_DONTNEED`): the
data stays in the cache, and the next touch finds it there. Where the address space is limited (`ulimit -v`), shards
that were not used for longest are unmapped.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tdmpc2_fast.errors import DataError

from .rows import Rows
from .shard import ShardFile

try:
    import resource
except ImportError:  # not on Windows, which limits neither
    resource = None  # type: ignore[assignment]

_MOST_RESIDENT = 1 << 30
_BETWEEN_LOOKS = 16
_STATM = Path("/proc/self/statm")


class _Mapped(NamedTuple):
    memory: mmap.mmap
    rows: Rows
    nbytes: int


class Maps:
    """The rows of shards by their number, for any thread.

    Args:
        files: the shards.
        resident: bytes of mapped files that may be resident in this process, where the system tells how many are.
    """

    def __init__(self, files: Sequence[ShardFile], resident: int = _MOST_RESIDENT) -> None:
        self._files, self._resident = files, resident
        self._space = _address_space()
        self._held: OrderedDict[int, _Mapped] = OrderedDict()
        self._nbytes = self._looks = 0
        self._lock = threading.Lock()

    def __getitem__(self, i: int) -> Rows:
        """Return the rows of shard i, which must not be written to; they stay mapped while a part of them is in use.

        Raises:
            DataError: the file has another size than when the set was opened, or does not fit into the address space.
        """
        with self._lock:
            if i in self._held:
                self._held.move_to_end(i)
            else:
                self._make_room(self._files[i].shard.bytes)
                self._held[i] = self._map(self._files[i])
                self._nbytes += self._held[i].nbytes
            return self._held[i].rows

    def look(self) -> None:
        """Drop what is resident where it has become too much; to be called between batches."""
        with self._lock:
            self._looks += 1
            if self._looks % _BETWEEN_LOOKS == 0 and _resident() > self._resident:
                for mapped in self._held.values():
                    mapped.memory.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of all of them."""
        with self._lock:
            self._held.clear()
            self._nbytes = 0

    def _make_room(self, nbytes: int) -> None:
        if self._space is None:
            return
        if nbytes > self._space:
            raise DataError(
                f"data: a shard of {nbytes:,} bytes, allowed: {self._space:,}, half of the address space that the "
                "limit on this process leaves (ulimit -v)"
            )
        while self._held and self._nbytes + nbytes > self._space:
            self._unmap_one()

    def _unmap_one(self) -> None:
        """Unmap the shard that was not used for longest."""
        self._nbytes -= self._held.popitem(last=False)[1].nbytes

    def _map(self, file: ShardFile) -> _Mapped:
        """Map a shard, in place of others where there is no room: threads and what they allocate take of it, too."""
        while True:
            try:
                return _mapped(file)
            except OSError as e:
                if e.errno != errno.ENOMEM or not self._held:
                    raise DataError(f"data {str(file.path)!r}: cannot be mapped ({e.strerror})") from e
            self._unmap_one()


def _mapped(file: ShardFile) -> _Mapped:
    with file.path.open("rb") as f:
        if (size := os.fstat(f.fileno()).st_size) != file.shard.bytes:  # reading behind its end would kill the process
            raise DataError(f"data {str(file.path)!r}: has {size:,} bytes now, allowed: {file.shard.bytes:,}")
        memory = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    rows, task = file.shard.rows, file.task
    shapes = dict(obs=(rows, task.obs_dim), action=(rows, task.action_dim), reward=(rows,), terminated=(rows,))
    fields = {
        name: np.frombuffer(memory, "?" if name == "terminated" else "<f4", int(np.prod(shape)), file.starts[name])
        for name, shape in shapes.items()
    }
    return _Mapped(memory, Rows(**{name: x.reshape(shapes[name]) for name, x in fields.items()}), size)


def _address_space() -> int | None:
    """Return the bytes of address space that shards may take: half of what is left; None where there is no limit."""
    limit = -1 if resource is None else resource.getrlimit(resource.RLIMIT_AS)[0]
    if resource is None or limit == resource.RLIM_INFINITY:
        return None
    try:
        used = int(_STATM.read_text().split()[0]) * mmap.PAGESIZE
    except OSError:
        used = 0
    return max(limit - used, 0) // 2


def _resident() -> int:
    """Return the bytes of files that are resident in this process; 0 where the system does not tell."""
    try:
        return int(_STATM.read_text().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0
