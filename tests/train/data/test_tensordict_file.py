"""TensorDicts in files of every version: read without their pickles, and refused where they are more than tensors."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_episodes import official_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmpc2_fast.compat.tensordict_file import TensorDictFile
from tdmpc2_fast.errors import DataError

OFFICIAL = Path(__file__).parent / "official"
FILES = sorted(OFFICIAL.glob("*.pt"))
ONE = OFFICIAL / "tensordict-0.8.3.pt"


def rewritten(
    path: Path, change: Callable[[str, bytes], bytes | None], source: Path = ONE, how: int = zipfile.ZIP_STORED
) -> Path:
    """The same archive with other parts; None leaves one out."""
    with zipfile.ZipFile(source) as z, zipfile.ZipFile(path, "w", how) as out:
        for name in z.namelist():
            if (data := change(name.partition("/")[2], z.read(name))) is not None:
                out.writestr(name, data)
    return path


def pickled(path: Path, change: Callable[[bytes], bytes], source: Path = ONE) -> Path:
    return rewritten(path, lambda name, data: change(data) if name == "data.pkl" else data, source)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_version_is_read(path: Path) -> None:
    file, numbers = TensorDictFile(path), official_numbers()
    file.check()
    assert file.shape == (6, 11)
    assert file.columns.keys() == numbers.keys()
    for name, column in file.columns.items():
        assert column.shape == numbers[name].shape
        np.testing.assert_array_equal(column.read(0, 6), numbers[name])
        np.testing.assert_array_equal(column.read(2, 5), numbers[name][2:5])
        assert len(column.read(3, 3)) == 0


def test_there_are_files_of_all_forms() -> None:
    assert len(FILES) == 6
    assert {b"_make_td", b"LazyStackedTensorDict", b"_StringOnlyDict"} == {
        word for path in FILES for word in (b"_make_td", b"LazyStackedTensorDict", b"_StringOnlyDict")
        if word in path.read_bytes()
    }  # fmt: skip


class Hostile:
    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.ran}",)


@pytest.mark.parametrize("where", ["alone", "in front", "as a key", "as a tensor"])
def test_nothing_in_a_pickle_is_executed(where: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    hostile = pickle.dumps(Hostile(ran), 2)

    def change(data: bytes) -> bytes:
        body = hostile[2:-1]  # without its protocol and stop
        if where == "alone":
            return hostile
        if where == "in front":
            return data[:2] + body + b"0" + data[2:]
        at = data.index(b"X\x06\x00\x00\x00reward")
        return data[:at] + body + b"0" + data[at:] if where == "as a key" else data[:-1] + body + b"0."

    path = pickled(tmp_path / "hostile.pt", change)
    with pytest.raises(DataError, match="refused, it holds more than weights"):
        TensorDictFile(path)
    assert not ran.exists()
    pickle.loads(hostile)  # that it would have
    assert ran.exists()


@pytest.mark.parametrize(
    "op", [b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.", b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93."]
)
def test_no_other_name_is_known(op: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="eval"):
        TensorDictFile(pickled(tmp_path / "x.pt", lambda _: op))


def test_no_object_of_another_class_is_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"torch\.Size"):
        TensorDictFile(pickled(tmp_path / "x.pt", lambda _: b"\x80\x02ctorch\nSize\n)\x81."))
    with pytest.raises(DataError, match="an object of no class"):
        TensorDictFile(pickled(tmp_path / "x.pt", lambda _: b"\x80\x02K\x01)\x81."))


def test_an_archive_that_grows_is_refused(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "bomb.pt", lambda name, data: bytes(1 << 20) if name == "data/0" else data, how=8)
    with pytest.raises(DataError, match="compressed"):
        TensorDictFile(path)


def test_claims_beyond_the_file_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    """462 numbers of the observations become 2**30, in the storage and in the tensor."""
    small, large = b"M\xce\x01", b"J\x00\x00\x00\x40"
    path = pickled(tmp_path / "claims.pt", lambda data: data.replace(small, large))
    assert small in zipfile.ZipFile(ONE).read(zipfile.ZipFile(ONE).namelist()[0])
    with pytest.raises(DataError, match="storage 0 of 4,294,967,296 bytes, of which 1,848 are there"):
        TensorDictFile(path)
    rows = pickled(tmp_path / "rows.pt", lambda data: data.replace(b"K\x06K\x0bK\x07\x87", b"K\xffK\x0bK\x07\x87"))
    with pytest.raises(DataError, match="a tensor of 19,635 numbers in a storage of 462"):
        TensorDictFile(rows)


@pytest.mark.parametrize("large", [False, True], ids=["zip", "zip64"])
def test_a_table_of_contents_that_claims_much_is_refused(large: bool, tmp_path: Path) -> None:
    data = bytearray(ONE.read_bytes())
    at = data.rfind(b"PK\6\6" if large else b"PK\5\6")
    if large:
        data[at + 40 : at + 48] = struct.pack("<Q", 0x7FFFFFFF)
    else:
        end, at = data[at:], data.rfind(b"PK\6\6")
        data = data[:at] + end
        data[at + 12 : at + 16] = struct.pack("<I", 0x7FFFFFFF)
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(DataError, match="table of contents claims 2,147,483,647 bytes"):
        TensorDictFile(tmp_path / "x.pt")


def test_parts_that_overlap_are_refused(tmp_path: Path) -> None:
    """Two entries of the table of contents that name one place: each is as large as the file lets it be."""
    data = ONE.read_bytes()
    with zipfile.ZipFile(ONE) as z:
        entries = {e.filename.partition("/")[2]: e for e in z.infolist()}
    at = data.rindex(entries["data/3"].filename.encode()) - 46
    moved = data[: at + 42] + struct.pack("<I", entries["data/2"].header_offset) + data[at + 46 :]
    (tmp_path / "x.pt").write_bytes(moved)
    with pytest.raises(DataError, match=r"no '.*data/3' where the table of contents says"):
        TensorDictFile(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (dict(obs=torch.zeros(2, 3)), "it holds dict, allowed: a TensorDict"),
        ([torch.zeros(2)], "it holds list"),
        (torch.zeros(2, 3), "torch._utils._rebuild_tensor_v2"),
    ],
    ids=["dict", "list", "tensor"],
)
def test_what_is_no_tensordict_is_named(made: Any, reason: str, tmp_path: Path) -> None:
    torch.save(made, tmp_path / "x.pt")
    with pytest.raises(DataError, match=reason):
        TensorDictFile(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"\x1f\x8b" + bytes(50), "compressed"),
        (b"PK\x03\x04" + bytes(100), "truncated or damaged"),
    ],
)
def test_files_of_other_kinds_are_named(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        TensorDictFile(tmp_path / "x.pt")


def test_a_file_of_an_older_torch_is_named(tmp_path: Path) -> None:
    torch.save(dict(x=torch.zeros(2)), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"torch before 1\.6"):
        TensorDictFile(tmp_path / "x.pt")


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "x.pt", lambda name, data: b"big" if name == "byteorder" else data)
    with pytest.raises(DataError, match="byte order b'big'"):
        TensorDictFile(path)


def test_a_renamed_key_is_another_key(tmp_path: Path) -> None:
    path = pickled(tmp_path / "x.pt", lambda data: data.replace(b"_tensordict", b"_tensordicy"))
    with pytest.raises(DataError, match="a form that no version known here writes"):
        TensorDictFile(path)


def test_deep_nesting_and_long_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="deep"):
        TensorDictFile(pickled(tmp_path / "x.pt", lambda _: b"\x80\x02" + b"]" * 500 + b"a" * 499 + b"."))
    with pytest.raises(DataError, match="a pickle of"):
        TensorDictFile(pickled(tmp_path / "x.pt", lambda _: b"\x80\x02" + b"]" * (9 << 20) + b"."))


def read_all(path: Path) -> dict[str, np.ndarray]:
    file = TensorDictFile(path)
    file.check()
    return {name: column.read(0, file.shape[0]) for name, column in file.columns.items()}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FILES), st.data())
def test_damage_changes_no_number(source: Path, data: st.DataObject) -> None:
    """A flipped bit, or a missing end, is an error or of no consequence, never another number."""
    content = bytearray(source.read_bytes())
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"flipped-{os.getpid()}.pt"
    path.write_bytes(content)
    try:
        found = read_all(path)
    except DataError:
        return
    finally:
        path.unlink()
    numbers = official_numbers()
    for name, x in found.items():
        if name in numbers and x.shape == numbers[name].shape and x.dtype == numbers[name].dtype:
            np.testing.assert_array_equal(x, numbers[name])


def test_what_torch_reads_is_what_is_read(tmp_path: Path) -> None:
    """Views of a storage that lie behind an offset, with strides."""
    base = torch.arange(240, dtype=torch.float32)
    view = base[12:].as_strided((3, 4, 5), (40, 8, 1))
    buffer = io.BytesIO()
    torch.save(view, buffer)
    with zipfile.ZipFile(buffer) as z:
        tensor = z.read(next(n for n in z.namelist() if n.endswith("data.pkl")))[2:-1]
        storage = z.read(next(n for n in z.namelist() if n.endswith("data/0")))
    text = pickle.dumps  # strings and numbers, without protocol and stop
    body = b"\x80\x02ctensordict._reductions\n_make_td\nctensordict._td\nTensorDict\n}("
    body += text("_tensordict", 2)[2:-1] + b"}" + text("x", 2)[2:-1] + tensor + b"s"
    body += text("_batch_size", 2)[2:-1] + b"ctorch\nSize\nK\x03K\x04\x86\x85Ru\x86R."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as z:
        z.writestr("x/data.pkl", body)
        z.writestr("x/data/0", storage)
    column = TensorDictFile(tmp_path / "x.pt").columns["x"]
    np.testing.assert_array_equal(column.read(0, 3), view.numpy())
    np.testing.assert_array_equal(column.read(1, 2), view[1:2].numpy())
