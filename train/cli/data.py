"""The commands `collect` and `data`: sets of episodes made, looked at, checked and converted."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from tdmpc2_fast.errors import ConfigError, did_you_mean

from . import keys, tables

_BY_SIGNAL = 128
_DATA = "tdmpc2-fast data info FOLDER, data check FOLDER, or data convert SOURCE ... out=FOLDER [tasks=NAME,...]"


def collect(words: Sequence[str]) -> int:
    """Play episodes into a data set.

    SOURCE is a task's name, which is played with random actions, a checkpoint, or a run's folder, of which all
    checkpoints play. With replay=true the episodes in a run's replay are taken instead. They are appended to what is in
    the folder; stopped and called again, it goes on where it was.
    """
    options, words = keys.options(words, keys.CollectOptions)
    sources, words = keys.arguments(words)
    values = keys.parse(words, presets=False)
    if not sources or options.out is None:
        got = "no source" if not sources else "no out="
        hint = f"; SOURCE is the name alone: {values['task']}" if not sources and "task" in values else ""
        raise ConfigError(f"got {got}, allowed: tdmpc2-fast collect SOURCE ... out=FOLDER [key=value ...]{hint}")
    from ..data import collect as collecting
    from ..run.stop import Stop, Stopped

    stop, out = Stop(), Path(options.out).expanduser()
    with stop.listening():
        try:
            collecting.collect(sources, out, values, options.episodes, options.noise, options.replay, stop, _say)
        except Stopped as e:
            print("stopped; the episodes that ended are in the set, the same command goes on", file=sys.stderr)
            return _BY_SIGNAL + e.signal
    return _info(out)


def data(words: Sequence[str]) -> int:
    """Look at a data set, check it, or make one of others.

    info lists its tasks. check reads every number and says what is damaged; its exit status is then 1. convert makes a
    data set of official .pt files, of a folder of them, of Minari's data sets, or of several of ours.
    """
    options, words = keys.options(words, keys.DataOptions)
    paths, others = keys.arguments(words)
    own = [f.name for f in dataclasses.fields(options)]
    if others or len(paths) < 2 or paths[0] not in ("info", "check", "convert"):
        got, known = others[0] if others else " ".join(paths), ("info", "check", "convert")
        if got in known:
            raise ConfigError(f"data {got}: got no {'SOURCE' if got == 'convert' else 'FOLDER'}, allowed: {_DATA}")
        close = did_you_mean(got.partition("=")[0], own) if others else did_you_mean(got, known)
        raise ConfigError(f"got {got!r}, allowed: {_DATA}.{close}")
    what, *given = paths
    if what != "convert" and (len(given) > 1 or options != keys.DataOptions()):
        raise ConfigError(f"data {what}: got {' '.join(words)!r}, allowed: data {what} FOLDER")
    sources = [Path(p).expanduser() for p in given]
    if what == "info":
        return _info(sources[0])
    if what == "check":
        return _check(sources[0])
    if options.out is None:
        raise ConfigError(f"data convert: got no out=, allowed: {_DATA}")
    from ..data.convert import convert

    out = Path(options.out).expanduser()
    convert(sources, out, options.tasks, _say)
    return _info(out)


def _say(line: str) -> None:
    print(line, flush=True)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _info(folder: Path) -> int:
    from ..data.dataset import DataSet

    found = DataSet.open(folder)
    rows = [
        (
            t.name,
            f"{t.obs_dim}",
            f"{t.action_dim}",
            f"{t.episode_length:,}",
            f"{t.episodes:,}",
            f"{t.steps:,}",
            f"{t.mean_return:,.1f}",
            f"{t.min_return:,.1f}",
            f"{t.max_return:,.1f}",
            f"{t.nbytes / 1e6:,.1f}",
        )
        for t in found.tasks
    ]
    titles = ("task", "obs", "action", "length", "episodes", "steps", "return", "min", "max", "MB")
    steps, size = sum(t.steps for t in found.tasks), sum(t.nbytes for t in found.tasks)
    print(tables.rendered(tables.grid(rows, titles)))
    episodes = sum(t.episodes for t in found.tasks)
    counts = (_count(len(rows), "task"), _count(episodes, "episode"), _count(steps, "step"))
    print(f"{folder}: {', '.join(counts)}, {size / 1e6:,.1f} MB")
    return 0


def _check(folder: Path) -> int:
    from ..data.check import problems
    from ..data.dataset import DataSet

    count = 0
    for problem in problems(folder):
        count += 1
        print(problem, flush=True)
    if count:
        print(f"{folder}: {_count(count, 'problem')}")
        return 1
    found = DataSet.open(folder)
    print(f"{folder}: {_count(len(found.files), 'file')}, every checksum and every number is right")
    return 0
