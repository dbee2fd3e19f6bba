"""Completion of `key=value` in a shell: `eval "$(_TDMPC2_FAST_COMPLETE=bash_source tdmpc2-fast)"`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from . import keys

_FILES = ("checkpoint", "init", "work_dir", "data_dir", "out", "reference")


def complete(words: Sequence[str], incomplete: str, own: type[Any] | None, config: bool) -> list[CompletionItem]:
    """Return what the last word can become; `words` are those before it, the rest is as for `keys.groups`."""
    known = {f.name: f for fields in keys.groups(own, config).values() for f in fields}
    # bash breaks words at "=", click drops one that stands alone; other shells keep key=value whole.
    before = [w for w in words if w != "="]
    if "=" in incomplete:
        key, _, text = incomplete.partition("=")
        prefix = f"{key}="
    elif before and before[-1] in known:
        key, text, prefix = before[-1], incomplete, ""
    else:
        given = [w.partition("=")[0].lstrip("+") for w in before]
        names = [CompletionItem(f"{k}=") for k in known if k.startswith(incomplete) and k not in given]
        return names if names or own is keys.Options else [CompletionItem(incomplete, type="file")]
    if key in _FILES:
        return [CompletionItem(text, type="file")]
    done, comma, last = text.rpartition(",")  # of a sweep
    return [CompletionItem(f"{prefix}{done}{comma}{v}") for v in _values(key, known.get(key)) if v.startswith(last)]


@add_completion_class
class _Bash(BashComplete):
    """Bash, told to put no space after `key=`."""

    source_template = BashComplete.source_template.replace("-o nosort", "-o nosort -o nospace")

    def format_completion(self, item: CompletionItem) -> str:
        space = "" if item.type != "plain" or item.value.endswith("=") else " "
        return super().format_completion(item) + space


def _values(key: str, f: dataclasses.Field[Any] | None) -> list[str]:
    if key == "task":
        from ..envs import SUITES  # which looks for a simulator

        return [n for s in SUITES.values() for n in s.names]
    if key == "device":
        return ["auto", "cpu", "cuda"]
    if f is None:
        return []
    if str(f.type).startswith("bool"):
        return ["true", "false"]
    return ["none" if c is None else str(c) for c in f.metadata["choices"] or ()]
