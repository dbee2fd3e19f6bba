"""Learning runs of the project's list, or of your own: begun, gone on with, and listed.

    python -m tdmpc2_fast.benchmarks.learning [RUN ...] [KEY=VALUE ...]

RUN is a name of the list, a task in it, a pattern or `all`; without one, and without `task=`, the list is printed,
with how far each run has come. A run that was begun goes on where it was stopped. Several are made one after another,
each in a process of its own. Keys:

  out=runs/learning  folder of the runs
  minutes=           of each run in this sitting; default: to its end
  together=1         runs side by side, which share the cores
  official=          checkout of the official repository, for runs that it makes
  KEY=VALUE          those of `tdmpc2-fast train`, where they differ from the list; with task=NAME and no RUN, a run of
                     your own, in bfloat16 and 5M unless told otherwise

A run's folder has `config.json`, `train.csv`, `eval.csv`, its checkpoints, and `about.json` with machine, versions,
commit and time of each sitting. Exit status: 0 also where the time was over first, 1 where a run failed, 2 where the
words are wrong.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from tdmpc2_fast import Config
from tdmpc2_fast.errors import BackendError, ConfigError, InputError, NonFiniteError
from tdmpc2_fast.train.cli.keys import parse
from tdmpc2_fast.train.cli.tables import grid, rendered
from tdmpc2_fast.train.envs import suite_of
from tdmpc2_fast.train.signals import SIGNALS, handled

from ..harness.measure import CannotMeasureError
from .runs import OFFICIAL, RUNS, Run, named
from .sitting import about, reached, sit


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of this command."""

    out: Path = Path("runs/learning")
    minutes: float | None = None
    together: int = 1
    official: str | None = None


def options(words: Sequence[str]) -> tuple[Options, list[Run]]:
    """Return the options and the runs that words mean; none: the list is wanted.

    Raises:
        ConfigError: a bad word, named.
    """
    own = {f.name for f in dataclasses.fields(Options)}
    given = {k: v for k, _, v in (w.partition("=") for w in words) if k in own and v}
    names = [w for w in words if "=" not in w]
    keys = [w for w in words if "=" in w and w.partition("=")[0] not in own]
    found = Options(
        Path(given.get("out", Options.out)).expanduser(),
        _number("minutes", given["minutes"], 0) if "minutes" in given else None,
        int(_number("together", given.get("together", "1"), 0, whole=True)),
        given.get("official"),
    )
    # `official` is a precision of the list only.
    values = parse([w for w in keys if w != f"precision={OFFICIAL}"])
    values |= dict(precision=OFFICIAL) if f"precision={OFFICIAL}" in keys else {}
    if names and "task" in values:
        raise ConfigError(f"config key 'task': got {values['task']!r} beside {names[0]!r}, allowed: one of both")
    runs = [_changed(r, values) for r in named(names)]
    if "task" in values:
        runs = [_changed(Run(values["task"]), values)]
    elif keys and not names:
        raise ConfigError(f"argument {keys[0]!r}: allowed: beside a RUN or task=NAME")
    for run in runs:
        Config.from_dict(run.values())
        suite_of(run.task)
    return found, runs


def _number(key: str, text: str, above: float, whole: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (above < value < math.inf and (not whole or value.is_integer())):
        kind = "an integer" if whole else "a number"
        raise ConfigError(f"learning key {key!r}: got {text!r}, allowed: {kind} above {above:g}")
    return value


def _changed(run: Run, values: dict[str, Any]) -> Run:
    """Return a run with other values of config keys, those that its name tells among them."""
    names = dict(task="task", seed="seed", model_size="size", precision="precision", steps="steps")
    fields = {names[k]: v for k, v in values.items() if k in names}
    return dataclasses.replace(run, **fields, keys={**run.keys, **{k: v for k, v in values.items() if k not in names}})


class Several:
    """Runs in processes of their own; signals go to all of them, and no other is begun then."""

    def __init__(self, commands: Sequence[Sequence[str]], logs: Sequence[Path], together: int) -> None:
        self._work, self._together = list(zip(commands, logs, strict=True)), together
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._signal: int | None = None

    def run(self) -> int:
        """Run them; return 0 where all went well, 1 where one failed, 128 + a signal that ended them."""
        with handled(SIGNALS, self._stop), ThreadPoolExecutor(self._together) as pool:
            statuses = list(pool.map(lambda work: self._one(*work), self._work))
        return 128 + self._signal if self._signal is not None else int(any(statuses))

    def _one(self, command: Sequence[str], log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as f:
            with self._lock:
                if self._signal is not None:
                    return 0
                print(f"{log.stem}: goes on in {log}", flush=True)
                # A process group of its own: Ctrl-C in a terminal reaches this process, which passes it on once.
                child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=f, process_group=0)
                self._children.add(child)
            status = child.wait()
        print(f"{log.read_text(errors='replace').strip().rpartition(chr(10))[2]}", flush=True)
        return status

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        for child in [*self._children]:
            if child.poll() is None:
                child.send_signal(number)


def commands(words: Sequence[str], together: int) -> Iterator[list[str]]:
    """Yield what makes each run alone; side by side they share the cores evenly, unless `num_threads` is given."""
    keys = [w for w in words if "=" in w and not w.startswith("together=")]
    if together > 1 and not any(w.startswith("num_threads=") for w in keys):
        keys.append(f"num_threads={max(1, (os.cpu_count() or 1) // together)}")
    for run in named([w for w in words if "=" not in w]):
        yield [sys.executable, "-P", "-m", "tdmpc2_fast.benchmarks.learning", run.name, *keys]


def listing(out: Path) -> str:
    """Return the list of runs, and how far each has come in a folder."""
    rows = []
    for run in RUNS:
        folder = out / run.name
        finished = ", finished" if about(folder)["finished"] else ""
        state = reached(folder).line() + finished if folder.is_dir() else "not begun"
        rows.append((run.name, f"{run.steps:,}", state))
    return rendered(grid(rows, ("run", "decisions", f"in {out}"), fixed=2))


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
        return Several([*commands(words, chosen.together)], logs, chosen.together).run()
    except (BackendError, CannotMeasureError, ConfigError, InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except NonFiniteError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
