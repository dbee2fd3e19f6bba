"""Sweeps: several runs from one line of words."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
from command_line import (
    Capture,
    in_an_empty_folder,  # noqa: F401
    start,
    words,
)

from tdmpc2_fast import Config
from tdmpc2_fast.train.cli import keys, sweep

pytest.importorskip("dm_control")
pytest.importorskip("click")
pytest.importorskip("rich")

from tdmpc2_fast.train import cli


class TestSweeps:
    def test_the_product_last_key_fastest(self) -> None:
        runs = sweep.expand(["task=walker-walk,cheetah-run", "steps=10", "seed=1..3"])
        assert [r.label for r in runs] == [f"task={t} seed={s}" for t in ("walker-walk", "cheetah-run") for s in "123"]
        assert runs[4].words == ("task=cheetah-run", "steps=10", "seed=2")
        assert [r.words for r in sweep.expand(["seed=1,3..4"])] == [("seed=1",), ("seed=3",), ("seed=4",)]

    def test_one_run_is_left_as_it_is(self) -> None:
        given = ["+task=dog-run", "exp_name='a,b'", "tasks=[a,b]", "seed=5", "work_dir=../x"]
        assert sweep.expand(given) == [sweep.Run(tuple(given), "")]

    def test_every_run_has_a_folder_of_its_own(self) -> None:
        runs = sweep.expand(["lr=1e-3,3e-4", "exp_name=x", "seed=1,2", "checkpoint=a/b,none"])
        configs = [Config.from_dict(keys.parse(r.words)) for r in runs]
        assert len({(c.exp_name, c.seed) for c in configs}) == 8
        assert configs[0].exp_name == "x-lr_1e-3-checkpoint_a_b"
        runs = sweep.expand(["preset=quick", "lr=1e-3,3e-4"])
        assert keys.parse(runs[0].words)["exp_name"] == "quick-lr_1e-3"
        runs = sweep.expand(["work_dir=runs/x", "seed=1,2", "task=dog-run,dog-walk"])
        assert [keys.parse(r.words)["work_dir"] for r in runs] == [
            f"runs/x/seed_{s}-task_{t}" for s in (1, 2) for t in ("dog-run", "dog-walk")
        ]
        runs = sweep.expand(["work_dir=a,b", "lr=1e-3,3e-4"])
        assert [keys.parse(r.words)["work_dir"] for r in runs] == ["a", "a", "b", "b"]

    def test_dry_run_and_job(self, empty_folder: Path, capsys: Capture) -> None:
        given = ["task=walker-walk,dog-run", "exp_name=a b", "seed=1,2"]
        assert cli.main(["train", "dry_run=true", *given]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[2] == "tdmpc2-fast train task=dog-run 'exp_name=a b' seed=1"
        assert len(lines) == 4
        for job in range(1, 5):
            assert cli.main([*given, "-m", f"job={job}", "dry_run=true"]) == 0
            assert capsys.readouterr().out.splitlines() == [lines[job - 1]]
        assert list(empty_folder.iterdir()) == []

    def test_a_job_runs_here(self, empty_folder: Path, capsys: Capture) -> None:
        assert cli.main(["train", *words(seed="1,2", steps=4, episode_length=10), "job=2"]) == 1  # nothing was learned
        assert (empty_folder / "runs/Pendulum-v1/default/2/eval.csv").exists()
        assert not (empty_folder / "runs/Pendulum-v1/default/1").exists()

    def test_a_failure_does_not_end_the_rest(self, empty_folder: Path) -> None:
        # Hopper-v5 terminates, which fails without episodic=true
        done = start("train", *words(task="Hopper-v5,Pendulum-v1", eval_freq=100))
        out, err = done.communicate(timeout=300)
        assert done.returncode == 1
        assert "error: config key 'episodic'" in err
        summary = out[out.rindex("\nsweep") :]
        assert re.search(r"task=Hopper-v5 +failed \(2\) ", summary)
        assert not (empty_folder / "runs/Hopper-v5").exists()  # it was found before the run began
        assert "set episodic=true" in " ".join(summary.split())
        assert re.search(r"task=Pendulum-v1 +return -\d+\.\d ± .*runs/Pendulum-v1/default/1", summary)

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_goes_to_the_run_and_ends_the_rest(self, number: int, status: int, empty_folder: Path) -> None:
        done = start("train", *words(seed="1,2", steps=1_000_000, eval_freq=1_000_000))
        folder = empty_folder / "runs/Pendulum-v1/default"
        deadline = time.monotonic() + 300
        while not (folder / "1/train.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        done.send_signal(number)
        out, _err = done.communicate(timeout=300)
        assert done.returncode == status
        assert re.search(r"seed=1 +interrupted", out)
        assert re.search(r"seed=2 +not started", out)
        assert not (folder / "2").exists()
        if number == signal.SIGINT:
            assert out.count("stopped by SIGINT") == 1
            assert (folder / "1/checkpoints/latest.safetensors").exists()
