"""Collecting: random actions, agents, replays; appended, stopped, gone on with."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import QUICK, in_an_empty_folder, save_untrained, words  # noqa: F401
from conftest import TINY
from data_episodes import episode
from data_sets import make_data

pytest.importorskip("gymnasium")
pytest.importorskip("dm_control")
pytest.importorskip("click")
from tdmpc2_fast import TDMPC2, Config, load
from tdmpc2_fast.errors import CheckpointError, ConfigError, DataError
from tdmpc2_fast.train import cli
from tdmpc2_fast.train.data import collect as module
from tdmpc2_fast.train.data.check import problems
from tdmpc2_fast.train.data.collect import collect
from tdmpc2_fast.train.data.dataset import DataSet
from tdmpc2_fast.train.data.rows import kept
from tdmpc2_fast.train.data.writer import write
from tdmpc2_fast.train.envs.base import EnvError
from tdmpc2_fast.train.run.checkpoints import Checkpoints
from tdmpc2_fast.train.run.folder import locked
from tdmpc2_fast.train.run.stop import Stop, Stopped

OUT = Path("set")
SHORT: dict[str, Any] = dict(episode_length=20)
PENDULUM = "Pendulum-v1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        assert cli.main(words(work_dir=folder, steps=130, episode_length=20, eval_freq=50)) == 0
    assert len([*folder.glob("checkpoints/*-at-*")]) == 2
    return folder


class StopAfter(Stop):
    """Asked to end after so many decisions."""

    def __init__(self, decisions: int) -> None:
        super().__init__()
        self.left = decisions

    def check(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.signal = 2
        super().check()


def test_random_episodes() -> None:
    lines: list[str] = []
    collect([PENDULUM], OUT, SHORT, 3, tell=lines.append)
    (task,) = DataSet.open(OUT).tasks
    assert (task.name, task.episodes, task.steps, task.obs_dim, task.action_dim) == (PENDULUM, 3, 60, 3, 1)
    assert not [*problems(OUT)]
    assert lines[-1].startswith("Pendulum-v1: 3 of 3 episodes, return -")
    rows = DataSet.open(OUT).episodes(PENDULUM)[0].rows(0, 3)
    assert np.nanstd(rows.action) > 0.4  # of a uniform one it is 0.58
    assert len(np.unique(rows.obs[::21], axis=0)) == 3  # each begins elsewhere


def test_equal_seeds_collect_equal_episodes() -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        collect([PENDULUM], Path(folder), SHORT | dict(seed=seed), 2)
    a, b, c = (DataSet.open(f).index.shards[0].sha256 for f in "abc")
    assert a == b != c


def test_it_goes_on_to_the_number_asked_for() -> None:
    collect([PENDULUM], OUT, SHORT, 2)
    lines: list[str] = []
    collect([PENDULUM], OUT, SHORT, 2, tell=lines.append)
    assert lines == ["Pendulum-v1: 2 of 2 episodes are there (random actions, seed 1, episode_length=20)"]
    collect([PENDULUM], OUT, SHORT, 3)
    collect([PENDULUM], OUT, SHORT | dict(seed=2), 1)
    data = DataSet.open(OUT)
    assert data.tasks[0].episodes == 4
    assert len({rows.tobytes() for e in data.episodes(PENDULUM) for rows in [e.rows(0, 1).obs]}) == 3


def test_stopped_it_keeps_what_was_done() -> None:
    with pytest.raises(Stopped):
        collect([PENDULUM], OUT, SHORT, 5, stop=StopAfter(50))
    assert DataSet.open(OUT).tasks[0].episodes == 2
    assert not [*problems(OUT)]
    collect([PENDULUM], OUT, SHORT, 5)
    assert DataSet.open(OUT).tasks[0].episodes == 5


def test_a_failing_environment_keeps_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = module.step, [50]

    def failing(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise EnvError("broke")
        return real(*args)

    monkeypatch.setattr(module, "step", failing)
    with pytest.raises(EnvError, match="broke"):
        collect([PENDULUM], OUT, SHORT, 5)
    assert DataSet.open(OUT).tasks[0].episodes == 2


def test_long_collections_are_appended_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_APPEND_SECONDS", 0)
    collect([PENDULUM], OUT, SHORT, 3)
    assert [s.episodes for s in DataSet.open(OUT).index.shards] == [1, 1, 1]


def test_it_waits_for_another_process_to_have_written() -> None:
    collect([PENDULUM], OUT, SHORT, 1)
    busy = locked(OUT, "data")
    busy.__enter__()
    threading.Timer(0.5, busy.__exit__, (None, None, None)).start()
    collect([PENDULUM], OUT, SHORT, 2)
    assert DataSet.open(OUT).tasks[0].episodes == 2


def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    collect([PENDULUM], OUT, SHORT, 1)
    monkeypatch.setattr(module, "_APPEND_SECONDS", 0.2)
    with locked(OUT, "data"), pytest.raises(ConfigError, match="is writing to it"):
        collect([PENDULUM], OUT, SHORT, 2)


@pytest.mark.parametrize("mpc", [True, False])
def test_an_agent_plays(mpc: bool) -> None:
    save_untrained("agent")
    for folder, noise in (("a", False), ("b", False), ("c", True)):
        collect(["agent"], Path(folder), dict(mpc=mpc), 2, noise=noise)
    a, b, c = (DataSet.open(f) for f in "abc")
    assert a.index.shards[0].sha256 == b.index.shards[0].sha256 != c.index.shards[0].sha256
    assert a.tasks[0].steps == 80
    assert "with noise" in c.index.shards[0].origin
    if not mpc:  # what the policy prior of the agent does in these observations
        rows = a.episodes(PENDULUM)[0].rows(0, 1)
        expected = load("agent", mpc=False).act(rows.obs[:-1], eval_mode=True)
        np.testing.assert_allclose(rows.action[1:], expected.numpy(), atol=1e-5)


def test_all_checkpoints_of_a_run_play(trained: Path) -> None:
    """Its best, too, where it is none of the newest, and once what stands there twice."""
    files = module._checkpoints(trained)
    apart = not any(files[0].samefile(f) for f in files[1:]) and files[0].stem == "best"
    assert len(files) == 2 + apart
    count = len({f.read_bytes() for f in files})
    collect([str(trained)], OUT, {}, 5)
    shards = DataSet.open(OUT).index.shards
    assert [s.episodes for s in shards] == {1: [5], 2: [3, 2], 3: [2, 2, 1]}[count]
    assert len({s.origin for s in shards}) == count
    collect([str(trained)], OUT, {}, 5)
    assert DataSet.open(OUT).tasks[0].episodes == 5


def test_the_newest_plays_first_and_equal_ones_once(trained: Path) -> None:
    shutil.copytree(trained, "run")
    names = [p.name for p in sorted(Path("run/checkpoints").glob("*-at-*"))]
    lines: list[str] = []
    collect(["run"], OUT, {}, 1, tell=lines.append)
    (shard,) = DataSet.open(OUT).index.shards
    assert names[-1] in shard.origin
    assert not [line for line in lines if "of 0 episodes" in line]
    for name in names[:-1]:
        shutil.copy(f"run/checkpoints/{names[-1]}/agent.safetensors", f"run/checkpoints/{name}/agent.safetensors")
    for path in Path("run/checkpoints").glob("best.*"):
        path.unlink()
    collect(["run"], Path("once"), {}, 4)
    assert [s.episodes for s in DataSet.open("once").index.shards] == [4]


def test_what_was_played_otherwise_is_not_there() -> None:
    save_untrained("agent")
    for values in (dict(mpc=False), dict(mpc=True, iterations=2), dict(mpc=False)):
        collect(["agent"], OUT, values, 1)
    assert [s.origin.partition("seed 1")[2] for s in DataSet.open(OUT).index.shards] == [
        ", mpc=false",
        ", iterations=2",
    ]
    for g in (5.0, 9.0):
        collect([PENDULUM], OUT, dict(episode_length=5, env_kwargs=dict(g=g)), 1)
    assert DataSet.open(OUT).tasks[0].episodes == 4


def test_two_of_one_seed_do_not_write_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real, first = module._round, [True]

    def beside(*args: Any) -> Any:
        if first.pop() if first else False:
            collect([PENDULUM], OUT, SHORT, 1)
        return real(*args)

    monkeypatch.setattr(module, "_round", beside)
    with pytest.raises(DataError, match=r"got 1 episodes of Pendulum-v1 .* where 0 were: another process"):
        collect([PENDULUM], OUT, SHORT, 2)
    assert DataSet.open(OUT).tasks[0].episodes == 1


def test_environments_are_closed_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Any] = []

    def full(*args: Any, **keys: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module, "write", full)
    monkeypatch.setattr(module, "close_all", lambda envs: closed.append(len(envs)))
    with pytest.raises(OSError, match="no space"):
        collect([PENDULUM], OUT, SHORT, 2)
    assert closed == [1, 1]  # of the try, and of what played
    assert not OUT.exists()


def test_a_folder_of_other_files_is_refused_before_anything_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    OUT.mkdir()
    (OUT / "00000-Pendulum-v1.safetensors").write_text("mine")
    monkeypatch.setattr(module, "_play", lambda *args: pytest.fail("it played"))
    with pytest.raises(DataError, match=r"and no index\.json, allowed: a new or empty folder"):
        collect([PENDULUM], OUT, SHORT, 1)
    with pytest.raises(DataError, match="cannot be made"):
        collect([PENDULUM], Path("/proc/foo"), SHORT, 1)


def test_a_run_without_a_replay_says_so(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", PENDULUM)
    assert cli.main(words(work_dir="run", steps=2, episode_length=20, data_dir=data)) == 0
    with pytest.raises(DataError, match="run: has no replay: it learned from data alone"):
        collect(["run"], OUT, {}, replay=True)
    assert not OUT.exists()


def test_the_best_plays_where_it_is_none_of_the_newest(trained: Path) -> None:
    shutil.copytree(trained, "run")
    names = [p.name for p in sorted(Path("run/checkpoints").glob("*-at-*"))]
    shutil.copy(f"run/checkpoints/{names[0]}/agent.safetensors", "best")
    Path("run/checkpoints/best.safetensors").unlink()
    os.link(f"run/checkpoints/{names[1]}/agent.safetensors", "run/checkpoints/best.safetensors")
    assert [p.parent.name for p in module._checkpoints(Path("run"))] == names
    Path("run/checkpoints/best.safetensors").unlink()
    Path("best").rename("run/checkpoints/best.safetensors")
    assert [p.parent.name for p in module._checkpoints(Path("run"))] == ["checkpoints", *names]


def test_a_replay_is_taken_as_it_is(trained: Path) -> None:
    collect([str(trained)], OUT, {}, replay=True)
    saved = Checkpoints(trained, 1).newest(print)
    assert saved is not None
    data = DataSet.open(OUT)
    steps = dict(Checkpoints(trained, 1).replay.read(saved.chunks))
    held = {k: np.concatenate([x[k].numpy() for x in steps.values()]) for k in ("obs", "action", "reward")}
    lengths = saved.tensors["replay/episodes"][:, 1].tolist()
    assert data.tasks[0].episodes == len(lengths) >= 5
    rows = data.episodes(PENDULUM)[0].rows(0, len(lengths))
    for name, x in held.items():
        np.testing.assert_array_equal(getattr(rows, name), x)
    lines: list[str] = []
    collect([str(trained)], OUT, {}, replay=True, tell=lines.append)
    assert "its episodes are there" in lines[0]
    collect([str(trained)], Path("newest"), {}, 2, replay=True)
    newest = DataSet.open("newest").episodes(PENDULUM)[0].rows(0, 2)
    np.testing.assert_array_equal(newest.obs, held["obs"][-42:])


def test_an_agent_of_several_tasks_plays_each() -> None:
    tasks = (PENDULUM, "MountainCarContinuous-v0")
    keys = dict(
        TINY, multitask=True, tasks=tasks, action_dims=(1, 1), episode_lengths=(200, 999), task_dim=4, mpc=False
    )
    TDMPC2(Config.from_dict({**keys, "device": "cpu"}).with_env({"state": (5,)}, 2, 999)).save("several")
    collect(["several"], OUT, {}, 1)
    with pytest.raises(ConfigError, match=rf"'task': got '{PENDULUM}', allowed: none .* each of its tasks"):
        collect(["several"], OUT, dict(task=PENDULUM), 1)
    found = {t.name: t for t in DataSet.open(OUT).tasks}
    assert {k: (t.obs_dim, t.action_dim, t.episodes) for k, t in found.items()} == {
        tasks[0]: (3, 1, 1),
        tasks[1]: (2, 1, 1),
    }
    assert found[tasks[0]].steps == 200


@pytest.mark.parametrize(
    ("source", "keys", "error", "reason"),
    [
        ("walker-wlak", {}, ConfigError, "unknown task 'walker-wlak'. Nearest: walker-walk"),
        (PENDULUM, dict(values=dict(obs="rgb")), DataError, "config key 'obs': got 'rgb', allowed: 'state'"),
        ("empty", {}, CheckpointError, "a folder without checkpoints"),
        ("empty", dict(replay=True), DataError, "has no checkpoint with a replay"),
        ("nothing", dict(replay=True), DataError, "has no checkpoint with a replay"),
        (
            "nothing",
            dict(replay=True, noise=True),
            ConfigError,
            "'noise': got True, which changes nothing for a replay",
        ),
        ("nothing", dict(replay=True, values=dict(seed=2)), ConfigError, "'seed': got 2, .* allowed: none"),
        ("runs/none/1", {}, ConfigError, "'runs/none/1' is no file or folder, and .*unknown task"),
        ("a,b", {}, ConfigError, "unknown task 'a,b'.*Several sources have spaces between them"),
        (PENDULUM, dict(noise=True), ConfigError, "'noise': got True, which changes nothing for random actions"),
        (PENDULUM, dict(values=dict(steps=7)), ConfigError, "'steps': got 7, .* random actions, allowed: seed, device"),
        (PENDULUM, dict(values=dict(mpc=False)), ConfigError, "'mpc': got False, which changes nothing for random"),
        (
            PENDULUM,
            dict(values=dict(task="x")),
            ConfigError,
            r"'task': .* allowed: none, SOURCE says it \(Pendulum-v1\)",
        ),
    ],
)
def test_what_cannot_be_is_said_before(source: str, keys: dict[str, Any], error: Any, reason: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(error, match=reason):
        collect([source], OUT, **{"values": {}, **keys})
    assert not OUT.exists()


def test_all_mistakes_are_said_before_the_first_plays() -> None:
    save_untrained("agent")
    for wrong in ("walker-wlak", "empty"):
        Path("empty").mkdir(exist_ok=True)
        with pytest.raises((ConfigError, CheckpointError)):
            collect([PENDULUM, "agent", wrong], OUT, SHORT, 1)
    OUT.touch()
    with pytest.raises(DataError, match="'set' is a file, allowed: a folder"):
        collect([PENDULUM], OUT, SHORT, 1)
    OUT.unlink()
    rng = np.random.default_rng(0)
    write(OUT, [kept(PENDULUM, [episode(rng, 5, 4, 1)], "made")])
    with pytest.raises(DataError, match=r"has 'Pendulum-v1' with .* of 4 and 1 numbers, allowed: 3 and 1, as they are"):
        collect([PENDULUM], OUT, SHORT, 1)
    assert DataSet.open(OUT).tasks[0].episodes == 1


def test_an_agent_of_another_environment_is_refused() -> None:
    save_untrained("agent")
    with pytest.raises(ConfigError, match="obs_shape"):
        collect(["agent"], OUT, dict(task="MountainCarContinuous-v0"), 1)
    assert QUICK["task"] == PENDULUM
