"""Writes data sets: shard by shard, each whole or absent, and the index last.

What is there of a set that is not finished stands in `unfinished-KEY.json`, KEY telling from what it is made. The next
try of the same keeps the shards whose checksums are right, and writes the others. A set that grows is, until its new
index takes the place of the old one, the old set.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tdmpc2_fast.errors import DataError

from ..run.folder import locked
from ..run.replay_files import sha256
from . import shard
from .dataset import found_index
from .index import INDEX, UNFINISHED, Index, Shard, Task, read, run_lengths, task_name
from .rows import Episodes, Rows, firsts, judged, pieces, returns

SHARD_BYTES = 1 << 30
_PIECE_BYTES = 8 << 20
_MOST_TEXT = 500


class _Chain:
    """Episodes of one task from several places, as those of one."""

    def __init__(self, parts: Sequence[Episodes]) -> None:
        self.parts = parts
        self.lengths = np.concatenate([p.lengths for p in parts]).astype(np.int64)
        self._ends = np.cumsum([len(p.lengths) for p in parts])

    def pieces(self, first: int, stop: int, most: int) -> Iterator[tuple[Episodes, int, int]]:
        """Yield the place of episodes, and from where to where there, so that each time few rows are in memory."""
        for part, end in zip(self.parts, self._ends, strict=True):
            start = int(end) - len(part.lengths)
            a, b = max(first - start, 0), min(stop - start, len(part.lengths))
            if a < b:
                yield from ((part, a + x, a + y) for x, y in pieces(part.lengths[a:b], most))


def write(
    folder: Path,
    parts: Sequence[Episodes],
    tell: Callable[[str], None] = lambda line: None,
    shard_bytes: int = SHARD_BYTES,
) -> Index:
    """Write episodes into a new data set, or behind those of one that is there; return its index.

    Args:
        parts: episodes; those of one task become its shards together.
        tell: told in a line of each shard.
        shard_bytes: how large a shard may become, if it has more than one episode.

    Raises:
        DataError: a task of two widths, numbers that are not finite, no room on the disk, or a damaged set there.
        ConfigError: another process is writing to it.
        OSError: it cannot be written; what was there is as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "data"):
        for left in folder.glob(".*.tmp"):  # by a process that was killed
            left.unlink()
        old = found_index(folder) if (folder / INDEX).exists() else None
        tasks, chains = _tasks(old, parts)
        plan = [
            (number, first, stop)
            for number, chain in chains.items()
            for first, stop in pieces(chain.lengths, max(shard_bytes // tasks[number].row_bytes, 1))
        ]
        if not plan:
            raise DataError(f"data {str(folder)!r}: got no episodes, allowed: at least one")
        begun = folder / f"unfinished-{_key(tasks, chains, shard_bytes)}.json"
        kept = {s.file: s for s in _shards(begun)}
        _check_room(folder, sum(int(c.lengths.sum()) * tasks[n].row_bytes for n, c in chains.items()), kept)
        done: list[Shard] = []
        begin = 1 + max((_number(s.file) for s in (() if old is None else old.shards)), default=-1)
        for i, (number, first, stop) in enumerate(plan):
            path = folder / f"{begin + i:05d}-{_slug(tasks[number].name)}.safetensors"
            made = _whole(path, kept.get(path.name))
            how = "is there" if made else "written"
            made = made or _written(path, number, tasks[number], chains[number], first, stop)
            done.append(made)
            Index(tasks, tuple(done)).write(begun)
            tell(f"{i + 1}/{len(plan)} {path.name}: {made.episodes:,} episodes, {made.bytes / 1e6:,.1f} MB, {how}")
        index = Index(tasks, (*(() if old is None else old.shards), *done))
        index.write(folder / INDEX)
        _tidy(folder, index)
    return index


def _tasks(old: Index | None, parts: Sequence[Episodes]) -> tuple[tuple[Task, ...], dict[int, _Chain]]:
    """Return the tasks of the set to be and the episodes to write by the number of their task."""
    tasks = [] if old is None else list(old.tasks)
    names = [t.name for t in tasks]
    by_number: dict[int, list[Episodes]] = {}
    for part in parts:
        task = Task(task_name(part.task, "task"), part.obs_dim, part.action_dim)
        if task.name not in names:
            tasks.append(task)
            names.append(task.name)
        number = names.index(task.name)
        if tasks[number] != task:
            was = tasks[number]
            raise DataError(
                f"{part.origin}: {task.name!r} has observations and actions of {task.obs_dim} and {task.action_dim} "
                f"numbers, allowed: {was.obs_dim} and {was.action_dim}, as elsewhere in the set"
            )
        if len(part.lengths):
            by_number.setdefault(number, []).append(part)
    return tuple(tasks), {n: _Chain(by_number[n]) for n in sorted(by_number)}


def _written(path: Path, number: int, task: Task, chain: _Chain, first: int, stop: int) -> Shard:
    found, ends = [np.zeros(0)], 0

    def checked() -> Iterator[Rows]:
        nonlocal ends
        for part, a, b in chain.pieces(first, stop, max(_PIECE_BYTES // task.row_bytes, 1)):
            lengths = part.lengths[a:b]
            rows = judged(part.rows(a, b), lengths, f"{part.origin}, {task.name}", a)
            found.append(returns(rows, lengths))
            ends += int(rows.terminated.sum())
            yield rows

    lengths = chain.lengths[first:stop]
    size = shard.write(path, task, int(lengths.sum()), checked())
    each = np.concatenate(found)
    return Shard(
        path.name,
        number,
        len(lengths),
        int(lengths.sum()),
        size,
        sha256(path),
        run_lengths(lengths),
        _summary(each),
        ends,
        _origin(chain, first, stop),
    )


def _summary(each: np.ndarray) -> tuple[float, float, float]:
    """Return the smallest, the mean and the largest; rounding puts no mean beyond them."""
    low, high = float(each.min()), float(each.max())
    return low, min(max(float(each.mean()), low), high), high


def _whole(path: Path, told: Shard | None) -> Shard | None:
    """Return the shard that an earlier try wrote, if it is whole."""
    there = told is not None and path.is_file() and not path.is_symlink()
    return told if there and told is not None and sha256(path) == told.sha256 else None


def _origin(chain: _Chain, first: int, stop: int) -> str:
    names = dict.fromkeys(part.origin for part, _, _ in chain.pieces(first, stop, int(firsts(chain.lengths)[-1])))
    text = "; ".join(names)
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"


def _key(tasks: Sequence[Task], chains: dict[int, _Chain], shard_bytes: int) -> str:
    """Return a name of what is written: of other episodes, or in other shards, it is another."""
    found = hashlib.sha256(repr((tasks, shard_bytes)).encode())
    for number, chain in chains.items():
        found.update(repr((number, [p.identity for p in chain.parts])).encode())
        found.update(chain.lengths.tobytes())
    return found.hexdigest()[:16]


def _shards(begun: Path) -> tuple[Shard, ...]:
    """Return what an earlier try has written; nothing where it does not tell in a form that can be read."""
    with contextlib.suppress(DataError, FileNotFoundError):
        return read(begun).shards
    return ()


def _tidy(folder: Path, index: Index) -> None:
    """Remove what tries that were not finished have left beside a set."""
    needed = {s.file for s in index.shards}
    for begun in folder.glob(UNFINISHED):
        for shard_ in _shards(begun):
            if shard_.file not in needed:
                (folder / shard_.file).unlink(missing_ok=True)
        begun.unlink()


def _check_room(folder: Path, needed: int, kept: dict[str, Shard]) -> None:
    needed -= sum(s.bytes for s in kept.values())
    if needed > (free := shutil.disk_usage(folder).free):
        raise DataError(f"data {str(folder)!r}: needs {needed / 1e9:,.1f} GB, allowed: the {free / 1e9:,.1f} GB free")


def _number(file: str) -> int:
    """Return the number that a shard's name begins with; -1 where it is of another program's making."""
    found = re.match(r"\d{1,9}", file)
    return -1 if found is None else int(found[0])


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
