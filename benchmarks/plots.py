"""Pictures of a results file: latency against environments, ratio by size, roofline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .harness.measure import Row
from .suites.ceilings import reached


def draw(rows: Sequence[Row], path: Path) -> str:
    """Draw what the rows have to show; return where the picture is, or why there is none."""
    panels = [p for p in (_latency, _ratios, _roofline) if p(rows, None)]
    if not panels:
        return f"no picture of {path.stem}: nothing in it is drawn"
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no picture: matplotlib is missing (extra [bench]); `make results` draws it later from the results file"
    size = (6.2 * len(panels), 4.6)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for panel, ax in zip(panels, axes[0], strict=True):
        panel(rows, ax)
    r = rows[0]
    figure.suptitle(f"{r.label}; commit {r.commit or 'unknown'}, {r.date[:10]}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return str(path)


def _latency(rows: Sequence[Row], ax: Any) -> bool:
    """Draw the median plan against environments planned for, by implementation, size and precision."""
    plans = [(r, r.envs) for r in rows if r.suite == "planner" and r.p50 is not None and r.envs]
    envs = sorted({e for _, e in plans})
    if ax is None:
        return len(envs) > 1
    found: defaultdict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    for r, e in plans:
        parts = (r.variant, f"{r.size}M", r.precision if r.gpu else "", f"A={r.actions}" if r.actions != 6 else "")
        label = ", ".join(filter(None, parts))
        assert r.p20 is not None and r.p50 is not None and r.p80 is not None  # noqa: PT018
        found[label].append((e, r.calls * r.p50, r.calls * (r.p50 - r.p20), r.calls * (r.p80 - r.p50)))
    for label, points in found.items():
        x, y, below, above = zip(*sorted(points), strict=True)
        ax.errorbar(x, y, yerr=(below, above), marker="o", capsize=3, label=label)
    ax.set(xscale="log", yscale="log", xlabel="environments E", ylabel="ms, median, 20% to 80%")
    ax.set_title("latency of a plan for E environments")
    ax.set_xticks(envs, map(str, envs))
    ax.set_xticks([], minor=True)
    ax.legend(fontsize=7)
    ax.grid(alpha=0.3)
    return True


def _ratios(rows: Sequence[Row], ax: Any) -> bool:
    """Draw how many times longer each baseline takes, by model size, for one environment."""
    found = [r for r in rows if r.suite in ("planner", "update") and r.ratio is not None and r.envs in (None, 1)]
    found = [r for r in found if r.actions == 6 and r.size is not None]
    if ax is None or not found:
        return bool(found)
    sizes = sorted({r.size for r in found if r.size is not None})
    labels = list(dict.fromkeys(_label(r) for r in found))
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        mine = [r for r in found if _label(r) == label]
        x = [sizes.index(r.size) + (i - (len(labels) - 1) / 2) * width for r in mine if r.size is not None]
        heights = [r.ratio or 0 for r in mine]
        spread = [
            [max(0, (r.ratio or 0) - (r.ratio_p20 or 0)) for r in mine],
            [max(0, (r.ratio_p80 or 0) - (r.ratio or 0)) for r in mine],
        ]
        ax.bar(x, heights, width, yerr=spread, capsize=2, label=label)
    ax.axhline(1, color="black", linewidth=1)
    ax.set_xticks(range(len(sizes)), [f"{s}M" for s in sizes])
    ax.set(ylabel="time by the product's time", title="baselines, by model size, E = 1")
    ax.set_ylim(top=1.5 * ax.get_ylim()[1])  # room for the legend
    ax.legend(fontsize=7, ncols=2, loc="upper left")
    ax.grid(axis="y", alpha=0.3)
    return True


def _label(r: Row) -> str:
    batch = f", batch {r.batch}" if r.batch else ""
    return f"{r.case}{batch}: {r.variant}" + (f", {r.precision}" if r.gpu else "")


def _roofline(rows: Sequence[Row], ax: Any) -> bool:
    """Draw each product's TFLOP/s against its work per byte, under what the machine reached."""
    ceilings = reached(rows)
    found = [r for r in rows if r.tflops and r.mbyte and r.gflop and r.variant == r.product and r.suite != "ceilings"]
    if ax is None or not (ceilings.gbs and ceilings.tflops and found):
        return bool(ceilings.gbs and ceilings.tflops and found)
    import numpy as np

    intensity = [1e3 * (r.gflop or 0) / (r.mbyte or 1) for r in found]
    x = np.geomspace(min([1.0, *intensity]) / 2, max([1e4, *intensity]) * 2, 200)
    for precision, rate in ceilings.tflops.items():
        ax.plot(x, np.minimum(x * ceilings.gbs / 1e3, rate), label=f"reached here, {precision}", linewidth=1.5)
    for case in dict.fromkeys(r.case for r in found):
        points = [(i, r) for i, r in zip(intensity, found, strict=True) if r.case == case]
        ax.scatter([i for i, _ in points], [r.tflops for _, r in points], s=18, label=case)
        for i, r in points:
            ax.annotate(_point(r), (i, r.tflops), fontsize=6, xytext=(3, 3), textcoords="offset points")
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte needed", ylabel="TFLOP/s", title="roofline of the product")
    ax.legend(fontsize=6, loc="lower right")
    ax.grid(alpha=0.3)
    return True


def _point(r: Row) -> str:
    many = f"E={r.envs}" if r.envs and r.envs > 1 else ""
    return " ".join(p for p in (f"{r.size}M" if r.size else "", many, r.precision if r.gpu else "") if p)
