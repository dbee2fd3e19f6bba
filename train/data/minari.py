"""Minari's data sets: HDF5 files of episodes of one Gymnasium environment, read where they lie.

    data/metadata.json      spaces of observations and actions, the environment's id
    data/main_data.hdf5     episode_N/{observations, actions, rewards, terminations, truncations}

Observations become what an agent of that environment sees (`train/envs/spaces.py`), actions what it would have done in
[-1, 1]: the inverse of how actions reach the environment. Nothing in a file may lead out of it.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.errors import ConfigError, DataError

from ..envs.spaces import ObservationSpace, action_space, parts
from ..run.replay_files import sha256
from .rows import Lengths, Rows

METADATA = "metadata.json"
FILE = "main_data.hdf5"
_MOST_BYTES = 16 << 20  # of the metadata
_MOST_SPACES = 1000
_LONGEST_EPISODE = 1 << 30  # bytes
_MOST_PACKED = 200  # times the bytes of a file that its episodes may have


class MinariEpisodes:
    """The episodes of such a data set, as `Episodes`; the file is open until `close`.

    Args:
        folder: the one with `metadata.json`, or that above it.
        task: its name; none: the id of the environment.

    Raises:
        DataError: it is no such data set, damaged, leads out of its folder, or has spaces that no agent here takes.
    """

    def __init__(self, folder: Path, task: str | None = None) -> None:
        self.folder = folder / "data" if (folder / "data" / METADATA).is_file() else folder
        about = self._metadata()
        spec = about.get("env_spec")
        self.task = task or str(self._loaded(spec, "env_spec").get("id", "")) if task or spec else ""
        if not self.task:
            raise self._error("does not name its environment: tasks=NAME does")
        self._observations = self._space(about, "observation_space")
        self._actions = self._space(about, "action_space")
        try:
            self.obs_dim = ObservationSpace(self._observations, "state", self.task).shape[0]
            self.action_dim = action_space(self._actions, self.task).size
        except ConfigError as e:
            raise self._error(str(e)) from e
        self._read_parts = [(p, _reader(s)) for p, s in parts(self._observations)]
        if odd := [s for (_, r), (_, s) in zip(self._read_parts, parts(self._observations), strict=True) if r is None]:
            raise self._error(f"has observations of {type(odd[0]).__name__}, allowed: Box, Discrete and MultiBinary")
        path = self.folder / FILE
        if path.is_symlink() or not path.is_file():
            raise self._error(f"has no {FILE}")
        self.identity = sha256(path)
        self.origin = f"Minari {str(about.get('dataset_id', self.folder.name))[:100]} ({self.identity[:8]})"
        self._file = self._opened(path)
        try:
            with self._reading():
                self._groups = [self._group(i) for i in range(self._count(about))]
                self.lengths: Lengths = self._measured(path.stat().st_size)
        except BaseException:
            self.close()
            raise

    def rows(self, first: int, stop: int) -> Rows:
        """Return episodes from `first` to before `stop`."""
        with (
            self._reading(),
            np.errstate(over="ignore", invalid="ignore"),
        ):  # what becomes infinite is told of by `judged`
            each = [self._episode(i) for i in range(first, stop)]
        return Rows(*(np.concatenate(x) for x in zip(*each, strict=True)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _measured(self, size: int) -> Lengths:
        """Return the rows of each episode; size: the bytes of the file."""
        found = np.array([self._set(g, "rewards").shape[0] + 1 for g in self._groups], np.int64)
        claimed = int(found.sum()) * 4 * (self.obs_dim + self.action_dim + 1)
        if claimed > _MOST_PACKED * size:
            raise self._error(f"claims episodes of {claimed:,} bytes in a file of {size:,}")
        if (found < 2).any():
            raise self._error(f"episode {int(found.argmin())} has no step")
        return found

    def _episode(self, i: int) -> Rows:
        group, steps = self._groups[i], int(self.lengths[i]) - 1
        obs = [
            read(self._numbers(group, steps + 1, "observations", *_names(path)))
            for path, read in self._read_parts
            if read
        ]
        action = np.full((steps + 1, self.action_dim), np.nan, np.float32)
        action[1:] = _undone(self._actions, self._numbers(group, steps, "actions"))
        reward = np.full(steps + 1, np.nan, np.float32)
        reward[1:] = self._numbers(group, steps, "rewards").reshape(steps)
        ends = np.zeros(steps + 1, bool)
        ends[1:] = self._numbers(group, steps, "terminations").reshape(steps)
        found = np.concatenate(obs, axis=1, dtype=np.float32)
        if found.shape[1] != self.obs_dim:
            raise self._error(f"{group.name} has observations of {found.shape[1]} numbers, allowed: {self.obs_dim}")
        return Rows(found, action, reward, ends)

    def _numbers(self, group: Any, count: int, *names: str) -> NDArray[Any]:
        """Return the numbers of a dataset of so many rows."""
        found = self._set(group, *names)
        if found.shape[:1] != (count,) or found.dtype.kind not in "fiub":
            raise self._error(
                f"{found.name} has {found.shape} of {found.dtype}, allowed: numbers, {count} rows of them"
            )
        return np.asarray(found[()])

    def _set(self, group: Any, *names: str) -> Any:
        """Return a dataset of an episode that lies in this file."""
        import h5py

        found = group
        for name in names:
            if not isinstance(found, h5py.Group) or name not in found:
                raise self._error(f"{group.name} lacks {'/'.join(names)}")
            self._stays(found, name)
            found = found[name]
        if not isinstance(found, h5py.Dataset) or found.shape is None or not found.shape:
            raise self._error(f"{group.name} has no numbers at {'/'.join(names)}")
        if found.external or found.is_virtual:
            raise self._error(f"{found.name} leads to other files")
        if found.nbytes > _LONGEST_EPISODE:
            raise self._error(f"{found.name} claims {found.nbytes:,} bytes, allowed: {_LONGEST_EPISODE:,} an episode")
        return found

    def _group(self, i: int) -> Any:
        import h5py

        name = f"episode_{i}"
        if name not in self._file:
            raise self._error(f"lacks {name}")
        self._stays(self._file, name)
        found = self._file[name]
        if not isinstance(found, h5py.Group):
            raise self._error(f"{name} is no group")
        return found

    def _stays(self, group: Any, name: str) -> None:
        import h5py

        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise self._error(f"{group.name.rstrip('/')}/{name} is a link, which may lead to other files")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Say that the file is damaged where the library stumbles over it, which it does in many ways."""
        try:
            yield
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, OSError, OverflowError, MemoryError) as e:
            raise self._error(f"{FILE} is damaged ({e})") from e

    def _opened(self, path: Path) -> Any:
        try:
            import h5py
        except ImportError as e:
            raise DataError("a Minari data set needs h5py; pip install 'tdmpc2-fast[minari]'") from e
        try:
            return h5py.File(path, "r")
        except OSError as e:
            raise self._error(f"{FILE} is truncated, damaged or no HDF5 ({e})") from e

    def _metadata(self) -> dict[str, Any]:
        path = self.folder / METADATA
        if path.stat().st_size > _MOST_BYTES:
            raise self._error(f"{METADATA} has more than {_MOST_BYTES:,} bytes")
        about = self._loaded(path.read_text(encoding="utf-8", errors="replace"), METADATA)
        kind = about.get("data_format", "hdf5")
        if kind != "hdf5":
            raise self._error(f"has the format {str(kind)[:50]!r}, allowed: hdf5")
        return about

    def _loaded(self, text: Any, what: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except (ValueError, TypeError, RecursionError) as e:
            raise self._error(f"{what} is no JSON ({type(e).__name__})") from None
        if not isinstance(found, dict):
            raise self._error(f"{what} is no JSON object")
        return found

    def _count(self, about: dict[str, Any]) -> int:
        count = about.get("total_episodes")
        if type(count) is not int or not 0 < count <= len(self._file):
            raise self._error(f"says it has {str(count)[:50]} episodes, allowed: the {len(self._file):,} in {FILE}")
        return count

    def _space(self, about: dict[str, Any], name: str) -> Any:
        if name not in about:
            raise self._error(f"{METADATA} lacks the key {name!r}")
        left = [_MOST_SPACES]
        try:
            return _space(self._loaded(about[name], name), left)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError, RecursionError, OverflowError) as e:
            if isinstance(e, DataError):
                raise
            raise self._error(f"{name} is not in a form known here ({type(e).__name__}: {e})") from e

    def _error(self, what: str) -> DataError:
        return DataError(f"data {str(self.folder)!r}: {what}")


def _space(found: dict[str, Any], left: list[int]) -> Any:
    """Build a space that Minari has written down; left: how many more there may be."""
    from gymnasium import spaces

    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"more than {_MOST_SPACES} spaces")
    kind = found["type"]
    if kind == "Dict":
        return spaces.Dict([(k, _space(s, left)) for k, s in found["subspaces"].items()])  # in their order
    if kind == "Tuple":
        return spaces.Tuple([_space(s, left) for s in found["subspaces"]])
    if kind == "Box":
        low, high = (np.asarray(found[k], np.float64).astype(found["dtype"]) for k in ("low", "high"))
        return spaces.Box(low, high, tuple(found["shape"]), np.dtype(found["dtype"]))
    if kind == "Discrete":
        return spaces.Discrete(int(found["n"]), start=int(found["start"]))
    if kind == "MultiBinary":
        return spaces.MultiBinary(found["n"])
    raise ValueError(f"a space of the type {str(kind)[:50]!r}")


def _reader(space: Any) -> Any:
    """Return what makes (n, numbers) float32 of a space's values, in the order of `ObservationSpace`."""
    from gymnasium import spaces

    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return lambda x: x.reshape(len(x), -1).astype(np.float32)
    if isinstance(space, spaces.Discrete):
        return functools.partial(_one_hot, int(space.n), int(space.start))
    return None


def _one_hot(n: int, start: int, x: NDArray[Any]) -> NDArray[np.float32]:
    index = x.reshape(len(x)).astype(np.int64) - start
    if ((index < 0) | (index >= n)).any():
        raise DataError(f"data: got {int(index.min()) + start} to {int(index.max()) + start} of Discrete({n})")
    return np.eye(n, dtype=np.float32)[index]


def _undone(space: Any, action: NDArray[Any]) -> NDArray[np.float32]:
    """Return the actions in [-1, 1] that reach the environment as these: (n, A)."""
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return 2 * _one_hot(int(space.n), int(space.start), action) - 1
    if not isinstance(space, spaces.Box):
        raise DataError(f"data: actions of {type(space).__name__}, allowed: Box and Discrete")
    low, high = (np.ravel(x).astype(np.float64) for x in (space.low, space.high))
    x = action.reshape(len(action), -1).astype(np.float64)
    if x.shape[1] != len(low):
        raise DataError(f"data: actions of {x.shape[1]} numbers, allowed: {len(low)}")
    half = np.where(high > low, high - low, 1) / 2
    return np.where(high > low, np.clip((x - (low + high) / 2) / half, -1, 1), 0).astype(np.float32)


def _names(path: tuple[Any, ...]) -> list[str]:
    """Return the names of HDF5 groups on a path of keys and places."""
    return [f"_index_{key}" if isinstance(key, int) else str(key) for key in path]
