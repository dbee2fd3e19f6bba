"""The commands: train, eval, resume, plot and plan, and how a failure ends them."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_line import (
    Capture,
    in_an_empty_folder,  # noqa: F401
    save_untrained,
    start,
    words,
)
from conftest import tiny_config

from tdmpc2_fast import TDMPC2
from tdmpc2_fast.errors import NonFiniteError

pytest.importorskip("dm_control")
pytest.importorskip("click")
pytest.importorskip("rich")

from tdmpc2_fast.train import cli


@pytest.fixture(scope="module")
def no_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files and folders that are no runs, or not yet."""
    root = tmp_path_factory.mktemp("no_runs")
    TDMPC2(tiny_config()).save(root / "a.pt")
    torch.save({"x": torch.zeros(2)}, root / "b.pt")
    for folder in ("empty", "begun", "runs/1/checkpoints", "runs/2/checkpoints"):
        (root / folder).mkdir(parents=True)
    (root / "begun/config.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run in `run`, and what was said of it."""
    root, said = tmp_path_factory.mktemp("trained"), io.StringIO()
    with contextlib.chdir(root), contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("COLUMNS", "80")
        assert cli.main(words(work_dir="run", steps=80, eval_episodes=2)) == 0  # without a command: train
    return root, said.getvalue()


@pytest.fixture
def trained_here(trained: tuple[Path, str], empty_folder: Path) -> str:
    """What was said of the run that lies in `run` of the test's own folder."""
    shutil.copytree(trained[0] / "run", empty_folder / "run")
    return trained[1]


class TestCommands:
    def test_train_then_eval(self, trained_here: str, empty_folder: Path, capsys: Capture) -> None:
        folder = empty_folder / "run"
        assert trained_here.count("eval   step") == 3
        assert "done: return" in trained_here
        for path in (f"checkpoint={folder}/checkpoints/latest", str(folder), f"{folder}/checkpoints/best.safetensors"):
            assert cli.main(["eval", path, "eval_episodes=1"]) == 0
            assert "Pendulum-v1: return" in capsys.readouterr().out
        # nothing is overwritten
        assert cli.main(["train", *words(work_dir=folder)]) == 2
        assert "is taken" in capsys.readouterr().err

    def test_the_default_folder_never_overwrites(self, empty_folder: Path) -> None:
        for _ in range(2):
            assert cli.main(["train", *words(steps=4, episode_length=10)]) == 1  # nothing was learned
        runs = sorted(str(p.parent.relative_to(empty_folder)) for p in empty_folder.rglob("eval.csv"))
        assert runs == ["runs/Pendulum-v1/default/1", "runs/Pendulum-v1/default/1-2"]

    def test_what_a_checkpoint_is_of_is_said(self, trained_here: str, capsys: Capture) -> None:
        best = json.loads(Path("run/checkpoints/best.json").read_text())["trained"]
        assert best["decisions"] > 50  # it has learned, whatever the two episodes before returned
        said = f"step {best['step']} ({best['decisions']} decisions, {best['updates']} updates), return "
        said += f"{best['return']:.1f} ± {best['return_std']:.1f} over 2 episodes"
        path = "run/checkpoints/best.safetensors"
        assert f"weights      {path}: {said}" in trained_here
        for command in (["eval", "run", "eval_episodes=1"], ["plan", "run", "decision=1"]):
            assert cli.main(command) == 0
            assert capsys.readouterr().out.splitlines()[0] == f"{path}: {said}"
        assert cli.main(["info", "run"]) == 0
        assert f"trained {said}" in " ".join(capsys.readouterr().out.split())
        assert cli.main(["info", "run/checkpoints/latest"]) == 0
        assert "trained step 80 (80 decisions, 79 updates), return" in " ".join(capsys.readouterr().out.split())

    def test_info_says_what_this_machine_plans_with_and_why_not_with_the_rest(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert cli.main(["info"]) == 0
        said = capsys.readouterr().out
        assert "backend=auto         cpu (the kernels run on this CPU with vectors of" in said
        assert "backend=triton       Triton needs a CUDA device" in said
        monkeypatch.setattr("tdmpc2_fast.kernels.device.launch.why_not_built", lambda: "no compiler")
        assert cli.main(["info"]) == 0
        said = capsys.readouterr().out
        assert "backend=auto         torch (no compiler)" in said
        assert "backend=cpu          no compiler\n" in said

    def test_an_evaluation_in_a_pipe_leaves_stderr_empty(self, empty_folder: Path) -> None:
        save_untrained("a")
        out, err = (done := start("eval", "a")).communicate(timeout=300)
        assert done.returncode == 0
        assert out.splitlines()[0] == "a.safetensors: step and return unknown"
        assert err == ""

    def test_the_last_decision_is_drawn_of_an_episode_that_is_too_short(
        self, empty_folder: Path, capsys: Capture
    ) -> None:
        save_untrained("a")
        assert cli.main(["plan", "a"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert "note: the episode ends before decision 50; decision 39 is drawn" in out
        assert out[-1] == "a-plan.png"
        assert cli.main(["plan", "a", "decision=40"]) == 2
        assert "decision: got 40, allowed: below 40" in capsys.readouterr().err

    def test_without_wandb_nothing_is_begun(
        self, empty_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert cli.main(words(work_dir="run", steps=4, episode_length=10)) == 1
        capsys.readouterr()
        before = Path("run/config.json").read_bytes()
        monkeypatch.setitem(sys.modules, "wandb", None)
        for command in (["train", *words(wandb="true")], ["resume", "run", "steps=8", "wandb=true"]):
            assert cli.main(command) == 2
            shown = capsys.readouterr()
            assert shown.out == ""
            assert "pip install 'tdmpc2-fast[wandb]', or set enable_wandb=false" in shown.err
        assert [p.name for p in empty_folder.iterdir()] == ["run"]
        assert Path("run/config.json").read_bytes() == before

    def test_a_path_with_an_equals_sign_is_a_path(self, empty_folder: Path, capsys: Capture) -> None:
        save_untrained("lr=1/a")
        assert cli.main(["eval", "lr=1/a"]) == 2  # a key, by its looks
        assert "unknown config key 'lr" not in capsys.readouterr().err
        assert cli.main(["eval", "./lr=1/a"]) == 0

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["eval"], "eval CHECKPOINT"),
            (["eval", "a", "b"], "got 2 arguments (a b)"),
            (["eval", "a", "checkpoint=b"], "got 2 arguments"),
            (["eval", "nowhere"], "no such file"),
            (["eval", "."], "without checkpoints/best"),
            (["eval", "a.pt"], "give task=NAME"),
            (["eval", "a.pt", "preset=quick"], "belongs to the command train"),
            (["info", "a", "b"], "info [CHECKPOINT]"),
            (["info", "b.pt"], "no TD-MPC2 model"),
            (["resume"], "resume RUN"),
            (["resume", "nowhere"], "no such folder"),
            (["resume", "a.pt"], "a file, allowed: the folder of a run"),
            (["resume", "empty"], "no run, allowed: the folder of a run"),
            (["resume", "begun"], "a run that wrote no checkpoint"),
            (["resume", "runs"], "no run, but runs are in it (1, 2)"),
            (["resume", ".", "seed=1,2"], "config key 'seed'"),
            (["plot"], "no run given"),
            (["plot", "nowhere"], "nowhere"),
            (["plot", ".", "refrence=x"], "Did you mean 'reference'"),
            (["plot", ".", "max_step=0"], "a number of at least 1"),
            (["plot", ".", "--reference"], "--reference VALUE"),
            (["plot", ".", "--refrence", "x"], "Did you mean 'reference'"),
            (["plan"], "plan CHECKPOINT"),
            (["plan", "a", "decision=-1"], "got -1, allowed: an integer of at least 0"),
            (["plan", "a", "horizn=3"], "Did you mean 'horizon'"),
            (["tasks", "humnoid"], "Did you mean"),
            (["tasks", "a", "b"], "tasks [TEXT]"),
            (["trian"], "Did you mean 'train'"),
            (["zzz"], "--help lists the commands"),
            (["help", "zzz"], "unknown command 'zzz'"),
            (["eval", "zzz=3"], "train --help lists the keys"),
            (["eval", ""], "checkpoint ''"),
            (["tasks", "zzz"], "tasks lists all"),
        ],
    )
    def test_wrong_words(
        self, args: list[str], message: str, no_runs: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(no_runs)
        assert cli.main(args) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert len(captured.err.splitlines()) == 1

    def test_a_run_is_drawn(self, trained_here: str, empty_folder: Path, capsys: Capture) -> None:
        assert "run/curve.png" in trained_here
        (empty_folder / "published/sac").mkdir(parents=True)
        (empty_folder / "published/sac/Pendulum-v1.csv").write_text("step,reward,seed\n0,-900,1\n60,-800,1\n")
        assert cli.main(["plot", "run", "reference=published", "out=both.svg"]) == 0
        assert capsys.readouterr().out.strip() == "both.svg"
        assert "sac" in Path("both.svg").read_text()
        assert cli.main(["plot", "run", "--reference", "published", "--out=again.svg", "--max-step", "50"]) == 0
        assert "sac" in Path("again.svg").read_text()
        assert cli.main(["plan", "run", "decision=3", "out=plan.png"]) == 0
        assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
        assert cli.main(["plan", "run", "decision=3"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "run/checkpoints/best-plan.png"


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "status", "message"),
        [
            (RuntimeError("the simulator broke"), 1, "error: RuntimeError: the simulator broke"),
            (NonFiniteError("loss is NaN"), 1, "error: loss is NaN"),
            (OSError(28, "No space left on device"), 1, "No space left"),
            (KeyboardInterrupt(), 130, "to go on: tdmpc2-fast resume"),
        ],
    )
    def test_exit_status(
        self,
        error: BaseException,
        status: int,
        message: str,
        capsys: Capture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr("tdmpc2_fast.train.envs.gymnasium_tasks.GymnasiumTask.step", fail)
        monkeypatch.setattr("tdmpc2_fast.train.envs._try", lambda *_: None)  # it is to fail in the run
        assert cli.main(["train", *words()]) == status
        out, err = capsys.readouterr()
        assert message in out + err
        assert "Traceback" not in err
        if status == 1:
            assert "TDMPC2_DEBUG=1" in err
            assert cli.main(["train", *words(), "debug=true"]) == 1
            assert "in fail" in capsys.readouterr().err
            monkeypatch.setenv("TDMPC2_DEBUG", "1")
            assert cli.main(["train", *words()]) == 1
            assert "in fail" in capsys.readouterr().err
