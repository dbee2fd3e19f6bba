"""Learning runs of the project's list, or of your own: begun, gone on with, and listed.

    python -m tdmpc2_fast.benchmarks.learning [RUN ...] [KEY=VALUE ...]

RUN is a name of the list, a task in it, a pattern or `all`; without one, and without `task=`, the list is printed,
with how far each run has come. A run that was begun goes on where it was stopped. Several are made one after another,
each in a process of its own. Keys:

  out=runs/learning  folder of the runs
  minutes=           of each run in this sitting; default: to its end
  together=1         runs side by side, which share the cores
  official=          checkout of the official repository, for runs that it makes; `all` without it leaves them out
  by=                `official` has the official code make the run
  KEY=VALUE          those of `tdmpc2-fast train` for one task, where they differ from the list; with task=NAME and no
                     RUN, a run of your own, in bfloat16 and 5M unless told otherwise

A run's folder has `config.json`, `train.csv`, `eval.csv`, its checkpoints, and `about.json` with machine, versions,
commit and time of each sitting. Exit status: 0 also where the time was over first, 1 where a run failed, 2 where the
words are wrong, 128 and the number of a signal that ended it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tdmpc2_fast import Config
from tdmpc2_fast.errors import BackendError, CheckpointError, ConfigError, InputError, NonFiniteError
from tdmpc2_fast.runtime.backend import resolve_device
from tdmpc2_fast.train.cli.keys import parse
from tdmpc2_fast.train.cli.tables import grid, rendered
from tdmpc2_fast.train.envs import suite_of
from tdmpc2_fast.train.signals import Children

from ..harness.measure import CannotMeasureError
from .official import OFFICIAL, check_checkout
from .runs import RUNS, Run, named
from .sitting import about, reached, sit


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of this command."""

    out: Path = Path("runs/learning")
    minutes: float | None = None
    together: int = 1
    official: str | None = None
    by: str | None = None


def options(words: Sequence[str]) -> tuple[Options, list[Run]]:
    """Return the options and the runs that words mean; none: the list is wanted.

    Raises:
        ConfigError: a bad word, or a run that cannot be made here, named.
    """
    chosen = _own(words)
    names = [w for w in words if "=" not in w]
    keys = [w for w in words if "=" in w and w.partition("=")[0] not in _KEYS]
    values = parse(keys)
    for key in ("work_dir", "resume", "data_dir", "tasks"):
        if values.get(key):
            raise ConfigError(f"config key {key!r}: got {values[key]!r}, allowed: none in a learning run; out=FOLDER")
    if names and "task" in values:
        raise ConfigError(f"config key 'task': got {values['task']!r} beside {names[0]!r}, allowed: one of both")
    if keys and not names and "task" not in values:
        raise ConfigError(f"argument {keys[0]!r}: allowed: beside a RUN or task=NAME")
    found = _listed(names, chosen) if names else [Run(values["task"])] if "task" in values else []
    runs = [_changed(r, values, chosen) for r in found]
    for run in runs:
        cfg = Config.from_dict(run.values())
        resolve_device(cfg.device)
        if cfg.tasks:
            raise ConfigError(f"config key 'task': got {cfg.task!r}, allowed: one task")
        if missing := suite_of(run.task).needs():
            raise ConfigError(f"learning run {run.name!r}: {missing}")
        if run.by_official:
            check_checkout(chosen.official)
    return chosen, runs


def _listed(names: Sequence[str], chosen: Options) -> list[Run]:
    """Return the runs that names mean; `all` are those that can be made with what is given."""
    left_out = names == ["all"] and chosen.official is None
    return [r for r in named(names) if not (left_out and r.by_official)]


_KEYS = {f.name for f in dataclasses.fields(Options)}


def _own(words: Sequence[str]) -> Options:
    given: dict[str, str] = {}
    for key, _, text in (w.partition("=") for w in words if "=" in w):
        if key in _KEYS:
            if key in given or not text:
                raise ConfigError(f"learning key {key!r}: {'given twice' if text else 'got nothing'}, allowed: once")
            given[key] = text
    if given.get("by", OFFICIAL) != OFFICIAL:
        raise ConfigError(f"learning key 'by': got {given['by']!r}, allowed: {OFFICIAL}")
    return Options(
        Path(given.get("out", Options.out)).expanduser(),
        _above_0("minutes", given["minutes"]) if "minutes" in given else None,
        int(_above_0("together", given.get("together", "1"), whole=True)),
        str(Path(given["official"]).expanduser()) if "official" in given else None,
        given.get("by"),
    )


def _above_0(key: str, text: str, whole: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf and (not whole or value.is_integer())):
        raise ConfigError(
            f"learning key {key!r}: got {text!r}, allowed: {'an integer' if whole else 'a number'} above 0"
        )
    return value


def _changed(run: Run, values: Mapping[str, Any], chosen: Options) -> Run:
    """Return a run with other values of config keys, those that its name tells among them."""
    fields = {f.name for f in dataclasses.fields(Run)}
    own = {k: v for k, v in values.items() if k in fields}
    further = {k: v for k, v in values.items() if k not in fields}
    made = dataclasses.replace(run, **own, keys={**run.keys, **further})
    return dataclasses.replace(made, by_official=True) if chosen.by == OFFICIAL else made


class Several:
    """Runs in processes of their own; signals go to all of them, and no other is begun then."""

    def __init__(self, commands: Sequence[Sequence[str]], logs: Sequence[Path], together: int) -> None:
        self._work, self._together = list(zip(commands, logs, strict=True)), together
        self._children = Children()

    def run(self) -> int:
        """Run them; return 0 where all went well, 1 where one failed, 128 + a signal that ended them."""
        with self._children.heeding(), ThreadPoolExecutor(self._together) as pool:
            statuses = list(pool.map(lambda work: self._one(*work), self._work))
        return 128 + self._children.signal if self._children.signal is not None else int(any(statuses))

    def _one(self, command: Sequence[str], log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as f:
            begun = f.tell()
            if self._children.signal is not None:
                return 0
            _say(f"{log.stem}: what it says goes to {log}")
            status = self._children.run(command, stdout=f, stderr=f)
        with log.open(errors="replace") as f:
            f.seek(begun)
            said = f.read().strip().rpartition("\n")[2]
        _say(said if status == 0 else f"{log.stem}: status {status}: {said}")
        return status


def _say(line: str) -> None:
    """Print a line in one piece: others print beside."""
    print(f"{line}\n", end="", flush=True)


def commands(words: Sequence[str], chosen: Options) -> Iterator[list[str]]:
    """Yield what makes each run alone; side by side they share the cores evenly, unless `num_threads` is given."""
    names, keys = ([w for w in words if ("=" in w) is it] for it in (False, True))
    keys = [w for w in keys if not w.startswith("together=")]
    if chosen.together > 1 and not any(w.startswith("num_threads=") for w in keys):
        keys.append(f"num_threads={max(1, (os.cpu_count() or 1) // chosen.together)}")
    for run in _listed(names, chosen):
        yield [sys.executable, "-P", "-m", "tdmpc2_fast.benchmarks.learning", run.name, *keys]


def listing(out: Path) -> str:
    """Return the list of runs, and how far each has come in a folder."""
    return rendered(
        grid([(r.name, f"{r.steps:,}", _state(out / r.name)) for r in RUNS], ("run", "decisions", f"in {out}"), fixed=2)
    )


def _state(folder: Path) -> str:
    if not folder.is_dir():
        return "not begun"
    try:
        return reached(folder).line() + (", finished" if about(folder)["finished"] else "")
    except InputError as e:
        return f"damaged: {e}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & {*words}:
        print(__doc__)
        return 0
    try:
        chosen, runs = options(words)
        if not runs:
            print(listing(chosen.out))
            return 0
        if len(runs) == 1:
            return sit(runs[0], chosen.out, chosen.minutes, chosen.official)
        logs = [chosen.out / f"{run.name}.log" for run in runs]
        return Several([*commands(words, chosen)], logs, chosen.together).run()
    except (BackendError, CannotMeasureError, CheckpointError, ConfigError, InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except NonFiniteError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
