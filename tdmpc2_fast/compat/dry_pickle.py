"""What a pickle of torch would build, found without building it: which names it calls for, what its tensors claim.

`torch.load(weights_only=True)` runs no code either, but allocates what a file claims, and its messages say how to run
the file all the same. Here nothing is imported, called or allocated: each name stands for an object without a body.
"""

from __future__ import annotations

import functools
import io
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

MAGIC = 0x1950A86A20F9469CFC6C
"""The number that a file of torch before 1.6 begins with."""
_LEGACY_HEAD = 3  # pickles before the one with the object: magic number, version, machine
_HARMLESS = {
    "_codecs.encode",
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "torch.storage.UntypedStorage",
}
_DTYPE = re.compile(r"torch\.(u?int\d+|float\w+|bfloat16|bool|half|double|long|short)$")
_STORAGE = re.compile(r"torch\.(?:cuda\.)?(\w+)Storage$")
_BYTES = dict(Double=8, Float=4, Half=2, BFloat16=2, Long=8, Int=4, Short=2, Char=1, Byte=1, Bool=1, Untyped=1)
_BYTES |= dict(ComplexFloat=8, ComplexDouble=16)
MOST_BYTES = 8 << 20
"""The longest pickle that is looked at, of which each byte may make a list; a state dict's has a hundredth of it."""
_TOO_DEEP = 64  # dicts and lists in one another
_MOST_DIMS = 64  # of a tensor, as in torch
_BITS = 63  # of a number
_KEYS = (str, int, float, bytes, type(None))
"""What may be a key. Tuples in tuples are small in a file and take for ever to hash."""


class RefusedError(Exception):
    """A pickle calls for something that is no weight; the message is its full name."""


class ClaimError(Exception):
    """A pickle claims more than its file holds; the message says what."""


class Storage(NamedTuple):
    """Memory that a pickle asks for: its name in the file, the bytes it claims, and of a number, and of what kind."""

    key: str
    nbytes: int
    itemsize: int
    kind: str


class Called:
    """What came of calling a name: nothing but the name and the arguments."""

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args = name, args

    def __setstate__(self, state: Any) -> None:
        """Take the state that a pickle gives the object, and do nothing with it."""


class _Dict(dict[Any, Any]):
    """An ordered dict, which may have attributes."""

    def __setstate__(self, state: Any) -> None: ...


class Name:
    """A class or function that a pickle names; calling it checks what it would make."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> Any:
        """Return what stands for the object that would be made."""
        if self.name == "collections.OrderedDict":
            pairs: list[Any] = list(*args)
            _check_keys(k for k, _ in pairs)
            return _Dict(pairs)
        if self.name == "torch.Size":
            return tuple(*args)
        if self.name.startswith("torch._utils._rebuild_tensor"):
            _check_tensor(*args[:4])
        return Called(self.name, args)


class Unpickler(pickle._Unpickler):  # in Python: no op allocates what it only claims
    """Reads a pickle into dicts, lists, names and what calls of them are; `storages` has what it asks for by key."""

    # Of protocol 5, which torch does not write: they allocate first and read then.
    dispatch = {  # noqa: RUF012
        op: f
        for op, f in pickle._Unpickler.dispatch.items()
        if op not in (pickle.BYTEARRAY8[0], pickle.NEXT_BUFFER[0], pickle.READONLY_BUFFER[0])
    }

    stack: list[Any]

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def _checked(self, what: str) -> None:
        """Do what the base class does for a dict or set, of whose items the keys are looked at first."""
        items = self.stack if what != "setitem" else self.stack[-2:-1]
        pairs = what in ("setitems", "dict")
        _check_keys(items[::2] if pairs else items)
        getattr(pickle._Unpickler, f"load_{what}")(self)

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name, or raise `RefusedError`."""
        full = f"{module}.{name}"
        if full in _HARMLESS or _DTYPE.match(full) or _STORAGE.match(full):
            return Name(full)
        raise RefusedError(full[:200])

    def persistent_load(self, pid: Any) -> Storage:
        """Return a storage that the pickle refers to, or raise `ClaimError`."""
        kind, storage, key, _, numel = pid[:5] if isinstance(pid, tuple) else ()
        of = _STORAGE.match((storage.name if isinstance(storage, Name) else "").replace("torch.storage.", "torch."))
        plain = kind == "storage" and isinstance(key, (str, int)) and type(numel) is int
        if not plain or of is None or not 0 <= numel < 1 << _BITS:
            raise ClaimError("a storage of another kind than torch writes")
        itemsize = _BYTES.get(of[1], 1)
        found = Storage(str(key), numel * itemsize, itemsize, of[1])
        if self.storages.setdefault(found.key, found).nbytes != found.nbytes:
            raise ClaimError(f"storage {found.key} of two sizes")
        return found


for _what in ("setitem", "setitems", "dict", "additems", "frozenset"):
    Unpickler.dispatch[getattr(pickle, _what.upper())[0]] = functools.partial(Unpickler._checked, what=_what)


def _check_tensor(storage: Any, offset: Any, size: Any, stride: Any) -> None:
    """Raise `ClaimError` where a tensor has more numbers than its storage, or some that are not in it."""
    if any(type(n) is not int or n.bit_length() > _BITS for n in (*size, *stride, offset)) or len(size) > _MOST_DIMS:
        raise ClaimError("a tensor of sizes that none can have")
    numbers = 1
    for n in size:
        numbers *= n
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if numbers else 0
    held = storage.nbytes // storage.itemsize
    # Bytes of an untyped storage are numbers of one byte at least, which is all that can be said of them.
    if min([*size, *stride, offset, 0]) < 0 or max(numbers, last) > held:
        raise ClaimError(f"a tensor of {numbers:,} numbers in a storage of {held:,}")


def _check_keys(keys: Iterable[Any]) -> None:
    """Raise `ClaimError` where one is no name, no number, and no few of those."""
    for key in keys:
        parts = key if isinstance(key, tuple) and len(key) <= _MOST_DIMS else (key,)
        if not all(isinstance(part, _KEYS) for part in parts):
            raise ClaimError(f"a dict with a key of the type {type(key).__name__}")


def zipped(data: bytes, held: Mapping[str, int]) -> None:
    """Check the pickle of an archive; `held` has the bytes of each storage in it.

    Raises:
        RefusedError: it names what is no weight.
        ClaimError: a storage or tensor is larger than what is held.
        Exception: it is damaged.
    """
    unpickler = Unpickler(io.BytesIO(data))
    check_depth(unpickler.load())
    check_storages(unpickler, held)


def check_storages(unpickler: Unpickler, held: Mapping[str, int]) -> None:
    """Raise `ClaimError` where a pickle that was read asks for a storage larger than the bytes `held` of it."""
    for key, storage in unpickler.storages.items():
        if held.get(key, -1) < storage.nbytes:
            there = max(held.get(key, 0), 0)
            raise ClaimError(f"storage {key} of {storage.nbytes:,} bytes, of which {there:,} are there")


def plain(head: bytes, size: int) -> bool:
    """Check a file of `size` bytes that begins with a pickle; tell whether it is one of torch before 1.6.

    head: its first `MOST_BYTES`. Raises as `zipped`.
    """
    file = io.BytesIO(head)
    first = Unpickler(file).load()
    if first != MAGIC:
        check_depth(first)
        return False
    for _ in range(_LEGACY_HEAD - 1):
        Unpickler(file).load()
    unpickler = Unpickler(file)
    check_depth(unpickler.load())
    if (claimed := sum(s.nbytes for s in unpickler.storages.values())) > size:
        raise ClaimError(f"storages of {claimed:,} bytes in a file of {size:,}")
    return True


def check_depth(made: Any) -> None:
    """Raise `ClaimError` where dicts and lists are in one another deeper than a state dict's."""
    level, seen = {id(made): made}, {id(made)}
    for _ in range(_TOO_DEEP):
        level = {id(x): x for held in level.values() for x in _inside(held) if id(x) not in seen}
        seen |= level.keys()
        if not level:
            return
    raise ClaimError(f"dicts and lists more than {_TOO_DEEP} deep")


def _inside(x: Any) -> Iterator[Any]:
    values = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple, set)) else ()
    yield from (v for v in values if isinstance(v, (dict, list, tuple, set)))
