"""Pictures of learning curves: what is in them, and that they stay as they are."""

from __future__ import annotations

import logging
import math
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from curve_files import csv_file, run

from tdmpc2_fast.errors import ConfigError, InputError
from tdmpc2_fast.train.pictures.curves import (
    Band,
    find_runs,
    group,
    read_curves,
    read_reference,
)

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import FillBetweenPolyCollection, LineCollection

from tdmpc2_fast.train.pictures.plots import _STYLE, draw, format_step, plot_runs, x_axis, y_limits


class TestPictures:
    def several(self, root: Path, tasks: Sequence[str] = ("cheetah-run", "walker-walk"), seeds: int = 3) -> Path:
        for task in tasks:
            for seed in range(1, seeds + 1):
                run(root / "runs", task, "default", seed, (0, 0), (50_000, 200.0 + seed), (100_000, 400 + 10 * seed))
        return root / "runs"

    def published(self, root: Path, tasks: Sequence[str] = ("cheetah-run", "walker-walk")) -> Path:
        for task in tasks:
            rows = [(100_000 * i, 300 + 5 * i + seed, seed) for seed in (1, 2, 3) for i in range(41)]
            csv_file(root / "reference/tdmpc2" / f"{task}.csv", *rows)
        return root / "reference"

    def figure(self, runs: Path, reference: Path | None = None, **keys: Any) -> Any:
        ours = group(c for f in find_runs([runs]) for c in read_curves(f))
        theirs = group(read_reference(reference, sorted({t for t, _ in ours}))) if reference else {}
        return draw(ours, theirs, **keys)

    def test_where_they_go(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        runs = self.several(tmp_path)
        one = runs / "cheetah-run/default/1"
        assert plot_runs([one]) == [one / "curve.png", one / "curve.svg"]
        assert plot_runs([runs]) == [Path("curves.png"), Path("curves.svg")]
        out = tmp_path / "new/a.svg"
        assert plot_runs(str(one), out=str(out)) == [out]
        assert sorted(p.name for p in tmp_path.rglob("*.??g")) == [
            *("a.svg", "curve.png", "curve.svg", "curves.png", "curves.svg"),
        ]
        before = out.read_bytes()
        plot_runs([runs], out=out)  # what is named is written
        assert out.read_bytes() != before
        with pytest.raises(InputError, match=r"\.png or \.svg"):
            plot_runs([one], out=tmp_path / "a.pdf")
        with pytest.raises(InputError, match="max_step"):
            plot_runs([one], max_step=0)

    @pytest.mark.parametrize("package", ["matplotlib", "scipy.stats"])
    def test_what_is_missing_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=rf"plots need {package}; pip install 'tdmpc2-fast\[train\]'"):
            plot_runs([self.several(tmp_path)], tmp_path / "a.png")

    def test_png_has_the_size_of_its_grid(self, tmp_path: Path) -> None:
        def size(*names: str) -> tuple[int, int]:
            (path,) = plot_runs([self.several(tmp_path / "-".join(names), names)], out=tmp_path / "a.png")
            head = path.read_bytes()[:24]
            assert head[:8] == b"\x89PNG\r\n\x1a\n"
            width, height = struct.unpack(">II", head[16:])
            return width, height

        assert size("cheetah-run") == (896, 672)
        # with the panel of their IQM, three and then four panels: two rows of three
        assert size("cheetah-run", "walker-walk") == (1776, 560)
        assert size("cheetah-run", "walker-walk", "dog-run") == (1776, 1040)

    def test_svg_has_words_and_the_same_bytes_every_time(self, tmp_path: Path) -> None:
        runs, reference = self.several(tmp_path), self.published(tmp_path)
        run(runs, "cheetah-run", "ablation", 1, (0, 1), (90_000, 300))
        first, second = (plot_runs([runs], tmp_path / f"{n}.svg", reference)[0] for n in "ab")
        assert first.read_bytes() == second.read_bytes()
        texts = {"".join(e.itertext()) for e in ElementTree.parse(first).iter() if e.tag.endswith("}text")}
        assert texts >= {
            *("cheetah-run", "walker-walk", "IQM of 2 tasks", "episode return", "return / 1000", "environment steps"),
            *("default (3 seeds)", "tdmpc2 (3 seeds)", "ablation (1 seed, no band)", "0", "50k", "100k"),
        }

    def test_nothing_global_is_left_behind(self, tmp_path: Path) -> None:
        code = f"""
import sys, matplotlib
from pathlib import Path
from tdmpc2_fast.train.pictures.plots import plot_runs
assert not {{"scipy", "matplotlib.figure"}} & set(sys.modules)
matplotlib.rcParams["axes.facecolor"] = "red"
settings = lambda: {{k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}}
before = settings()
plot_runs([Path({str(self.several(tmp_path))!r})], Path({str(tmp_path / "b.svg")!r}))
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
print("fine")
"""
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "fine", done.stderr
        # nor does a reader's own style change the picture
        plot_runs([tmp_path / "runs"], tmp_path / "a.svg")
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()

    def test_lines_and_bands_are_the_statistics(self, tmp_path: Path) -> None:
        figure = self.figure(self.several(tmp_path), self.published(tmp_path))
        assert [ax.get_title() for ax in figure.axes] == ["cheetah-run", "walker-walk", "IQM of 2 tasks"]
        for ax, scale in zip(figure.axes, (1, 1, 1000), strict=True):
            theirs, ours = ax.lines
            assert (theirs.get_label(), ours.get_label()) == ("tdmpc2", "default")
            assert ours.get_xdata().tolist() == [0, 50_000, 100_000]
            assert ours.get_ydata() == pytest.approx(np.array([0, 202, 420]) / scale)
            bands = [c for c in ax.collections if isinstance(c, FillBetweenPolyCollection)]
            assert len(bands) == 2
            assert ax.get_xlim()[1] == pytest.approx(1.02 * 150_000)
        # Student's t of 410, 420, 430
        ends = figure.axes[0].collections[1].get_paths()[0].vertices[:, 1]
        assert (ends.min(), ends.max()) == pytest.approx((0, 420 + 4.3027 * 10 / math.sqrt(3)), rel=1e-4)

    def test_bands_of_a_range_reach_from_seed_to_seed(self, tmp_path: Path) -> None:
        figure = self.figure(self.several(tmp_path), self.published(tmp_path), by_range=True)
        ax = figure.axes[0]
        assert len(figure.axes) == 2  # and no IQM
        theirs = next(c for c in ax.collections if isinstance(c, FillBetweenPolyCollection))
        ends = theirs.get_paths()[0].vertices
        assert sorted({float(y) for x, y in ends if x == 100_000}) == [306.0, 308.0]
        assert "shaded: lowest to highest seed" in figure.legends[0].get_title().get_text()

    def test_success_is_drawn_where_it_is_what_was_published(self, tmp_path: Path) -> None:
        folder = run(tmp_path / "runs", "mw-reach", "default", 1, (0, 90), (100_000, 800))
        csv_file(folder / "success.csv", (0, 0, 1), (100_000, 0.8, 1))
        other = run(tmp_path / "runs", "cheetah-run", "default", 1, (0, 5), (100_000, 400))
        published = tmp_path / "reference" / "tdmpc2" / "mw-reach.csv"
        published.parent.mkdir(parents=True)
        published.write_text("step,success,seed\n0,0.0,3\n100000,0.9,3\n")
        csv_file(published.with_name("cheetah-run.csv"), (0, 1, 1), (100_000, 420, 1))
        drawn: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tdmpc2_fast.train.pictures.plots.write", lambda make, targets: drawn.append(make()))
            plot_runs([folder, other], tmp_path / "x.png", tmp_path / "reference")
        cheetah, reach = drawn[0].axes
        assert (cheetah.get_ylabel(), reach.get_ylabel()) == ("episode return", "success rate")
        assert reach.get_ylim()[1] <= 1.05
        heights = {line.get_label(): [float(y) for y in line.get_ydata()] for line in reach.lines}
        assert heights["default"] == [0, 0.8]
        assert heights["tdmpc2"] == [0, 0.9]
        returns = csv_file(tmp_path / "mine" / "mw-reach.csv", (0, 90, 1))
        with pytest.raises(InputError, match="mw-reach: mine has returns and tdmpc2 success, allowed: one of both"):
            plot_runs([returns], tmp_path / "x.png", tmp_path / "reference")

    def test_every_seed_is_drawn_and_a_wide_band_leaves_them_room(self, tmp_path: Path) -> None:
        for seed, end in enumerate((-1400, -900, -150)):
            run(tmp_path / "runs", "Pendulum-v1", "default", seed, (0, -1500), (20_000, end))
        (ax,) = self.figure(tmp_path / "runs").axes
        band, each = ax.collections
        assert isinstance(each, LineCollection)
        assert [path.vertices[-1, 1] for path in each.get_paths()] == [-1400, -900, -150]
        low, high = ax.get_ylim()
        ends = band.get_paths()[0].vertices[:, 1]
        assert low < ends.min() < ends.max() < high  # its ends are seen
        assert 1350 / (high - low) > 0.35
        run(tmp_path / "one", "Pendulum-v1", "default", 1, (0, -1500), (20_000, -200))
        assert not self.figure(tmp_path / "one").axes[0].collections

    @pytest.mark.parametrize(
        ("heights", "edges", "full", "expected"),
        [
            ([0, 100], [], None, (-10, 110)),
            ([0, 100], [-40, 130], None, (-50, 140)),
            ([0, 100], [-9000, 9000], None, (-75, 175)),  # as far as the curves keep two fifths
            ([5], [], None, (4.8, 5.2)),
            ([3e6, 3e6], [], None, (2.97e6, 3.03e6)),
            ([], [], None, (-0.2, 0.2)),
            ([0, 400], [], 1000, (-10, 520)),
            ([0, 400], [-300, 700], 1000, (-14, 728)),
            ([0, 800], [-900, 1900], 1000, (-20, 1040)),  # nothing is above the highest return
            ([1000], [], 1000, (-20, 1040)),  # and a line there is whole
        ],
    )
    def test_how_high_the_axis_goes(
        self, heights: list[float], edges: list[float], full: float | None, expected: tuple[float, float]
    ) -> None:
        assert y_limits(heights, edges, full) == pytest.approx(expected)

    @pytest.mark.parametrize("count", [1, 3])
    def test_long_names_stay_inside_the_picture(self, tmp_path: Path, count: int) -> None:
        for n in range(count):
            name = f"my.own_package.environments:AVeryLongNameOfATask-With-Words-v{n}"
            run(tmp_path, name, "an_experiment-lr_0.0003-batch_size_512-model_size_5-and_more", 1, (0, 0), (9, 3))
        with rc_context(_STYLE):
            figure = self.figure(tmp_path)
            FigureCanvasAgg(figure).draw()
        width, height = figure.canvas.get_width_height()
        for text in (*(ax.title for ax in figure.axes), *figure.legends[0].get_texts()):
            box = text.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= width
            assert 0 <= box.y0 < box.y1 <= height

    def test_where_nothing_is_seen(self, tmp_path: Path) -> None:
        run(tmp_path, "Reacher-v5", "default", 1, (500, -9), (1000, -8))
        (ax,) = self.figure(tmp_path, max_step=100).axes
        assert ax.get_xlim()[1] == pytest.approx(102)

    def test_a_run_that_ends_before_the_first_published_point(self, tmp_path: Path) -> None:
        run(tmp_path / "runs", "cheetah-run", "quick", 1, (0, 4), (7000, 60))
        figure = self.figure(tmp_path / "runs", self.published(tmp_path))
        (ax,) = figure.axes
        theirs, ours = ax.lines
        assert (ours.get_xdata().tolist(), ours.get_marker()) == ([0, 7000], "o")
        assert theirs.get_xdata()[0] == 100_000  # nothing is drawn across what was not measured
        assert (ax.get_xscale(), ax.get_xlabel()) == ("symlog", "environment steps (log scale)")
        figure.canvas.draw()
        assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1k", "10k", "100k", "1M"]
        left, right = (ax.transData.transform((x, 0))[0] for x in (0, 7000))
        assert right - left > 0.3 * ax.bbox.width  # legible
        (ax,) = self.figure(tmp_path / "runs", self.published(tmp_path), max_step=300_000).axes
        assert (ax.get_xscale(), ax.get_xlim()[1]) == ("linear", pytest.approx(306_000))

    @pytest.mark.parametrize(
        ("ours", "theirs", "expected"),
        [
            ([0, 500], [], (500, None)),
            ([0], [], (1, None)),
            ([0], [0, 100, 4000], (4000, None)),
            ([0, 70], [0, 100, 4000], (4000, 10)),
            ([0, 100], [0, 100, 4000], (150, None)),
            ([0, 4000], [0, 100, 4000], (4000, None)),
            ([0, 9000], [0, 100, 4000], (9000, None)),
        ],
    )
    def test_how_far_the_axis_goes(self, ours: list[float], theirs: list[float], expected: tuple[float, None]) -> None:
        bands = [[Band(np.array(s, float), np.zeros(len(s)), None, None)] if s else [] for s in (ours, theirs)]
        assert x_axis(*bands) == expected

    def test_what_cannot_be_compared_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        runs = self.several(tmp_path)
        run(runs, "cheetah-run", "ablation", 1, (0, 1), (90_000, 300))
        reference = self.published(tmp_path, ["cheetah-run"])
        figure = self.figure(runs, reference)
        assert [line.get_label() for line in figure.axes[2].lines] == ["default"]
        assert "ablation is not in the IQM over tasks: it has no curve of walker-walk" in caplog.messages
        assert "tdmpc2 is not in the IQM over tasks: it has no curve of walker-walk" in caplog.messages
        caplog.clear()
        run(runs, "Hopper-v5", "default", 1, (0, 1), (90_000, 3000))
        run(runs, "cheetah-run", "ablation", 2, (0, 1), (9_000, 300))
        with caplog.at_level(logging.WARNING):
            plot_runs([runs], tmp_path / "a.png")
        assert "no IQM over tasks: no known scale of returns for Hopper-v5" in caplog.messages
        assert "ablation of cheetah-run ends at 9k, where seed 2 ends; others go on to 90k" in caplog.messages

    def test_a_set_of_tasks_is_drawn_with_each_of_them(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for seed in (1, 2):
            run(tmp_path, "two", "default", seed)
            head = "step,reward,seed,normalized_score,return+cup-catch,return+dog-run\n"
            (tmp_path / f"two/default/{seed}/eval.csv").write_text(f"{head}0,10,{seed},1,20,0\n20,30,{seed},3,50,10\n")
        run(tmp_path, "dog-run", "default", 1, (0, 5), (20, 7))
        runs = group(c for f in find_runs([tmp_path]) for c in read_curves(f))
        panels = draw(runs, {}).axes
        assert [ax.get_title() for ax in panels] == ["two", "cup-catch", "dog-run", "IQM of 2 tasks"]
        assert [ax.get_ylabel() for ax in panels][:2] == ["normalised score", "episode return"]
        assert "default is not in the IQM over tasks: it has no curve of cup-catch" in caplog.text
        caplog.clear()
        mixed = {
            ("x", "default"): runs["two", "default"],
            ("mw-reach", "default of x"): runs["dog-run", "default of two"],
        }
        mixed |= {("cup-catch", "default of x"): runs["cup-catch", "default of two"]}
        assert [ax.get_title() for ax in draw(mixed, {}).axes] == ["x", "cup-catch", "mw-reach"]
        assert not caplog.text

    def test_methods_look_the_same_whatever_is_beside_them(self, tmp_path: Path) -> None:
        runs, reference = self.several(tmp_path, ["cheetah-run"]), self.published(tmp_path)

        def looks() -> dict[str, SimpleNamespace]:
            lines = self.figure(runs, reference).axes[0].lines
            return {x.get_label(): SimpleNamespace(c=x.get_color(), dash=x._dash_pattern) for x in lines}

        alone = looks()
        for method in ("another", "sac", "zero", "a", "b", "c"):
            csv_file(reference / method / "cheetah-run.csv", (0, 0, 1), (100_000, 300, 1))
        among = looks()
        assert {k: among[k] for k in alone} == alone
        assert len({(x.c, str(x.dash)) for x in among.values()}) == len(among) == 8

    @pytest.mark.parametrize(
        ("step", "text"), [(0, "0"), (500, "500"), (7000, "7k"), (250_000, "250k"), (1e6, "1M"), (1.5e6, "1.5M")]
    )
    def test_steps_as_people_write_them(self, step: float, text: str) -> None:
        assert format_step(step) == text
