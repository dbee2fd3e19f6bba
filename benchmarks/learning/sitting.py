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
from tdmpc2_fast.errors import InputError
from tdmpc2_fast.model.files import replacing
from tdmpc2_fast.runtime.backend import resolve_device
from tdmpc2_fast.train.run import lifecycle
from tdmpc2_fast.train.run.checkpoints import Checkpoints
from tdmpc2_fast.train.run.folder import locked, untouched
from tdmpc2_fast.train.signals import handled

from ..harness.machine import Machine, this_machine
from .official import train_official
from .runs import Run

_ASKED = 128 + signal.SIGTERM
_SITTING = dict(began=int, decisions=int, seconds=float, commit=str, cpu=str, gpu=str, threads=int, torch_version=str)


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
    """Read how far the run in a folder has come; a missing one has not begun.

    Raises:
        InputError: one of its files is damaged.
    """
    with reading(folder / "train.csv") as file:
        decisions = max((int(r["decisions"]) for r in rows_of(file)), default=0)
    decisions = max(decisions, _saved(folder))
    with reading(folder / "eval.csv") as file:
        evaluated = rows_of(file)
        if not evaluated:
            return Reached(decisions, None, None)
        return Reached(decisions, int(evaluated[-1]["step"]), float(evaluated[-1]["reward"]))


def _saved(folder: Path) -> int:
    """Return the decisions of the newest checkpoint; 0 without one."""
    with reading(folder / "checkpoints" / "latest.json") as file:
        return int(json.loads(file.read_text())["trained"]["decisions"]) if file.is_file() else 0


def rows_of(file: Path) -> list[dict[str, str]]:
    """Return the rows of a run's CSV file; none where it is missing."""
    if not file.is_file():
        return []
    with file.open(newline="") as f:
        return list(csv.DictReader(f))


@contextlib.contextmanager
def reading(file: Path, what: str = "what a learning run writes") -> Iterator[Path]:
    """Have what goes wrong with a file's content be an `InputError` that names it and `what` is allowed."""
    try:
        yield file
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as e:
        raise InputError(f"{file}: got {type(e).__name__} ({e}), allowed: {what}") from e


def about(folder: Path) -> dict[str, Any]:
    """Return what `about.json` of a run says: whether it is `finished`, and its `sittings`, first to last.

    A sitting has the machine's facts, the decisions it `began` at and those it came to, and its `seconds`, in which
    evaluations and compilation are.

    Raises:
        InputError: it says something else.
    """
    with reading(folder / "about.json") as file:
        if not file.exists():
            return dict(finished=False, sittings=[])
        found = json.loads(file.read_text())
        sittings = [s | {k: kind(s[k]) for k, kind in _SITTING.items()} for s in found["sittings"]]
        return dict(finished=bool(found["finished"]), sittings=sittings)


class Sitting:
    """The sitting of this process, which `about.json` tells of anew at each `note`."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.folder, self._machine, self._start = folder, machine, time.monotonic()
        self._before = about(folder)["sittings"]
        # Rows after the last checkpoint are those of a process that was killed: they are made again.
        self._began = _saved(folder)

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
        InputError: its folder has another run, or what a run does not write.
        ConfigError, CheckpointError, BackendError: as a run.
    """
    folder = folder_of(run, out)
    cfg = Config.from_dict(run.values())
    sitting = Sitting(folder, this_machine(resolve_device(cfg.device)))
    before = run.by_official and about(folder)["finished"]
    with _alarm(minutes) as over:
        try:
            if run.by_official:
                status = 0 if before else train_official(cfg, checkout, sitting)
            else:
                status, before = _train(run, sitting)
        except SystemExit as e:  # what does not end by itself when it is asked to
            if e.code != _ASKED:
                raise
            status = _ASKED
    if not before and (rows_of(folder / "train.csv") or _can_go_on(folder)):
        sitting.note(finished=status == 0)
    ended = over() and status == _ASKED
    how = "finished before" if before else "to its end" if status == 0 else f"ended with status {status}"
    how = "until the time was over" if ended else how
    print(f"{folder}\n{folder.name}: {sitting.seconds:.0f} s, {how}: {reached(folder).line()}")
    return 0 if ended else status


def folder_of(run: Run, out: Path) -> Path:
    """Return the folder of a run, which is new or has the run to go on with.

    What a run left that cannot go on, as one without checkpoints, gets another name.

    Raises:
        InputError: something else is there, or a run with other keys.
        ConfigError: another process is at it.
    """
    folder = out / run.name
    if not folder.exists() or (folder.is_dir() and untouched(folder)):
        return folder
    try:
        config = json.loads((folder / "config.json").read_text())
        others = run.differences(config)
    except (OSError, ValueError, TypeError) as e:
        raise InputError(f"run {str(folder)!r}: no config.json of a run ({e}), allowed: a new folder") from e
    if others:
        raise InputError(
            f"run {str(folder)!r}: made with other keys: {'; '.join(others[:3])}; take another folder: out="
        )
    if _can_go_on(folder) or about(folder)["finished"]:
        return folder
    with locked(folder):
        aside = next(p for n in itertools.count(1) if not (p := out / f"{run.name}-stopped-{n}").exists())
        folder.rename(aside)
    print(f"{folder}: what was there cannot go on; it is in {aside}")
    return folder


def _can_go_on(folder: Path) -> bool:
    return Checkpoints(folder, 1).last() is not None


def _train(run: Run, sitting: Sitting) -> tuple[int, bool]:
    """Make our run; returns its status, and whether it had been finished before."""
    kept: dict[str, Any] = dict(tensorboard=False, display="lines")
    values = kept | run.values() | dict(work_dir=str(sitting.folder), resume="auto")
    outcome = lifecycle.start(values, lifecycle.Given(callbacks=[lambda event: sitting.note()]))
    return outcome.status, outcome.agent is None


@contextlib.contextmanager
def _alarm(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Have this process asked to end after `minutes`; yields what tells whether it was."""
    rang = threading.Event()

    def ring() -> None:
        rang.set()
        # As from a person or a cluster: a run knows this wish.
        os.kill(os.getpid(), signal.SIGTERM)

    timer = None if minutes is None else threading.Timer(60 * minutes, ring)
    with handled(lambda *_: sys.exit(_ASKED), [signal.SIGTERM]):
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield rang.is_set
        finally:
            if timer is not None:
                timer.cancel()
