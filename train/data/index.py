"""The table of contents of a data set: `index.json`, read as a stranger's file and believed in nothing.

docs/data.md describes the format. What an index may claim is bounded before memory is taken for it, every key is one
that is known, and a checksum covers all of it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdmpc2_fast.errors import DataError
from tdmpc2_fast.model.files import replacing

from .rows import Lengths

FORMAT = "tdmpc2-fast-data/1"
INDEX = "index.json"
UNFINISHED = "unfinished-*.json"
"""Indices of what is there of a set that is being written."""
_MOST_BYTES = 64 << 20
_MOST_SHARDS = 100_000
_MOST_WIDTH = 1_000_000
_MOST_ROWS = 2**31 - 1  # of a shard, so that the number of a row fits into 32 bits
_MOST_TEXT = 500
_MOST_RETURN = 1e300  # integers in JSON have no end
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Task:
    """A task of a data set: its name and the widths of its observations and actions."""

    name: str
    obs_dim: int
    action_dim: int

    @property
    def row_bytes(self) -> int:
        """The bytes of a row in a shard."""
        return 4 * (self.obs_dim + self.action_dim + 1) + 1


@dataclass(frozen=True)
class Shard:
    """A file with episodes of one task.

    lengths: rows of the episodes in their order, as pairs of a length and how many episodes in a row have it.
    returns: the smallest, the mean and the largest of the sums of rewards; terminated: episodes that terminate.
    origin: where the episodes come from.
    """

    file: str
    task: int
    episodes: int
    rows: int
    bytes: int
    sha256: str
    lengths: tuple[tuple[int, int], ...]
    returns: tuple[float, float, float]
    terminated: int
    origin: str

    def each_length(self) -> Lengths:
        """Return the rows of each episode: (episodes,) int64."""
        pairs = np.asarray(self.lengths, np.int64)
        return np.repeat(pairs[:, 0], pairs[:, 1])


@dataclass(frozen=True)
class Index:
    """What a data set holds."""

    tasks: tuple[Task, ...]
    shards: tuple[Shard, ...]

    def digest(self) -> str:
        """Return the SHA-256 that stands in the file."""
        return _digest(self._plain())

    def write(self, path: Path) -> None:
        """Write the index; what is at `path` is replaced when it is on the disk."""
        text = json.dumps(self._plain() | dict(sha256=self.digest()), indent=1, allow_nan=False)
        with replacing(path) as tmp:
            tmp.write_text(text + "\n", encoding="utf-8")

    def _plain(self) -> dict[str, Any]:
        shards = [{**vars(s), "lengths": [list(x) for x in s.lengths], "returns": list(s.returns)} for s in self.shards]
        return dict(format=FORMAT, tasks=[vars(t) for t in self.tasks], shards=shards)


def run_lengths(lengths: Lengths) -> tuple[tuple[int, int], ...]:
    """Return lengths as pairs of a length and how often it comes in a row."""
    change = np.flatnonzero(np.diff(lengths)) + 1
    starts = np.concatenate([[0], change, [len(lengths)]])
    return tuple((int(lengths[a]), int(b - a)) for a, b in itertools.pairwise(starts))


def read(path: Path) -> Index:
    """Read an index.

    Raises:
        DataError: it is none, damaged, of another version, or claims what cannot be.
        OSError: it cannot be read.
    """
    with path.open("rb") as f:
        data = f.read(_MOST_BYTES + 1)
    try:
        if len(data) > _MOST_BYTES:
            raise DataError(f"more than {_MOST_BYTES:,} bytes long")
        return _index(_parsed(data))
    except DataError as e:
        raise DataError(f"data {str(path)!r}: {e}") from None


def _parsed(data: bytes) -> Any:
    """Read JSON in which no key comes twice and every number is one."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise DataError("lists or objects in one another deeper than any index has them") from None
    except (ValueError, MemoryError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"no JSON, or truncated ({e})") from None


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DataError(f"the key {key[:_MOST_TEXT]!r} comes twice in an object")
        found[key] = value
    return found


def _no_number(text: str) -> Any:
    raise DataError(f"got {text}, allowed: finite numbers")


def _index(found: Any) -> Index:
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise DataError(f"format {str(version)[:_MOST_TEXT]!r}, allowed: {FORMAT!r}")
    top = _object(found, "index", {"format", "tasks", "shards", "sha256"})
    if top["sha256"] != _digest({k: v for k, v in top.items() if k != "sha256"}):
        raise DataError("its checksum differs from what it holds: it is damaged")
    tasks = tuple(_task(x, f"tasks[{i}]") for i, x in enumerate(_list(top["tasks"], "tasks", 1, _MOST_SHARDS)))
    names = [t.name for t in tasks]
    if len({*names}) < len(names):
        raise DataError(f"tasks: {max(names, key=names.count)!r} comes twice")
    given = _list(top["shards"], "shards", 1, _MOST_SHARDS)
    shards = tuple(_shard(x, f"shards[{i}]", tasks) for i, x in enumerate(given))
    files = [s.file.lower() for s in shards]  # some file systems know no case
    if len({*files}) < len(files):
        raise DataError(f"shards: {max(files, key=files.count)!r} comes twice")
    return Index(tasks, shards)


def _task(found: Any, where: str) -> Task:
    x = _object(found, where, {"name", "obs_dim", "action_dim"})
    widths = (_whole(x[k], f"{where}.{k}", 1, _MOST_WIDTH) for k in ("obs_dim", "action_dim"))
    return Task(task_name(x["name"], f"{where}.name"), *widths)


def task_name(name: Any, where: str) -> str:
    """Return the name of a task, if a data set may have it; raises `DataError`."""
    if not isinstance(name, str) or not name or len(name) > _MOST_TEXT or not name.isprintable():
        raise DataError(f"{where}: got {str(name)[:_MOST_TEXT]!r}, allowed: the name of a task")
    return name


def _shard(found: Any, where: str, tasks: tuple[Task, ...]) -> Shard:
    x = _object(found, where, set(Shard.__dataclass_fields__))
    file, sha256, origin = (x[k] for k in ("file", "sha256", "origin"))
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        raise DataError(f"{where}.file: got {str(file)[:_MOST_TEXT]!r}, allowed: NAME.safetensors in the same folder")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise DataError(f"{where}.sha256: got {str(sha256)[:_MOST_TEXT]!r}, allowed: 64 digits")
    if not isinstance(origin, str) or len(origin) > _MOST_TEXT or not origin.isprintable():
        raise DataError(f"{where}.origin: got {str(origin)[:_MOST_TEXT]!r}, allowed: a line of text")
    task = _whole(x["task"], f"{where}.task", 0, len(tasks) - 1)
    rows = _whole(x["rows"], f"{where}.rows", 2, _MOST_ROWS)
    episodes = _whole(x["episodes"], f"{where}.episodes", 1, rows // 2)
    terminated = _whole(x["terminated"], f"{where}.terminated", 0, episodes)
    lengths = _lengths(x["lengths"], f"{where}.lengths", episodes, rows)
    least = rows * tasks[task].row_bytes
    size = _whole(x["bytes"], f"{where}.bytes", least, least + _MOST_BYTES)
    low, mean, high = _numbers(x["returns"], f"{where}.returns", 3)
    if not low <= mean <= high:
        raise DataError(f"{where}.returns: got {[low, mean, high]}, allowed: the smallest, the mean, the largest")
    return Shard(file, task, episodes, rows, size, sha256, lengths, (low, mean, high), terminated, origin)


def _lengths(found: Any, where: str, episodes: int, rows: int) -> tuple[tuple[int, int], ...]:
    pairs = []
    for i, pair in enumerate(_list(found, where, 1, episodes)):
        length, count = _list(pair, f"{where}[{i}]", 2, 2)
        count = _whole(count, f"{where}[{i}]", 1, episodes)
        pairs.append((_whole(length, f"{where}[{i}]", 2, rows), count))
    total = sum(count for _, count in pairs), sum(length * count for length, count in pairs)
    if total != (episodes, rows):
        raise DataError(f"{where}: {total[0]:,} episodes of {total[1]:,} rows, allowed: {episodes:,} of {rows:,}")
    return tuple(pairs)


def _object(found: Any, where: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise DataError(f"{where}: got {type(found).__name__}, allowed: an object")
    if found.keys() != keys:
        odd = sorted(found.keys() ^ keys)[0][:_MOST_TEXT]
        raise DataError(f"{where}: {'unknown' if odd in found else 'lacks the'} key {odd!r}")
    return found


def _list(found: Any, where: str, low: int, high: int) -> list[Any]:
    if not isinstance(found, list) or not low <= len(found) <= high:
        got = f"{len(found):,}" if isinstance(found, list) else type(found).__name__
        raise DataError(f"{where}: got {got}, allowed: a list of {low:,} to {high:,}")
    return found


def _whole(found: Any, where: str, low: int, high: int) -> int:
    if type(found) is not int or not low <= found <= high:
        raise DataError(f"{where}: got {str(found)[:_MOST_TEXT]}, allowed: an integer from {low:,} to {high:,}")
    return found


def _numbers(found: Any, where: str, count: int) -> list[float]:
    numbers = _list(found, where, count, count)
    if not all(type(x) in (int, float) and abs(x) <= _MOST_RETURN for x in numbers):
        raise DataError(f"{where}: got {str(numbers)[:_MOST_TEXT]}, allowed: finite numbers")
    return [float(x) for x in numbers]


def _digest(plain: dict[str, Any]) -> str:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
