"""One model for several tasks, as a person asks for it on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Capture

pytest.importorskip("click")
pytest.importorskip("rich")

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train import cli
from tdmpc2_fast.train.cli import keys, sweep

TWO = ["walker-walk", "cup-catch"]


def test_a_name_makes_one_model_of_what_is_else_a_sweep() -> None:
    words = ["task=walker-walk,cup-catch", "as=two", "seed=1,2"]
    runs = sweep.expand(words)
    assert [r.words for r in runs] == [(*words[:2], f"seed={n}") for n in (1, 2)]
    cfg = Config.from_dict(keys.parse(runs[0].words))
    assert (cfg.task, cfg.tasks, cfg.multitask, cfg.action_dims) == ("two", tuple(TWO), True, (6, 2))
    assert len(sweep.expand(words[:1])) == 2
    assert keys.parse(["task=walker-walk, cup-catch", "+as=two"]) == dict(task="two", tasks=TWO)
    assert keys.parse(["task=walker-walk", "as=one"]) == dict(task="one", tasks=["walker-walk"])
    assert keys.parse(["task=mt30"]) == dict(task="mt30")


FILE = """# two of DMControl's
---
name: mine  # its folder's
tasks:
  - walker-walk
  - 'cup-catch'
"""


@pytest.mark.parametrize("text", [FILE, FILE.replace("name: mine  # its folder's\n", ""), FILE.replace("\n", "\r\n")])
def test_a_file_lists_a_set(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(text.encode())
    name = "mine" if "name" in text else "own"
    assert keys.parse([f"task={path}"]) == dict(task=name, tasks=TWO)
    assert keys.parse([f"task={path}", "as=other"]) == dict(task="other", tasks=TWO)
    runs = sweep.expand([f"task={path}", "seed=1,2"])
    assert [keys.parse(r.words)["tasks"] for r in runs] == [TWO, TWO]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\n", ["lists no task", "`- TASK`"]),
        ("- walker-walk\n", ["line 1", "'- walker-walk'"]),
        ("tasks: [walker-walk]\n", ["line 1"]),
        ("tasks:\n  - a\nother: 1\n", ["line 3", "'other: 1'"]),
        ("tasks:\n  - a\ntasks:\n  - b\n", ["line 3"]),
        ("tasks:\n  -\n", ["line 2"]),
        ("name: a/b\ntasks:\n  - a\n", ["'as'", "'a/b'"]),
        ("\xff", ["cannot read"]),
    ],
)
def test_a_file_in_another_form_is_refused_by_its_line(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "own.yml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as e:
        keys.parse([f"task={path}"])
    assert all(word in str(e.value) for word in words), str(e.value)
    with pytest.raises(ConfigError, match="No such file"):
        keys.parse(["task=nowhere.yaml"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=walker-walk,cup-catch", "as=mt30"], "'as': got 'mt30'"),
        (["task=walker-walk,cup-catch", "as=dog-run"], "'as': got 'dog-run'"),
        (["task=walker-walk,cup-catch", "as=a/b"], "'as': got 'a/b'"),
        (["task=walker-walk,", "as=two"], "a task between any two commas"),
        (["task=walker-walk,walker-walk", "as=two"], "each task once"),
        (["task=walker-walk,cup-cathc", "as=two"], "unknown task 'cup-cathc'. Nearest: cup-catch"),
        (["task=walker-walk,cup-catch", "as=two", "obs=rgb"], "'obs': got 'rgb', allowed: state in a multi-task model"),
        (["task=walker-walk,cup-catch", "as=two", "episodic=true"], "false in a multi-task model"),
        (["task=walker-walk,Hopper-v5", "as=two", "dry_run=false"], "Hopper-v5 terminated an episode"),
    ],
)
def test_mistakes_are_told_before_the_run(
    words: list[str], message: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_others_than_train_take_no_name(capsys: Capture) -> None:
    assert cli.main(["resume", "run", "as=two"]) == 2
    assert "belongs to the command train" in capsys.readouterr().err
