"""Minari's data sets, as an agent of their environment would have lived them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("gymnasium")
pytest.importorskip("h5py")
import h5py
from point_env import Point

from tdmpc2_fast.errors import DataError
from tdmpc2_fast.train.data.check import problems
from tdmpc2_fast.train.data.convert import convert
from tdmpc2_fast.train.data.dataset import DataSet
from tdmpc2_fast.train.data.minari import MinariEpisodes
from tdmpc2_fast.train.envs.gymnasium_tasks import GymnasiumTask

HERE = Path(__file__).parent / "minari"
FULL = [i for i, byte in enumerate((HERE / "parts" / "main_data.hdf5").read_bytes()) if byte]
"""Places in the file that are not empty."""


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    shutil.copytree(HERE / "parts", tmp_path / "x" / "data")
    return tmp_path / "x"


@pytest.mark.parametrize(("name", "keys"), [("parts", dict(parts=True)), ("discrete", dict(discrete=True))])
def test_an_agent_of_the_environment_would_have_lived_it(name: str, keys: dict[str, bool]) -> None:
    """Each action, done by the environment's wrapper, is the one that was recorded; so is each observation seen."""
    found = MinariEpisodes(HERE / name)
    env = GymnasiumTask(Point(**keys), tiny_config(), None, 10)
    with h5py.File(HERE / name / "main_data.hdf5") as file:
        for i in (0, 1):
            rows, group = found.rows(i, i + 1), file[f"episode_{i}"]
            assert np.abs(rows.action[1:]).max() <= 1
            for t, action in enumerate(group["actions"]):
                np.testing.assert_allclose(env.done(rows.action[t + 1]), action, rtol=1e-6, atol=1e-6)
            for t, seen in enumerate(rows.obs):
                obs = group["observations"]
                raw = {k: x[t] for k, x in obs.items()} if keys.get("parts") else obs[t]
                np.testing.assert_array_equal(seen, env.seen(raw, t == 0))
            np.testing.assert_array_equal(rows.reward[1:], group["rewards"][:].astype(np.float32))
            np.testing.assert_array_equal(rows.terminated[1:], group["terminations"][:])
    assert found.lengths.tolist() == [8, 11]
    found.close()


@pytest.mark.parametrize("path", ["", "data", "data/main_data.hdf5"])
def test_it_becomes_a_data_set(path: str, parts: Path, tmp_path: Path) -> None:
    convert([parts / path], tmp_path / "set")
    data = DataSet.open(tmp_path / "set")
    (task,) = data.tasks
    assert (task.name, task.obs_dim, task.action_dim, task.steps, task.terminated) == ("Point-parts-v0", 6, 2, 17, 1)
    assert not [*problems(tmp_path / "set")]
    assert data.index.shards[0].origin.startswith("Minari point/parts-v0 (")


def test_it_gets_the_name_that_is_given(parts: Path, tmp_path: Path) -> None:
    convert([parts], tmp_path / "set", "mine")
    assert DataSet.open(tmp_path / "set").tasks[0].name == "mine"


def test_actions_outside_of_the_bounds_are_those_bounds(parts: Path) -> None:
    with h5py.File(parts / "data" / "main_data.hdf5", "a") as f:
        f["episode_0/actions"][0] = [-50, 3]
    assert MinariEpisodes(parts).rows(0, 1).action[1].tolist() == [-1, 1]


def metadata(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "metadata.json"
        about = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in about.items() if v is not None}))

    return change


def file(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        with h5py.File(folder / "main_data.hdf5", "a") as f:
            change(f)

    return changed


def external(f: Any) -> None:
    """Numbers that lie in another file, as any file on the disk is."""
    del f["episode_0/rewards"]
    f["episode_0"].create_dataset("rewards", (7,), "f8", external=[("/etc/hostname", 0, 56)])


def virtual(f: Any) -> None:
    del f["episode_0/rewards"]
    layout = h5py.VirtualLayout((7,), "f8")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (7,))
    f["episode_0"].create_virtual_dataset("rewards", layout)


def swapped(name: str, make: Callable[[], Any]) -> Callable[[Path], None]:
    def change(f: Any) -> None:
        del f[name]
        f[name] = make()

    return file(change)


def huge(f: Any) -> None:
    del f["episode_0/rewards"]
    f["episode_0"].create_dataset("rewards", (1 << 40,), "f8", chunks=(1 << 10,), compression="gzip")


def many(f: Any) -> None:
    del f["episode_0/rewards"]
    f["episode_0"].create_dataset("rewards", (1 << 26,), "f8", chunks=(1 << 10,), compression="gzip")


BOX = dict(type="Box", dtype="float32", shape=[2], low=[-1.0, -1.0], high=[1.0, 1.0])
IMAGE = dict(type="Box", dtype="uint8", shape=[64, 64, 3], low=[[[0] * 3] * 64] * 64, high=[[[255] * 3] * 64] * 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (metadata(data_format="arrow"), "has the format 'arrow', allowed: hdf5"),
        (metadata(total_episodes=3), "says it has 3 episodes, allowed: the 2"),
        (metadata(total_episodes=-1), "says it has -1 episodes"),
        (metadata(env_spec=None), "does not name its environment: tasks=NAME does"),
        (metadata(env_spec="nonsense"), "env_spec is no JSON"),
        (metadata(action_space=None), "lacks the key 'action_space'"),
        (metadata(action_space=json.dumps(BOX | dict(high=[1e400, 1.0]))), "finite bounds"),
        (metadata(action_space=json.dumps(BOX | dict(dtype="O"))), "is not in a form known here"),
        (metadata(action_space=json.dumps(dict(type="Graph"))), "a space of the type 'Graph'"),
        (metadata(action_space=json.dumps(dict(BOX, shape=[3], low=[-1] * 3, high=[1] * 3))), "actions of 2 numbers"),
        (metadata(observation_space=json.dumps(IMAGE)), "images"),
        (metadata(observation_space=json.dumps(BOX)), "episode_0 has no numbers at observations"),
        (metadata(observation_space=json.dumps(dict(type="Dict", subspaces={"../../x": BOX}))), "lacks observations"),
        (metadata(observation_space='{"type":"Tuple","subspaces":[' * 3000), "is no JSON"),
        (lambda p: (p / "metadata.json").write_text("[" * 100_000), "metadata.json is no JSON"),
        (lambda p: (p / "metadata.json").write_text("[]"), "no JSON object"),
        (lambda p: (p / "main_data.hdf5").unlink(), "has no main_data.hdf5"),
        (
            lambda p: (p / "main_data.hdf5").write_bytes((p / "main_data.hdf5").read_bytes()[:9000]),
            "truncated, damaged",
        ),
        (lambda p: (p / "main_data.hdf5").write_bytes(b"nothing"), "or no HDF5"),
        (file(lambda f: f.move("episode_1", "episode_2")), "lacks episode_1"),
        (file(lambda f: f.move("episode_1/rewards", "episode_1/reward")), "/episode_1 lacks rewards"),
        (file(external), "/episode_0/rewards leads to other files"),
        (file(virtual), "leads to other files"),
        (swapped("episode_0", lambda: h5py.ExternalLink("/tmp/x.h5", "/")), "/episode_0 is a link"),
        (swapped("episode_0/actions", lambda: h5py.SoftLink("/episode_1/actions")), "actions is a link"),
        (swapped("episode_0/actions", lambda: np.zeros((6, 2))), r"has \(6, 2\) of float64, allowed: numbers, 7 rows"),
        (swapped("episode_0/actions", lambda: [b"x"] * 7), "allowed: numbers, 7 rows"),
        (swapped("episode_0/observations/kind", lambda: np.full(8, 5)), r"got 5 to 5 of Discrete\(3\)"),
        (swapped("episode_0/rewards", lambda: np.zeros(0)), "episode 0 has no step"),
        (swapped("episode_0/rewards", lambda: 3.0), "no numbers at rewards"),
        (file(huge), "claims 8,796,093,022,208 bytes"),
        (file(many), "claims episodes of .* bytes in a file of"),
    ],
)
def test_what_is_none_or_leads_elsewhere_is_refused(change: Callable[[Path], None], reason: str, parts: Path) -> None:
    change(parts / "data")
    with pytest.raises(DataError, match=reason):
        convert([parts], parts / "set")
    assert not (parts / "set" / "index.json").exists()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_named_or_changes_numbers_alone(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """HDF5 of this kind has no checksums; whatever its library raises, it becomes a `DataError`."""
    folder = tmp_path_factory.mktemp("flip")
    shutil.copy(HERE / "parts" / "metadata.json", folder)
    content = bytearray((HERE / "parts" / "main_data.hdf5").read_bytes())
    if data.draw(st.integers(0, 9)):
        for i in data.draw(st.lists(st.sampled_from(FULL), min_size=1, max_size=4)):
            content[i] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (folder / "main_data.hdf5").write_bytes(content)
    with contextlib.suppress(DataError):
        found = MinariEpisodes(folder)
        try:
            rows = found.rows(0, 2)  # compares the rows that each dataset claims
            assert found.lengths.tolist() == [8, 11]
            assert rows.obs.shape == (19, 6)
        finally:
            found.close()
    shutil.rmtree(folder)


def test_a_link_in_place_of_the_file_is_refused(parts: Path) -> None:
    path = parts / "data" / "main_data.hdf5"
    path.rename(parts / "x.hdf5")
    path.symlink_to(parts / "x.hdf5")
    with pytest.raises(DataError, match=r"has no main_data\.hdf5"):
        MinariEpisodes(parts)


def test_without_h5py_it_says_what_to_install(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(DataError, match=r"pip install 'tdmpc2-fast\[minari\]'"):
        MinariEpisodes(parts)
