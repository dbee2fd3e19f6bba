"""Shards in memory: mapped once, forgotten where they are too many."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import numpy as np
import pytest
from data_episodes import TASKS, episode, made, parts

from tdmpc2_fast.errors import DataError
from tdmpc2_fast.train.data import maps as module
from tdmpc2_fast.train.data.dataset import DataSet
from tdmpc2_fast.train.data.maps import Maps
from tdmpc2_fast.train.data.rows import kept
from tdmpc2_fast.train.data.shard import ShardFile
from tdmpc2_fast.train.data.writer import write

TOLD = pytest.mark.skipif(not module._STATM.exists(), reason="the system does not tell what is resident")


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    made(tmp_path, shard_bytes=500)
    return DataSet.open(tmp_path)


def test_rows_are_those_of_the_file(data: DataSet) -> None:
    maps, (given, *_) = Maps(data.files), parts()
    whole = [maps[i] for i, f in enumerate(data.files) if f.task.name == given.task]
    for name, x in given.held._asdict().items():
        np.testing.assert_array_equal(np.concatenate([getattr(rows, name) for rows in whole]), x)
    assert maps[0].obs is maps[0].obs
    assert not maps[0].obs.flags.writeable


def test_the_least_used_are_unmapped(data: DataSet) -> None:
    maps, size = Maps(data.files), [f.shard.bytes for f in data.files]
    maps._space = size[0] + size[1] + size[2]
    first = maps[0]
    _ = maps[1], maps[2], maps[0]
    assert [*maps._held] == [1, 2, 0]
    held = maps[3]
    assert 1 not in maps._held
    assert maps[0] is first
    assert maps._nbytes == sum(size[i] for i in maps._held) <= maps._space
    maps.close()
    assert not maps._held
    assert np.isfinite(held.obs).all()  # what is in use stays


def test_where_others_took_the_room_fewer_are_held(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    maps, mapped, room = Maps(data.files), module._mapped, [3]

    def crowded(file: ShardFile) -> module._Mapped:
        if len(maps._held) >= room[0]:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return mapped(file)

    monkeypatch.setattr(module, "_mapped", crowded)
    for i in range(4):
        _ = maps[i]
    assert [*maps._held] == [1, 2, 3]
    room[0] = 1
    _ = maps[0]
    assert [*maps._held] == [0]
    assert maps._nbytes == data.files[0].shard.bytes
    room[0] = 0
    with pytest.raises(DataError, match=r"cannot be mapped \(Cannot allocate memory\)"):
        _ = maps[1]


def test_threads_may_use_what_others_unmap(data: DataSet) -> None:
    maps, wrong = Maps(data.files), []
    expected = [f.shard.returns[1] for f in data.files]
    maps._space = max(f.shard.bytes for f in data.files)  # one at a time

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, len(data.files), 300).tolist():
            mean = np.nansum(maps[i].reward.astype(np.float64)) / data.files[i].shard.episodes
            maps.look()
            if abs(mean - expected[i]) > 1e-6:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@TOLD
def test_what_is_resident_is_dropped_where_it_is_much(tmp_path: Path) -> None:
    task, rng = "walker-walk", np.random.default_rng(0)
    one = kept(task, [episode(rng, 500, *TASKS[task]) for _ in range(40)], "made")
    write(tmp_path, [one] * 10)
    files = DataSet.open(tmp_path).files
    assert files[0].shard.bytes > 23 << 20
    before = module._resident()
    maps = Maps(files, resident=before + (8 << 20))
    total = float(np.nansum(maps[0].obs))
    assert module._resident() > before + (16 << 20)
    for _ in range(module._BETWEEN_LOOKS):
        maps.look()
    assert module._resident() < before + (8 << 20)
    assert float(np.nansum(maps[0].obs)) == total  # and they are there again
    many = Maps(files)
    _ = float(np.nansum(many[0].obs))
    for _ in range(module._BETWEEN_LOOKS):
        many.look()
    assert module._resident() > before + (16 << 20)  # a gigabyte may be


def test_an_unlimited_process_has_no_limit() -> None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    assert (module._address_space() is None) == (limit == resource.RLIM_INFINITY)
