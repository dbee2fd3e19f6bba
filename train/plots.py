"""Pictures of learning curves: a panel per task, and one of the IQM over tasks."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdmpc2_fast.errors import ConfigError, InputError

from .curves import (
    FEWEST_SEEDS,
    Band,
    Groups,
    find_runs,
    full_return,
    group,
    iqm_over_tasks,
    mean_over_seeds,
    read_curves,
    read_reference,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours and a grey, which stay apart for colour-blind readers, and dashes, for those who see none.
_OURS = ("#D55E00", "#0072B2", "#000000")
_PUBLISHED = ("#56B4E9", "#009E73", "#5A5A5A", "#CC79A7", "#E69F00")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)))
_MOST_COLUMNS = 3
_MOST_MARKERS = 8
# They look the same in every picture, whichever of them are in it.
_METHODS = ("tdmpc2", "tdmpc", "sac", "dreamerv3", "tdmpc2-pixels")
_STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "legend.frameon": False,
    # text stays text, and the same runs make the same bytes
    "svg.fonttype": "none",
    "svg.hashsalt": "tdmpc2-fast",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Line:
    """How a method is drawn, in all panels alike."""

    colour: str
    dash: Any
    width: float
    shade: float


@dataclass(frozen=True)
class _Panel:
    """What is in it; bands are by label, and `full` is the highest value possible, where there is one."""

    title: str
    ylabel: str
    full: float | None
    ours: Mapping[str, Band]
    theirs: Mapping[str, Band]


def plot_runs(
    paths: Sequence[Path], out: Path | None = None, reference: Path | None = None, max_step: float | None = None
) -> list[Path]:
    """Draw the learning curves of runs.

    Args:
        paths: run folders, folders above runs, or CSV files.
        out: picture to write, `.png` or `.svg`; what is there is overwritten. None writes both: `curve.*` into the
            folder of a single run, `curves.*` into the current folder for several.
        reference: published curves to draw beside them, as `METHOD/TASK.csv`; the folder of one METHOD or of several.
        max_step: right end of the axes in environment steps; None chooses it by the length of the runs.

    Returns:
        The files written.

    Raises:
        InputError: no run, a malformed file, another ending of `out`, `max_step` not above 0.
        ConfigError: matplotlib or scipy is missing.
    """
    if out is not None and out.suffix not in (".png", ".svg"):
        raise InputError(f"out: got {str(out)!r}, allowed: a file name that ends in .png or .svg")
    if max_step is not None and not max_step > 0:
        raise InputError(f"max_step: got {max_step}, allowed: above 0")
    files = find_runs(paths)
    runs = group(c for f in files for c in read_curves(f))
    tasks = sorted({task for task, _ in runs})
    _say_what_is_cut(runs)
    published = group(read_reference(reference, tasks)) if reference else {}
    if out is not None:
        targets = [out]
    elif len(files) == 1 and files[0].name == "eval.csv":
        targets = [files[0].with_name(f"curve.{kind}") for kind in ("png", "svg")]
    else:
        targets = [Path(f"curves.{kind}") for kind in ("png", "svg")]
    try:
        import matplotlib
        import scipy.stats  # noqa: F401
    except ImportError as e:
        raise ConfigError(f"plots need {e.name}; pip install 'tdmpc2-fast[train]'") from e
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own style would change the bytes
        matplotlib.rcParams.update(_STYLE)
        figure = draw(runs, published, max_step)
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(target, dpi=160, metadata={"Date": None} if target.suffix == ".svg" else None)
    return targets


def _say_what_is_cut(runs: Groups) -> None:
    for (task, label), curves in runs.items():
        first, last = (pick(curves, key=lambda c: float(c.steps[-1])) for pick in (min, max))
        if first.steps[-1] < 0.9 * last.steps[-1]:
            _log.warning(
                "%s of %s ends at %s, where seed %d ends; others go on to %s",
                label,
                task,
                format_step(first.steps[-1]),
                first.seed,
                format_step(last.steps[-1]),
            )


def draw(runs: Groups, published: Groups, max_step: float | None = None) -> Figure:
    """The figure of runs and published curves by (task, label): a panel per task and, for several, one of their IQM."""
    from matplotlib.figure import Figure

    lines = _lines(runs, published)
    tasks = sorted({task for task, _ in runs})
    panels = [
        _Panel(task, "episode return", full_return(task), _means(runs, task), _means(published, task)) for task in tasks
    ]
    if len(tasks) > 1 and (iqms := _iqms(runs, published, tasks)):
        panels.append(_Panel(f"IQM of {len(tasks)} tasks", "return / 1000", 1.0, *iqms))
    columns = min(len(panels), _MOST_COLUMNS)
    height = -(-len(panels) // columns)
    size = (5.6, 4.2) if len(panels) == 1 else (3.7 * columns, 3.0 * height + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False)
    for ax, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(ax, panel, lines, max_step)
    for ax in grid.flat[len(panels) :]:
        ax.remove()
    handles = [_handle(line, text) for line, text in _legend(lines, runs, published)]
    banded = any(len(c) >= FEWEST_SEEDS for c in (*runs.values(), *published.values()))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), max(columns, 2)),
        title="mean of seeds, shaded: 95% confidence interval" if banded else None,
    )
    return figure


def _lines(runs: Groups, published: Groups) -> dict[tuple[bool, str], _Line]:
    """By (ours, label)."""
    ours, theirs = (sorted({label for _, label in groups}) for groups in (runs, published))
    found = {}
    for i, label in enumerate(ours):
        found[True, label] = _Line(_OURS[i % len(_OURS)], _DASHES[i // len(_OURS) % len(_DASHES)], 2.4, 0.25)
    places = {m: i for i, m in enumerate(_METHODS) if m in theirs}
    free = (i for i in itertools.count() if i not in places.values())
    places |= dict(zip([m for m in theirs if m not in places], free, strict=False))
    shade = max(0.08, 0.24 / max(len(theirs), 1))  # many bands over each other stay light
    for label, i in places.items():
        turn, colour = divmod(i, len(_PUBLISHED))
        found[False, label] = _Line(_PUBLISHED[colour], _DASHES[(colour + turn) % len(_DASHES)], 1.5, shade)
    return found


def _means(groups: Groups, task: str) -> dict[str, Band]:
    return {label: mean_over_seeds(curves) for (t, label), curves in groups.items() if t == task}


def _iqms(runs: Groups, published: Groups, tasks: Sequence[str]) -> tuple[dict[str, Band], dict[str, Band]] | None:
    """IQMs of the methods that have all tasks; a warning names what is left out and why."""
    if unknown := [t for t in tasks if full_return(t) is None]:
        _log.warning("no IQM over tasks: no known scale of returns for %s", ", ".join(unknown))
        return None
    found: list[dict[str, Band]] = []
    for groups in (runs, published):
        found.append({})
        for label in sorted({label for _, label in groups}):
            missing = [t for t in tasks if (t, label) not in groups]
            if missing:
                _log.warning("%s is not in the IQM over tasks: it has no curve of %s", label, ", ".join(missing))
            else:
                found[-1][label] = iqm_over_tasks({t: groups[t, label] for t in tasks})
    return (found[0], found[1]) if found[0] else None


def _draw_panel(ax: Any, panel: _Panel, lines: Mapping[tuple[bool, str], _Line], max_step: float | None) -> None:
    end, linear = x_axis(list(panel.ours.values()), list(panel.theirs.values()))
    if max_step is not None:
        end, linear = max_step, None
    heights = []
    for mine, bands in ((False, panel.theirs), (True, panel.ours)):
        for label, band in bands.items():
            # A line from 0 to the first published point would cross steps of which nothing is known.
            start = 0 if mine or linear is None else linear
            heights += _curve(ax, band, start, end, lines[mine, label], label, mine)
    if linear is None:
        ax.locator_params(axis="x", nbins=5)
        ax.set_xlabel("environment steps")
    else:
        ax.set_xscale("symlog", linthresh=linear)
        ax.set_xticks([0, *(10.0**k for k in range(round(math.log10(linear)), math.ceil(math.log10(end))))])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("environment steps (log scale)")
    ax.xaxis.set_major_formatter(lambda x, _: format_step(x))
    ax.set(title=panel.title, ylabel=panel.ylabel, xlim=(-0.02 * (linear or end), 1.02 * end))
    if panel.full:
        top = min(1.25 * max(*heights, 0.02 * panel.full), panel.full)
        ax.set_ylim(-0.02 * top, 1.01 * top)
    else:
        room = 0.1 * (max(heights) - min(heights)) or 1.0
        ax.set_ylim(min(heights) - room, max(heights) + room)


def _curve(ax: Any, band: Band, start: float, end: float, line: _Line, label: str, mine: bool) -> list[float]:
    """Draw a band from `start` on; returns the heights of its line that are seen."""
    import numpy as np

    shown = band.steps >= start
    steps, centre = band.steps[shown], band.centre[shown]
    seen = centre[steps <= end]
    ax.plot(
        steps,
        centre,
        color=line.colour,
        linestyle=line.dash,
        linewidth=line.width,
        marker="o" if mine and len(seen) <= _MOST_MARKERS else "",
        markersize=2.2 * line.width,
        zorder=4 + mine,
        label=label,
    )
    if band.low is not None and band.high is not None:
        ax.fill_between(
            steps, band.low[shown], band.high[shown], color=line.colour, alpha=line.shade, linewidth=0, zorder=2 + mine
        )
    return [*seen, float(np.interp(end, steps, centre))] if len(seen) else []


def x_axis(ours: Sequence[Band], theirs: Sequence[Band]) -> tuple[float, float | None]:
    """Right end of a panel's axis in environment steps, and up to where it is linear; None: all of it.

    Published curves go on to half as much again as the longest run. Runs that end before the first published point
    after 0 would have nothing beside them: there the axis shows all and is logarithmic from the power of ten below
    the end of the longest run on.
    """
    last = max(float(b.steps[-1]) for b in ours)
    later = [float(s) for b in theirs for s in b.steps if s > 0]
    if not later:
        return last or 1.0, None
    if 0 < last < min(later):
        return max(later), 10.0 ** math.floor(math.log10(last))
    return max(last, min(1.5 * last, max(later))) or max(later), None


def format_step(step: float) -> str:
    """0, 250k, 1.5M."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(step) >= unit:
            return f"{step / unit:g}{letter}"
    return f"{step:g}"


def _legend(lines: Mapping[tuple[bool, str], _Line], runs: Groups, published: Groups) -> list[tuple[_Line, str]]:
    entries = []
    for (mine, label), line in lines.items():
        counts = sorted({len(g) for (_, name), g in (runs if mine else published).items() if name == label})
        text = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        text += " seed" if counts == [1] else " seeds"
        if counts[0] < FEWEST_SEEDS:
            text += ", no band" if counts[-1] < FEWEST_SEEDS else f", no band below {FEWEST_SEEDS}"
        entries.append((line, f"{label} ({text})"))
    return entries


def _handle(line: _Line, text: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=line.colour, linestyle=line.dash, linewidth=line.width, label=text)
