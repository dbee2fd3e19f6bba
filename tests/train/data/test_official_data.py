"""Official files become data sets, task by task."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_episodes import official_numbers
from numpy.typing import NDArray

from tdmpc2_fast.errors import DataError
from tdmpc2_fast.task_sets import TASK_SETS, TASKS
from tdmpc2_fast.train.data import official
from tdmpc2_fast.train.data.check import problems
from tdmpc2_fast.train.data.convert import convert
from tdmpc2_fast.train.data.dataset import DataSet

FILES = sorted((Path(__file__).parent / "official").glob("*.pt"))
TREE = ["a", "b", "c"]


def saved(path: Path, numbers: dict[str, NDArray[Any]]) -> Path:
    """A file as tensordict 0.8 writes it, of any numbers: its pickle is put together here."""
    tensors, storages = b"", {}
    for i, (name, x) in enumerate(numbers.items()):
        one = path.with_suffix(".one")
        torch.save(torch.from_numpy(np.ascontiguousarray(x)), one)
        with zipfile.ZipFile(one) as z:
            inner = {n.partition("/")[2]: z.read(n) for n in z.namelist()}
        old, new = b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00" + str(i).encode()
        tensors += pickle.dumps(name, 2)[2:-1] + inner["data.pkl"][2:-1].replace(old, new) + b"s"
        storages[f"data/{i}"] = inner["data/0"]
        one.unlink()
    batch = pickle.dumps(tuple(numbers["reward"].shape[:2]), 2)[2:-1]
    body = b"\x80\x02ctensordict._reductions\n_make_td\nctensordict._td\nTensorDict\n}"
    body += pickle.dumps("_tensordict", 2)[2:-1] + b"}" + tensors + b"s"
    body += pickle.dumps("_batch_size", 2)[2:-1] + b"ctorch\nSize\n" + batch + b"\x85Rs\x86R."
    with zipfile.ZipFile(path, "w") as z:
        for name, data in {"data.pkl": body, "byteorder": b"little", **storages}.items():
            z.writestr(f"x/{name}", data)
    return path


def test_the_pickles_put_together_here_are_read_as_real_ones_are(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", official_numbers())
    real = official.episodes(FILES[0], TREE)
    for x, y in zip(official.episodes(path, TREE), real, strict=True):
        for a, b in zip(x.rows(0, 2), y.rows(0, 2), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_episodes_are_sorted_by_their_tasks(path: Path, tmp_path: Path) -> None:
    convert([path], tmp_path / "set", "a,b,c")
    data, numbers = DataSet.open(tmp_path / "set"), official_numbers()
    assert [(t.name, t.episodes, t.steps) for t in data.tasks] == [(n, 2, 20) for n in TREE]
    assert not [*problems(tmp_path / "set")]
    for i, name in enumerate(TREE):
        rows = data.episodes(name)[0].rows(0, 2)
        for key in ("obs", "action", "reward"):
            np.testing.assert_array_equal(getattr(rows, key), np.concatenate(numbers[key][i::3]))
        assert not rows.terminated.any()


def mt30(which: list[int], rows: int = 501, **changes: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Numbers of the form of mt30 or mt80: padded with zeros."""
    names = TASK_SETS["mt30" if rows == 501 else "mt80"]
    wide = 24 if rows == 501 else 39
    found = official_numbers(len(which), rows, wide, 6)
    for e, i in enumerate(which):
        task = TASKS[names[i]]
        assert task.obs_dim is not None
        assert task.action_dim is not None
        found["obs"][e, :, task.obs_dim :] = 0
        found["action"][e, 1:, task.action_dim :] = 0
    found["task"] = np.repeat(np.array(which)[:, None], rows, 1)
    return found | changes


@pytest.mark.parametrize(("rows", "which"), [(501, [7, 12, 7, 0, 29]), (101, [7, 45, 12, 79])])
def test_the_official_sets_are_known_by_their_lengths(rows: int, which: list[int], tmp_path: Path) -> None:
    numbers = mt30(which, rows)
    (tmp_path / "data").mkdir()
    saved(tmp_path / "data" / "chunk_0.pt", numbers)
    saved(tmp_path / "data" / "chunk_1.pt", mt30(which[:1], rows))
    convert([tmp_path / "data"], tmp_path / "set")
    names = TASK_SETS["mt30" if rows == 501 else "mt80"]
    tasks = {t.name: t for t in DataSet.open(tmp_path / "set").tasks}
    assert {*tasks} == {names[i] for i in which}
    assert tasks[names[which[0]]].episodes == which.count(which[0]) + 1
    for name, t in tasks.items():
        assert (t.obs_dim, t.action_dim) == (TASKS[name].obs_dim, TASKS[name].action_dim)
    rows_ = DataSet.open(tmp_path / "set").episodes(names[which[1]])[0].rows(0, 1)
    np.testing.assert_array_equal(rows_.obs, numbers["obs"][1, :, : rows_.obs.shape[1]])


def test_ends_are_kept(tmp_path: Path) -> None:
    """As floats with NaN before the first decision, which is how the official code notes them."""
    ends = np.zeros((6, 11), np.float32)
    ends[:, 0], ends[2, 10] = np.nan, 1
    found = official.episodes(saved(tmp_path / "x.pt", official_numbers() | dict(terminated=ends)), TREE)
    assert found[2].rows(0, 1).terminated.tolist() == [False] * 10 + [True]
    assert not found[0].rows(0, 2).terminated.any()


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_other_floats_are_taken(dtype: str, tmp_path: Path) -> None:
    numbers = {k: x.astype(dtype) if k != "task" else x.astype("int32") for k, x in official_numbers().items()}
    rows = official.episodes(saved(tmp_path / "x.pt", numbers), TREE)[0].rows(0, 1)
    np.testing.assert_array_equal(rows.obs, numbers["obs"][0].astype(np.float32))
    assert rows.obs.dtype == np.float32


def changed(**changes: Callable[[NDArray[Any]], NDArray[Any]]) -> dict[str, NDArray[Any]]:
    numbers = official_numbers()
    return {k: changes[k](x) if k in changes else x for k, x in numbers.items()}


def poked(index: Any, value: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    def change(x: NDArray[Any]) -> NDArray[Any]:
        x[index] = value
        return x

    return change


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        (changed(task=lambda x: x + 1), "episode 2 has the tasks .3., allowed: one number, 0 to 2, of 3 tasks"),
        (changed(task=lambda x: x - 1), "episode 0 has the tasks .-1."),
        (changed(task=poked((4, 7), 0)), "episode 4 has the tasks .0, 1., allowed: one number"),
        (changed(task=lambda x: x + 0.5), r"episode 0 has the tasks \[0\.5\]"),
        (changed(obs=lambda x: x[..., 0]), r"'obs' has the shape \(6, 11\), allowed: \(episodes, steps, numbers\)"),
        (changed(obs=lambda x: x[:5]), r"'obs' has the shape \(5, 11, 7\), allowed: \(6, 11\) and what follows"),
        (changed(reward=lambda x: x[..., None].repeat(2, -1)), r"'reward' has the shape \(6, 11, 2\)"),
        (changed(obs=lambda x: x.astype(np.int64)), "'obs' is of int64, allowed: real numbers"),
        ({k: x for k, x in official_numbers().items() if k != "task"}, r"has the keys \['action', 'obs', 'reward'\]"),
        ({k: x[:, :1] for k, x in official_numbers().items()}, "episodes of 1 rows, allowed: at least 2"),
        ({("obz" if k == "obs" else k): x for k, x in official_numbers().items()}, "has the keys"),
    ],
)
def test_another_form_is_refused(numbers: dict[str, NDArray[Any]], reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason):
        official.episodes(saved(tmp_path / "x.pt", numbers), TREE)


def test_numbers_that_are_not_finite_are_named_by_their_place(tmp_path: Path) -> None:
    saved(tmp_path / "x.pt", changed(reward=poked((4, 7), np.inf)))
    with pytest.raises(DataError, match=r"x\.pt .* b: step 7 of episode 1 has reward that is NaN or infinite"):
        convert([tmp_path / "x.pt"], tmp_path / "set", "a,b,c")
    with pytest.raises(DataError, match=r"has no index|not finished"):
        DataSet.open(tmp_path / "set")


def test_another_order_of_tasks_is_noticed(tmp_path: Path) -> None:
    """Numbers stand where the task that the number names has none."""
    saved(tmp_path / "x.pt", mt30([7, 12]) | dict(task=np.repeat([[12], [7]], 501, 1)))
    with pytest.raises(DataError, match=r"'pendulum-swingup' have numbers behind the 3 .* another order of tasks"):
        convert([tmp_path / "x.pt"], tmp_path / "set")
    saved(tmp_path / "x.pt", official_numbers(2, 11, 3, 1))
    with pytest.raises(
        DataError, match="'dog-run' has observations and actions of 223 and 38 numbers, but there are 3"
    ):
        convert([tmp_path / "x.pt"], tmp_path / "set", "dog-run,b")


def test_lengths_of_no_official_set_ask_for_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"episodes of 11 rows, which is no official set .501 or 101.: tasks=NAME"):
        convert([FILES[0]], tmp_path / "set")


def test_a_flipped_number_is_noticed(tmp_path: Path) -> None:
    content = bytearray(FILES[0].read_bytes())
    at = content.index(official_numbers()["obs"].tobytes()[:64])
    content[at + 40] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(DataError, match=r"the checksum of its part .*data/0' differs"):
        official.episodes(tmp_path / "x.pt", TREE)


LIMITED = """
import resource, sys
from pathlib import Path
from tdmpc2_fast.train.data.convert import convert

def status(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) << 10

limit = status("VmSize") + (80 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before = status("VmHWM")
convert([Path(sys.argv[1])], Path(sys.argv[2]))
print((status("VmHWM") - before) >> 20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what is resident")
def test_a_file_larger_than_memory_is_converted(tmp_path: Path) -> None:
    """With `ulimit -v`: 120 MB, where 80 more may be taken, and few are."""
    numbers = mt30([i % 30 for i in range(30)], 101)
    path = saved(tmp_path / "x.pt", {k: np.tile(x, (200, *[1] * (x.ndim - 1))) for k, x in numbers.items()})
    assert path.stat().st_size > 110 << 20
    command = [sys.executable, "-P", "-c", LIMITED, str(path), str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sum(t.episodes for t in DataSet.open(tmp_path / "set").tasks) == 6000
    assert int(done.stdout) < 50
