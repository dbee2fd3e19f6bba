"""What is made of results files: tables, pages, pictures, comparisons."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from bench_rows import row, slower
from conftest import ROOT

from tdmpc2_fast.benchmarks import compare, report
from tdmpc2_fast.benchmarks.harness.measure import Row
from tdmpc2_fast.benchmarks.suites import ceilings

RESULTS = ROOT / "benchmarks" / "results"


def test_only_what_is_beyond_noise_counts_as_a_change() -> None:
    def real(new: Row, old: Row | None = None) -> list[float]:
        return [c.factor for c in compare.compare([old or row()], [new]) if c.real]

    assert real(row()) == []
    assert real(slower(1.02)) == []
    assert real(slower(1.2)) == [pytest.approx(1.2)]
    assert real(slower(0.8)) == [pytest.approx(0.8)]
    noisy = dict(p20=60.0, p80=140.0)
    assert real(row(p50=115.0, **noisy), row(**noisy)) == []
    assert real(slower(1.5, envs=4)) == []


def test_different_machines_are_compared_by_ratios() -> None:
    def pair(ratio: float, **where: Any) -> list[Row]:
        rows = [slower(5.0, **where), slower(5.0 * ratio, variant="reference", **where)]
        spread = dict(ratio=ratio, ratio_p20=ratio * 0.99, ratio_p80=ratio * 1.01)
        return [rows[0], dataclasses.replace(rows[1], **spread)]

    here, there = pair(2.0), pair(1.5, cpu="another")
    (change,) = compare.compare(here, there)
    assert change.real
    assert change.factor == pytest.approx(2 / 1.5)
    assert "torch against reference: 1.33x slower" in compare.describe(change)
    assert not any(c.real for c in compare.compare(here, pair(2.01, cpu="another")))
    (change,) = compare.compare(here, pair(1.5), by_ratios=True)
    assert change.factor == pytest.approx(2 / 1.5)


def test_compare_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (tmp_path / f"{x}.json" for x in "abc")
    report.write(a, [row()])
    report.write(b, [slower(1.5)])
    assert compare.main([str(a), str(a)]) == 0
    assert compare.main([str(a), str(b)]) == 1
    assert "plan, 5M, torch: 1.50x slower" in capsys.readouterr().out
    assert compare.main([str(b), str(a)]) == 0
    c.write_text("{}")
    assert compare.main([str(a), str(c)]) == 2
    c.write_text(json.dumps([{"schema": 99}]))
    assert compare.main([str(a), str(c)]) == 2
    assert "schema [99], allowed: 1" in capsys.readouterr().err
    assert compare.main([str(a)]) == 2


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    rows = [row(), slower(2.0, split={"plan": 1.5}, samples=[1.0, 2.0])]
    report.write(path, rows)
    assert report.read(path) == rows
    assert len(path.read_text().splitlines()) == 4


def test_pages_are_made_from_the_committed_files() -> None:
    files = sorted(RESULTS.glob("*.json"))
    assert files
    assert (ROOT / "benchmarks" / "RESULTS.md").read_text() == report.results_page(files)
    readme, shown = (ROOT / "README.md").read_text(), report.shown_in_readme(files)
    assert shown
    assert report.with_table(readme, report.readme_tables(shown)) == readme
    with pytest.raises(ValueError, match="got 0 tables"):
        report.with_table("no marks", "table")


def test_the_readme_shows_a_gpu_before_a_newer_cpu(tmp_path: Path) -> None:
    for name, changes in {
        "old": dict(gpu="NVIDIA H100"),
        "new": dict(date="2027-01-01"),
        "newest": dict(suite="replay", date="2028-01-01"),
    }.items():
        report.write(tmp_path / f"{name}.json", [row(**changes)])
    files = list(tmp_path.glob("*.json"))
    assert [path.stem for path in report.shown_in_readme(files)] == ["old", "new"]
    assert report.shown_in_readme([tmp_path / "newest.json"]) == []
    assert report.results_page(files).index("newest.json") < report.results_page(files).index("old.json")


def test_ceilings_are_the_fastest_rounds() -> None:
    rows = [row(suite="ceilings", gflop=20.0, samples=[100.0, 50.0]), row(suite="ceilings", mbyte=8.0, samples=[4.0])]
    found = ceilings.reached([*rows, row(gflop=1e9, samples=[1.0])])
    assert found.tflops == {"float32": 0.4}
    assert found.gbs == 2.0


def test_a_picture_is_drawn_where_there_is_something_to_show(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tdmpc2_fast.benchmarks.plots import draw

    ratios = dict(variant="reference", ratio=2.0, ratio_p20=1.9, ratio_p80=2.1)
    rows = [slower(e**0.5, envs=e) for e in (1, 4, 16)] + [slower(2.0, **ratios)]
    rows += [row(suite="ceilings", mbyte=3000.0, samples=[100.0]), row(suite="ceilings", gflop=20.0, samples=[100.0])]
    rows += [row(tflops=0.1, gflop=40.0, mbyte=20.0)]
    assert draw(rows, tmp_path / "x.png") == str(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert "nothing in it" in draw([row(suite="replay")], tmp_path / "y.png")
