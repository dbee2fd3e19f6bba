"""Writing: whole or absent at every moment, gone on with, and appended to at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_episodes import TASKS, made, parts

from tdmpc2_fast.errors import ConfigError, DataError
from tdmpc2_fast.train.data import writer
from tdmpc2_fast.train.data.convert import convert
from tdmpc2_fast.train.data.dataset import DataSet
from tdmpc2_fast.train.data.index import INDEX, Index, Shard
from tdmpc2_fast.train.data.rows import Rows, pieces
from tdmpc2_fast.train.run.folder import locked

SMALL = 500  # bytes of a shard: an episode, or a few small ones


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".lock"}


def killed(moment: int, work: Callable[[], object]) -> bool:
    """Do the work in a process that is killed at its n-th wait for the disk or rename; tell whether it came so far."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    left = [moment]
    real = os.fsync, os.replace

    def counted(which: int) -> Callable[..., None]:
        def call(*args: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            real[which](*args)  # type: ignore[arg-type]

        return call

    os.fsync, os.replace = counted(0), counted(1)
    try:
        work()
    finally:
        os._exit(0)


def test_the_set_holds_what_was_written(tmp_path: Path) -> None:
    given = parts()
    made(tmp_path, shard_bytes=SMALL)
    data = DataSet.open(tmp_path)
    assert [t.name for t in data.tasks] == [*TASKS]
    assert len(data.files) > 6
    for part in given:
        found = data.episodes(part.task)
        np.testing.assert_array_equal(np.concatenate([e.lengths for e in found]), part.lengths)
        for name in Rows._fields:
            x = np.concatenate([getattr(e.rows(0, len(e.lengths)), name) for e in found])
            np.testing.assert_array_equal(x, getattr(part.held, name))
    task = data.tasks[0]
    each = [np.nansum(given[0].rows(i, i + 1).reward) for i in range(5)]
    assert (task.episodes, task.steps, task.episode_length) == (5, 37, 10)
    np.testing.assert_allclose([task.min_return, task.mean_return, task.max_return],
                               [min(each), np.mean(each), max(each)], rtol=1e-6)  # fmt: skip


def test_it_goes_on_wherever_it_was_killed(tmp_path: Path) -> None:
    made(tmp_path / "whole", shard_bytes=SMALL, count=2)
    whole, moment = contents(tmp_path / "whole"), 0
    while True:
        moment += 1
        folder = tmp_path / f"killed-{moment}"
        if not killed(moment, lambda folder=folder: made(folder, shard_bytes=SMALL, count=2)):  # type: ignore[misc]
            break
        if (folder / INDEX).exists():
            assert DataSet.open(folder).index == DataSet.open(tmp_path / "whole").index
            continue
        with pytest.raises(DataError, match=r"is not finished|has no index\.json"):
            DataSet.open(folder)
        told = [s.file for path in folder.glob("unfinished-*") for s in writer._shards(path)]
        finished = [file for file in told if (folder / file).exists()]  # it is told before it has its name
        before = {name: (folder / name).stat().st_ino for name in finished}
        made(folder, shard_bytes=SMALL, count=2)
        assert contents(folder) == whole
        assert before == {name: (folder / name).stat().st_ino for name in finished}  # they were not written again
    assert moment > 25


def test_a_shard_that_was_damaged_meanwhile_is_written_again(tmp_path: Path) -> None:
    made(tmp_path / "whole", shard_bytes=SMALL)
    assert killed(30, lambda: made(tmp_path / "set", shard_bytes=SMALL))
    first = sorted(tmp_path.glob("set/*.safetensors"))[0]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    made(tmp_path / "set", shard_bytes=SMALL)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@pytest.mark.parametrize("other", [dict(seed=1), dict(lengths=(10, 8, 2)), dict(count=4)], ids=str)
def test_what_other_episodes_have_left_is_not_taken(other: dict[str, object], tmp_path: Path) -> None:
    made(tmp_path / "whole", shard_bytes=SMALL)
    assert killed(40, lambda: made(tmp_path / "set", shard_bytes=SMALL, **other))
    made(tmp_path / "set", shard_bytes=SMALL)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_appending_is_atomic(tmp_path: Path) -> None:
    made(tmp_path / "old", shard_bytes=SMALL, count=2)
    old = DataSet.open(tmp_path / "old").index
    made(tmp_path / "new", shard_bytes=SMALL, count=2)
    made(tmp_path / "new", shard_bytes=SMALL, count=2, seed=1)
    new, moment, states = DataSet.open(tmp_path / "new").index, 0, []
    while True:
        moment += 3
        folder = tmp_path / f"killed-{moment}"
        made(folder, shard_bytes=SMALL, count=2)
        if not killed(moment, lambda folder=folder: made(folder, shard_bytes=SMALL, count=2, seed=1)):  # type: ignore[misc]
            break
        found = DataSet.open(folder).index
        assert found in (old, new)
        states.append(found == new)
        if found == old:
            made(folder, shard_bytes=SMALL, count=2, seed=1)
            assert contents(folder) == contents(tmp_path / "new")
    assert not states[0]
    assert len(new.shards) == 2 * len(old.shards)


def test_episodes_of_one_task_share_shards(tmp_path: Path) -> None:
    index = writer.write(tmp_path, [*parts(), *parts(seed=1)])
    assert [s.episodes for s in index.shards] == [10, 10, 10]
    assert index.shards[0].origin == "made of seed 0; made of seed 1"


def test_ends_are_counted(tmp_path: Path) -> None:
    index = made(tmp_path, ends=True)
    assert [s.terminated for s in index.shards] == [3, 3, 3]


def spoilt(name: str, row: int, value: float) -> Callable[[], list[object]]:
    def make() -> list[object]:
        found = parts()
        getattr(found[1].held, name)[row] = value
        return [*found]

    return make


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (spoilt("obs", 12, np.nan), "made of seed 0, cup-catch: step 1 of episode 1 has obs that is NaN"),
        (spoilt("action", 3, np.inf), "step 3 of episode 0 has action that is NaN or infinite"),
        (spoilt("reward", 5, -np.inf), "step 5 of episode 0 has reward"),
        (spoilt("action", 3, 1.5), "step 3 of episode 0 has action of 1.5"),
        (spoilt("terminated", 4, True), "step 4 of episode 0 terminates an episode that goes on"),
        (lambda: [parts()[0]._replace(obs_dim=3), parts()[0]], "numbers, allowed: 3 and 6, as elsewhere in the set"),
        (lambda: [], "got no episodes"),
    ],
    ids=["obs", "action", "reward", "wide", "end", "width", "none"],
)
def test_what_nothing_can_be_learned_from_is_refused(
    make: Callable[[], list[object]], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=reason):
        writer.write(tmp_path, make())  # type: ignore[arg-type]
    assert not (tmp_path / INDEX).exists()


def test_what_stands_before_the_first_decision_is_nothing(tmp_path: Path) -> None:
    given = parts()
    given[0].held.action[0], given[0].held.reward[0] = 1.0, 5.0
    writer.write(tmp_path, given)
    rows = DataSet.open(tmp_path).episodes("walker-walk")[0].rows(0, 1)
    assert np.isnan(rows.action[0]).all()
    assert np.isnan(rows.reward[0])


def test_a_full_disk_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(DataError, match=r"needs .* GB, allowed: the .* GB free"):
        made(tmp_path)
    assert not [*tmp_path.glob("*.safetensors")]


def test_two_processes_do_not_write_at_once(tmp_path: Path) -> None:
    with locked(tmp_path, "data"), pytest.raises(ConfigError, match=r"process .* is writing to it"):
        made(tmp_path)


FOREIGN = [
    ["00000-cup-catch.safetensors", ".draft.tmp"],
    ["notes.txt"],
    [".cache.tmp/"],
    ["00000-a.safetensors", "data.lock"],
]


def with_files(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("mine")
    return folder


@pytest.mark.parametrize("names", FOREIGN, ids=lambda names: names[0])
def test_a_folder_of_other_files_is_refused(names: list[str], tmp_path: Path) -> None:
    folder = with_files(tmp_path / "theirs", names)
    made(tmp_path / "ours")
    for work in (lambda: made(folder), lambda: convert([tmp_path / "ours"], folder)):
        with pytest.raises(DataError, match=r"'out': .*theirs' has files \('.*'\) and no index.json, allowed: a new"):
            work()
    assert {p.name for p in folder.iterdir()} == {n.rstrip("/") for n in names}
    assert all(p.read_text() == "mine" for p in folder.iterdir() if p.is_file())


def test_a_set_whose_index_was_lost_is_not_written_over(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / INDEX).unlink()
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"and no index\.json"):
        made(tmp_path, seed=1)
    assert contents(tmp_path) == before


def test_other_files_beside_a_set_stay(tmp_path: Path) -> None:
    """Those, too, that have names such as ours, and those that a list of unfinished shards names."""
    made(tmp_path)
    with_files(tmp_path, ["00007-mine.safetensors", ".draft.tmp", ".cache.tmp/", "unfinished-mine.json"])
    stray = [vars(s) | dict(file="00007-mine.safetensors") for s in DataSet.open(tmp_path).index.shards[:1]]
    index = Index(DataSet.open(tmp_path).index.tasks, tuple(Shard(**s) for s in stray))
    index.write(tmp_path / f"unfinished-{'0' * 16}.json")
    assert [s.file[:5] for s in made(tmp_path, seed=1).shards[3:]] == ["00008", "00009", "00010"]
    assert all((tmp_path / n).read_text() == "mine" for n in ("00007-mine.safetensors", ".draft.tmp"))
    assert (tmp_path / ".cache.tmp").is_dir()
    assert (tmp_path / "unfinished-mine.json").exists()
    assert not [*tmp_path.glob("unfinished-0*")]


def test_a_refused_set_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="NaN"):
        writer.write(tmp_path / "new", spoilt("obs", 3, np.nan)())  # type: ignore[arg-type]
    assert (tmp_path / "new" / "00000-walker-walk.safetensors").exists()  # what is good goes on
    with pytest.raises(DataError, match="got no episodes"):
        writer.write(tmp_path / "none", [])
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be made \(Not a directory\)"):
        made(tmp_path / "file" / "set")


def test_an_index_of_another_program_is_appended_to(tmp_path: Path) -> None:
    index = made(tmp_path)
    renamed = []
    for i, s in enumerate(index.shards):
        (tmp_path / s.file).rename(tmp_path / f"part{i}.safetensors")
        renamed.append(type(s)(**{**vars(s), "file": f"part{i}.safetensors"}))
    Index(index.tasks, tuple(renamed)).write(tmp_path / INDEX)
    made(tmp_path, seed=1)
    assert [t.episodes for t in DataSet.open(tmp_path).tasks] == [10, 10, 10]


@pytest.mark.parametrize("most", [1, 7, 20, 1000])
def test_pieces_hold_every_episode_once(most: int) -> None:
    lengths = np.array([5, 9, 2, 2, 7, 30, 1])
    found = [*pieces(lengths, most)]
    assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])]
    assert found[-1][1] == len(lengths)
    assert all(lengths[a:b].sum() <= most or b - a == 1 for a, b in found)
