"""Checking: every bit that is flipped, and every number that is wrong, is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_episodes import forged, made
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmpc2_fast.train.data.check import problems
from tdmpc2_fast.train.data.dataset import DataSet
from tdmpc2_fast.train.data.shard import ShardFile
from tdmpc2_fast.train.run.replay_files import sha256


def test_a_whole_set_has_none(tmp_path: Path) -> None:
    made(tmp_path, shard_bytes=1500, ends=True)
    assert not [*problems(tmp_path)]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flip")
    path = folder / data.draw(st.sampled_from([s.file for s in made(folder).shards]))
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    (found,) = problems(folder)
    assert path.name in found


def rewritten(folder: Path, name: str, row: int, value: float) -> None:
    """Put a number into the first shard, with the checksum that it has then."""
    file: ShardFile = DataSet.open(folder).files[0]
    width = dict(obs=24, action=6).get(name, 1)
    with file.path.open("r+b") as f:
        f.seek(file.starts[name] + row * width * (1 if name == "terminated" else 4))
        f.write(bytes([int(value)]) if name == "terminated" else np.float32(value).tobytes())
    forged(folder, lambda found: found["shards"][0].update(sha256=sha256(file.path)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("obs", 12, np.nan), "step 1 of episode 1 has obs that is NaN"),
        (("action", 3, np.inf), "step 3 of episode 0 has action"),
        (("reward", 13, np.nan), "step 2 of episode 1 has reward"),
        (("reward", 13, 50.0), "its returns are"),
        (("reward", 13, 3e38), "step 2 of episode 1 has reward of 3e+38, allowed: -1e+18 to 1e+18"),
        (("obs", 12, -3e38), "step 1 of episode 1 has obs of -3e+38"),
        (("action", 3, -1.01), "step 3 of episode 0 has action of -1.01, allowed: -1 to 1"),
        (("action", 0, 1.0), "an action or reward before the first decision"),
        (("terminated", 3, 1), "step 3 of episode 0 terminates an episode that goes on"),
        (("terminated", 10, 1), "1 of its episodes terminate, the index says 0"),
    ],
)
def test_numbers_that_are_wrong_are_found(change: Any, reason: str, tmp_path: Path) -> None:
    made(tmp_path)
    rewritten(tmp_path, *change)
    (found,) = problems(tmp_path)
    assert reason in found
    assert "00000-walker-walk.safetensors" in found


def test_a_set_that_cannot_be_opened_is_one_problem(tmp_path: Path) -> None:
    (found,) = problems(tmp_path)
    assert "has no index.json" in found
