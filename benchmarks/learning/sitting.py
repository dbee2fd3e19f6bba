"""A run as far as the clock allows: the next sitting goes on from there, and `about.json` has them all.

A sitting is a part of a run that one process makes on one machine: at most `minutes`, then the run is asked to end as
by a person, writes its checkpoint, and is there to go on with.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tdmpc2_fast import Config
from tdmpc2_fast.model.files import replacing
from tdmpc2_fast.runtime.backend import resolve_device
from tdmpc2_fast.train.run import lifecycle
from tdmpc2_fast.train.signals import handled

from ..harness.machine import Machine, this_machine
from .official import train_official
from .runs import Run

_ASKED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Reached:
    """How far a run has come, by its files.

    decisions: those of training, up to the last episode or checkpoint.
    step: environment steps of the last evaluation, `returned` what it returned; None before the first.
    """

    decisions: int
    step: int | None
    returned: float | None

    def line(self) -> str:
        """Return it in words."""
        found = "not evaluated" if self.returned is None else f"return {self.returned:.1f} at {self.step:,} steps"
        return f"{self.decisions:,} decisions; {found}"


def reached(folder: Path) -> Reached:
    """Read how far the run in a folder has come; an empty or missing one has not begun."""
    episodes, evaluated = _rows(folder / "train.csv"), _rows(folder / "eval.csv")
    decisions = max((int(r["decisions"]) for r in episodes), default=0)
    if (told := folder / "checkpoints" / "latest.json").is_file():
        decisions = max(decisions, int(json.loads(told.read_text())["trained"]["decisions"]))
    if not evaluated:
        return Reached(decisions, None, None)
    return Reached(decisions, int(evaluated[-1]["step"]), float(evaluated[-1]["reward"]))


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="") as f:
        return list(csv.DictReader(f))


def about(folder: Path) -> dict[str, Any]:
    """Return what `about.json` of a run says: whether it is `finished`, and its `sittings`, first to last.

    A sitting has the machine's facts, the decisions it `began` at and those it came to, and its `seconds`, in which
    evaluations and compilation are.
    """
    file = folder / "about.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else dict(finished=False, sittings=[])
    return found


class Sitting:
    """The sitting of this process, which `about.json` tells of anew at each `note`."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.folder, self._machine, self._start = folder, machine, time.monotonic()
        self._before, self._began = about(folder)["sittings"], reached(folder).decisions

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return round(time.monotonic() - self._start, 1)

    def note(self, finished: bool = False) -> None:
        """Write how far it came."""
        facts = replace(self._machine, threads=torch.get_num_threads()).facts()
        came = dict(began=self._began, decisions=reached(self.folder).decisions, seconds=self.seconds)
        found = dict(finished=finished, sittings=[*self._before, facts | came])
        with replacing(self.folder / "about.json") as tmp:
            tmp.write_text(json.dumps(found, indent=1) + "\n")


def sit(run: Run, out: Path, minutes: float | None = None, checkout: str | None = None) -> int:
    """Begin a run or go on with it, to its end or until `minutes` are over; returns the exit status.

    The status is 0 also where the time was over first.

    Raises:
        CannotMeasureError: the official code is to make it, and cannot.
        ConfigError, InputError, BackendError: as a run.
    """
    folder = folder_of(run, out)
    if about(folder)["finished"]:
        print(f"{folder}\n{folder.name}: finished before: {reached(folder).line()}")
        return 0
    cfg = Config.from_dict(run.values())
    sitting = Sitting(folder, this_machine(resolve_device(cfg.device)))
    with _alarm(minutes) as over:
        try:
            status = train_official(cfg, checkout, sitting) if run.by_official else _train(run, sitting)
        except SystemExit as e:  # what does not end by itself when it is asked to
            status = int(e.code or 0)
    if _rows(folder / "train.csv"):
        sitting.note(finished=status == 0)
    ended = over() and status == _ASKED
    how = "until the time was over" if ended else "to its end" if status == 0 else f"ended with status {status}"
    print(f"{folder}\n{folder.name}: {sitting.seconds:.0f} s, {how}: {reached(folder).line()}")
    return 0 if ended else status


def folder_of(run: Run, out: Path) -> Path:
    """Return a run's folder: one of its name that is new or has a run to go on with."""
    names = (run.name if n == 1 else f"{run.name}-{n}" for n in itertools.count(1))
    return next(p for p in map(out.joinpath, names) if not p.exists() or _can_go_on(p))


def _can_go_on(folder: Path) -> bool:
    """Tell whether a run left what it needs to go on, or nothing but its wish to begin."""
    return (folder / "checkpoints").is_dir() or about(folder)["finished"] or not _rows(folder / "train.csv")


def _train(run: Run, sitting: Sitting) -> int:
    kept: dict[str, Any] = dict(tensorboard=False, display="lines")
    values = kept | run.values() | dict(work_dir=str(sitting.folder), resume="auto")
    given = lifecycle.Given(callbacks=[lambda event: sitting.note()])
    return lifecycle.start(values, given).status


@contextlib.contextmanager
def _alarm(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Have this process asked to end after `minutes`; yields what tells whether it was."""
    rang = threading.Event()

    def ring() -> None:
        rang.set()
        # As from a person or a cluster: a run knows this wish.
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(1e9 if minutes is None else 60 * minutes, ring)
    timer.daemon = True
    with handled([signal.SIGTERM], lambda *_: sys.exit(_ASKED)):
        if minutes is not None:
            timer.start()
        try:
            yield rang.is_set
        finally:
            timer.cancel()
