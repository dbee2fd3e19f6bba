"""`env.KEY=VALUE`: what a word is as a value."""

from __future__ import annotations

from typing import Any

import pytest

from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.cli.keys import parse, settings

VALUES: dict[str, Any] = {
    "3": 3, "-2.5": -2.5, "1e-3": 0.001, "true": True, "False": False, "none": None, "null": None, "": None,
    "fast": "fast", " fast ": "fast", "'3'": "3", '"a b"': "a b", "[1, 2]": [1, 2], "[a,b]": ["a", "b"],
    "[1,b]": [1, "b"], "(1, 2)": (1, 2), '{"a": 1}': {"a": 1}, "{'a': None}": {"a": None}, "a=b": "a=b",
}  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_a_setting_is_what_it_looks_like(text: str) -> None:
    assert parse(["task=x", f"env.mode={text}"]) == dict(task="x", env_kwargs=dict(mode=VALUES[text]))


def test_settings_may_lie_in_one_another() -> None:
    values = parse(["env.a.b=1", "env.a.c.d=x", "env.e=2"])
    assert values == dict(env_kwargs=dict(a=dict(b=1, c=dict(d="x")), e=2))
    assert settings(values["env_kwargs"]) == {"env.a.b": 1, "env.a.c.d": "x", "env.e": 2}
    assert settings(None) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["env.a=nan"], "got nan, allowed: finite numbers"),
        (["env.a=-Infinity"], "allowed: finite numbers"),
        (["env.a=[1"], None),
        (["env.a={b"], "allowed: a list or dict as JSON or Python writes it"),
        (["env.=1"], r"allowed: env\.KEY=VALUE"),
        (["env.a..b=1"], "with a name between any two dots"),
        (["env.a=1", "env.a.b=2"], "'a' has a value of its own already"),
        (["env.a.b=2", "env.a=1"], "every KEY once"),
        (["env.a=1", "env.a=1"], "given twice"),
        (["env_kwargs.a=1"], r"env\.a=VALUE"),
    ],
)
def test_wrong_settings_are_named(words: list[str], message: str | None) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(words)
