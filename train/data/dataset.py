"""A data set, opened: what it holds, and its episodes.

    walker/
      index.json                            tasks, shards, lengths, checksums
      00000-walker-walk.safetensors         episodes of one task: obs, action, reward, terminated

docs/data.md describes the format.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from tdmpc2_fast.errors import DataError

from .index import INDEX, UNFINISHED, Index, Shard, Task, read
from .maps import Maps
from .rows import Episodes, Lengths, Rows, cut, firsts
from .shard import ShardFile


@dataclass(frozen=True)
class TaskData:
    """What a data set holds of a task.

    episode_length: decisions of its longest episode; steps: decisions of all; returns of the episodes.
    """

    name: str
    obs_dim: int
    action_dim: int
    episode_length: int
    episodes: int
    steps: int
    mean_return: float
    min_return: float
    max_return: float
    terminated: int
    nbytes: int


class DataSet:
    """A data set whose files are there and have the sizes and headers they must have. `open` makes one.

    folder, index; tasks: what it holds of each; files: its shards; maps: their rows.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index
        self.files = tuple(ShardFile(folder, s, index.tasks[s.task]) for s in index.shards)
        self.tasks = tuple(_told(i, t, index) for i, t in enumerate(index.tasks) if any(index_of(index, i)))
        self.maps = Maps(self.files)

    @classmethod
    def open(cls, folder: Path | str) -> DataSet:
        """Open a data set in our format. Checksums of numbers are left to `check`.

        Raises:
            DataError: there is none, it is not finished, damaged, unsafe or of another version.
            OSError: it cannot be read.
        """
        folder = Path(folder).expanduser()
        return cls(folder, found_index(folder))

    def episodes(self, task: str) -> list[Episodes]:
        """Return the episodes of a task, a shard at a time."""
        shards = enumerate(self.index.shards)
        return [
            ShardEpisodes(self.maps, i, s, self.index.tasks[s.task])
            for i, s in shards
            if self.index.tasks[s.task].name == task
        ]

    def close(self) -> None:
        """Let go of the files."""
        self.maps.close()


def found_index(folder: Path) -> Index:
    """Read the index of a folder; errors are those of `DataSet.open`."""
    if not folder.is_dir():
        raise DataError(
            f"data {str(folder)!r}: {'is a file' if folder.exists() else 'is not there'}, allowed: a folder"
        )
    path = folder / INDEX
    if not path.is_file() or path.is_symlink():
        what = f"has no {INDEX}"
        if any(folder.glob(UNFINISHED)):
            what = "is not finished: the command that was writing it goes on where it stopped"
        elif any(folder.glob("*.pt")):
            what += f": tdmpc2-fast data convert {folder} out=FOLDER makes a data set of these .pt files"
        raise DataError(f"data {str(folder)!r}: {what}")
    return read(path)


class ShardEpisodes:
    """The episodes of a shard, as `Episodes`."""

    def __init__(self, maps: Maps, number: int, shard: Shard, task: Task) -> None:
        self._maps, self._number, self._shard = maps, number, shard
        self.task, self.obs_dim, self.action_dim = task.name, task.obs_dim, task.action_dim
        self.origin, self.identity = shard.origin, shard.sha256

    @functools.cached_property
    def lengths(self) -> Lengths:
        """Rows of each episode."""
        return self._shard.each_length()

    @functools.cached_property
    def _firsts(self) -> Lengths:
        return firsts(self.lengths)

    def rows(self, first: int, stop: int) -> Rows:
        """Return episodes from `first` to before `stop`, in memory of their own."""
        a, b = (int(self._firsts[i]) for i in (first, stop))
        found = cut(self._maps[self._number], a, b)
        self._maps.look()
        return found


def index_of(index: Index, task: int) -> list[Shard]:
    """Return the shards of a task by its number."""
    return [s for s in index.shards if s.task == task]


def _told(number: int, task: Task, index: Index) -> TaskData:
    shards = index_of(index, number)
    episodes = sum(s.episodes for s in shards)
    return TaskData(
        task.name,
        task.obs_dim,
        task.action_dim,
        episode_length=max(length for s in shards for length, _ in s.lengths) - 1,
        episodes=episodes,
        steps=sum(s.rows for s in shards) - episodes,
        mean_return=sum(s.returns[1] * s.episodes for s in shards) / episodes,
        min_return=min(s.returns[0] for s in shards),
        max_return=max(s.returns[2] for s in shards),
        terminated=sum(s.terminated for s in shards),
        nbytes=sum(s.bytes for s in shards),
    )
