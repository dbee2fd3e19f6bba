"""The live table of a run, laid out for the terminal there is; it takes the package rich."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.box import ROUNDED
from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .status import Status, hms

_WIDEST, _LABEL, _GAP = 120, 9, "   "


def table(s: Status, width: int, height: int) -> Panel:
    """Lay out the live table, at most `width` columns wide, with as many of the notes as fit `height` rows."""
    width = min(width, _WIDEST)
    inner = width - 4  # the frame
    room = inner - _LABEL

    def item(name: str, value: str, after: str = "") -> Text:
        return Text.assemble((name and f"{name} ", "dim"), (value, "bold"), (after and f" {after}", "dim"))

    def number(name: str, value: float | None, form: str = ".1f") -> Text:
        return item(name, "-" if value is None else format(value, form))

    def metric(name: str, key: str) -> Text:
        return number(name, s.row.get(key), ".4g")

    if s.doing is not None:
        what, done, total = s.doing
        now = item(what, f"{done:,}", f"of {total:,}")
    elif s.over:
        now = Text("ended")
    elif s.seeding:
        now = Text("playing" if s.cfg.has_weights else "random actions")
    else:
        now = Text("training")
    elapsed = s.elapsed
    shares = {name: seconds / max(elapsed, 1e-9) for name, seconds in s.clock.so_far().items()}
    shares["other"] = max(0.0, 1 - sum(shares.values()))
    rows: list[tuple[str, list[Text]]] = [
        ("now", [now]),
        (
            "speed",
            [
                item("", "-" if s.rate is None else f"{s.rate:,.1f}", f"{s.unit}/s"),
                item("elapsed", hms(elapsed)),
                item("left", hms(s.left)),
            ],
        ),
        (
            "return",
            [
                *([number("episode", s.row.get("episode_reward"))] if s.plays else []),
                number("evaluation", s.last_eval),
                number("best", s.best_eval),
                *([item("task", s.row["task"])] if s.row.get("task") else []),
            ],
        ),
        ("losses", [number(name, value, ".4g") for name, value in s.losses] or [Text("-")]),
        ("gradient", [metric("norm", "grad_norm"), metric("policy norm", "pi_grad_norm")]),
        *([("replay", [item("", f"{s.replay:.0%}", "full")])] if s.plays else []),
        ("time", [item(name, f"{share:.0%}") for name, share in shares.items()]),
        ("about", [t for k, v in s.about.items() for t in _fold(f"{k} {v}", room)]),
        ("files", _fold(str(s.folder), room)),
    ]
    grid = Table.grid(padding=0)
    grid.add_column(width=_LABEL, no_wrap=True, style="cyan")
    grid.add_column(width=room, no_wrap=True)
    used = 3  # the frame and the bar
    for label, items in rows:
        for i, line in enumerate(_flow(items, room)):
            grid.add_row("" if i else label, line)
            used += 1
    for i, line in enumerate(_recent(s, room, 1000 if s.over else height - 1 - used)):
        grid.add_row("" if i else "notes", line)
    count = Text(f"{s.decisions:,} / {s.cfg.steps:,} {s.unit} {s.percent}", "bold")
    bar = Table.grid(padding=(0, 2, 0, 0))
    bar.add_column(width=max(inner - count.cell_len - 2, 1))
    bar.add_column(no_wrap=True)
    bar.add_row(ProgressBar(s.cfg.steps, min(s.decisions, s.cfg.steps)), count)
    title = Text(f"{s.cfg.task} · {s.cfg.exp_name} · seed {s.cfg.seed}", "bold")
    return Panel(Group(bar, grid), box=ROUNDED, title=title, title_align="left", width=width)


def _flow(items: Sequence[Text], width: int) -> list[Text]:
    """Put items side by side, on a new line where the next one does not fit: none is broken."""
    lines: list[Text] = []
    for item in items:
        if lines and lines[-1].cell_len + len(_GAP) + item.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], _GAP, item)
        else:
            lines.append(item)
    return lines


def _fold(words: str, width: int, style: str = "") -> list[Text]:
    return [Text(line, style) for line in textwrap.wrap(words, width, break_on_hyphens=False)]


def _recent(s: Status, width: int, most: int) -> list[Text]:
    """Return the newest notes that fit in `most` lines, in the order they came; the newest always shows."""
    lines: list[Text] = []
    for when, what, warning in reversed(list(s.notes)):
        words = f"{when} {'warning: ' * warning}{' '.join(what.split())}"
        folded = _fold(words, width, "yellow" if warning else "")
        if len(lines) + len(folded) > most:
            return lines or folded[: max(most, 1)]
        lines = folded + lines
    return lines
