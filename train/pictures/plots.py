"""Pictures of learning curves: a panel per task, and one of the IQM over tasks."""

from __future__ import annotations

import itertools
import logging
import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdmpc2_fast.errors import ConfigError, InputError

from .curves import (
    FEWEST_SEEDS,
    Band,
    Curve,
    Floats,
    Groups,
    find_runs,
    full_return,
    group,
    iqm_over_tasks,
    mean_over_seeds,
    of_success,
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
_MANY = 15  # panels, from which on there are twice as many columns
_MOST_MARKERS = 8
_LEAST_SHARE = 0.4  # of a panel's height that the curves keep, however far their bands reach
_LARGE = 1e5  # from here on values are written as steps are
_CHARACTER = 0.08  # inches of a usual letter
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

    @property
    def look(self) -> dict[str, Any]:
        """The line itself, as matplotlib takes it."""
        return dict(color=self.colour, linestyle=self.dash, linewidth=self.width)


@dataclass(frozen=True)
class _Panel:
    """What a panel shows, by label; `full` is the highest value possible, where there is one, `seeds` those of ours."""

    title: str
    ylabel: str
    full: float | None
    ours: Mapping[str, Band]
    theirs: Mapping[str, Band]
    seeds: Mapping[str, Sequence[Curve]]


def plot_runs(
    paths: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    reference: str | Path | None = None,
    max_step: float | None = None,
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
    out, reference = (None if p is None else Path(p) for p in (out, reference))
    if out is not None and out.suffix not in (".png", ".svg"):
        raise InputError(f"out: got {str(out)!r}, allowed: a file name that ends in .png or .svg")
    if max_step is not None and not max_step > 0:
        raise InputError(f"max_step: got {max_step}, allowed: above 0")
    files = find_runs([Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)])
    mine = {f: read_curves(f) for f in files}
    tasks = sorted({c.task for curves in mine.values() for c in curves if not c.scored})
    published = group(read_reference(reference, tasks)) if reference else {}
    by_success = {task for (task, _), curves in published.items() if curves[0].success}
    runs = group(c for f, curves in mine.items() for c in _as_published(f, curves, by_success))
    _say_what_is_cut(runs)
    _check_units(runs, published)
    single = len(files) == 1 and files[0].name == "eval.csv"
    stem = files[0].with_name("curve") if single else Path("curves")
    targets = [stem.with_suffix(kind) for kind in (".png", ".svg")] if out is None else [out]
    write(lambda: draw(runs, published, max_step), targets)
    return targets


def write(make: Callable[[], Figure], targets: Sequence[Path]) -> None:
    """Write the figure that `make` draws, in the project's own style, as PNG or SVG by the names of files.

    Raises:
        ConfigError: matplotlib or scipy is missing.
    """
    try:
        import matplotlib
        import scipy.stats  # noqa: F401
    except ImportError as e:
        raise ConfigError(f"plots need {e.name}; pip install 'tdmpc2-fast[train]'") from e
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own style would change the bytes
        matplotlib.rcParams.update(_STYLE)
        figure = make()
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(target, dpi=160, metadata={"Date": None} if target.suffix == ".svg" else None)


def _as_published(file: Path, curves: Sequence[Curve], by_success: Collection[str]) -> list[Curve]:
    """Return the curves of a run, those of success where what is published of its task is success."""
    if file.name != "eval.csv" or not any(c.task in by_success and not c.scored for c in curves):
        return list(curves)
    return [c for c in curves if c.task not in by_success] + [c for c in of_success(file) if c.task in by_success]


def _check_units(runs: Groups, published: Groups) -> None:
    """Raise `InputError` where one panel would have to show returns and success rates."""
    kinds: dict[str, dict[bool, str]] = {}
    for (task, label), curves in [*runs.items(), *published.items()]:
        for c in curves:
            kinds.setdefault(task, {})[c.success] = label
    for task, found in kinds.items():
        if len(found) > 1:
            raise InputError(f"{task}: {found[False]} has returns and {found[True]} success, allowed: one of both")


def _tasks(runs: Groups) -> dict[str, bool]:
    """Return the tasks in the order of their panels, sets first, and whether each is a set with scores."""
    found = {task: curves[0].scored for (task, _), curves in runs.items()}
    return dict(sorted(found.items(), key=lambda item: (not item[1], item[0])))


def _say_what_is_cut(runs: Groups) -> None:
    for (task, label), curves in runs.items():
        first, last = (pick(curves, key=lambda c: float(c.steps[-1])) for pick in (min, max))
        end, longest = first.steps[-1], last.steps[-1]
        if end < 0.9 * longest:
            ends = label, task, format_step(end), first.seed, format_step(longest)
            _log.warning("%s of %s ends at %s, where seed %d ends; others go on to %s", *ends)


def draw(runs: Groups, published: Groups, max_step: float | None = None, by_range: bool = False) -> Figure:
    """Draw runs and published curves by (task, label): a panel per task and, for several, one of their IQM.

    by_range: shade from the lowest to the highest seed instead of a confidence interval, and leave out the IQM.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = _lines(runs, published)
    panels = []
    tasks = _tasks(runs)
    for task, scored in tasks.items():
        ours = {label: curves for (t, label), curves in runs.items() if t == task}
        theirs = {label: curves for (t, label), curves in published.items() if t == task}
        ylabel, full = ("normalised score", 100.0) if scored else ("episode return", full_return(task))
        if any(c.success for curves in ours.values() for c in curves):
            ylabel, full = "success rate", 1.0
        panels.append(_Panel(task, ylabel, full, _means(ours, by_range), _means(theirs, by_range), ours))
    single = [task for task, scored in tasks.items() if not scored]
    of_tasks = {key: curves for key, curves in runs.items() if key[0] in single}
    # Nobody who trained on a set asked for an IQM, so that there is none needs no warning.
    wanted = len(single) == len(tasks) or all(full_return(task) for task in single)
    if len(single) > 1 and wanted and not by_range and (iqms := _iqms(of_tasks, published, single)):
        panels.append(_Panel(f"IQM of {len(single)} tasks", "return / 1000", 1.0, *iqms, {}))
    columns = min(len(panels), _MOST_COLUMNS if len(panels) <= _MANY else 2 * _MOST_COLUMNS)
    height = -(-len(panels) // columns)
    size = (5.6, 4.2) if len(panels) == 1 else (3.7 * columns, 3.0 * height + 0.5)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.06))
    grid = figure.subplots(height, columns, squeeze=False)
    for ax, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(ax, panel, lines, max_step)
    for ax in grid.flat[len(panels) :]:
        ax.remove()
    letters = int(size[0] / _CHARACTER) - 12  # beside a piece of line
    handles = [_handle(line, textwrap.fill(text, letters)) for line, text in _legend(lines, runs, published)]
    longest = max(len(handle.get_label()) for handle in handles)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), max(columns, 2), max(1, (letters + 12) // (longest + 8))),
        title=textwrap.fill(_reading(runs, published, by_range), letters + 10) or None,
    )
    return figure


def _reading(runs: Groups, published: Groups, by_range: bool) -> str:
    """Say what lines and shades are, where there is more than one seed."""
    ours, everything = [len(c) for c in runs.values()], [len(c) for c in (*runs.values(), *published.values())]
    if max(everything) == 1:
        return ""
    text = "mean of seeds" + " (thin: each)" * (max(ours) > 1)
    shaded = "lowest to highest seed" if by_range else "95% confidence interval"
    return text + f", shaded: {shaded}" * (max(everything) >= FEWEST_SEEDS)


def _lines(runs: Groups, published: Groups) -> dict[tuple[bool, str], _Line]:
    """Choose a line for each method, by (ours, label)."""
    ours, theirs = (sorted({label for _, label in groups}) for groups in (runs, published))
    found = {}
    for i, label in enumerate(ours):
        found[True, label] = _Line(_OURS[i % len(_OURS)], _DASHES[i // len(_OURS) % len(_DASHES)], 2.4, 0.15)
    places = {m: i for i, m in enumerate(_METHODS) if m in theirs}
    free = (i for i in itertools.count() if i not in places.values())
    places |= dict(zip([m for m in theirs if m not in places], free, strict=False))
    shade = max(0.08, 0.24 / max(len(theirs), 1))  # many bands over each other stay light
    for label, i in places.items():
        turn, colour = divmod(i, len(_PUBLISHED))
        found[False, label] = _Line(_PUBLISHED[colour], _DASHES[(colour + turn) % len(_DASHES)], 1.5, shade)
    return found


def _means(methods: Mapping[str, Sequence[Curve]], by_range: bool) -> dict[str, Band]:
    return {label: mean_over_seeds(curves, by_range) for label, curves in methods.items()}


def _iqms(runs: Groups, published: Groups, tasks: Sequence[str]) -> tuple[dict[str, Band], dict[str, Band]] | None:
    """Return IQMs of the methods that have all tasks; a warning names what is left out and why."""
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
    from matplotlib.ticker import MaxNLocator

    end, linear = x_axis(list(panel.ours.values()), list(panel.theirs.values()))
    if max_step is not None:
        end, linear = max_step, None
    heights: list[float] = []
    edges: list[float] = []
    for mine, bands in ((False, panel.theirs), (True, panel.ours)):
        for label, band in bands.items():
            # A line from 0 to the first published point would cross steps of which nothing is known.
            start = 0 if mine or linear is None else linear
            heights += _seen(band.steps, band.centre, start, end)
            if mine and band.low is not None and band.high is not None:
                edges += [*_seen(band.steps, band.low, start, end), *_seen(band.steps, band.high, start, end)]
            _curve(ax, band, start, end, lines[mine, label], label, mine)
    for label, curves in panel.seeds.items():
        if len(curves) > 1:
            heights += [y for c in curves for y in _seen(c.steps, c.returns, 0, end)]
            _each(ax, curves, lines[True, label])
    if linear is None:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=True))
        ax.set_xlabel("environment steps")
    else:
        ax.set_xscale("symlog", linthresh=linear)
        ax.set_xticks([0, *(10.0**k for k in range(round(math.log10(linear)), math.ceil(math.log10(end))))])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("environment steps (log scale)")
    ax.xaxis.set_major_formatter(lambda x, _: format_step(x))
    letters = int(0.7 * ax.figure.get_figwidth() / ax.get_gridspec().ncols / _CHARACTER)  # larger ones, over the axes
    ax.set(title=textwrap.fill(panel.title, letters), ylabel=panel.ylabel, xlim=(-0.02 * (linear or end), 1.02 * end))
    ax.set_ylim(y_limits(heights, edges, panel.full))
    if max(map(abs, ax.get_ylim())) >= _LARGE:
        ax.yaxis.set_major_formatter(lambda y, _: format_step(y))


def _seen(steps: Floats, values: Floats, start: float, end: float) -> list[float]:
    """Return the values of a curve from `start` to `end`."""
    import numpy as np

    inside = (steps >= start) & (steps <= end)
    cut = [float(np.interp(end, steps, values))] if steps[0] <= end else []
    return [*values[inside].tolist(), *cut]


def _curve(ax: Any, band: Band, start: float, end: float, line: _Line, label: str, mine: bool) -> None:
    """Draw a band from `start` on."""
    shown = band.steps >= start
    steps = band.steps[shown]
    marker = "o" if mine and (steps <= end).sum() <= _MOST_MARKERS else ""
    look = dict(line.look, marker=marker, markersize=2.2 * line.width, zorder=4 + mine)
    ax.plot(steps, band.centre[shown], label=label, **look)
    if band.low is not None and band.high is not None:
        shade = dict(color=line.colour, alpha=line.shade, linewidth=0, zorder=2 + mine)
        ax.fill_between(steps, band.low[shown], band.high[shown], **shade)


def _each(ax: Any, curves: Sequence[Curve], line: _Line) -> None:
    """Draw the seeds that a mean is of, thin."""
    import numpy as np
    from matplotlib.collections import LineCollection

    paths = [np.stack([c.steps, c.returns], -1) for c in curves]
    ax.add_collection(LineCollection(paths, colors=line.colour, linewidths=0.8, alpha=0.6, zorder=4), autolim=False)


def y_limits(heights: Sequence[float], edges: Sequence[float], full: float | None) -> tuple[float, float]:
    """Return the lower and upper end of a panel's axis, which shows curves, and bands as far as curves stay legible.

    Args:
        heights: of the curves; with none, nothing but the axes is seen.
        edges: of the bands.
        full: the highest value possible, where 0 is the lowest; None where neither is known.
    """
    low, high = (min(heights), max(heights)) if heights else (0.0, 0.0)
    if full is not None:
        low, high = 0.0, max(high, 0.02 * full)
    size = high - low or 2 * max(0.05 * abs(high), 1.0)
    if full is not None:
        top = min(max(1.25 * high, min(max(edges, default=0.0), high / _LEAST_SHARE)), full)
        return -0.02 * top, 1.04 * top
    middle, reach, room = (low + high) / 2, 0.5 * size / _LEAST_SHARE, 0.1 * size
    bottom, top = min([low, *edges]) - room, max([high, *edges]) + room
    return max(bottom, middle - reach), min(top, middle + reach)


def x_axis(ours: Sequence[Band], theirs: Sequence[Band]) -> tuple[float, float | None]:
    """Return the right end of a panel's axis in environment steps, and up to where it is linear; None: all of it.

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
    """Write a number of steps as 0, 250k or 1.5M."""
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

    return Line2D([], [], label=text, **line.look)
