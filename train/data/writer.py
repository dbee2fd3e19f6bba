"""Writes data sets: shard by shard, each whole or absent, and the index last.

What is there of a set that is not finished stands in `unfinished-KEY.json`, KEY telling from what it is made. The next
try of the same keeps the shards whose checksums are right, and writes the others. A set that grows is, until its new
index takes the place of the old one, the old set.

A shard is named there before it gets its name, so a file that no index names is somebody else's: it is neither written
over nor removed, and a folder with such files and without a set is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
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
_LOCK = "data.lock"
_BEGUN = re.compile(r"unfinished-[0-9a-f]{16}\.json")
_ASIDE = re.compile(rf"\.(\d{{5,}}-[A-Za-z0-9._-]+\.safetensors|index\.json|{_BEGUN.pattern})\.\d+\.tmp")
"""What the files are called that `replacing` writes here, and a killed process leaves."""


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


@contextlib.contextmanager
def place(folder: Path) -> Iterator[None]:
    """Make the folder of a data set; one in which nothing was written is removed in the end.

    Raises:
        DataError: it cannot be made, or `check_place` refuses it.
    """
    check_place(folder)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"data {str(folder)!r}: cannot be made ({e.strerror}), allowed: a folder") from e
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if new and {p.name for p in folder.iterdir()} <= {_LOCK}:
                (folder / _LOCK).unlink(missing_ok=True)
                folder.rmdir()


def check_place(folder: Path) -> None:
    """Raise a `DataError` where a data set can neither grow nor begin: its index is damaged, or the folder has others'
    files and no data set.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"config key 'out': {str(folder)!r} is a file, allowed: a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"config key 'out': {str(folder)!r} may not be written to, allowed: a folder of yours")
    if (folder / INDEX).exists():
        found_index(folder)
        return
    names = sorted(p.name for p in folder.iterdir())
    foreign = [n for n in names if n != _LOCK and not _ASIDE.fullmatch(n)]
    if foreign and not any(map(_BEGUN.fullmatch, foreign)):
        raise DataError(
            f"config key 'out': {str(folder)!r} has files ({foreign[0]!r}) and no {INDEX}, allowed: a new or empty "
            "folder, or a data set"
        )


def write(
    folder: Path,
    parts: Sequence[Episodes],
    tell: Callable[[str], None] = lambda line: None,
    shard_bytes: int = SHARD_BYTES,
    agree: Callable[[Index | None], None] = lambda old: None,
) -> Index:
    """Write episodes into a new data set, or behind those of one that is there; return its index.

    Args:
        parts: episodes; those of one task become its shards together.
        tell: told in a line of each shard.
        shard_bytes: how large a shard may become, if it has more than one episode.
        agree: told what is there when no other process can change it any more; raises where nothing is to be written.

    Raises:
        DataError: a task of two widths, numbers that are not finite, no room on the disk, or a folder that `place`
            refuses.
        ConfigError: another process is writing to it.
        OSError: it cannot be written; what was there is as it was.
    """
    with place(folder), locked(folder, "data"):
        for left in folder.iterdir():  # by a process that was killed
            if _ASIDE.fullmatch(left.name) and left.is_file() and not left.is_symlink():
                left.unlink()
        old = found_index(folder) if (folder / INDEX).exists() else None
        agree(old)
        there = () if old is None else old.shards
        tasks, chains = _tasks(old, parts)
        plan = [
            (number, first, stop)
            for number, chain in chains.items()
            for first, stop in pieces(chain.lengths, max(shard_bytes // tasks[number].row_bytes, 1))
        ]
        if not plan:
            raise DataError(f"data {str(folder)!r}: got no episodes, allowed: at least one")
        begun = folder / f"unfinished-{_key(tasks, chains, shard_bytes)}.json"
        kept = {s.file: s for s in _shards(begun) if s not in there}
        _check_room(folder, sum(int(c.lengths.sum()) * tasks[n].row_bytes for n, c in chains.items()), kept)
        _tidy(folder, there, keep=begun)
        begin = 1 + max((_number(p.name) for p in folder.iterdir() if p.name not in kept), default=-1)
        names = [f"{begin + i:05d}-{_slug(tasks[number].name)}.safetensors" for i, (number, *_) in enumerate(plan)]
        for file in kept.keys() - {*names}:
            _remove(folder, kept.pop(file))
        done: list[Shard] = []
        for i, (name, (number, first, stop)) in enumerate(zip(names, plan, strict=True)):
            made = _whole(folder / name, kept.get(name))
            how = "is there" if made else "written"
            if made is None:
                if os.path.lexists(folder / name) and name not in kept:
                    raise DataError(f"data {str(folder / name)!r}: is there, but no index names it")

                def announce(shard_: Shard, name: str = name) -> None:
                    later = (s for file, s in kept.items() if file > name)
                    Index(tasks, (*done, shard_, *later)).write(begun)

                made = _written(folder / name, number, tasks[number], chains[number], first, stop, announce)
            done.append(made)
            tell(f"{i + 1}/{len(plan)} {name}: {made.episodes:,} episodes, {made.bytes / 1e6:,.1f} MB, {how}")
        index = Index(tasks, (*there, *done))
        index.write(folder / INDEX)
        _tidy(folder, index.shards)
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


def _written(
    path: Path, number: int, task: Task, chain: _Chain, first: int, stop: int, announce: Callable[[Shard], None]
) -> Shard:
    """Write a shard, which is announced when it is complete and does not have its name yet."""
    found, ends, made = [np.zeros(0)], 0, list[Shard]()

    def checked() -> Iterator[Rows]:
        nonlocal ends
        for part, a, b in chain.pieces(first, stop, max(_PIECE_BYTES // task.row_bytes, 1)):
            lengths = part.lengths[a:b]
            rows = judged(part.rows(a, b), lengths, f"{part.origin}, {task.name}", a)
            found.append(returns(rows, lengths))
            ends += int(rows.terminated.sum())
            yield rows

    lengths = chain.lengths[first:stop]

    def complete(tmp: Path) -> None:
        made.append(
            Shard(
                path.name,
                number,
                len(lengths),
                int(lengths.sum()),
                tmp.stat().st_size,
                sha256(tmp),
                run_lengths(lengths),
                _summary(np.concatenate(found)),
                ends,
                _origin(chain, first, stop),
            )
        )
        announce(made[0])

    shard.write(path, task, int(lengths.sum()), checked(), complete)
    return made[0]


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
    return shortened("; ".join(names))


def shortened(origin: str) -> str:
    """Return where episodes come from as an index has it."""
    return origin if len(origin) <= _MOST_TEXT else origin[: _MOST_TEXT - 1] + "…"


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


def _tidy(folder: Path, needed: Sequence[Shard], keep: Path | None = None) -> None:
    """Remove what tries that were not finished have left beside the shards that are needed; not that of `keep`."""
    for begun in folder.glob(UNFINISHED):
        if begun == keep or not _BEGUN.fullmatch(begun.name) or not begun.is_file() or begun.is_symlink():
            continue
        for shard_ in _shards(begun):
            if shard_.file not in {s.file for s in needed}:
                _remove(folder, shard_)
        begun.unlink()


def _remove(folder: Path, told: Shard) -> None:
    """Remove a shard of a try that was not finished, if it is what that wrote."""
    if _whole(folder / told.file, told):
        (folder / told.file).unlink()


def _check_room(folder: Path, needed: int, kept: dict[str, Shard]) -> None:
    needed -= sum(s.bytes for s in kept.values())
    if needed > (free := shutil.disk_usage(folder).free):
        raise DataError(f"data {str(folder)!r}: needs {needed / 1e9:,.1f} GB, allowed: the {free / 1e9:,.1f} GB free")


def _number(file: str) -> int:
    """Return the number that a shard's name begins with; -1 of another name."""
    found = re.match(r"(\d{5,9})-", file)
    return -1 if found is None else int(found[1])


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
