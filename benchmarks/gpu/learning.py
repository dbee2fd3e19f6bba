"""A training run that ends by the clock: as much of a learning curve as fits into the time of a machine.

    python -m tdmpc2_fast.benchmarks.gpu.learning task=NAME [seconds=240] [out=FOLDER] [KEY=VALUE ...]

Keys are those of `tdmpc2-fast train`, with more evaluations than its defaults and nothing kept but numbers. The
run has a new folder in `out`: `config.json`, `train.csv` and `eval.csv` as every run, and `about.json` with
the machine, the versions, the commit and how far it came. That is its last line, too. Exit status: 0 also
where the time was over first, 1 where the run failed, 2 where the words are wrong.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdmpc2_fast import Config
from tdmpc2_fast.errors import BackendError, ConfigError, InputError
from tdmpc2_fast.runtime.backend import resolve_device
from tdmpc2_fast.train.cli.keys import parse
from tdmpc2_fast.train.envs import suite_of
from tdmpc2_fast.train.run.stop import Stop, Stopped
from tdmpc2_fast.train.run.threads import choose_threads
from tdmpc2_fast.train.run.trainer import OnlineTrainer

from ..harness.machine import this_machine

# 100,000 environment steps of DMControl, where the published curves have their first point. One thread: several
# runs share the machine, and the host only launches.
DEFAULTS: dict[str, Any] = dict(steps=50_000, eval_freq=5_000, eval_episodes=4, num_threads=1)
KEPT: dict[str, Any] = dict(save_agent=False, tensorboard=False, display="lines")


@dataclasses.dataclass(frozen=True)
class Learned:
    """How far a run came.

    Attributes:
        decisions, step: those of training; `step` counts environment steps, as the curves do.
        seconds: the time of the whole run, evaluations and compilation included.
        finished: whether it came to its end before the time was over.
        evaluated_at: environment steps at the last evaluation; None before the first.
        mean_return, std_return: those of the last evaluation's episodes.
    """

    decisions: int
    step: int
    seconds: float
    finished: bool
    evaluated_at: int | None
    mean_return: float | None
    std_return: float | None

    def line(self, cfg: Config) -> str:
        """Return a line for a person."""
        found = "not evaluated"
        if self.evaluated_at is not None:
            found = f"return {self.mean_return:.1f} ± {self.std_return:.1f} at {self.evaluated_at:,}"
        ended = "to its end" if self.finished else "until the time was over"
        run = f"{cfg.task} {cfg.precision} seed {cfg.seed}"
        return f"{run}: {self.step:,} steps in {self.seconds:.0f} s, {ended}; {found}"


class _Trainer(OnlineTrainer):
    """A trainer that keeps its last evaluation, which a run that is stopped does not return."""

    last: tuple[int, float, float] | None = None

    def _evaluate(self) -> Any:
        found = super()._evaluate()
        self.last = self.progress.decisions, found.mean_return, found.std_return
        return found


def learn(cfg: Config, folder: Path, seconds: float) -> Learned:
    """Train to the end or until `seconds` are over."""
    start, stop = time.monotonic(), Stop()
    # A wish to end comes as a signal, as from a person or a cluster.
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    with stop.listening():
        timer.start()
        try:
            trainer = _Trainer(cfg, folder, stop=stop)
            try:
                trainer.run()
            except Stopped as e:
                if e.signal != signal.SIGTERM:
                    raise
            finally:
                trainer.log.close()
        finally:
            timer.cancel()
    repeat, decisions = trainer.log.action_repeat, trainer.progress.decisions
    at, mean, std = trainer.last or (None, None, None)
    return Learned(
        decisions=decisions,
        step=decisions * repeat,
        seconds=round(time.monotonic() - start, 1),
        finished=not stop.asked,
        evaluated_at=None if at is None else at * repeat,
        mean_return=mean,
        std_return=std,
    )


def new_folder(out: Path, cfg: Config) -> Path:
    """Make a folder named after the run; one that is there is left alone."""
    name = f"{cfg.task}-{cfg.precision}-seed{cfg.seed}"
    names = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
    folder = next(out / n for n in names if not (out / n).exists())
    folder.mkdir(parents=True)
    return folder


def options(words: Sequence[str]) -> tuple[float, Path, Config]:
    """Return the seconds, the folder of runs and the config; a bad word raises `ConfigError`."""
    own = {"seconds": "240", "out": "runs/learning"}
    own |= {k: v for k, _, v in (w.partition("=") for w in words) if k in own}
    try:
        seconds = float(own["seconds"])
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"learning key 'seconds': got {own['seconds']!r}, allowed: a number above 0")
    values = parse([w for w in words if w.partition("=")[0] not in own])
    cfg = Config.from_dict(DEFAULTS | values | KEPT)
    suite_of(cfg.task)
    return seconds, Path(own["out"]).expanduser(), cfg


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & {*words}:
        print(__doc__)
        return 0
    try:
        seconds, out, cfg = options(words)
        choose_threads(cfg)
        machine = this_machine(resolve_device(cfg.device))
        folder = new_folder(out, cfg)
        learned = learn(cfg, folder, seconds)
    except (BackendError, ConfigError, InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    about = json.dumps(machine.facts() | dataclasses.asdict(learned), indent=1)
    (folder / "about.json").write_text(about + "\n")
    print(f"{folder}\n{learned.line(cfg)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
