"""Learning curves: what is read, and the statistics against hand-made and rliable's numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from curve_files import csv_file, curve, run

from tdmpc2_fast.errors import InputError
from tdmpc2_fast.train.pictures.curves import (
    find_runs,
    group,
    iqm,
    iqm_interval,
    iqm_over_tasks,
    mean_over_seeds,
    of_success,
    read_curves,
    read_reference,
)

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")


class TestReading:
    def test_runs_by_folder_by_the_folder_above_and_by_file(self, tmp_path: Path) -> None:
        one = run(tmp_path, "cheetah-run", "quick", 1, (0, 5.5), (7000, 60))
        two = run(tmp_path, "walker-walk", "default", 2, (0, 20))
        published = csv_file(tmp_path / "sac/cheetah-run.csv", (0, 1, 3), (0, 2, 4), (100, 8, 3))
        assert find_runs([one]) == [one / "eval.csv"]
        # what is named twice is there once
        assert find_runs([tmp_path, two, one / "eval.csv"]) == [one / "eval.csv", two / "eval.csv"]
        (c,) = read_curves(one / "eval.csv")
        assert (c.label, c.task, c.seed, c.steps.tolist(), c.returns.tolist()) == (
            *("quick", "cheetah-run", 1),
            *([0, 7000], [5.5, 60]),
        )
        both = read_curves(published)
        assert [(c.label, c.task, c.seed, len(c.steps)) for c in both] == [
            ("sac", "cheetah-run", 3, 2),
            ("sac", "cheetah-run", 4, 1),
        ]

    def test_steps_are_put_in_order_and_the_row_written_last_counts(self, tmp_path: Path) -> None:
        folder = run(tmp_path, "cheetah-run", "quick", 1, (0, 1), (20, 3), (10, 2), (20, 4))
        (c,) = read_curves(folder / "eval.csv")
        assert (c.steps.tolist(), c.returns.tolist()) == ([0, 10, 20], [1, 2, 4])

    def test_a_run_of_several_tasks_has_a_score_and_a_curve_of_each(self, tmp_path: Path) -> None:
        folder = run(tmp_path, "two", "default", 1)
        head = "step,reward,seed,normalized_score,return+cup-catch,success+cup-catch,return+dog-run\n"
        (folder / "eval.csv").write_text(f"{head}0,10,1,1,20,0,0\n20,30,1,3,50,0,10\n")
        found = read_curves(folder / "eval.csv")
        assert [(c.label, c.task, c.scored, c.steps.tolist(), c.returns.tolist()) for c in found] == [
            ("default", "two", True, [0, 20], [1, 3]),
            ("default of two", "cup-catch", False, [0, 20], [20, 50]),
            ("default of two", "dog-run", False, [0, 20], [0, 10]),
        ]
        (folder / "eval.csv").write_text(f"{head}0,10,1,,20,0,0\n20,30,1,,50,0,10\n")
        whole = read_curves(folder / "eval.csv")[0]
        assert (whole.task, whole.scored, whole.returns.tolist()) == ("two", False, [10, 30])
        (folder / "eval.csv").write_text(f"{head}0,10,1,x,20,0,0\n")
        with pytest.raises(InputError, match="line 2: got normalized_score=x"):
            read_curves(folder / "eval.csv")

    def test_where_success_is_published_a_run_has_a_curve_of_it(self, tmp_path: Path) -> None:
        published = tmp_path / "sac/mw-reach.csv"
        published.parent.mkdir()
        published.write_text("step,success,seed\n0,0.0,3\n100000,0.9,3\n")
        (c,) = read_curves(published)
        assert (c.success, c.returns.tolist()) == (True, [0, 0.9])
        with_both = tmp_path / "both.csv"
        with_both.write_text("step,reward,success,seed\n0,7,1,3\n")
        assert [(c.success, c.returns.tolist()) for c in read_curves(with_both)] == [(False, [7])]
        folder = run(tmp_path, "mw-reach", "quick", 1, (0, 100), (2000, 150))
        (none,) = of_success(folder / "eval.csv")
        assert (none.label, none.task, none.success) == ("quick", "mw-reach", True)
        assert (none.steps.tolist(), none.returns.tolist()) == ([0, 2000], [0, 0])
        csv_file(folder / "success.csv", (0, 0, 1), (2000, 0.3, 1))
        (some,) = of_success(folder / "eval.csv")
        (folder / "success.csv").unlink()
        (folder / "train.csv").write_text("step,episode_success\n100,0.0\n200,1.0\n")
        assert of_success(folder / "eval.csv") == []
        several = run(tmp_path, "two", "default", 1)
        (several / "eval.csv").write_text(
            "step,reward,seed,return+mw-reach,success+mw-reach,success+mw-push\n0,5,1,9,0.9,0.2\n"
        )
        found = [(c.label, c.task, c.success, c.returns.tolist()) for c in of_success(several / "eval.csv")]
        assert found == [("default of two", "mw-reach", True, [0.9]), ("default of two", "mw-push", True, [0.2])]
        assert (some.label, some.task, some.success, some.returns.tolist()) == ("quick", "mw-reach", True, [0, 0.3])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "line 1: got 'an empty file'"),
            ("step,reward,seed\n", "line 2: got nothing"),
            ("step,score,seed\n0,1,1\n", "line 1: got 'step,score,seed', allowed: the columns step,reward,seed"),
            ("step,reward,seed\n0,1,1\n10,nan,1\n", "line 3: got step=10,reward=nan,seed=1, allowed: step an integer"),
            ("step,reward,seed\n0,1,1\n\n10,x,1\n", "line 4"),
            ("step,reward,seed\n0,1\n", "seed=None"),
            ("step,reward,seed\n-2,1,1\n", "line 2"),
            ("step,reward,seed\n1.5,1,1\n", "step=1.5"),
            ("step,reward,seed\n\xff,1,1\n", "UTF-8"),
        ],
    )
    def test_a_malformed_file_is_named_with_its_line(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "sac/cheetah-run.csv"
        path.parent.mkdir()
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError) as e:
            read_curves(path)
        assert message in str(e.value)
        assert str(path) in str(e.value)

    def test_where_there_is_no_run(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "new").mkdir()
        (tmp_path / "new/config.json").write_text("{}")
        for path, message in (("gone", "no such file"), ("empty", "no run in this folder"), ("new", "no evaluation")):
            with pytest.raises(InputError, match=message):
                find_runs([tmp_path / path])
        with pytest.raises(InputError, match="none given"):
            find_runs([])
        for text in (None, "not json", "{}", "[]"):
            folder = run(tmp_path, "cheetah-run", "quick", 1, (0, 1))
            (folder / "config.json").unlink() if text is None else (folder / "config.json").write_text(text)
            with pytest.raises(InputError, match=r"allowed: the config\.json of a run"):
                read_curves(folder / "eval.csv")

    def test_reference_of_one_method_and_of_several(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for method in ("sac", "tdmpc2"):
            csv_file(tmp_path / method / "cheetah-run.csv", (0, 1, 1))
        csv_file(tmp_path / "sac/hopper-hop.csv", (0, 1, 1))
        assert {c.label for c in read_reference(tmp_path, ["cheetah-run"])} == {"sac", "tdmpc2"}
        assert {c.label for c in read_reference(tmp_path / "sac", ["cheetah-run"])} == {"sac"}
        assert not caplog.messages
        assert read_reference(tmp_path, ["hopper-stand"]) == []
        assert "no curve of hopper-stand; it has 2 tasks, such as hopper-hop" in caplog.text
        for path, message in (("gone", "no such folder"), ("", "no CSV file")):
            (tmp_path / "none").mkdir(exist_ok=True)
            with pytest.raises(InputError, match=message):
                read_reference(tmp_path / "none" / path, ["cheetah-run"])

    def test_a_seed_counts_once(self, caplog: pytest.LogCaptureFixture) -> None:
        short, long, other = curve([0, 5], [0, 1]), curve([0, 9], [0, 1]), curve([0, 9], [0, 2], seed=2)
        for curves in ([short, long, other], [long, short, other]):
            caplog.clear()
            assert group(curves) == {("cheetah-run", "default"): [long, other]}
            assert "seed 1 has several runs" in caplog.text


class TestStatistics:
    def test_mean_and_interval_by_hand(self) -> None:
        band = mean_over_seeds([curve([0, 10], [1, 3]), curve([0, 10], [2, 6], seed=2), curve([0, 10], [3, 9], seed=3)])
        assert band.centre.tolist() == [2, 6]
        # Student's t with 2 degrees of freedom: 4.3027; standard deviations 1 and 3
        half = 4.3027 / math.sqrt(3) * np.array([1, 3])
        assert band.low == pytest.approx(band.centre - half, rel=1e-4)
        assert band.high == pytest.approx(band.centre + half, rel=1e-4)

    def test_interpolated_only_where_every_seed_has_been(self) -> None:
        band = mean_over_seeds([curve([0, 10, 30], [0, 10, 50]), curve([5, 20], [100, 400], seed=2)])
        # the steps of both from 5 to 20, where the first seed is at 5, 10, 30 and the second at 100, 200, 400
        assert band.steps.tolist() == [5, 10, 20]
        assert band.centre == pytest.approx([52.5, 105, 215])
        with pytest.raises(InputError, match=r"no step that all of them cover: .*seed 1 0 to 4.*seed 2 5 to 9"):
            mean_over_seeds([curve([0, 4], [0, 1]), curve([5, 9], [0, 1], seed=2)])

    @pytest.mark.parametrize("seeds", [1, 2])
    def test_no_interval_of_one_or_two_seeds(self, seeds: int) -> None:
        curves = [curve([0, 10], [s, 2 * s], seed=s) for s in range(seeds)]
        for band in (mean_over_seeds(curves), iqm_over_tasks({"cheetah-run": curves, "walker-walk": curves})):
            assert band.low is None
            assert band.high is None

    def test_the_interval_holds_the_mean_as_often_as_it_says(self) -> None:
        draws = np.random.default_rng(0).normal(500, 80, (2000, 3))
        steps = list(range(2000))
        band = mean_over_seeds([curve(steps, draws[:, i].tolist(), seed=i) for i in range(3)])
        assert band.low is not None
        assert band.high is not None
        held = float(((band.low < 500) & (band.high > 500)).mean())
        assert abs(held - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)

    def test_iqm_by_hand(self) -> None:
        # of 8 values the lowest 2 and highest 2 go; of 6, one each
        assert iqm(np.array([[9.0, 1, 2, 3, 4, 5, 6, -90], [1, 1, 1, 2, 2, 2, 2, 100]])) == pytest.approx([3.5, 1.75])
        assert iqm(np.array([1.0, 2, 3, 4, 5, 600])) == pytest.approx(3.5)
        # all 6 runs of both tasks in one pool, by 1000
        tasks = {
            task: [curve([0, 10], [v, 100 * v], task, seed) for seed, v in enumerate(values)]
            for task, values in (("cheetah-run", (1, 2, 3)), ("walker-walk", (4, 5, 6)))
        }
        assert iqm_over_tasks(tasks).centre == pytest.approx([0.0035, 0.35])

    def test_bootstrap_draws_runs_within_their_task(self) -> None:
        # Runs of a task are alike and tasks differ: whatever is drawn, every task keeps its share.
        low, high = iqm_interval([np.full((3, 1), 0.1), np.full((3, 1), 0.5), np.full((3, 1), 0.9)])
        assert (low.tolist(), high.tolist()) == ([0.5], [0.5])
        # One task of 2 runs, 0 and 1: all draws are 00, 01, 10, 11, and the IQM of two values is their mean.
        low, high = iqm_interval([np.array([[0.0], [1.0]])])
        assert (low.tolist(), high.tolist()) == ([0.0], [1.0])

    def test_tasks_without_a_scale_have_no_iqm(self) -> None:
        with pytest.raises(InputError, match="Hopper-v5"):
            iqm_over_tasks({"cheetah-run": [curve([0], [1])], "Hopper-v5": [curve([0], [1])]})

    def test_iqm_is_rliables(self) -> None:
        metrics = pytest.importorskip("rliable.metrics")
        rng = np.random.default_rng(0)
        for runs, tasks in ((3, 5), (5, 4), (10, 7), (1, 1)):
            scores = rng.random((runs, tasks))
            assert float(iqm(scores.ravel())) == pytest.approx(metrics.aggregate_iqm(scores), rel=1e-12)

    def test_intervals_are_rliables(self) -> None:
        pytest.importorskip("rliable")
        try:
            from rliable import library, metrics
        except Exception as e:  # it imports arch, some versions of which fail with newer pandas
            pytest.skip(f"rliable cannot be imported: {e!r}")
        rng = np.random.default_rng(0)
        scores = np.linspace(0.2, 0.9, 6) + 0.15 * rng.standard_normal((5, 6))  # 5 runs of 6 tasks
        resamples = 20_000
        np.random.seed(1)  # noqa: NPY002, rliable draws from it
        _, ends = library.get_interval_estimates(
            {"a": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=resamples
        )
        ours = np.concatenate(iqm_interval([scores[:, [t]] for t in range(6)], resamples))
        # Both are quantiles of draws: as of a normal of the interval's width, five standard errors of their difference,
        # which is 3% of the width.
        spread = (ends["a"][1, 0] - ends["a"][0, 0]) / (2 * 1.96)
        error = spread * math.sqrt(2 * 0.025 * 0.975 / resamples) / 0.0584
        assert ours == pytest.approx(ends["a"][:, 0], abs=5 * error)
