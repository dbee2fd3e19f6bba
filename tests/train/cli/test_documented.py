"""What the documents say of keys and commands is what there is."""

from __future__ import annotations

import json
import re

import pytest
from command_line import in_an_empty_folder  # noqa: F401
from conftest import GOLDEN, ROOT

from tdmpc2_fast import Config
from tdmpc2_fast.train.cli import keys

pytest.importorskip("dm_control")
pytest.importorskip("click")
pytest.importorskip("rich")

from tdmpc2_fast.train.cli import app


class TestDocs:
    def rows(self, *columns: str) -> dict[str, list[str]]:
        """The cells behind the key, of all tables in docs/config.md with these columns."""
        text = (ROOT / "docs/config.md").read_text()
        found: dict[str, list[str]] = {}
        for table in re.split(r"\n\n", text):
            lines = [[c.strip().strip("`") for c in line.strip("|").split(" | ")] for line in table.splitlines()]
            if tuple(c.strip() for c in lines[0][: len(columns)]) == columns:
                assert not {r[0].strip() for r in lines[2:]} & set(found)
                found |= {r[0].strip("` "): [c.strip("` ") for c in r[1:]] for r in lines[2:]}
        return found

    def test_every_official_key_is_there_and_accepted(self) -> None:
        official = self.rows("key", "official default")
        recorded = json.loads((GOLDEN / "single_5m.json").read_text())["config"]
        older = {"disable_wandb", "terminated_coef", "cudagraphs"}
        assert set(official) == {*recorded, *older} - {"get"}
        for key, (default, status, *_) in official.items():
            notes: list[str] = []
            got = keys.parse([f"{key}={default}"], notes.append)
            assert (status == "not needed") == (key in keys.NOT_NEEDED), key
            if default != "???":
                assert bool(notes) == (status == "not needed"), key
            if status == "honoured":
                assert Config.from_dict(got) == Config(), key
            elif status == "differs" and default != "???" and key not in older:
                assert getattr(Config(), key) != got[key], key

    def test_every_key_here_is_there(self) -> None:
        official, ours = self.rows("key", "official default"), self.rows("key", "default", "meaning")
        assert {*official, *ours} >= {*Config.key_names(), *keys.OPTION_FIELDS}
        assert not {*official} & {*ours}
        for key, (default, _) in ours.items():
            assert default == keys.default_text({**keys.CONFIG_FIELDS, **keys.OPTION_FIELDS}[key]), key

    def test_every_command_is_there(self) -> None:
        headings = re.findall(r"^## `(\w+)", (ROOT / "docs/commands.md").read_text(), re.MULTILINE)
        assert {c.name for c in app.COMMANDS} <= set(headings)

    def test_presets_are_those_of_the_makefile(self) -> None:
        text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
        found = re.search(r"^TRAIN +\?= (.+)$", text, re.MULTILINE)
        assert found is not None
        assert keys.parse(found[1].split()) == keys.PRESETS["quick"]
