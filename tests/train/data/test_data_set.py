"""Opening a data set, and the reader that its page shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from data_episodes import TASKS, made, parts

from tdmpc2_fast.errors import DataError
from tdmpc2_fast.train.data.dataset import DataSet
from tdmpc2_fast.train.data.index import INDEX


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: None, "is not there, allowed: a folder"),
        (lambda p: p.touch(), "is a file, allowed: a folder"),
        (lambda p: p.mkdir(), r"has no index\.json$"),
        (lambda p: (p.mkdir(), (p / "chunk_0.pt").touch()), "tdmpc2-fast data convert .* makes a data set of these"),
        (lambda p: (p.mkdir(), (p / "unfinished-0.json").touch()), "is not finished"),
    ],
)
def test_what_is_no_data_set_is_named(make: Any, reason: str, tmp_path: Path) -> None:
    make(tmp_path / "set")
    with pytest.raises(DataError, match=reason):
        DataSet.open(tmp_path / "set")


def test_an_index_that_is_a_link_is_none(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / INDEX).rename(tmp_path / "other.json")
    (tmp_path / INDEX).symlink_to(tmp_path / "other.json")
    with pytest.raises(DataError, match=r"has no index\.json"):
        DataSet.open(tmp_path)


def test_episodes_are_read_by_number(tmp_path: Path) -> None:
    made(tmp_path)
    given = parts()[1]
    found = DataSet.open(tmp_path).episodes(given.task)[0]
    for a, b in ((0, 1), (1, 4), (4, 5), (2, 2)):
        for x, y in zip(found.rows(a, b), given.rows(a, b), strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_reader_of_the_page_reads_it(tmp_path: Path) -> None:
    """It knows numpy, safetensors and json alone."""
    page = (ROOT / "docs" / "data.md").read_text()
    program = re.search(r"```python\n(import json.*?)```", page, re.S)
    assert program is not None
    assert len(program[1].splitlines()) <= 12
    assert "tdmpc2" not in program[1]
    names: dict[str, Any] = {}
    exec(program[1], names)
    made(tmp_path, shard_bytes=1500)
    found = [*names["episodes"](tmp_path)]
    given = [(part.task, part.rows(i, i + 1)) for part in parts() for i in range(len(part.lengths))]
    assert [task for task, _ in found] == [task for task, _ in given]
    assert len(found) == 5 * len(TASKS)
    for (_, x), (_, y) in zip(found, given, strict=True):
        for name, values in y._asdict().items():
            np.testing.assert_array_equal(x[name], values)
