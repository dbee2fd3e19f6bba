"""The commands `collect` and `data`."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
from command_line import Capture, in_an_empty_folder, start  # noqa: F401
from data_episodes import made

pytest.importorskip("click")
pytest.importorskip("gymnasium")
from tdmpc2_fast.train import cli
from tdmpc2_fast.train.data import collect as module
from tdmpc2_fast.train.data.dataset import DataSet

OFFICIAL = str(Path(__file__).parent / "official")


def test_collect_says_what_there_is(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = ["episodes=2", "episode_length=10", "out=set"]
    assert cli.main(["collect", "Pendulum-v1", "MountainCarContinuous-v0", *words]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-4].split() == ["task", "obs", "action", "length", "episodes", "steps", "return", "min", "max", "MB"]
    assert out[-3].split()[:6] == ["Pendulum-v1", "3", "1", "10", "2", "20"]
    assert out[-1] == "set: 2 tasks, 4 episodes, 40 steps, 0.0 MB"


def test_data_info_check_and_convert(capsys: Capture) -> None:
    made(Path("one"))
    assert cli.main(["data", "check", "one"]) == 0
    assert capsys.readouterr().out == "one: 3 files, every checksum and every number is right\n"
    assert cli.main(["data", "convert", "one", "out=two"]) == 0
    capsys.readouterr()
    assert cli.main(["data", "info", "two"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "two: 3 tasks, 15 episodes, 111 steps, 0.0 MB"
    assert cli.main(["data", "convert", OFFICIAL, "tasks=a,b,c", "out=three"]) == 0
    assert "6 episodes of 3 tasks, its checksums are right" in capsys.readouterr().out
    assert [t.episodes for t in DataSet.open("three").tasks] == [12, 12, 12]


def test_check_fails_with_the_reason(capsys: Capture) -> None:
    path = Path("one") / made(Path("one")).shards[1].file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert cli.main(["data", "check", "one"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "00001-cup-catch.safetensors': its checksum differs" in out[0]
    assert out[1] == "one: 1 problem"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["collect"], "got no source, allowed: tdmpc2-fast collect SOURCE"),
        (["collect", "Pendulum-v1"], "got no out=, allowed"),
        (["collect", "Pendulum-v1", "out=x", "episodes=0"], "'episodes': got 0, allowed"),
        (["collect", "Pendulum-v1", "out=x", "episods=3"], "unknown config key 'episods'"),
        (["data"], "got '', allowed: tdmpc2-fast data info FOLDER"),
        (["data", "info"], "data info: got no FOLDER, allowed"),
        (["data", "convert", "out=y"], "data convert: got no SOURCE"),
        (["collect", "task=Pendulum-v1", "out=x"], "got no source, .*; SOURCE is the name alone: Pendulum-v1"),
        (["collect", "Pendulum-v1", "out=x", "steps=7"], "'steps': got 7, which changes nothing"),
        (["data", "inf", "x"], "Did you mean 'info'?"),
        (["data", "info", "x", "y"], "data info: got 'info x y', allowed: data info FOLDER"),
        (["data", "check", "x", "out=y"], "data check: got"),
        (["data", "convert", "x"], "data convert: got no out="),
        (["data", "convert", "x", "out=y", "task=a"], "got 'task=a'.*Did you mean 'tasks'"),
        (["data", "info", "nothing"], "data 'nothing': is not there, allowed: a folder"),
        (["data", "convert", "nothing", "out=y"], "data 'nothing': is not there"),
        (["data", "convert", "there", "out=there"], "'out': 'there' is a whole data set already"),
        (["data", "convert", "there", "out=y", "tasks=mt30"], "'tasks': got 'mt30', allowed: none with 'there'"),
        (["data", "convert", OFFICIAL, "out=y"], "which is no official set"),
    ],
)
def test_mistakes_end_with_status_2(words: list[str], reason: str, capsys: Capture) -> None:
    made(Path("there"))
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert re.search(reason, error), error
    assert not Path("y/index.json").exists()
    assert not Path("x").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_whole_set(number: signal.Signals) -> None:
    """In a process of its own, as a person stops it."""
    process = start("collect", "Pendulum-v1", "episode_length=50", "episodes=100000", "out=set")
    assert process.stdout is not None
    assert (
        process.stdout.readline()
        == "Pendulum-v1: 0 of 100,000 episodes are there (random actions, seed 1, episode_length=50)\n"
    )
    time.sleep(1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "the same command goes on" in error
    assert 0 < DataSet.open("set").tasks[0].episodes < 100_000


def test_help_names_the_keys(capsys: Capture) -> None:
    assert cli.main(["data", "--help"]) == 0
    assert "tasks=none" in capsys.readouterr().out
    assert cli.main(["collect", "--help"]) == 0
    assert "replay=false" in capsys.readouterr().out
    assert module.EPISODES == 100
