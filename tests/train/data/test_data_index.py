"""The index: what it may not say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_episodes import forged, made
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmpc2_fast.errors import DataError
from tdmpc2_fast.train.data.dataset import DataSet
from tdmpc2_fast.train.data.index import INDEX, Index, read, run_lengths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made(tmp_path / "set")
    return tmp_path / "set"


def test_it_is_read_as_written(folder: Path) -> None:
    index = read(folder / INDEX)
    index.write(folder / "again.json")
    assert read(folder / "again.json") == index
    assert (folder / "again.json").read_bytes() == (folder / INDEX).read_bytes()


def test_lengths_are_told_in_few_words() -> None:
    lengths = np.array([5, 5, 5, 3, 5, 5, 2])
    assert run_lengths(lengths) == ((5, 3), (3, 1), (5, 2), (2, 1))
    assert run_lengths(np.full(100_000, 501)) == ((501, 100_000),)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Change the first shard, or with a dot the first task."""

    def change(found: dict[str, Any]) -> None:
        part, _, name = key.rpartition(".")
        found[part or "shards"][0][name] = value

    return change


def shards(change: Callable[[list[Any]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda found: change(found["shards"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("file", "../x.safetensors"), r"shards\[0\].file: got '../x.safetensors', allowed: NAME.safetensors"),
        (put("file", "/etc/x.safetensors"), "file: got"),
        (put("file", "a/b.safetensors"), "file: got"),
        (put("file", "a\\b.safetensors"), "file: got"),
        (put("file", ".hidden.safetensors"), "file: got"),
        (put("file", "x.pt"), "file: got"),
        (put("file", "x.safetensors\n"), "file: got"),
        (put("file", 3), "file: got"),
        (put("rows", -1), r"rows: got -1, allowed: an integer from 2"),
        (put("rows", 2**40), "rows: got 1099511627776"),
        (put("rows", 37.0), r"rows: got 37\.0"),
        (put("rows", True), "rows: got True"),
        (put("bytes", 10**30), "bytes: got 1000"),
        (put("bytes", 0), "bytes: got 0"),
        (put("episodes", 0), "episodes: got 0"),
        (put("episodes", 6), "5 episodes of 42 rows, allowed: 6 of 42"),
        (put("task", 3), "task: got 3"),
        (put("task", -1), "task: got -1"),
        (put("lengths", [[11, 1], [8, 2**62], [4, 1]]), "lengths"),
        (put("lengths", [[1, 5]]), "lengths"),
        (put("lengths", [[11, 2, 3]]), "lengths"),
        (put("lengths", []), "lengths: got 0"),
        (put("lengths", {"11": 1}), "lengths: got dict"),
        (put("terminated", 6), "terminated: got 6"),
        (put("sha256", "0" * 63), "sha256: got"),
        (put("sha256", "G" * 64), "sha256: got"),
        (put("returns", [3.0, 2.0, 1.0]), "returns: got"),
        (put("returns", [1, 2, True]), "returns: got"),
        (put("returns", [1, 2, 10**400]), "returns: got"),
        (put("returns", [1.0]), "returns: got 1, allowed"),
        (put("origin", "x" * 1000), "origin: got"),
        (put("origin", "\x1b[2J"), "origin: got"),
        (put("extra", 1), r"shards\[0\]: unknown key 'extra'"),
        (put("tasks.name", ""), r"tasks\[0\].name: got ''"),
        (put("tasks.obs_dim", 0), "obs_dim: got 0"),
        (put("tasks.obs_dim", 10**9), "obs_dim: got 1000000000"),
        (put("tasks.action_dim", "6"), "action_dim: got 6"),
        (shards(lambda x: x[0].pop("rows")), "lacks the key 'rows'"),
        (shards(lambda x: x.append(dict(x[0]))), "safetensors' comes twice"),
        (shards(lambda x: x[1].update(file=x[0]["file"].upper().replace("SAFETENSORS", "safetensors"))), "comes twice"),
        (shards(lambda x: x.clear()), "shards: got 0, allowed"),
        (lambda found: found["tasks"].append(dict(found["tasks"][0])), "'walker-walk' comes twice"),
        (lambda found: found.update(format="tdmpc2-fast-data/2"), "format 'tdmpc2-fast-data/2', allowed"),
        (lambda found: found.update(shards={}), "shards: got dict"),
        (lambda found: found.pop("tasks"), "lacks the key 'tasks'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: Any, reason: str, folder: Path) -> None:
    forged(folder, change)
    with pytest.raises(DataError, match=reason):
        DataSet.open(folder)


def test_a_forged_index_that_changes_nothing_is_read(folder: Path) -> None:
    """So that the cases above are refused for what they change."""
    index = read(folder / INDEX)
    forged(folder, lambda found: None)
    assert read(folder / INDEX) == index
    DataSet.open(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON, or truncated"),
        ("[" * 100_000, "deeper than any index"),
        ('{"format": ' + '{"a": ' * 100_000, "deeper than any index"),
        ('{"format": 1, "format": 2}', "the key 'format' comes twice"),
        ('{"format": NaN}', "got NaN, allowed: finite numbers"),
        ('{"format": ' + "9" * 10_000 + "}", "no JSON"),
        ("[1]", "format 'None'"),
        ("null", "format 'None'"),
        ("\xff", "no JSON"),
        (" " * ((64 << 20) + 1), "more than 67,108,864 bytes"),
    ],
    ids=["empty", "lists", "objects", "twice", "nan", "digits", "list", "null", "latin", "long"],
)
def test_strange_json_is_refused(text: str, reason: str, folder: Path) -> None:
    (folder / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=reason):
        DataSet.open(folder)


def test_whole_numbers_are_numbers(tmp_path: Path) -> None:
    """As another program writes them."""
    made(tmp_path)
    forged(tmp_path, lambda found: found["shards"][0].update(returns=[0, 0, 1]))
    assert read(tmp_path / INDEX).shards[0].returns == (0.0, 0.0, 1.0)


def test_large_numbers_are_no_numbers(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    low = json.loads(text)["shards"][0]["returns"][0]
    (folder / INDEX).write_text(text.replace(repr(low), "1e999", 1))
    with pytest.raises(DataError, match="checksum"):
        read(folder / INDEX)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A data set whose index is written anew again and again, and what it was at first."""
    folder = tmp_path_factory.mktemp("set")
    made(folder)
    return folder, (folder / INDEX).read_bytes()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_noticed(many: tuple[Path, bytes], data: st.DataObject) -> None:
    folder, content = many[0], bytearray(many[1])
    (folder / INDEX).write_bytes(content)
    index = read(folder / INDEX)
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (folder / INDEX).write_bytes(content)
    try:
        found: Index = read(folder / INDEX)
    except DataError:
        return
    assert found == index  # a space that became another


def places(found: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in JSON that has a value."""
    inner = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    return [path, *(p for k, v in inner for p in places(v, (*path, k)))] if path else [
        p for k, v in inner for p in places(v, (k,))
    ]  # fmt: skip


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_a_forged_index_says_is_judged(many: tuple[Path, bytes], data: st.DataObject) -> None:
    """Anything in any place: it is refused by name, or the set opens and its numbers are read without harm."""
    folder = many[0]
    (folder / INDEX).write_bytes(many[1])
    path = data.draw(st.sampled_from(places(json.loads((folder / INDEX).read_text()))))
    value = data.draw(ANY)

    def change(found: Any) -> None:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = value

    forged(folder, change)
    try:
        opened = DataSet.open(folder)
    except DataError:
        return
    finally:
        left = [*folder.iterdir()]
    for task in opened.tasks:
        for episodes in opened.episodes(task.name):
            episodes.rows(0, len(episodes.lengths))
    assert [*folder.iterdir()] == left
