"""What a person sees of a run while it goes: a live table in a terminal, lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from time import perf_counter
from typing import TYPE_CHECKING

from typing_extensions import override

from tdmpc2_fast.errors import ConfigError

from .status import Status, hms

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live as RichLive
    from rich.panel import Panel

_FIRST_LINE, _BETWEEN_LINES = 5.0, 30.0
_BETWEEN_REFRESHES = 0.5
_REFRESH_SHARE = 200  # a refresh waits for at least this many times its own duration
_NOTES = 8


class Quiet:
    """Shows only warnings, and what is said when all is over."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self.due = float("inf")  # when `show` wants to be called

    def show(self, now: float) -> None:
        """Show how the run stands; called when the display is due."""

    def note(self, text: str) -> None:
        """Show a line."""

    def warn(self, text: str) -> None:
        """Show that something went wrong and the run goes on."""
        _print(f"warning: {text}  {hms(self.status.elapsed)}", error=True)

    def close(self, summary: Sequence[str]) -> None:
        """End with the lines of a summary."""
        for line in summary:
            _print(line)


class Lines(Quiet):
    """Prints plain lines for pipes and logs, each readable by itself."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.due = perf_counter() + _FIRST_LINE
        facts = {"task": status.cfg.task, **status.about, "seed": str(status.cfg.seed)}
        _print("  ".join(f"{k} {v}" for k, v in facts.items()))
        _print(f"run folder {status.folder}")

    @override
    def show(self, now: float) -> None:
        s = self.status
        self.due = now + _BETWEEN_LINES
        head = f"train  step {s.decisions * s.action_repeat:>9,}  {s.percent}"
        if s.doing is not None:
            what, done, total = s.doing
            _print(f"{head}  {what} {done:,} of {total:,}  {hms(s.elapsed)}")
            return
        reward = s.row.get("episode_reward")
        shown = (
            "" if reward is None else f"  return {reward:8.1f}" + (f" in {task}" if (task := s.row.get("task")) else "")
        )
        speed = "" if s.rate is None else f"  {s.rate:6.1f} {s.unit}/s"
        losses = "".join(f"  {name} {value:.4g}" for name, value in s.losses)
        _print(f"{head}{shown}{speed}{losses}  {hms(s.elapsed)}  left {hms(s.left)}")

    @override
    def note(self, text: str) -> None:
        _print(f"{text}  {hms(self.status.elapsed)}")


class Live(Quiet):
    """Keeps a table in its place, redrawn from the calls of the loop: it has no thread of its own.

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

    @override
    def show(self, now: float) -> None:
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
        _redirecting_logging(live.start)
        return live

    def _table(self) -> Panel:
        from .live_table import table

        return table(self.status, self.console.width, self.console.height)

    @override
    def note(self, text: str) -> None:
        self._add(text, False)

    @override
    def warn(self, text: str) -> None:
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

    @override
    def close(self, summary: Sequence[str]) -> None:
        self.status.over = True
        with suppress(OSError):
            if self._live is None:
                self.console.print(self._table())
            else:
                _redirecting_logging(self._live.stop)
        super().close(summary)


def choose(status: Status) -> Quiet:
    """Return the display of `cfg.display`; raise `ConfigError` where it insists on rich, which is missing."""
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


def _redirecting_logging(change: Callable[[], None]) -> None:
    """Call what replaces stdout and stderr; log handlers that wrote to them write to what replaced them."""
    before = sys.stdout, sys.stderr
    change()
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for handler in (h for logger in loggers for h in getattr(logger, "handlers", [])):
        for old, new in zip(before, (sys.stdout, sys.stderr), strict=True):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old and old is not new:
                handler.setStream(new)
