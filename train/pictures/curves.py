"""Learning curves: reading runs and published results, and what can be said over seeds and over tasks.

Steps are environment steps, action repeat included, in `eval.csv` and in published curves alike.
Returns are of evaluation episodes. Meta-World, MyoSuite and ManiSkill publish the share of them that succeeded instead.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.errors import InputError, nearest

from ..envs import dmcontrol

_SUCCESS = "success"  # in place of `reward`, in published curves
_COLUMNS = f"step,reward,seed, or {_SUCCESS} in place of reward"
_SCORE, _OF_TASK, _OF_SUCCESS = "normalized_score", "return+", "success+"  # what `eval.csv` has of several tasks
CONFIDENCE = 0.95
FEWEST_SEEDS = 3  # Student's t interval of two seeds is nine times as wide as they lie apart and fills any picture
_ALLOWED = "a run folder (eval.csv and config.json), a folder above runs, or a CSV file with step,reward,seed"
_MOST_IQM_STEPS = 200

_log = logging.getLogger(__name__)

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curve:
    """One seed of one method (`label`) on one task: `steps` (N,) ascending, `returns` (N,).

    scored: whether `task` is a set of tasks, and the numbers its normalised scores.
    success: whether they are shares of episodes that succeeded.
    """

    label: str
    task: str
    seed: int
    steps: Floats
    returns: Floats
    scored: bool = False
    success: bool = False


@dataclass(frozen=True, eq=False)
class Band:
    """A mean or IQM (N,) at `steps` (N,), and a band around it; None with fewer than `FEWEST_SEEDS`.

    The band is the 95% confidence interval, or reaches from the lowest to the highest seed.
    """

    steps: Floats
    centre: Floats
    low: Floats | None
    high: Floats | None


Groups = dict[tuple[str, str], list[Curve]]
"""The seeds by (task, label)."""


def full_return(task: str) -> float | None:
    """Return the return that counts as 1, 1000 in DMControl, where it is the most; None where none is customary."""
    return 1000.0 if task in dmcontrol.TASKS else None


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Find the CSV files that `paths` mean: a run's `eval.csv`, or those of all runs beneath a folder.

    Raises:
        InputError: a path that is not there, or no run in it.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        if path.is_file():
            found = [path]
        elif not path.is_dir():
            raise InputError(f"run {str(path)!r}: no such file or folder, allowed: {_ALLOWED}")
        elif (path / "eval.csv").is_file():
            found = [path / "eval.csv"]
        elif (path / "config.json").is_file():
            raise InputError(f"run {str(path)!r}: no eval.csv; there was no evaluation yet, or save_csv=false")
        else:
            found = sorted(path.rglob("eval.csv"))
        if not found:
            raise InputError(f"run {str(path)!r}: no run in this folder, allowed: {_ALLOWED}")
        files |= {f.resolve(): f for f in found}
    if not files:
        raise InputError(f"runs: none given, allowed: {_ALLOWED}")
    return list(files.values())


def read_curves(file: Path) -> list[Curve]:
    """Read the curves of one CSV file, one for each seed.

    Task and label are `task` and `exp_name` of the `config.json` beside an `eval.csv`, and the names of any other
    file and its folder. Of a step that comes twice the last row counts: a resumed run may evaluate again. A run of
    several tasks has the curve of its normalised score, or without one of the mean return, and one of each task,
    whose label says of which set. A column `success` in place of `reward` makes curves of success.

    Raises:
        InputError: a file that is missing, empty or malformed; it names the line.
    """
    if file.name == "eval.csv":
        label, task = _names(file.with_name("config.json"))
    else:
        label, task = file.resolve().parent.name, file.stem
    rows, several, success = _rows(file)
    scores = several.pop(_SCORE, [])
    scored = bool(scores) and None not in scores
    curves = _by_seed(rows, scores if scored else [reward for _, reward, _ in rows], label, task, scored)
    curves = [replace(c, success=success) for c in curves]
    for column, values in several.items():
        if column.startswith(_OF_SUCCESS):
            continue
        curves += _by_seed(rows, values, f"{label} of {task}", column.removeprefix(_OF_TASK), False)
    return curves


def _by_seed(
    rows: Sequence[tuple[int, float, int]], values: Sequence[float | None], label: str, task: str, scored: bool
) -> list[Curve]:
    seeds: dict[int, dict[int, float]] = {}
    for (step, _, seed), value in zip(rows, values, strict=True):
        if value is not None:
            seeds.setdefault(seed, {})[step] = value
    curves = []
    for seed, found in sorted(seeds.items()):
        steps = sorted(found)
        curves.append(Curve(label, task, seed, np.array(steps, float), np.array([found[s] for s in steps]), scored))
    return curves


def of_success(file: Path) -> list[Curve]:
    """Read the success rates of a run by its `eval.csv`: those of a set's tasks are in it, others in `success.csv`.

    Without that file none has succeeded yet; where `train.csv` tells of some that have, it is lost: there is no
    curve then, and a warning.
    """
    label, task = _names(file.with_name("config.json"))
    rows, several, _ = _rows(file)
    of_tasks = {k.removeprefix(_OF_SUCCESS): v for k, v in several.items() if k.startswith(_OF_SUCCESS)}
    if of_tasks:
        found = [c for t, v in of_tasks.items() for c in _by_seed(rows, v, f"{label} of {task}", t, False)]
    elif (there := file.with_name("success.csv")).is_file():
        found = [replace(c, label=label, task=task) for c in read_curves(there)]
    elif _some_succeeded(file.with_name("train.csv")):
        _log.warning("%s is missing, and episodes of %s have succeeded: its success is not drawn", there, task)
        return []
    else:
        found = _by_seed(rows, [0.0] * len(rows), label, task, False)
    return [replace(c, success=True) for c in found]


def _some_succeeded(train: Path) -> bool:
    if not train.is_file():
        return False
    with open(train, newline="", errors="replace") as f:
        return any((r.get("episode_success") or "0") not in ("0", "0.0") for r in csv.DictReader(f))


def _names(config: Path) -> tuple[str, str]:
    try:
        values = json.loads(config.read_text())
        return str(values["exp_name"]), str(values["task"])
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise InputError(f"{config}: got {type(e).__name__} ({e}), allowed: the config.json of a run") from e


def _rows(file: Path) -> tuple[list[tuple[int, float, int]], dict[str, list[float | None]], bool]:
    """Return step, reward and seed of each row, columns that are of several tasks, and whether rewards are success."""
    rows = []
    several: dict[str, list[float | None]] = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            there = reader.fieldnames or ()
            value = _SUCCESS if _SUCCESS in there and "reward" not in there else "reward"
            names = ("step", value, "seed")
            if not {*names} <= {*there}:
                came = ",".join(there) or "an empty file"
                raise InputError(f"{file}, line 1: got {came!r}, allowed: the columns {_COLUMNS}")
            several = {c: [] for c in there if c == _SCORE or c.startswith((_OF_TASK, _OF_SUCCESS))}
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                rows.append(_row(row, names, where))
                for column, values in several.items():
                    values.append(_number(row, column, where))
    except OSError as e:
        raise InputError(f"{file}: cannot be read: {e.strerror}") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{file}: not a CSV file in UTF-8: {e}") from e
    if not rows:
        raise InputError(f"{file}, line 2: got nothing, allowed: at least one row of {_COLUMNS}")
    return rows, several, value == _SUCCESS


def _number(row: Mapping[str, str | None], column: str, where: str) -> float | None:
    text = row[column]
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise InputError(f"{where}: got {column}={text}, allowed: a finite number, or nothing")
    return value


def _row(row: Mapping[str, str | None], names: Sequence[str], where: str) -> tuple[int, float, int]:
    try:
        step, reward, seed = (float(row[c] or "nan") for c in names)
    except ValueError:
        step = reward = seed = math.nan
    if not (math.isfinite(reward) and step.is_integer() and seed.is_integer() and step >= 0):
        came = ",".join(f"{c}={row[c]}" for c in names)
        allowed = f"step an integer of at least 0, {names[1]} finite, seed an integer"
        raise InputError(f"{where}: got {came}, allowed: {allowed}")
    return int(step), reward, int(seed)


def read_reference(folder: Path, tasks: Iterable[str]) -> list[Curve]:
    """Read published curves of `tasks` from `METHOD/TASK.csv`; `folder` is one METHOD or holds several.

    A task without a curve is named in a warning that says what is there.

    Raises:
        InputError: no such folder, no CSV file in it, or one that cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"reference {str(folder)!r}: no such folder, allowed: METHOD or a folder of METHOD/TASK.csv")
    files = sorted(folder.glob("*.csv")) or sorted(folder.glob("*/*.csv"))
    if not files:
        raise InputError(
            f"reference {str(folder)!r}: no CSV file in it, allowed: METHOD/TASK.csv with step,reward,seed"
        )
    there = sorted({f.stem for f in files})
    curves = []
    for task in tasks:
        if task not in there:
            close = nearest(task, there) or there[:3]
            has = f"{len(there)} tasks, such as {', '.join(close)}"
            _log.warning("reference %s has no curve of %s; it has %s", folder, task, has)
        curves += [c for f in files if f.stem == task for c in read_curves(f)]
    return curves


def group(curves: Iterable[Curve]) -> Groups:
    """Group curves by (task, label), each seed once: of two runs of a seed, which repeat each other, the longer."""
    groups: dict[tuple[str, str], dict[int, Curve]] = {}
    for c in curves:
        seeds = groups.setdefault((c.task, c.label), {})
        if c.seed in seeds:
            _log.warning("%s of %s: seed %d has several runs, the longest is drawn", c.label, c.task, c.seed)
        if c.seed not in seeds or c.steps[-1] >= seeds[c.seed].steps[-1]:
            seeds[c.seed] = c
    return {key: list(seeds.values()) for key, seeds in groups.items()}


def mean_over_seeds(curves: Sequence[Curve], by_range: bool = False) -> Band:
    """Return the mean of the seeds of one task, and Student's t interval of that mean, or their range.

    Seeds are interpolated linearly at all their steps inside the range that every one covers. With
    three seeds a normal or a bootstrap interval holds the mean far less often than it claims (75% to 81%); t
    is wide because three seeds say little.
    """
    steps = common_steps(curves)
    returns = _at(curves, steps)
    mean, n = returns.mean(axis=0), len(curves)
    if n < FEWEST_SEEDS:
        return Band(steps, mean, None, None)
    if by_range:
        return Band(steps, mean, returns.min(axis=0), returns.max(axis=0))
    from scipy.stats import t

    half = t.ppf((1 + CONFIDENCE) / 2, n - 1) * returns.std(axis=0, ddof=1) / math.sqrt(n)
    return Band(steps, mean, mean - half, mean + half)


def iqm_over_tasks(tasks: Mapping[str, Sequence[Curve]]) -> Band:
    """Return the IQM of the normalised returns of all runs of all tasks, and its stratified bootstrap interval.

    There is no interval where a task has fewer than `FEWEST_SEEDS`: resampled, so few vary too little.

    Raises:
        InputError: a task whose returns have no customary scale.
    """
    unknown = [t for t in tasks if full_return(t) is None]
    if unknown:
        raise InputError(f"IQM: no known scale of returns for {', '.join(unknown)}, allowed: DMControl tasks")
    steps = common_steps([c for curves in tasks.values() for c in curves])
    if len(steps) > _MOST_IQM_STEPS:
        steps = steps[np.linspace(0, len(steps) - 1, _MOST_IQM_STEPS).round().astype(int)]
    scores = [_at(curves, steps) / (full_return(task) or math.nan) for task, curves in tasks.items()]
    centre = iqm(np.concatenate(scores).T)
    if any(len(s) < FEWEST_SEEDS for s in scores):
        return Band(steps, centre, None, None)
    low, high = iqm_interval(scores)
    return Band(steps, centre, low, high)


def iqm(scores: Floats) -> Floats:
    """Return the mean over the last axis, (..., N) -> (...), without the lowest and the highest quarter."""
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(scores, 0.25, axis=-1))


def iqm_interval(scores: Sequence[Floats], resamples: int = 2000, seed: int = 0) -> tuple[Floats, Floats]:
    """Return the IQM's 95% percentile interval; runs are resampled within each task (Agarwal et al. 2021, section 4).

    Args:
        scores: the runs of each task, (runs, N); each of the N steps has an interval of its own.
        resamples: how often the bootstrap draws.
        seed: of its draws.

    Returns:
        Lower and upper ends, each (N,).
    """
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(s), size=(resamples, len(s))) for s in scores]
    tails = [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]
    ends = [
        np.percentile(iqm(np.concatenate([s[d, i] for s, d in zip(scores, draws, strict=True)], axis=1)), tails)
        for i in range(scores[0].shape[1])
    ]
    low, high = np.array(ends).T
    return low, high


def common_steps(curves: Sequence[Curve]) -> Floats:
    """Return all steps of the curves inside the range that every one covers; none is an `InputError`."""
    first, last = max(float(c.steps[0]) for c in curves), min(float(c.steps[-1]) for c in curves)
    if first > last:
        named = ", ".join(f"{c.label}/{c.task} seed {c.seed} {c.steps[0]:g} to {c.steps[-1]:g}" for c in curves)
        raise InputError(f"curves: no step that all of them cover: {named}")
    steps: Floats = np.unique(np.concatenate([c.steps for c in curves]))
    return steps[(steps >= first) & (steps <= last)]


def _at(curves: Sequence[Curve], steps: Floats) -> Floats:
    return np.stack([np.interp(steps, c.steps, c.returns) for c in curves])
