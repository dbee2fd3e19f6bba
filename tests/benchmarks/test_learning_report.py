"""The page that puts learning runs beside published ones."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from bench_rows import row
from conftest import ROOT

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
from tdmpc2_fast import Config
from tdmpc2_fast.benchmarks import report as bench_report
from tdmpc2_fast.benchmarks.learning import report, runs

RESULTS = ROOT / "benchmarks" / "results" / "learning"
SITTING = dict(commit="abc", gpu="", cpu="A CPU", threads=1, torch_version="2.13.0", seconds=1800)
SITTING |= dict(began=0, decisions=25_000)


def a_run(folder: Path, run: runs.Run, *points: tuple[int, float], finished: bool = True) -> None:
    """A run's files, as its sittings leave them."""
    folder = folder / run.name
    folder.mkdir(parents=True)
    config = Config.from_dict(run.values()).to_dict() | dict(work_dir="/home/somebody/x")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "eval.csv").write_text("step,reward,seed\n" + "".join(f"{s},{y},{run.seed}\n" for s, y in points))
    episodes = "".join(f"{2 * n},{n},{n / 10}\n" for n in (500, 5000, 5500, 9500, 10_500))
    (folder / "train.csv").write_text(f"step,decisions,episode_reward\n{episodes}")
    sittings = [SITTING, SITTING | dict(commit="def")]
    (folder / "about.json").write_text(json.dumps(dict(finished=finished, sittings=sittings)))


def published(folder: Path, task: str, *ends: float, column: str = "reward") -> None:
    for method in ("tdmpc2", "sac", "tdmpc2-pixels"):
        file = folder / method / f"{task}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{s},{y * (s > 0)},{n}" for n, y in enumerate(ends) for s in (0, 100_000, 300_000)]
        file.write_text("\n".join([f"step,{column},seed", *lines]) + "\n")


def test_the_page_says_where_runs_end_beside_published_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken, results, docs, reference = (tmp_path / n for n in ("runs", "results", "docs", "reference"))
    docs.mkdir()
    by_name = {r.name: r for r in runs.RUNS}
    a_run(taken, by_name["walker-walk-5m-bfloat16-seed1"], (0, 20), (20_000, 60), (100_000, 955))
    a_run(taken, by_name["walker-walk-5m-float32-seed1-10k"], (0, 21), (20_000, 70))
    a_run(taken, by_name["walker-walk-5m-official-seed1-10k"], (0, 22), (20_000, 80))
    a_run(taken, by_name["cheetah-run-5m-bfloat16-seed1"], (0, 1), (50_000, 300), finished=False)
    a_run(taken, by_name["mw-plate-slide-5m-bfloat16-seed1"], (0, 3), (100_000, 800))
    (taken / "mw-plate-slide-5m-bfloat16-seed1" / "success.csv").write_text("step,reward,seed\n0,0,1\n100000,0.7,1\n")
    published(reference, "walker-walk", 950, 960, 970)
    published(reference, "cheetah-run", 400, 500, 600)
    published(reference, "mw-plate-slide", 1, 1, 1, column="success")
    words = [f"take={taken}", f"results={results}", f"docs={docs}", f"reference={reference}"]
    assert report.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(docs / "results.md")
    text = (docs / "results.md").read_text()
    lines = text.splitlines()
    assert "| walker-walk | 955 at 100,000 | 960 (950, 960, 970) | inside | 1.0 |  |" in lines
    assert "| cheetah-run | 300 at 50,000 |  | not that far | 1.0 so far, 25,000 of 50,000 decisions |  |" in lines
    assert "make learning RUNS=walker-walk       # 1.0 hours: A CPU, 1 thread; torch 2.13.0; commit abc, def" in lines
    assert "| mw-plate-slide, success | 0.7 at 100,000 | 1 (1, 1, 1) | below | 1.0 |  |" in lines
    assert "- walker-walk-5m-bfloat16-seed1: A CPU, 1 thread; torch 2.13.0; commit abc, def" in lines
    head = lines.index("| walker-walk, seed 1 | 0 steps | 20,000 steps | training, 5,000 to 10,000 decisions |")
    assert lines[head + 2 : head + 5] == [
        "| bfloat16 | 20 | 60 | 750, 2 episodes |",
        "| float32 | 21 | 70 | 750, 2 episodes |",
        "| official | 22 | 80 | 750, 2 episodes |",
    ]
    assert "somebody" not in "".join(p.read_text() for p in results.rglob("*.json"))
    assert {p.name for p in docs.iterdir()} == {"results.md", "results.png", "results-first.png"}
    # Without the curves, and with what a person found, and with a speed.
    (results / "findings.md").write_text("## What was found\n\nNothing.\n")
    rows = [row(suite="loop", variant="official", ratio=4.5, ratio_p20=4.25, ratio_p80=5.0)]
    bench_report.write(results / "walker-walk-5m-bfloat16-seed1" / "a-cpu.json", rows)
    pictures = {p.name: p.read_bytes() for p in docs.glob("*.png")}
    assert report.main(words[1:3]) == 0
    assert pictures == {p.name: p.read_bytes() for p in docs.glob("*.png")}
    changed = (docs / "results.md").read_text()
    assert "## What was found\n\nNothing.\n" in changed
    assert "| walker-walk | 955 at 100,000 | 960 (950, 960, 970) | inside | 1.0 | 4.50x (4.25, 5) |" in changed


@pytest.mark.parametrize(
    ("value", "found"),
    [(950, "inside"), (900, "inside, widened"), (853, "below"), (1067, "above"), (855, "inside, widened")],
)
def test_verdicts(value: float, found: str) -> None:
    assert report.verdict(value, [950, 960, 970]) == found


def test_without_a_run_or_with_bad_words_the_command_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([f"results={tmp_path}"]) == 2
    assert "no run of the list, allowed: a folder with some, or take=FOLDER" in capsys.readouterr().err
    assert report.main(["runs=x"]) == 2
    assert "argument 'runs=x': allowed: reference=FOLDER" in capsys.readouterr().err
    assert report.main([f"results={tmp_path}", f"take={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere': no run of the list" in capsys.readouterr().err


def test_what_is_missing_or_made_otherwise_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, run = tmp_path / "results", runs.RUNS[0]
    a_run(results, run, (0, 20), (100_000, 955))
    words = [f"results={results}", f"docs={tmp_path}"]
    assert report.main(words) == 2
    assert "published.json: got FileNotFoundError" in capsys.readouterr().err
    published(tmp_path / "reference" / "x", "dog-run", 1)
    assert report.main([*words, f"reference={tmp_path / 'reference' / 'x' / 'sac'}"]) == 2
    assert "no curve of tdmpc2, allowed: with tdmpc2/TASK.csv" in capsys.readouterr().err
    (results / "published.json").write_text("{}")
    config = results / run.name / "config.json"
    whole = config.read_text()
    config.write_text(json.dumps(json.loads(whole) | dict(batch_size=8)))
    assert report.main(words) == 2
    assert "made with other keys: batch_size is 8 in it and 256 here" in capsys.readouterr().err
    config.write_text(whole)
    assert report.main(words) == 0
    assert "| walker-walk | 955 at 100,000 |  | nothing published | 1.0 |  |" in (tmp_path / "results.md").read_text()
    (results / run.name / "about.json").unlink()
    assert report.main(words) == 2
    assert "no sitting in about.json" in capsys.readouterr().err


def test_a_damaged_file_of_training_episodes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, alike = tmp_path / "results", [r for r in runs.RUNS if r.task == "walker-walk"]
    for run in alike:
        a_run(results, run, (0, 20), (20_000, 60))
    (results / "published.json").write_text("{}")
    damaged = results / alike[0].name / "train.csv"
    damaged.write_text("step,decisions\n1000,500\n")
    assert report.main([f"results={results}", f"docs={tmp_path}"]) == 2
    assert f"{damaged}: got KeyError ('episode_reward')" in capsys.readouterr().err


def test_runs_in_float32_stand_for_those_of_the_list(tmp_path: Path) -> None:
    results = tmp_path / "results"
    a_run(results, dataclasses.replace(runs.RUNS[2], precision="float32"), (0, 0), (100_000, 970))
    (results / "published.json").write_text("{}")
    assert report.main([f"results={results}", f"docs={tmp_path}"]) == 0
    assert "| cup-catch, float32 | 970 at 100,000 |" in (tmp_path / "results.md").read_text()


def test_the_projects_page_is_made_from_its_files(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    assert report.main([f"results={tmp_path / 'results'}", f"docs={tmp_path}"]) == 0
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()
