"""Sweeps: `train task=walker-walk,cheetah-run seed=1..3` is six runs, one after another.

Each is a process of its own, so that memory is free for the next one and a crash of one does
not end the rest. A process is told to stop by a signal only: it then writes what it has and ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError

from ..log.status import hms
from ..signals import SIGNALS, Children
from . import keys

_REPORT = "TDMPC2_SWEEP_REPORT"
_IN_FOLDER_NAME = ("task", "seed", "exp_name")  # runs that differ in these have folders of their own anyway
_HYDRA_SWEEP = re.compile(r"(range|choice|interval|glob|shuffle|sort)\(")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_STOPPED = {status: s for s in SIGNALS for status in (128 + s, -s)}


@dataclass(frozen=True)
class Run:
    """One run of a sweep: the words after `train`, and those of them that make it this one."""

    words: tuple[str, ...]
    label: str

    @property
    def command(self) -> str:
        """The words that a person would type."""
        return shlex.join(["tdmpc2-fast", "train", *self.words])


@dataclass
class Outcome:
    """What became of a run: its exit status (None: not started) and what it told."""

    run: Run
    status: int | None = None
    seconds: float = 0.0
    told: dict[str, Any] = dataclasses.field(default_factory=dict)


def expand(words: Sequence[str]) -> list[Run]:
    """Return the runs these words ask for, the last key varying fastest; one where no key has several values.

    Runs that differ in more than task, seed and exp_name get the other keys into their exp_name; a
    `work_dir` for all becomes a folder with a folder for each. With `as=NAME` the tasks are those of one model.
    """
    one_model = any(word.lstrip("+").startswith("as=") for word in words)
    choices = [
        [word] if one_model and word.lstrip("+").startswith("task=") else _choices(word, words[i + 1 :])
        for i, word in enumerate(words)
    ]
    swept = [i for i, values in enumerate(choices) if len(values) > 1]
    if not swept:
        return [Run(tuple(words), "")]
    swept_keys = {choices[i][0].partition("=")[0] for i in swept}
    runs = []
    for picked in itertools.product(*choices):
        own = [picked[i] for i in swept]
        given = keys.parse(picked, note=lambda _: None)
        named: dict[str, Any] = {}
        if "work_dir" in given and "work_dir" not in swept_keys:
            named["work_dir"] = Path(given["work_dir"]) / "-".join(map(_name, own))
        elif "work_dir" not in given and swept_keys - {*_IN_FOLDER_NAME}:
            extra = [_name(w) for w in own if w.partition("=")[0] not in _IN_FOLDER_NAME]
            named["exp_name"] = "-".join([given.get("exp_name", Config.exp_name), *extra])
        kept = [w for w in picked if w.partition("=")[0].lstrip("+") not in named]
        runs.append(Run((*kept, *(f"{k}={v}" for k, v in named.items())), " ".join(own)))
    return runs


def pick(runs: Sequence[Run], job: int) -> Run:
    """Return the run that `job=` counts to, from 1."""
    if not 1 <= job <= len(runs):
        raise ConfigError(f"config key 'job': got {job}, allowed: 1 to {len(runs)}, the runs of this sweep")
    return runs[job - 1]


def tell(**facts: Any) -> None:
    """Tell the sweep that this process is a run of, if there is one."""
    if path := os.environ.get(_REPORT):
        with open(path, "a") as f:
            f.write(json.dumps(facts) + "\n")


class Sweep:
    """Runs one after another. SIGINT, SIGTERM and SIGHUP go to the one under way and cancel the rest."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.outcomes = [Outcome(run) for run in runs]
        self._children = Children()

    def run(self) -> int:
        """Run them; return 0 where all finished, 1 where one failed, 128 + a signal that ended the sweep."""
        with self._children.heeding(), tempfile.TemporaryDirectory() as folder:
            for i, outcome in enumerate(self.outcomes):
                if self._children.signal is not None:
                    break
                print(f"\nrun {i + 1} of {len(self.outcomes)}: {outcome.run.command}", flush=True)
                self._run(outcome, Path(folder) / str(i))
        if self._children.signal is not None:
            return 128 + self._children.signal
        return int(any(o.status for o in self.outcomes))

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return, for every run, what makes it this one, how it ended, how long it took, and where or why."""
        return [(o.run.label, *_summary(o)) for o in self.outcomes]

    def _run(self, outcome: Outcome, report: Path) -> None:
        start = time.monotonic()
        command = [sys.executable, "-P", "-m", "tdmpc2_fast.train", "train", *outcome.run.words]
        outcome.status = self._children.run(command, env={**os.environ, _REPORT: str(report)})
        outcome.seconds = time.monotonic() - start
        if report.exists():
            for line in report.read_text().splitlines():
                outcome.told.update(json.loads(line))
        if self._children.signal is None:
            self._children.signal = _STOPPED.get(outcome.status)  # someone else told the run to stop


def _summary(o: Outcome) -> tuple[str, str, str]:
    if o.status is None:
        return "not started", "", ""
    took = hms(o.seconds)
    where = str(o.told.get("folder", ""))
    if o.status == 0:
        return f"return {o.told['mean_return']:.1f} ± {o.told['std_return']:.1f}", took, where
    how = "interrupted" if o.status in _STOPPED else f"failed ({o.status})"
    return how, took, "\n".join(filter(None, (where, o.told.get("error", ""))))


def _choices(word: str, following: Sequence[str]) -> list[str]:
    """Return the word once for each of its values."""
    key, text = keys.pair(word, following)
    if _HYDRA_SWEEP.match(text):
        raise ConfigError(f"config key {key!r}: got {text!r}, allowed in a sweep: 1,2,3 or, both ends included, 1..3")
    if text.startswith(("'", '"', "[", "{", "(")) or not ("," in text or _RANGE.fullmatch(text)):
        return [word]
    values = [v for part in text.split(",") for v in _range(part.strip())]
    if "" in values:
        raise ConfigError(f"config key {key!r}: got {text!r}, allowed in a sweep: a value between any two commas")
    if len({*values}) < len(values):
        raise ConfigError(f"config key {key!r}: got {text!r}, allowed in a sweep: every value once")
    return [f"{key}={v}" for v in values]


def _range(text: str) -> list[str]:
    found = _RANGE.fullmatch(text)
    if found is None:
        return [text]
    first, last = int(found[1]), int(found[2])
    if first > last:
        raise ConfigError(f"range {text!r}: allowed: the smaller number first")
    return [str(n) for n in range(first, last + 1)]


def _name(word: str) -> str:
    """Return a word as part of a folder's name."""
    return re.sub(r"[^\w.+-]", "_", word)
