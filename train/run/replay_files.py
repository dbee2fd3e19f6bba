"""The replay on disk: steps are written once, a file for what came since the last time."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tdmpc2_fast.learn.replay import ReplayBuffer
from tdmpc2_fast.model.files import read_tensors, write_tensors

_MOST_BYTES = 2**28  # a file, while it is written and read, is in memory a second time


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Chunk(NamedTuple):
    """A file with the steps of a replay from number `start` to before `stop`."""

    file: str
    start: int
    stop: int
    sha256: str


class ReplayFiles:
    """Writes and reads the files of a run's replay.

    Args:
        folder: where they are; several ranks share it.
        prefix: what the names of new files begin with, so that no two mean the same one.

    chunks: those that together hold what the replay held when it was saved, oldest first.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix
        self.chunks: list[Chunk] = []

    def save(self, buffer: ReplayBuffer) -> list[Chunk]:
        """Write the steps that are in no file yet; return the files of all steps held."""
        oldest = max(0, buffer.written - buffer.capacity)
        self.chunks = [c for c in self.chunks if c.stop > oldest]
        self.folder.mkdir(exist_ok=True)
        if self.chunks:
            self.prefix = self.chunks[-1].file[: -len("0123456789-0123456789.safetensors")]
        rows = max(1, _MOST_BYTES * buffer.capacity // max(buffer.nbytes, 1))
        start = self.chunks[-1].stop if self.chunks else oldest
        while start < buffer.written:
            stop = min(start + rows, buffer.written)
            path = self.folder / f"{self.prefix}{start:010d}-{stop:010d}.safetensors"
            write_tensors(path, buffer.kept(start, stop))
            self.chunks.append(Chunk(path.name, start, stop, sha256(path)))
            start = stop
        return list(self.chunks)

    def read(self, chunks: Sequence[Chunk]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield the number of the first step and the steps of each file, as `ReplayBuffer.restore` takes them.

        What is saved from here on is what comes after them.
        """
        self.chunks = list(chunks)
        for chunk in chunks:
            yield chunk.start, read_tensors(self.folder / chunk.file)[0]

    def prune(self, needed: Collection[str]) -> None:
        """Delete files that no checkpoint needs."""
        for path in self.folder.iterdir():
            if path.name not in needed:
                path.unlink()
