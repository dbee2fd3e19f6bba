"""Shards: one safetensors file each, written a piece at a time, and believed only where it is what the index says."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_episodes import made
from safetensors.numpy import load_file

from tdmpc2_fast.errors import DataError
from tdmpc2_fast.train.data.dataset import DataSet
from tdmpc2_fast.train.data.index import Task
from tdmpc2_fast.train.data.rows import Rows
from tdmpc2_fast.train.data.shard import write


def rows(n: int, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    obs, action = (rng.standard_normal((n, k)).astype(np.float32) for k in (5, 2))
    return Rows(obs, action, rng.random(n).astype(np.float32), rng.random(n) > 0.5)


@pytest.mark.parametrize("cuts", [[], [1], [3, 4, 9]])
def test_pieces_make_one_safetensors_file(cuts: list[int], tmp_path: Path) -> None:
    whole = rows(12)
    bounds = [0, *cuts, 12]
    parts = [Rows(*(x[a:b] for x in whole)) for a, b in itertools.pairwise(bounds)]
    size = write(tmp_path / "x.safetensors", Task("a", 5, 2), 12, parts)
    assert size == (tmp_path / "x.safetensors").stat().st_size
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == {*Rows._fields}
    for name, x in whole._asdict().items():
        np.testing.assert_array_equal(found[name], x)


def test_the_numbers_begin_at_a_round_place(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", Task("a", 5, 2), 3, [rows(3)])
    data = (tmp_path / "x.safetensors").read_bytes()
    assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0


@pytest.mark.parametrize("count", [11, 13])
def test_another_number_of_rows_leaves_nothing(count: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rows, allowed: 12"):
        write(tmp_path / "x.safetensors", Task("a", 5, 2), 12, [rows(5), rows(count - 5)])
    assert not [*tmp_path.iterdir()]


def header(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        found = json.loads(data[8 : 8 + length])
        change(found)
        text = json.dumps(found, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length
        return data[:8] + text + data[8 + length :]

    return changed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-1], "bytes, allowed: .* as the index says .truncated"),
        (lambda data: data + b"x", "bytes, allowed"),
        (lambda data: (1 << 40).to_bytes(8, "little") + data[8:], "a header of 1,099,511,627,776 bytes"),
        (lambda data: data[:8] + b"[" * 50 + data[58:], "a header that is damaged"),
        (header(lambda h: h["obs"].update(shape=[24, 37])), r"another header than the index describes \(obs\)"),
        (header(lambda h: h["obs"].update(dtype="F64")), r"\(obs\)"),
        (header(lambda h: h.update(obz=h.pop("obs"))), r"\(obs\)"),
        (header(lambda h: h["reward"].update(data_offsets=h["action"]["data_offsets"])), r"\(reward\)"),
    ],
    ids=["short", "long", "header", "nested", "shape", "dtype", "name", "overlap"],
)
def test_a_shard_that_is_not_what_the_index_says(change: Callable[[bytes], bytes], reason: str, tmp_path: Path) -> None:
    path = tmp_path / made(tmp_path).shards[0].file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=reason):
        DataSet.open(tmp_path)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "missing"])
def test_a_shard_that_is_no_file_of_the_folder(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "set" / made(tmp_path / "set").shards[0].file
    other = path.rename(tmp_path / "elsewhere.safetensors")
    if kind == "link":
        path.symlink_to(other)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(DataError, match="is missing" if kind == "missing" else "is a link or no file"):
        DataSet.open(tmp_path / "set")
