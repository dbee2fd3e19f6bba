"""The page of results: runs of the list beside published ones, as a table and pictures.

    python -m tdmpc2_fast.benchmarks.learning.report [reference=FOLDER] [take=FOLDER] [results=FOLDER] [docs=FOLDER]

writes `results.md` into `docs`, from what is in `results` (default: `docs` and `benchmarks/results/learning` of the
project). `take` is a folder of runs whose numbers are copied into `results` first. `reference` has published curves as
`METHOD/TASK.csv`; without it the pictures stay, and the published numbers of the table are those noted when it was
last given. Exit status: 2 where something is missing or malformed.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tdmpc2_fast.errors import ConfigError, InputError
from tdmpc2_fast.train.pictures.curves import Curve, group, of_success, read_curves, read_reference
from tdmpc2_fast.train.pictures.plots import draw, write

from ..report import read
from .official import OFFICIAL
from .runs import RUNS, WHOLE, Run
from .sitting import about, reading, rows_of

_ROOT = Path(__file__).resolve().parents[2]
_KEPT = ("config.json", "eval.csv", "success.csv", "train.csv", "about.json")
_METHODS = ("tdmpc2", "tdmpc", "sac", "dreamerv3")
_AGAINST = _METHODS[0]
_WIDER = 0.1  # of the published mean, by which the seeds' range may be left: three seeds do not show all of it
_END = 200_000  # environment steps that a picture shows
_HEAD = 3  # panels of the README's picture

Published = Mapping[str, Mapping[str, Any]]
"""By task: `seeds`, what published ones reached by environment step, lowest first; `success`, whether that is it."""


@dataclass(frozen=True, eq=False)
class Result:
    """A run of the list and what it left."""

    run: Run
    folder: Path
    curve: Curve
    about: Mapping[str, Any]

    @property
    def hours(self) -> float:
        """The time of all its sittings."""
        return sum(float(s["seconds"]) for s in self.about["sittings"]) / 3600

    @property
    def took(self) -> str:
        """The hours of a run that is finished, or of one that is not, and how far it came."""
        if self.about["finished"]:
            return f"{self.hours:.1f}"
        return f"{self.hours:.1f} so far, {self.about['sittings'][-1]['decisions']:,} of {self.run.steps:,} decisions"

    @property
    def where(self) -> str:
        """The machine and versions of its last sitting, and the commits of all."""
        last = self.about["sittings"][-1]
        commits = ", ".join(dict.fromkeys(s["commit"] for s in self.about["sittings"]))
        machine = last["gpu"] or f"{last['cpu']}, {last['threads']} thread{'s' * (last['threads'] > 1)}"
        return f"{machine}; torch {last['torch_version']}; commit {commits}"


def read_results(folder: Path, published: Published) -> list[Result]:
    """Read the runs of the list that a folder has, in the list's order, by what is published of their tasks.

    Raises:
        InputError: a run's file is missing or damaged, or it was made with other keys than the list has.
    """
    found = []
    for run in _there(folder):
        place = folder / run.name
        config = _read_json(place / "config.json", "a run's config")
        if others := run.differences(config):
            raise InputError(f"run {str(place)!r}: made with other keys: {'; '.join(others[:3])}, allowed: the list's")
        success = published.get(run.task, {}).get("success", False)
        curves = of_success(place / "eval.csv") if success else read_curves(place / "eval.csv")
        told = about(place)
        if len(curves) != 1 or not told["sittings"]:
            missing = "no sitting in about.json" if len(curves) == 1 else f"{len(curves)} curves"
            raise InputError(f"run {str(place)!r}: {missing}, allowed: one curve, and at least one sitting")
        found.append(Result(run, place, curves[0], told))
    return found


def _there(folder: Path) -> list[Run]:
    """Return runs of the list in a folder; one in float32 stands for one in bfloat16 that is not there."""
    found = []
    for run in RUNS:
        instead = replace(run, precision="float32") if run.precision == "bfloat16" else run
        found += [r for r in (run, instead) if (folder / r.name / "eval.csv").is_file()][:1]
    return found


def _read_json(file: Path, what: str) -> dict[str, Any]:
    with reading(file, what):
        found = json.loads(file.read_text())
    if not isinstance(found, dict):
        raise InputError(f"{file}: got {type(found).__name__}, allowed: {what}")
    return found


def summary(curves: Sequence[Curve]) -> dict[str, dict[str, Any]]:
    """Return what the page needs of published curves, as `published.json` has it."""
    found: dict[str, dict[str, Any]] = {}
    for c in (c for c in curves if c.label == _AGAINST):
        seeds = found.setdefault(c.task, dict(success=c.success, seeds={}))["seeds"]
        for step, value in zip(c.steps.tolist(), c.returns.tolist(), strict=True):
            if step <= _END:
                seeds.setdefault(str(int(step)), []).append(value)
                seeds[str(int(step))].sort()
    return found


def verdict(value: float, seeds: Sequence[float]) -> str:
    """Say where a return lies beside those of published seeds."""
    mean, low, high = sum(seeds) / len(seeds), min(seeds), max(seeds)
    if low <= value <= high:
        return "inside"
    if low - _WIDER * abs(mean) <= value <= high + _WIDER * abs(mean):
        return "inside, widened"
    return "above" if value > high else "below"


def common(curve: Curve, seeds: Mapping[str, Sequence[float]]) -> tuple[int, float] | None:
    """Return the last step after 0 that a run and published seeds both have, and the run's return there."""
    points = ((int(s), float(y)) for s, y in zip(curve.steps, curve.returns, strict=True))
    both = [(s, y) for s, y in points if s > 0 and str(s) in seeds]
    return both[-1] if both else None


def _row(result: Result, published: Published) -> list[str]:
    run, curve, seeds = result.run, result.curve, published.get(result.run.task, {}).get("seeds", {})
    at = common(curve, seeds)
    last = f"{curve.returns[-1]:.4g} at {int(curve.steps[-1]):,}"
    if at is None:
        beside = ["", "not that far" if seeds else "nothing published"]
    else:
        values = seeds[str(at[0])]
        last = f"{at[1]:.4g} at {at[0]:,}"
        beside = [f"{sum(values) / len(values):.4g} ({', '.join(f'{x:.4g}' for x in values)})", verdict(at[1], values)]
    name = f"{run.task}{', success' * curve.success}{', float32' * (run.precision == 'float32')}"
    return [name, last, *beside, result.took, _times(result.folder)]


def _times(folder: Path) -> str:
    """Return how many times longer the official code takes for a decision and an update, as measured in turns."""
    for path in sorted(folder.glob("*.json"), reverse=True):
        if path.name in _KEPT:
            continue
        for row in read(path):
            if row.suite == "loop" and row.variant == OFFICIAL and row.ratio is not None:
                return f"{row.ratio:.2f}x ({row.ratio_p20:.3g}, {row.ratio_p80:.3g})"
    return ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def page(found: Sequence[Result], published: Published, findings: str) -> str:
    """Return the page; `findings` is what a person has to say of it."""
    whole = _whole(found)
    head = ("task", "our return", "published: mean (seeds)", "ours is", "hours", "official code")
    parts = [_INTRODUCTION, _PICTURE, _READING, _table(head, [_row(r, published) for r in whole])]
    parts += ["\n".join(f"- {r.run.name}: {r.where}" for r in whole)]
    if again := _again(found):
        parts += ["## The same run, computed otherwise", again]
    if findings:
        parts.append(findings.strip())
    return "\n\n".join([*parts, _repeat(whole)]) + "\n"


def _whole(found: Sequence[Result]) -> list[Result]:
    """Return the runs that go as far as the published curves' first point."""
    return [r for r in found if r.run.steps == WHOLE]


def _again(found: Sequence[Result]) -> str:
    """Compare runs of one task and seed that differ in what computes them, at the steps that all of them evaluated."""
    parts = []
    for run in (r for r in RUNS if r.by_official):
        alike = [r for r in found if (r.run.task, r.run.seed) == (run.task, run.seed)]
        if len(alike) < 2:
            continue
        steps = sorted(set.intersection(*({*map(int, r.curve.steps)} for r in alike)))
        rows = []
        for r in alike:
            at = dict(zip(map(int, r.curve.steps), r.curve.returns.tolist(), strict=True))
            rows.append([r.run.label, *(f"{at[s]:.4g}" for s in steps), _trained(r.folder, run.steps)])
        head = [f"{run.task}, seed {run.seed}", *(f"{s:,} steps" for s in steps)]
        parts.append(_table([*head, f"training, {run.steps // 2:,} to {run.steps:,} decisions"], rows))
    return "\n\n".join(parts)


def _trained(folder: Path, decisions: int) -> str:
    """Return the mean return of the training episodes that end in the second half of these decisions."""
    with reading(folder / "train.csv") as file:
        rows = [(int(r["decisions"]), float(r["episode_reward"])) for r in rows_of(file)]
    found = [y for n, y in rows if decisions // 2 < n <= decisions]
    return f"{sum(found) / len(found):.4g}, {len(found)} episodes" if found else ""


def _repeat(whole: Sequence[Result]) -> str:
    done = [r for r in whole if r.about["finished"]]
    first = (done or whole)[0]
    one = f"make learning RUNS={first.run.task}"
    time = f"{first.took} hours: " if done else "not finished yet: "
    return _REPEAT.format(one=f"{one:36}", task=first.run.task, time=time, where=first.where)


_INTRODUCTION = """# Results

Made by `python -m tdmpc2_fast.benchmarks.learning.report` from `benchmarks/results/learning/`; not edited by hand.

Does a run end where the published ones do? Below are runs of the 5M model with the official settings, one seed each: an
update per decision, ten evaluation episodes every 5,000 decisions, products in bfloat16."""

_PICTURE = "![Returns of our runs and of published ones against environment steps](results.png)"

_READING = """The table has the return at the last step that a run and the
[published curves](https://github.com/nicklashansen/tdmpc2/tree/main/results) both have. *Inside* is within the range of
the three published seeds; *inside, widened*, within that range and 10% of its mean on either side. Published curves
have a point every 100,000 environment steps (50,000 decisions of most suites); between them lines are straight.
*Hours* are those of the whole run, evaluations included. *Official code* is how many times longer it takes for a
decision and its update in the same loop on the same machine and threads, in float32: the median and the 20th and 80th
percentile of rounds that take turns."""

_REPEAT = """## Repeat one

```console
{one} # {time}{where}
make learning RUNS="all together=2"  # all of them, two side by side, each on half of the cores
make learning                        # the list, and how far each has come
```

A run that is stopped goes on with the same command, bit for bit. Its folder is `runs/learning/NAME`.
`RUNS="{task} seed=2 steps=10000"` changes keys; `precision=float32` is for a CPU without bfloat16. Runs
of the official code need `official=CHECKOUT` and its packages ([benchmarks.md](benchmarks.md#learning-runs)).

More runs, of smaller models, on a GPU, from pixels and from data, are in
[benchmarks/results/learning](../benchmarks/results/learning/README.md)."""


def taken(runs: Path, results: Path) -> Iterator[Path]:
    """Copy the numbers of listed runs, without paths of the machine; yields the folders written."""
    if runs.resolve() == results.resolve():
        raise InputError(f"take {str(runs)!r}: the same as results, allowed: another folder")
    for run in _there(runs):
        source, target = runs / run.name, results / run.name
        target.mkdir(parents=True, exist_ok=True)
        for name in _KEPT:
            (target / name).unlink(missing_ok=True)
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        config = _read_json(source / "config.json", "a run's config")
        (target / "config.json").write_text(json.dumps(config | dict(work_dir=None), indent=1) + "\n")
        yield target


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    own = dict(results=str(_ROOT / "benchmarks/results/learning"), docs=str(_ROOT / "docs"))
    if {"-h", "--help"} & {*words}:
        print(__doc__)
        return 0
    try:
        for word in words:
            key, _, value = word.partition("=")
            if key not in _FOLDERS or not value:
                raise ConfigError(f"argument {word!r}: allowed: {', '.join(f'{k}=FOLDER' for k in _FOLDERS)}")
            own[key] = value
        print(make(**{k: Path(v).expanduser() for k, v in own.items()}))
    except (ConfigError, InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


_FOLDERS = ("reference", "take", "results", "docs")


def make(results: Path, docs: Path, reference: Path | None = None, take: Path | None = None) -> Path:
    """Write the page, and with `reference` its pictures and `published.json`; returns the page's path."""
    if take is not None and not _there(take):
        raise InputError(f"take {str(take)!r}: no run of the list, allowed: a folder with some")
    for folder in taken(take, results) if take is not None else ():
        print(folder)
    if not _there(results):
        raise InputError(f"results {str(results)!r}: no run of the list, allowed: a folder with some, or take=FOLDER")
    noted = results / "published.json"
    curves: list[Curve] = []
    if reference is not None:
        curves = read_reference(reference, dict.fromkeys(run.task for run in _there(results)))
        found = summary(curves)
        if not found:
            allowed = f"with {_AGAINST}/TASK.csv"
            raise InputError(f"reference {str(reference)!r}: no curve of {_AGAINST}, allowed: {allowed}")
        noted.write_text(json.dumps(found, indent=1) + "\n")
    published = _read_json(noted, "what reference=FOLDER makes")
    runs = read_results(results, published)
    if not _whole(runs):
        raise InputError(f"results {str(results)!r}: no whole run of the list, allowed: at least one")
    if curves:
        _pictures(runs, [c for c in curves if c.label in _METHODS], docs)
    (docs / "results.md").write_text(page(runs, published, _text(results / "findings.md")))
    return docs / "results.md"


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def _pictures(found: Sequence[Result], published: Sequence[Curve], docs: Path) -> None:
    """Draw all tasks for the page, and the first of them for the README."""
    tasks = list(dict.fromkeys(r.run.task for r in found))
    for name, shown in (("results.png", tasks), ("results-first.png", tasks[:_HEAD])):
        curves = [replace(r.curve, label=f"tdmpc2-fast, {r.run.precision}") for r in _whole(found)]
        ours = group(c for c in curves if c.task in shown)
        theirs = group(c for c in published if c.task in shown)
        write(partial(draw, ours, theirs, _END, by_range=True), [docs / name])


if __name__ == "__main__":
    sys.exit(main())
