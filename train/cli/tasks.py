"""The commands `tasks` and `suites`: what can be trained here, and what makes more of it possible."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from tdmpc2_fast.errors import ConfigError, did_you_mean
from tdmpc2_fast.task_sets import TASK_SETS

from . import keys, tables

_SETS = "Sets of tasks"


def tasks(words: Sequence[str]) -> int:
    """List the tasks, or those with TEXT in their names.

    Each suite says whether its tasks run here, or what they need. With --check an episode of each
    that runs here is played with random actions, and the list says what a decision takes.
    """
    options, words = keys.options(["check=true" if w == "--check" else w for w in words], keys.TasksOptions)
    if len(words) > 1 or (words and words[0].startswith("-")):
        raise ConfigError(
            f"got {len(words)} arguments ({' '.join(words)}), allowed: tdmpc2-fast tasks [TEXT] [--check]"
        )
    text = words[0].lower() if words else ""
    groups = _groups()
    found = [(title, state, [n for n in names if text in n.lower()]) for title, state, names in groups]
    found = [group for group in found if group[2]]
    if not found:
        known = [n for _, _, names in groups for n in names]
        raise ConfigError(
            f"no task has {text!r} in its name.{did_you_mean(text, known) or ' tdmpc2-fast tasks lists all.'}"
        )
    if options.check:
        return _check(group for group in found if group[0] != _SETS)
    parts: list[Any] = [
        tables.section(f"{title} ({len(names)}): {state or 'runs here'}", "  ".join(names))
        for title, state, names in found
    ]
    if not text:
        parts.append("\nAny other Gymnasium id whose actions are a bounded Box or discrete works, too.")
    print(tables.rendered(*parts).lstrip("\n"))
    return 0


def _groups() -> list[tuple[str, str, list[str]]]:
    """Return title, what is missing, and names of tasks that lack the same."""
    from ..envs import SUITES
    from ..envs.catalogue import lacks

    groups: dict[tuple[str, str], list[str]] = {}
    for title, suite in SUITES.items():
        state = suite.needs()
        for name in suite.names:
            need = state or lacks(name)
            groups.setdefault((title, need), []).append(name)
    groups[_SETS, "one model each, where all of its tasks run"] = [*TASK_SETS]
    return [(title, state, names) for (title, state), names in groups.items()]


def _check(groups: Iterable[tuple[str, str, list[str]]]) -> int:
    """Play an episode of each task that runs here; return 1 where one fails, or none runs."""
    from ..envs.check import Checked, check

    failed = 0
    print(f"{'task':34}{'observation':>12}{'actions':>9}{'decisions':>11}{'us a decision':>15}   state", flush=True)
    start, ran = time.monotonic(), 0
    for _, state, names in groups:
        for name in names:
            found = Checked(needs=state) if state else check(name)
            if found.needs:
                print(f"{name:34}{'':47}   {found.needs}", flush=True)
                continue
            ran += 1
            failed += bool(found.problem)
            shape = "x".join(map(str, found.obs_shape))
            row = f"{shape:>12}{found.action_dim:9}{found.decisions:11}{found.microseconds:15,.0f}"
            print(f"{name:34}{row}   {found.problem or 'runs here'}", flush=True)
    print(f"{ran} tasks played, {failed} failed, in {time.monotonic() - start:.0f} s")
    return int(failed > 0 or not ran)


def suites(words: Sequence[str]) -> int:
    """List, install or remove suites with an interpreter of their own.

    Their packages exclude ours, so each lives in a virtual environment that this command makes, in
    TDMPC2_SUITES if that is set and else beside this package. Training, evaluation and everything
    else use it by themselves.
    """
    options, words = keys.options(words, keys.SuitesOptions)
    from ..envs import APART
    from ..envs.apart import interpreters

    if not words:
        rows = [(s.name, s.title, s.needs() or f"runs here ({s.python or sys.executable})") for s in APART.values()]
        print(tables.rendered(tables.grid(rows, ("name", "suite", "state"))))
        return 0
    what, *names = words
    if what == "remove" and options != keys.SuitesOptions():
        raise ConfigError("keys python and installer: allowed: with suites install NAME")
    if what not in ("install", "remove") or not names:
        got = " ".join(words)
        raise ConfigError(
            f"got {got!r}, allowed: tdmpc2-fast suites [install|remove NAME ...]; names: {', '.join(APART)}"
        )
    for name in names:
        if name not in APART:
            raise ConfigError(f"suite: got {name!r}, allowed: {', '.join(APART)}.{did_you_mean(name, APART)}")
    for name in names:
        suite, start = APART[name], time.monotonic()
        if what == "remove":
            print(f"{name}: {'removed' if interpreters.remove(name) else 'was not there'}")
            continue
        print(f"{name}: installing {', '.join(suite.module.REQUIREMENTS)}", flush=True)
        where = interpreters.install(name, suite.module.REQUIREMENTS, options.python, options.installer)
        print(f"{name}: {where} made in {time.monotonic() - start:.0f} s")
        if note := getattr(suite.module, "SYSTEM", ""):
            print(f"{name}: {note}")
    return 0
