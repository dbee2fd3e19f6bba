"""The program around the commands: help, plugins and completion."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from command_line import (
    Capture,
    in_an_empty_folder,  # noqa: F401
)

from tdmpc2_fast import Config
from tdmpc2_fast.config import DEFAULT_DIMS
from tdmpc2_fast.train.cli import keys

pytest.importorskip("dm_control")
pytest.importorskip("click")
pytest.importorskip("rich")
from click.shell_completion import ShellComplete

from tdmpc2_fast.train import cli
from tdmpc2_fast.train.cli import app, tables


class TestProgram:
    def test_without_a_word_it_shows_its_help(self, capsys: Capture) -> None:
        assert cli.main([]) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        assert cli.main(["--help"]) == 0
        assert capsys.readouterr().out == shown.out

    def test_version(self, capsys: Capture) -> None:
        assert cli.main(["--version"]) == 0
        assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", capsys.readouterr().out)

    def test_the_installed_command_runs(self) -> None:
        command = [str(Path(sys.executable).with_name("tdmpc2-fast")), "--version"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def test_a_plugin_gets_the_words_as_they_came(self, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        got: list[str] = []

        class Entry:
            name = "bench"

            def load(self) -> Callable[[list[str]], int]:
                return lambda words: got.extend(words) or 3  # type: ignore[func-returns-value]

        monkeypatch.setattr(app, "entry_points", lambda **_: [Entry()])
        given = ["planner", "--help", "size=1,5", "--", "-x"]
        assert cli.main(["bench", *given]) == 3
        assert got == given

    def test_a_broken_plugin_leaves_the_help_whole(self, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        entry = EntryPoint("broken", "no_such_package.run:main", "tdmpc2_fast.commands")
        monkeypatch.setattr(app, "entry_points", lambda name="broken", **_: [entry] if name == "broken" else [])
        assert cli.main(["--help"]) == 0
        assert "Cannot be loaded: No module named 'no_such_package'" in capsys.readouterr().out

    def test_without_click_it_says_what_to_install(self, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "click", None)
        assert cli.main(["train"]) == 2
        assert "pip install 'tdmpc2-fast[train]'" in capsys.readouterr().err


class TestHelp:
    def test_short_help(self, capsys: Capture) -> None:
        assert cli.main(["--help"]) == 0
        out = capsys.readouterr().out
        for command in [*(c.name for c in app.COMMANDS), "bench"]:
            assert re.search(rf"^  {command} +[A-Z]", out, re.MULTILINE)
        assert "..." not in out.partition("Commands:")[2].partition("Examples")[0]
        assert len(out.splitlines()) < 32
        assert cli.main(["help"]) == 0
        assert capsys.readouterr().out == out

    @pytest.mark.parametrize("width", [80, 200])
    @pytest.mark.parametrize("command", ["train", "eval"])
    def test_every_key_is_in_the_help(
        self, command: str, width: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        assert cli.main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert max(map(len, out.splitlines())) <= width
        shown = [f for f in dataclasses.fields(Config) if f.name not in keys.FILLED_IN]
        own = dataclasses.fields(dict(train=keys.Options, eval=keys.EvalOptions)[command])
        shown += own
        text = " ".join(out.split())
        for f in shown:
            assert f"  {f.name}={keys.default_text(f)} " in out
            if width == 200:
                assert f"{tables._allowed(f)} " in out
                assert f.metadata["help"] in text
        assert ("preset=quick" in out) == (command == "train")
        assert "horizon=3                integer >= 1" in out
        for key in {*keys.FILLED_IN} - {f.name for f in own}:
            assert f"  {key}=" not in out

    def test_keys_are_grouped_as_in_config(self) -> None:
        groups = keys.groups(keys.Options)
        assert list(groups) == [
            *("command line", "environment", "evaluation", "training", "planning", "policy prior", "critic"),
            *("architecture", "logging", "misc", "from the environment", "of this project"),
        ]
        assert [f.name for f in groups["critic"]] == ["num_bins", "vmin", "vmax"]
        shown = [f.name for fields in groups.values() for f in fields]
        assert shown == [*keys.OPTION_FIELDS, *keys.CONFIG_FIELDS]

    @pytest.mark.parametrize("own", [keys.Options, keys.PlotOptions, keys.EvalOptions, keys.PlanOptions])
    def test_defaults_can_be_typed(self, own: type[Any]) -> None:
        for fields in keys.groups(own).values():
            for f in fields:
                default = f.default if f in dataclasses.fields(own) else Config.__dict__.get(f.name, f.default)
                got = keys.value_of(f, keys.default_text(f))
                assert got == DEFAULT_DIMS.get(f.name, default), f.name


class TestCompletion:
    def complete(self, *args: str) -> list[str]:
        """Of the last word, as zsh and fish ask."""
        found = ShellComplete(app.app, {}, "tdmpc2-fast", "_TDMPC2_FAST_COMPLETE").get_completions(
            list(args[:-1]), args[-1]
        )
        return [i.value if i.type == "plain" else f"<{i.type}>" for i in found]

    @pytest.mark.parametrize(
        ("args", "found"),
        [
            (("",), [*(c.name for c in app.COMMANDS), "bench"]),
            (("plot", "ref"), ["reference="]),
            (("plan", "deci"), ["decision="]),
            (("tr",), ["train"]),
            (("train", "hor"), ["horizon="]),
            (("train", "preset=1"), ["preset=1m", "preset=19m"]),
            (("train", "obs="), ["obs=state", "obs=rgb"]),
            (("train", "mpc=f"), ["mpc=false"]),
            (("train", "task=dog-"), [f"task=dog-{x}" for x in ("run", "stand", "trot", "walk", "fetch")]),
            (("train", "task=dog-run,humanoid-w"), ["task=dog-run,humanoid-walk"]),
            (("train", "task", "=", "walker-s"), ["walker-stand"]),  # bash breaks words at "="
            (("train", "task", "=", "dog-run", "obs", "="), ["state", "rgb"]),
            (("train", "horizon=3", "hor"), []),
            (("task=dog-run", "hor"), ["horizon="]),
            (("task=humanoid-w",), ["task=humanoid-walk"]),
            (("eval", "chec"), ["checkpoint=", "checkpoint_minutes="]),
            (("eval", "checkpoint=ru"), ["<file>"]),
            (("eval", "pre"), ["precision="]),
            (("info", "ru"), ["<file>"]),
        ],
    )
    def test_words(self, args: tuple[str, ...], found: list[str]) -> None:
        assert self.complete(*args) == found

    def test_through_bash(self) -> None:
        env = dict(_TDMPC2_FAST_COMPLETE="bash_source")
        script = "import sys; from tdmpc2_fast.train.cli import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **env}, check=False
        )
        assert "complete -o nosort -o nospace -F" in done.stdout
        env = dict(_TDMPC2_FAST_COMPLETE="bash_complete", COMP_WORDS="tdmpc2-fast train hori", COMP_CWORD="2")
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **env}, check=False
        )
        assert done.stdout == "plain,horizon=\n"
