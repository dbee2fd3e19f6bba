"""The folder of a run where nothing keeps two processes apart, and where something does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.run import folder


def test_one_process_at_a_time_where_the_system_can_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder.locked(tmp_path):
        with pytest.raises(ConfigError, match=r"process \d+ is writing to it"), folder.locked(tmp_path):
            pass
        monkeypatch.setattr(folder, "fcntl", None)
        with folder.locked(tmp_path):
            pass


def test_only_a_folder_in_which_nothing_has_begun_is_discarded(tmp_path: Path) -> None:
    for name, there in (("begun", ["config.json", "eval.csv"]), ("new", ["config.json", "run.lock"])):
        (tmp_path / name).mkdir()
        for file in there:
            (tmp_path / name / file).touch()
        folder.discard(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["begun"]
    assert len(list((tmp_path / "begun").iterdir())) == 2


@pytest.mark.parametrize(
    ("there", "taken"),
    [("run.lock", False), (".eval.tmp", False), ("checkpoints/.1.tmp", False), (".hidden", True), ("a.tmp", True)],
)
def test_a_folder_with_more_than_an_unfinished_beginning_is_taken(there: str, taken: bool, tmp_path: Path) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).touch()
    cfg = Config(work_dir=str(tmp_path))
    if taken:
        with pytest.raises(ConfigError, match="is taken, allowed: a new or empty folder"):
            folder.new_folder(cfg)
    else:
        assert folder.new_folder(cfg) == tmp_path
    assert (tmp_path / there).exists()
