"""The commands `tasks --check` and `suites`, and the interpreters that the latter makes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import Capture

pytest.importorskip("dm_control")
pytest.importorskip("click")

from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train import cli
from tdmpc2_fast.train.envs import APART
from tdmpc2_fast.train.envs.apart import interpreters
from tdmpc2_fast.train.envs.dmcontrol import DMControl

METAWORLD = APART["metaworld"].module.REQUIREMENTS


class TestCheck:
    def test_an_episode_of_each_is_played(self, capsys: Capture) -> None:
        assert cli.main(["tasks", "pendulum-s", "--check"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:4] for line in lines[1:-1]] == [
            ["pendulum-swingup", "3", "1", "500"],
            ["pendulum-spin", "3", "1", "500"],
        ]
        assert all(line.endswith("runs here") for line in lines[1:-1])
        assert lines[-1].startswith("2 tasks played, 0 failed")

    def test_one_that_fails_says_why(self, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise ZeroDivisionError("the physics are broken")

        monkeypatch.setattr(DMControl, "step", fail)
        assert cli.main(["tasks", "pendulum-spin", "check=true"]) == 1
        out = capsys.readouterr().out
        assert "FAILED: ZeroDivisionError: the physics are broken" in out
        assert "1 tasks played, 1 failed" in out

    def test_one_that_cannot_run_here_says_what_it_needs(
        self, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TDMPC2_SUITES", str(tmp_path))
        assert cli.main(["tasks", "mw-reach", "--check"]) == 1  # nothing was played
        out = capsys.readouterr().out
        assert "needs an interpreter of its own: tdmpc2-fast suites install metaworld" in out
        assert "0 tasks played, 0 failed" in out

    def test_a_broken_interpreter_is_a_failure(self, capsys: Capture, calls: list[list[str]]) -> None:
        interpreters.install("metaworld", METAWORLD, installer="pip")
        python = interpreters.python_of("metaworld")
        python.unlink()
        python.write_text("#!/bin/sh\nexit 0\n")
        python.chmod(0o755)
        assert cli.main(["tasks", "mw-reach-wall", "--check"]) == 1
        assert "FAILED: config key 'task': mw-reach-wall cannot be made" in capsys.readouterr().out

    def test_what_is_meant_for_a_flag_is_no_text(self, capsys: Capture) -> None:
        assert cli.main(["tasks", "--chek"]) == 2
        assert "tasks [TEXT] [--check]" in capsys.readouterr().err


@pytest.fixture(name="calls")
def recorded_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would be run; only the folder and the interpreter are made."""
    calls: list[list[str]] = []

    def run(call: Sequence[str]) -> None:
        calls.append(list(call))
        if "venv" in call:
            python = Path(call[-1]) / "bin/python"
            python.parent.mkdir(parents=True)
            python.symlink_to(sys.executable)

    monkeypatch.setenv("TDMPC2_SUITES", str(tmp_path / "suites"))
    monkeypatch.setattr(interpreters, "_run", run)
    return calls


class TestSuites:
    def test_one_is_installed_listed_and_removed(self, calls: list[list[str]], capsys: Capture) -> None:
        assert cli.main(["suites", "install", "metaworld", "installer=pip", f"python={sys.executable}"]) == 0
        assert calls[0][:3] == [sys.executable, "-m", "venv"]
        assert calls[1][-len(METAWORLD) :] == list(METAWORLD)
        assert "made in" in capsys.readouterr().out
        assert cli.main(["suites"]) == 0
        assert "runs here" in capsys.readouterr().out
        assert not APART["metaworld"].needs()
        assert cli.main(["suites", "remove", "metaworld"]) == 0
        assert not interpreters.home("metaworld").exists()
        assert APART["metaworld"].needs()

    def test_uv_is_taken_where_it_is(self, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(interpreters.shutil, "which", lambda name: f"/bin/{name}")
        interpreters.install("metaworld", METAWORLD)
        assert [call[:2] for call in calls] == [["uv", "venv"], ["uv", "pip"]]

    def test_what_is_not_ours_stays(self, calls: list[list[str]]) -> None:
        mine = interpreters.home("metaworld") / "my.txt"
        mine.parent.mkdir(parents=True)
        mine.write_text("x")
        with pytest.raises(ConfigError, match="is no interpreter of a suite"):
            interpreters.install("metaworld", METAWORLD, installer="pip")
        with pytest.raises(ConfigError, match="is no interpreter of a suite"):
            interpreters.remove("metaworld")
        assert mine.read_text() == "x"
        assert calls == []

    def test_what_serves_goes_on_serving_where_a_new_one_cannot_be_made(
        self, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interpreters.install("metaworld", METAWORLD, installer="pip")

        def fail(call: Sequence[str]) -> None:
            raise ConfigError("no network")

        monkeypatch.setattr(interpreters, "_run", fail)
        with pytest.raises(ConfigError, match="no network"):
            interpreters.install("metaworld", ["metaworld==9"], installer="pip")
        assert not interpreters.missing("metaworld", METAWORLD)
        assert [p.name for p in interpreters.home("metaworld").parent.iterdir()] == ["metaworld"]

    def test_a_folder_that_is_called_like_the_package_is_not_the_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "somewhere/metaworld").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path / "somewhere")
        monkeypatch.setenv("TDMPC2_SUITES", str(tmp_path / "suites"))
        assert "tdmpc2-fast suites install metaworld" in APART["metaworld"].needs()

    def test_another_version_or_a_damaged_one_is_made_anew(self, calls: list[list[str]]) -> None:
        interpreters.install("metaworld", ["metaworld==1"], installer="pip")
        assert "made by another version" in interpreters.missing("metaworld", METAWORLD)
        interpreters.install("metaworld", METAWORLD, installer="pip")
        interpreters.python_of("metaworld").unlink()
        assert "whose Python is gone" in interpreters.missing("metaworld", METAWORLD)
        stamp = interpreters.home("metaworld") / "tdmpc2-fast.json"
        for text in ("{", "[]", json.dumps({"requirements": None})):
            stamp.write_text(text)
            assert interpreters.missing("metaworld", METAWORLD)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["install"], "suites [install|remove NAME ...]"),
            (["update", "metaworld"], "suites [install|remove NAME ...]"),
            (["install", "metawrld"], "Did you mean 'metaworld'"),
            (["install", "metaworld", "installer=conda"], "allowed: one of uv, pip"),
            (["install", "metaworld", "pyton=3"], "suite: got 'pyton=3'"),
        ],
    )
    def test_wrong_words(self, words: list[str], said: str, calls: list[list[str]], capsys: Capture) -> None:
        assert cli.main(["suites", *words]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
        assert calls == []

    def test_an_installer_that_is_not_there(self, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(interpreters.shutil, "which", lambda name: None)
        with pytest.raises(ConfigError, match="installer: got 'uv', allowed: pip"):
            interpreters.install("metaworld", METAWORLD, installer="uv")

    def test_a_place_that_cannot_be_written(self, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TDMPC2_SUITES", "/proc/none")
        with pytest.raises(ConfigError, match="set TDMPC2_SUITES to a folder that can be written"):
            interpreters.install("metaworld", METAWORLD, installer="pip")


def test_what_a_call_says_is_told() -> None:
    with pytest.raises(ConfigError, match=r"failed \(exit code 3\): no such package"):
        interpreters._run(
            [sys.executable, "-c", "import sys; sys.exit(print('no such package', file=sys.stderr) or 3)"]
        )
    with pytest.raises(ConfigError, match="nowhere/python: No such file"):
        interpreters._run(["/nowhere/python"])
