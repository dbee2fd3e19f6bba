"""What a person sees of a run while it goes: a live table in a terminal, lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live as RichLive
    from rich.panel import Panel

_RATE_SECONDS, _BETWEEN_SAMPLES = 60.0, 0.5
_PACE_SECONDS, _WORTH_A_LINE = 3.0, 10.0  # until an evaluation's pace is known; how long one is that is told of
_FIRST_LINE, _BETWEEN_LINES = 5.0, 30.0
_BETWEEN_REFRESHES = 0.5
_REFRESH_SHARE = 200  # a refresh waits for at least this many times its own duration
_NOTES = 8
_PARTS = ("environment", "plan", "update", "evaluation")
_KEPT = ("decisions", "replay", "last_eval", "best_eval", "eval_seconds")
_LOSSES = ("consistency", "reward", "value", "pi", "termination")


class Clock:
    """How long the parts of a run took, in seconds. Parts inside each other count twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """`with clock.part("plan"):` adds the time inside to `seconds["plan"]`."""
        start = self._since[name] = perf_counter()
        try:
            yield
        finally:
            self._since.pop(name, None)
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    def so_far(self) -> dict[str, float]:
        """`seconds`, with what the parts that are under way took until now."""
        now, total = perf_counter(), dict(self.seconds)
        for name, start in list(self._since.items()):
            total[name] = total.get(name, 0.0) + now - start
        first = [name for name in _PARTS if name in total]
        return {name: total[name] for name in dict.fromkeys([*first, *total])}


class Status:
    """What is known of a run; `RunLog` writes it, displays read it. No tensor is kept here."""

    def __init__(self, cfg: Config, folder: Path, action_repeat: int, about: Mapping[str, str], clock: Clock) -> None:
        self.cfg, self.folder, self.action_repeat = cfg, folder, action_repeat
        self.about, self.clock = dict(about), clock
        self.decisions, self.replay = 0, 0.0
        self.row: Mapping[str, Any] = {}  # the last training episode
        self.last_eval: float | None = None
        self.best_eval: float | None = None
        self.eval_seconds = 0.0  # of the last evaluation
        self.notes: deque[tuple[str, str, bool]] = deque()  # when, what, whether it is a warning
        self.doing: tuple[str, int, int] | None = None
        self.over = False
        self.before = 0.0  # seconds of earlier sessions
        self._start = self._last_step = self._began = perf_counter()
        self._aside, self._skipped = 0.0, 0  # seconds and decisions that say nothing of the speed
        self._long = False
        self._samples: deque[tuple[float, int]] = deque()
        self._first = 0  # decisions of the long stretch at `_began`
        self._foretold = False

    def step(self, decisions: int, replay: float) -> float:
        """One decision was made; returns the time."""
        now = perf_counter()
        if self._long:  # the decision around a long stretch says nothing of the speed
            self._aside += now - self._last_step
            self._skipped += decisions - self.decisions
            self._long, self.doing = False, None
        seeding = self.cfg.seed_steps or 0
        if self.decisions <= seeding < decisions:
            self._samples.clear()  # random actions are faster than planned ones
        self._last_step = now
        self.decisions, self.replay = decisions, replay
        sample = self._sample()
        if not self._samples or sample[0] - self._samples[-1][0] >= _BETWEEN_SAMPLES:
            self._samples.append(sample)
        while len(self._samples) > 1 and self._samples[1][0] < sample[0] - _RATE_SECONDS:
            self._samples.popleft()
        return now

    def busy(self, what: str, done: int, total: int) -> float:
        """A long stretch goes on; returns the time."""
        now = perf_counter()
        if self.doing is None or self.doing[0] != what:
            self._began, self._first = now, done
        self.doing, self._long = (what, done, total), True
        return now

    def evaluated(self, mean: float) -> None:
        """An evaluation has ended."""
        self.eval_seconds = perf_counter() - (self._last_step if self.doing is None else self._began)
        self.last_eval = mean
        self.best_eval = mean if self.best_eval is None else max(mean, self.best_eval)
        self.doing, self._long = None, True

    def foretold(self, now: float) -> str | None:
        """How long the evaluations of this run will take: once, as soon as the pace of the first one is known."""
        if self._foretold or self.eval_seconds or self.doing is None or self.doing[0] != "evaluating":
            return None
        cfg, (_, done, total) = self.cfg, self.doing
        if done == self._first or now - self._began < _PACE_SECONDS:
            return None
        self._foretold = True
        each = (now - self._began) / (done - self._first) * total
        if each < _WORTH_A_LINE:
            return None
        count, length = self._evaluations + (self.decisions < cfg.steps), cfg.episode_length or total
        episodes = f"{cfg.eval_episodes} episode{'s' * (cfg.eval_episodes != 1)} of up to {length:,} decisions"
        text = f"an evaluation takes about {hms(each)}: {episodes}; this run has {count}"
        # In plans of one environment: an update takes about as long as one.
        training = max(cfg.steps - (cfg.seed_steps or 0), 0) + cfg.utd * cfg.steps
        if cfg.mpc and count * cfg.eval_episodes * length > training:
            ways = ["a smaller eval_episodes"] * (cfg.eval_episodes > 1) + ["a larger eval_freq"] * (count > 2)
            text += f", probably most of its time. What shortens it: {' or '.join(ways) or 'more steps'}"
        return text

    def state(self) -> dict[str, Any]:
        """JSON-ready, for `load`."""
        row = {k: v for k, v in self.row.items() if v is None or isinstance(v, (int, float))}
        kept = {name: getattr(self, name) for name in _KEPT}
        return dict(**kept, row=row, elapsed=self.elapsed, seconds=self.clock.seconds)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        for name in _KEPT:
            setattr(self, name, state[name])
        self.row, self.before = state["row"], state["elapsed"]
        self.clock.seconds.update(state["seconds"])

    @property
    def rate(self) -> float | None:
        """Decisions per second in the last minute, pretraining and evaluations left out."""
        if not self._samples:
            return None
        (start, first), (end, last) = self._samples[0], self._sample()
        return (last - first) / (end - start) if end > start else None

    def _sample(self) -> tuple[float, int]:
        return self._last_step - self._start - self._aside, self.decisions - self._skipped

    @property
    def left(self) -> float | None:
        """Seconds to go: decisions at the recent speed, and evaluations like the last one."""
        rate, cfg = self.rate, self.cfg
        if not rate or self.over or self.decisions <= (cfg.seed_steps or 0):
            return None
        return max(cfg.steps - self.decisions, 0) / rate + self._evaluations * self.eval_seconds

    @property
    def _evaluations(self) -> int:
        """How many come after this decision, the one at the end included; an episode has one at most."""
        cfg = self.cfg
        period = max(cfg.eval_freq, 0 if cfg.episodic else cfg.num_envs * (cfg.episode_length or 0))
        return max((cfg.steps - 1) // period - self.decisions // period, 0) + 1

    @property
    def elapsed(self) -> float:
        """Seconds of this run, earlier sessions included."""
        return self.before + perf_counter() - self._start

    @property
    def losses(self) -> list[tuple[str, float]]:
        """Losses of the last training episode's last update, by short name."""
        names = _LOSSES if self.cfg.episodic else _LOSSES[:-1]
        found = ((name, self.row.get(f"{name}_loss")) for name in names)
        return [(name, value) for name, value in found if value is not None]


def hms(seconds: float | None) -> str:
    """Hours, minutes, seconds."""
    if seconds is None:
        return "-:--:--"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def percent(s: Status) -> str:
    """Decisions made, as a share of all."""
    return f"{100 * s.decisions // s.cfg.steps:3}%"


class Quiet:
    """Shows warnings only, and what is said when all is over."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self.due = float("inf")  # when `show` wants to be called

    def show(self, now: float) -> None:
        """The display is due."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def warn(self, text: str) -> None:
        """Something went wrong; the run goes on."""
        _print(f"warning: {text}  {hms(self.status.elapsed)}", error=True)

    def close(self, summary: Sequence[str]) -> None:
        """The run is over."""
        for line in summary:
            _print(line)


class Lines(Quiet):
    """Plain lines for pipes and logs, each readable by itself."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.due = perf_counter() + _FIRST_LINE
        facts = {"task": status.cfg.task, **status.about, "seed": str(status.cfg.seed)}
        _print("  ".join(f"{k} {v}" for k, v in facts.items()))
        _print(f"run folder {status.folder}")

    def show(self, now: float) -> None:
        """A line about training, or about the long stretch it is in."""
        s = self.status
        self.due = now + _BETWEEN_LINES
        head = f"train  step {s.decisions * s.action_repeat:>9,}  {percent(s)}"
        if s.doing is not None:
            what, done, total = s.doing
            _print(f"{head}  {what} {done:,} of {total:,}  {hms(s.elapsed)}")
            return
        reward = s.row.get("episode_reward")
        shown = "" if reward is None else f"  return {reward:8.1f}"
        speed = "" if s.rate is None else f"  {s.rate:6.1f} decisions/s"
        losses = "".join(f"  {name} {value:.4g}" for name, value in s.losses)
        _print(f"{head}{shown}{speed}{losses}  {hms(s.elapsed)}  left {hms(s.left)}")

    def note(self, text: str) -> None:
        """A line with the time."""
        _print(f"{text}  {hms(self.status.elapsed)}")


class Live(Quiet):
    """A table that stays where it is, redrawn from the calls of the loop: no thread of its own.

    Notes are in the table while they are recent and above it after that. What others print or
    log to the terminal appears above the table, too.
    """

    def __init__(self, status: Status, console: Console | None = None) -> None:
        from rich.console import Console as RichConsole

        super().__init__(status)
        self.due = 0.0
        self.console = console or RichConsole(force_terminal=True, highlight=False)
        self._live: RichLive | None = None
        self._width = 0

    def show(self, now: float) -> None:
        """Draw the table as it is now."""
        with suppress(OSError):  # a terminal that went away
            if self._live is None:
                self._live = self._begin()
            width = self.console.width
            if width < self._width:  # the terminal has folded the old table; nobody knows into how many lines
                self.console.clear()
            self._width = width
            self._live.refresh()
        self.due = now + max(_BETWEEN_REFRESHES, _REFRESH_SHARE * (perf_counter() - now))

    def _begin(self) -> RichLive:
        from rich.live import Live as RichLive

        live = RichLive(
            console=self.console,
            auto_refresh=False,
            redirect_stderr=sys.stderr.isatty(),
            vertical_overflow="crop",
            get_renderable=self._table,
        )
        before = sys.stdout, sys.stderr
        live.start()
        _redirect_logging(before, (sys.stdout, sys.stderr))
        return live

    def _table(self) -> Panel:
        from .live_table import table

        return table(self.status, self.console.width, self.console.height)

    def note(self, text: str) -> None:
        """Into the table with the next refresh."""
        self._add(text, False)

    def warn(self, text: str) -> None:
        """Into the table, in colour."""
        self._add(text, True)

    def _add(self, text: str, warning: bool) -> None:
        notes = self.status.notes
        notes.append((hms(self.status.elapsed), text, warning))
        self.due = 0.0
        if len(notes) > _NOTES:
            when, old, warned = notes.popleft()
            with suppress(OSError):
                self.console.print(
                    f"{when} {'warning: ' * warned}{old}", style="yellow" if warned else None, markup=False
                )

    def close(self, summary: Sequence[str]) -> None:
        """Leave the last table on the screen, and the summary below it."""
        self.status.over = True
        with suppress(OSError):
            if self._live is None:
                self.console.print(self._table())
            else:
                before = sys.stdout, sys.stderr
                self._live.stop()
                _redirect_logging(before, (sys.stdout, sys.stderr))
        super().close(summary)


def choose(status: Status) -> Quiet:
    """The display of `cfg.display`; raises `ConfigError` where rich is missing and insisted on."""
    kind, rich = status.cfg.display, find_spec("rich") is not None
    if kind == "none":
        return Quiet(status)
    if kind == "live" and not rich:
        raise ConfigError("config key 'display': live takes the package rich; pip install 'tdmpc2-fast[train]'")
    on_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not on_ci
    if kind == "live" or (kind == "auto" and terminal and rich):
        return Live(status)
    lines = Lines(status)
    if kind == "auto" and terminal:
        lines.note("a live table takes the package rich: pip install 'tdmpc2-fast[train]'")
    return lines


def _print(text: str, error: bool = False) -> None:
    # A full disk behind a log file, or a reader of a pipe that left, is no reason to end a run.
    with suppress(OSError):
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


def _redirect_logging(before: Sequence[Any], after: Sequence[Any]) -> None:
    """Log handlers that write to a stream of `before` write to its counterpart in `after`."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            for old, new in zip(before, after, strict=True):
                if isinstance(handler, logging.StreamHandler) and handler.stream is old and old is not new:
                    handler.setStream(new)
