"""A TensorDict that `torch.save` wrote, read a few rows at a time, without torch and without building what is pickled.

    Called("tensordict._reductions._make_td", (TensorDict, state))     tensordict 0.5 and newer
    Made("tensordict._td.TensorDict", state)                           0.3, 0.4; 0.2 names another module
    Made("tensordict.tensordict.LazyStackedTensorDict", state)         torch.stack of 0.2: one TensorDict a row

`state` holds the tensors under `_tensordict`, or under `tensordicts` those that are stacked. Each tensor is a view of
a storage, which is an entry of the zip archive that is not compressed. All that is claimed of sizes is compared with
the archive's table of contents before anything is read.
"""

from __future__ import annotations

import io
import itertools
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from . import dry_pickle, foreign

_DTYPES = dict(Float="f4", Double="f8", Half="f2", Long="i8", Int="i4", Short="i2", Char="i1", Byte="u1", Bool="?")
_TENSORDICT = {"tensordict._td.TensorDict", "tensordict.tensordict.TensorDict"}
_STACKED = {"tensordict._lazy.LazyStackedTensorDict", "tensordict.tensordict.LazyStackedTensorDict"}
_MAKE = "tensordict._reductions._make_td"
_KNOWN = {*_TENSORDICT, *_STACKED, _MAKE, "tensordict.utils._StringOnlyDict", "__builtin__.set", "builtins.set"}
_TENSOR = "torch._utils._rebuild_tensor_v2"
_CHUNK = 1 << 22
_LOCAL_HEADER = 30


class _Made(dict[Any, Any]):
    """An object without a body that a pickle makes of a name, with the state it gives it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _new(reader: Any) -> None:
    """Make what NEWOBJ asks for: nothing but its name."""
    args, cls = reader.stack.pop(), reader.stack.pop()
    if not isinstance(cls, dry_pickle.Name) or cls.name not in _KNOWN or args != ():
        raise dry_pickle.RefusedError(getattr(cls, "name", "an object of no class"))
    reader.stack.append(_Made(cls.name))


class _Reader(dry_pickle.Unpickler):
    dispatch = {**dry_pickle.Unpickler.dispatch, pickle.NEWOBJ[0]: _new}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        return dry_pickle.Name(full) if full in _KNOWN else super().find_class(module, name)


class _View(NamedTuple):
    """Rows of a tensor: where its storage begins in the file, and how it lies there."""

    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, path: Path, first: int, stop: int) -> NDArray[Any]:
        size, shape = self.dtype.itemsize, (stop - first, *self.shape[1:])
        if 0 in shape:
            return np.zeros(shape, self.dtype)
        numbers = sum((n - 1) * s for n, s in zip(shape, self.strides, strict=True)) + 1
        at = self.start + first * self.strides[0] * size
        held = np.fromfile(path, self.dtype, numbers, offset=at)
        if len(held) < numbers:
            raise DataError(f"data {str(path)!r}: truncated while it was read")
        strides = [s * size for s in self.strides]
        return np.lib.stride_tricks.as_strided(held, shape, strides, writeable=False)


class Column:
    """A tensor of the TensorDict, (E, T, ...), of which rows are read when they are asked for."""

    def __init__(self, path: Path, views: Sequence[_View]) -> None:
        self._path, self._views = path, views
        self._ends = np.cumsum([v.shape[0] for v in views])
        self.shape: tuple[int, ...] = (int(self._ends[-1]), *views[0].shape[1:])
        self.dtype = views[0].dtype

    def read(self, first: int, stop: int) -> NDArray[Any]:
        """Return rows from `first` to before `stop`: (stop - first, T, ...), in memory of their own."""
        found, at = [], int(np.searchsorted(self._ends, first, side="right"))
        while first < stop:
            view, end = self._views[at], int(self._ends[at])
            start = end - view.shape[0]
            found.append(view.read(self._path, first - start, min(stop, end) - start))
            first, at = end, at + 1
        return np.concatenate(found) if found else np.zeros((0, *self.shape[1:]), self.dtype)


class TensorDictFile:
    """The table of contents of such a file.

    path: of the file; shape: the batch's (E, T); columns: its tensors by name.

    Raises:
        DataError: it is of another kind, holds anything but tensors, is truncated, or claims more than it holds.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        entries = foreign.entries(path)
        if isinstance(entries, str):
            raise self._error(entries)
        self._entries = {k[5:]: e for k, e in entries.items() if k[:5] == "data/"}
        try:
            with zipfile.ZipFile(path) as z:
                data = z.read(entries["data.pkl"])
                order = z.read(entries["byteorder"])[:8] if "byteorder" in entries else b"little"
            self._starts = self._offsets()
        except (zipfile.BadZipFile, ValueError, RuntimeError, zlib.error, EOFError) as e:
            raise self._error(f"truncated or damaged ({e})") from e
        if order.strip() != b"little":
            raise self._error(f"byte order {order!r}, allowed: little")
        made: list[Any] = []
        if (wrong := foreign.tried(data, lambda: made.append(self._read(data)))) is not None:
            raise self._error(wrong)
        self.shape: tuple[int, int] = (0, 0)
        self.columns = self._columns(made[0])

    @property
    def checksums(self) -> dict[str, int]:
        """The CRC-32 of each storage, as the archive tells it."""
        return {key: entry.CRC for key, entry in self._entries.items()}

    def check(self) -> None:
        """Read all of it and raise `DataError` where a checksum of the archive differs."""
        with self.path.open("rb") as f:
            for key, entry in self._entries.items():
                f.seek(self._starts[key])
                left, crc = entry.file_size, 0
                while left and (piece := f.read(min(left, _CHUNK))):
                    left, crc = left - len(piece), zlib.crc32(piece, crc)
                if left or crc != entry.CRC:
                    raise self._error(f"the checksum of its part {entry.filename!r} differs: it is damaged")

    def _read(self, data: bytes) -> Any:
        reader = _Reader(io.BytesIO(data))
        found = reader.load()
        dry_pickle.check_depth(found)
        dry_pickle.check_storages(reader, {k: e.file_size for k, e in self._entries.items()})
        return found

    def _offsets(self) -> dict[str, int]:
        """Return where in the file each storage begins, as the record before it tells."""
        found = {}
        with self.path.open("rb") as f:
            for key, entry in self._entries.items():
                f.seek(entry.header_offset)
                head = f.read(_LOCAL_HEADER)
                name, extra = (int.from_bytes(head[i : i + 2], "little") for i in (26, 28))
                if not head.startswith(b"PK\3\4") or f.read(name) != entry.filename.encode():
                    raise ValueError(f"no {entry.filename!r} where the table of contents says")
                found[key] = entry.header_offset + _LOCAL_HEADER + name + extra
        ends = [found[k] + e.file_size for k, e in self._entries.items()]
        order = sorted(range(len(ends)), key=lambda i: ends[i])
        starts = list(found.values())
        if any(starts[b] < ends[a] for a, b in itertools.pairwise(order)):
            raise ValueError("parts of it overlap")
        if ends and max(ends) > self.path.stat().st_size:
            raise ValueError("a part of it ends behind the end of the file")
        return found

    def _columns(self, made: Any) -> dict[str, Column]:
        name, state = self._unwrapped(made)
        if name in _STACKED:
            inner, dim = state.get("tensordicts"), state.get("stack_dim")
            if not isinstance(inner, list) or not inner or dim != 0:
                raise self._error(f"a stack of TensorDicts along dimension {dim!r}, allowed: 0, and at least one")
            rows = [self._tensors(*self._unwrapped(x), leading=True) for x in inner]
        else:
            rows = [self._tensors(name, state, leading=False)]
        shapes = {shape for shape, _ in rows}
        if len({shape[1] for shape in shapes}) > 1:
            raise self._error("a stack of TensorDicts of different lengths")
        views: dict[str, list[_View]] = {key: [] for key in rows[0][1]}
        for _, tensors in rows:
            if tensors.keys() != views.keys():
                raise self._error("a stack of TensorDicts with different keys")
            for key, view in tensors.items():
                if views[key] and (view.shape[1:], view.dtype) != (views[key][0].shape[1:], views[key][0].dtype):
                    raise self._error(f"a stack of TensorDicts whose {key!r} differ in shape or dtype")
                views[key].append(view)
        self.shape = (sum(shape[0] for shape, _ in rows), rows[0][0][1])
        return {key: Column(self.path, found) for key, found in views.items()}

    def _unwrapped(self, made: Any) -> tuple[str, dict[Any, Any]]:
        """Return the class and the state of a pickled TensorDict."""
        if isinstance(made, dry_pickle.Called) and made.name == _MAKE and len(made.args) == 2:
            name, state = getattr(made.args[0], "name", ""), made.args[1]
        else:
            name, state = getattr(made, "name", ""), getattr(made, "state", None)
        if name not in _TENSORDICT | _STACKED or not isinstance(state, dict):
            what = type(made).__name__ if isinstance(made, (dict, list)) and not name else name or "another object"
            raise self._error(f"it holds {what}, allowed: a TensorDict of episodes")
        return name, state

    def _tensors(self, name: str, state: dict[Any, Any], leading: bool) -> tuple[tuple[int, int], dict[str, _View]]:
        """Return batch shape (E, T) and tensors of a TensorDict; leading: it is one row of a stack."""
        held, batch = state.get("_tensordict"), state.get("_batch_size")
        if name in _STACKED or not isinstance(held, dict) or not isinstance(batch, tuple):
            raise self._error("a TensorDict in a form that no version known here writes")
        batch = (1, *batch) if leading else batch
        if len(batch) != 2 or any(type(n) is not int or n < 1 for n in batch):
            raise self._error(f"a TensorDict of the batch {batch}, allowed: (episodes, steps)")
        found = {}
        for key, tensor in held.items():
            if not isinstance(key, str) or not isinstance(tensor, dry_pickle.Called) or tensor.name != _TENSOR:
                what = getattr(tensor, "name", type(tensor).__name__)
                raise self._error(f"its entry {key!r} is {what}, allowed: a tensor")
            found[key] = self._view(key, tensor, batch, leading)
        return (batch[0], batch[1]), found

    def _view(self, key: str, tensor: dry_pickle.Called, batch: tuple[int, ...], leading: bool) -> _View:
        storage, offset, size, stride = tensor.args[:4]
        if storage.kind not in _DTYPES:
            raise self._error(f"{key!r} is of {storage.kind}, allowed: {', '.join(_DTYPES)}")
        dtype = np.dtype(_DTYPES[storage.kind]).newbyteorder("<")
        if leading:
            size, stride = (1, *size), (0, *stride)
        if tuple(size[:2]) != batch:
            raise self._error(f"{key!r} has the shape {tuple(size)}, allowed: {batch} and what follows")
        inner = sum((n - 1) * s for n, s in zip(size[1:], stride[1:], strict=True)) + 1 if 0 not in size else 0
        if size[0] > 1 and 0 < stride[0] < inner:
            raise self._error(f"{key!r} does not lie episode behind episode: save it with .contiguous()")
        start = self._starts[storage.key] + offset * dtype.itemsize
        return _View(start, dtype, tuple(size), tuple(stride))

    def _error(self, what: str) -> DataError:
        return DataError(f"data {str(self.path)!r}: {what}")
