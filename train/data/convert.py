"""What a path is, and the episodes in it: official files, a Minari data set, or one of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tdmpc2_fast.errors import DataError
from tdmpc2_fast.task_sets import TASK_SETS

from . import minari, official, writer
from .dataset import DataSet, found_index
from .index import INDEX, Index
from .rows import Episodes


def convert(
    sources: Sequence[Path],
    out: Path,
    tasks: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
    shard_bytes: int = writer.SHARD_BYTES,
) -> Index:
    """Make one data set of others; return its index. A try that was interrupted is gone on with.

    Args:
        sources: official files or folders of them, Minari data sets, data sets of ours.
        out: a folder that is new, or that a conversion has begun to fill.
        tasks: of official files, the set or the names of tasks in their order; of Minari, the name of the task.

    Raises:
        DataError: a source that cannot be read, or `out` is a whole data set already.
    """
    if (out / INDEX).exists():
        raise DataError(f"config key 'out': {str(out)!r} is a whole data set already, allowed: a new folder")
    writer.check_place(out)
    found: list[Episodes] = []
    try:
        for source in sources:
            found += episodes(source, tasks, tell)
        return writer.write(out, found, tell, shard_bytes)
    finally:
        for part in found:
            if isinstance(part, minari.MinariEpisodes):
                part.close()


def episodes(path: Path, tasks: str | None, tell: Callable[[str], None] = lambda line: None) -> list[Episodes]:
    """Return the episodes at a path; arguments and errors are those of `convert`."""
    names = None if tasks is None else TASK_SETS.get(tasks, tuple(tasks.split(",")))
    if path.is_dir():
        if any((path / x / minari.METADATA).is_file() for x in (".", "data")):
            return [minari.MinariEpisodes(path, tasks)]
        files = sorted(path.glob("*.pt"))
        if files and not (path / INDEX).exists():
            return [part for file in files for part in _official(file, names, tell)]
        if tasks is not None:
            raise DataError(
                f"config key 'tasks': got {tasks!r}, allowed: none with {str(path)!r}, which has its own names"
            )
        found_index(path)
        data = DataSet.open(path)
        return [part for t in data.tasks for part in data.episodes(t.name)]
    if not path.exists():
        raise DataError(f"data {str(path)!r}: is not there")
    if path.name == minari.FILE:
        return [minari.MinariEpisodes(path.parent, tasks)]
    return _official(path, names, tell)


def _official(path: Path, names: Sequence[str] | None, tell: Callable[[str], None]) -> list[Episodes]:
    found = official.episodes(path, names)
    tell(f"{path}: {sum(len(e.lengths) for e in found):,} episodes of {len(found)} tasks, its checksums are right")
    return found
