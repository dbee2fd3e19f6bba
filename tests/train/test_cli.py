"""The command line: its grammar, its answers to mistakes, its commands, sweeps and completion."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, ROOT, TINY, tiny_config, tiny_multitask

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.compat.state_dict import CRITICS, TARGETS, tensors_only
from tdmpc2_fast.config import DEFAULT_DIMS
from tdmpc2_fast.errors import ConfigError, NonFiniteError
from tdmpc2_fast.train.cli import keys, sweep

pytest.importorskip("dm_control")
pytest.importorskip("click")
pytest.importorskip("rich")
from click.shell_completion import ShellComplete

from tdmpc2_fast.train import cli
from tdmpc2_fast.train.cli import app, tables
from tdmpc2_fast.train.envs import SUITES
from tdmpc2_fast.train.envs.catalogue import lacks

QUICK = dict(
    TINY,
    task="Pendulum-v1",
    episode_length=40,
    seed_steps=50,
    steps=60,
    eval_freq=40,
    eval_episodes=1,
    iterations=1,
    device="cpu",
    num_threads=1,
)
Capture = pytest.CaptureFixture[str]


def words(**values: Any) -> list[str]:
    return [f"{k}={v}" for k, v in {**QUICK, **values}.items()]


def start(*args: str, **env: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-P", "-m", "tdmpc2_fast.train", *args]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env}
    )


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tests run in a folder of their own; interpreted, the kernels would run for days."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


class TestGrammar:
    def test_numbers_as_people_write_them(self) -> None:
        got = keys.parse(
            ["steps=7_000_000", "lr=3e-4", "buffer_size=1e6", "vmax=+10", "vmin=-10", "batch_size=2*128", "seed=6/2"]
        )
        cfg = Config.from_dict(got)
        assert (cfg.steps, cfg.buffer_size, cfg.batch_size, cfg.seed, cfg.vmin) == (7_000_000, 1_000_000, 256, 3, -10)

    def test_none_and_unset(self) -> None:
        for text in ("none", "null", "None", ""):
            assert keys.parse([f"model_size={text}"]) == {"model_size": None}
        assert keys.parse(["checkpoint=???", "horizon=???", "task_title=???"]) == {}

    def test_what_hydra_takes(self) -> None:
        got = keys.parse(["+horizon=4", "++mpc=False", "exp_name='a b'", 'task="dog-run"', "work_dir=a b/c=d"])
        assert got == dict(horizon=4, mpc=False, exp_name="a b", task="dog-run", work_dir="a b/c=d")

    @pytest.mark.parametrize(
        ("word", "key", "value"),
        [
            ("wandb=true", "enable_wandb", True),
            ("disable_wandb=true", "enable_wandb", False),
            ("disable_wandb=False", "enable_wandb", True),
            ("terminated_coef=0.1", "termination_coef", 0.1),
        ],
    )
    def test_other_names(self, word: str, key: str, value: Any) -> None:
        assert keys.parse([word]) == {key: value}

    @pytest.mark.parametrize("key", keys.NOT_NEEDED)
    def test_official_keys_without_a_use_are_answered(self, key: str) -> None:
        notes: list[str] = []
        assert keys.parse([f"{key}=[1,2]"], notes.append) == {}
        assert len(notes) == 1
        assert notes[0].startswith(f"{key} has no effect: ")

    def test_keys_given_win_over_a_preset(self) -> None:
        got = keys.parse(["steps=10", "preset=quick", "task=walker-walk"])
        assert got == keys.PRESETS["quick"] | dict(steps=10, task="walker-walk")
        for name, values in keys.PRESETS.items():
            Config.from_dict(values)
            assert name == "quick" or Config.from_dict(values).model_size == int(name[:-1])

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["task=walker-wlak"], "walker-walk"),
            (["horizn=3"], "Did you mean 'horizon'"),
            (["horizn=3"], "horizon: an integer of at least 1."),
            (["tsak=dog-run"], "Did you mean 'task'"),
            (["horizon=0"], "got 0, allowed: an integer of at least 1"),
            (["horizon=three"], "got 'three', allowed: an integer of at least 1"),
            (["horizon=[3]"], "an integer"),
            (["exp_name=[a]"], "exp_name"),
            (["episodic=maybe"], "true or false"),
            (["seed=1/0"], "seed"),
            (["steps"], "allowed: steps=VALUE"),
            (["walker-walk"], "Did you mean task=walker-walk?"),
            (["horizon:3"], "allowed: key=value. Did you mean 'horizon'"),
            (["steps=inf"], "steps"),
            (["obs=pixels"], "state, rgb"),
            (["preset=quik"], "Did you mean 'quick'"),
            (["task=Pendulum-v1", "work_dir=/dev/null/x"], "work_dir"),
            (["num_elites=20", "num_samples=10"], "num_samples (10)"),
            (["checkpoint=/nowhere/a.pt", "task=Pendulum-v1", "work_dir=x"], "no such file"),
            (["backend=triton", "device=cpu", "task=Pendulum-v1", "work_dir=x"], "backend='triton' cannot run"),
            (["device=cuda:99", "task=Pendulum-v1", "work_dir=x"], "device"),
            (["seed=1", "seed=2"], "'seed': given twice"),
            (["wandb=true", "enable_wandb=true"], "'enable_wandb': given twice"),
            (["dry_run=true", "dry_run=true"], "'dry_run': given twice"),
            (["--horizon", "3"], "allowed: horizon=3"),
            (["--horizon=3"], "allowed: horizon=3"),
            (["-horizon", "3"], "allowed: horizon=3"),
            (["--batch-size", "3"], "allowed: batch_size=3"),
            (["--vmin", "-3"], "allowed: vmin=-3"),
            (["--compile", "--horizon"], "allowed: compile=true"),
            (["--horizn", "3"], "Did you mean 'horizon'"),
            (["~checkpoint"], "KEY=none"),
            (["~checkpoint=a"], "KEY=none"),
            (["hydra.run.dir=x"], "work_dir=FOLDER"),
            (["hydra/launcher=submitit_slurm"], "docs/sweeps.md"),
            (["seed=1,x"], "got 'x'"),
            (["seed=1,,2"], "between any two commas"),
            (["seed=1,2,1"], "every value once"),
            (["seed=3..1"], "smaller number first"),
            (["seed=range(1,4)"], "1..3"),
            (["seed=1,2", "task=walker-walk,walker-wlak"], "walker-wlak"),
            (["seed=1,2", "job=3"], "got 3, allowed: 1 to 2"),
            (["job=0"], "got 0"),
        ],
    )
    def test_mistakes_are_answered_at_once(
        self, given: list[str], message: str, empty_folder: Path, capsys: Capture
    ) -> None:
        assert cli.main(["train", *given]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert "Traceback" not in captured.err
        assert captured.out == ""
        if "work_dir=x" not in given:
            assert list(empty_folder.iterdir()) == []

    @pytest.mark.parametrize("key", ["dry_run", "job", "preset", "debug"])
    def test_keys_of_train_belong_to_train(self, key: str) -> None:
        with pytest.raises(ConfigError, match="belongs to the command train"):
            keys.parse([f"{key}=1"], presets=False)


class TestCommands:
    def test_train_then_eval(self, empty_folder: Path, capsys: Capture) -> None:
        folder = empty_folder / "run"
        assert cli.main(words(work_dir=folder)) == 0  # without a command: train
        out = capsys.readouterr().out
        assert out.count("eval   step") == 3
        assert "done: return" in out
        for path in (f"checkpoint={folder}/checkpoints/latest", str(folder), f"{folder}/checkpoints/best.safetensors"):
            assert cli.main(["eval", path, "eval_episodes=1"]) == 0
            assert "Pendulum-v1: return" in capsys.readouterr().out
        # nothing is overwritten
        assert cli.main(["train", *words(work_dir=folder)]) == 2
        assert "is taken" in capsys.readouterr().err

    def test_the_default_folder_never_overwrites(self, empty_folder: Path) -> None:
        for _ in range(2):
            assert cli.main(["train", *words(steps=4)]) == 1  # nothing was learned
        runs = sorted(str(p.parent.relative_to(empty_folder)) for p in empty_folder.rglob("eval.csv"))
        assert runs == ["runs/Pendulum-v1/default/1", "runs/Pendulum-v1/default/1-2"]

    def test_what_a_checkpoint_is_of_is_said(self, empty_folder: Path, capsys: Capture) -> None:
        assert cli.main(words(work_dir="run", steps=80, eval_episodes=2)) == 0
        out = capsys.readouterr().out
        best = json.loads(Path("run/checkpoints/best.json").read_text())["trained"]
        assert best["decisions"] > 50  # it has learned, whatever the two episodes before returned
        said = f"step {best['step']} ({best['decisions']} decisions, {best['updates']} updates), return "
        said += f"{best['return']:.1f} ± {best['return_std']:.1f} over 2 episodes"
        path = "run/checkpoints/best.safetensors"
        assert f"weights      {path}: {said}" in out
        for command in (["eval", "run", "eval_episodes=1"], ["plan", "run", "decision=1"]):
            assert cli.main(command) == 0
            assert capsys.readouterr().out.splitlines()[0] == f"{path}: {said}"
        assert cli.main(["info", "run"]) == 0
        assert f"trained {said}" in " ".join(capsys.readouterr().out.split())
        assert cli.main(["info", "run/checkpoints/latest"]) == 0
        assert "trained step 80 (80 decisions, 79 updates), return" in " ".join(capsys.readouterr().out.split())

    def test_an_evaluation_in_a_pipe_leaves_stderr_empty(self, empty_folder: Path) -> None:
        TDMPC2(Config.from_dict(dict(QUICK)).with_env({"state": (3,)}, 1, 40)).save("a")
        out, err = (done := start("eval", "a")).communicate(timeout=300)
        assert done.returncode == 0
        assert out.splitlines()[0] == "a.safetensors: step and return unknown"
        assert err == ""

    def test_the_last_decision_is_drawn_of_an_episode_that_is_too_short(
        self, empty_folder: Path, capsys: Capture
    ) -> None:
        TDMPC2(Config.from_dict(dict(QUICK)).with_env({"state": (3,)}, 1, 40)).save("a")
        assert cli.main(["plan", "a"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert "note: the episode ends before decision 50; decision 39 is drawn" in out
        assert out[-1] == "a-plan.png"
        assert cli.main(["plan", "a", "decision=40"]) == 2
        assert "decision: got 40, allowed: below 40" in capsys.readouterr().err

    def test_without_wandb_nothing_is_begun(
        self, empty_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert cli.main(words(work_dir="run", steps=4)) == 1
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
        agent = TDMPC2(Config.from_dict(dict(QUICK)).with_env({"state": (3,)}, 1, 40))
        agent.save(empty_folder / "lr=1" / "a")
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
            (["info"], "info CHECKPOINT"),
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
    def test_wrong_words(self, args: list[str], message: str, empty_folder: Path, capsys: Capture) -> None:
        TDMPC2(tiny_config()).save(empty_folder / "a.pt")
        torch.save({"x": torch.zeros(2)}, "b.pt")
        for folder in ("empty", "begun", "runs/1/checkpoints", "runs/2/checkpoints"):
            Path(folder).mkdir(parents=True)
        Path("begun/config.json").write_text("{}")
        assert cli.main(args) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert len(captured.err.splitlines()) == 1

    def test_a_run_is_drawn(self, empty_folder: Path, capsys: Capture) -> None:
        assert cli.main(["train", *words(work_dir="run", steps=60)]) == 0
        assert "run/curve.png" in capsys.readouterr().out
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

    def test_tasks(self, capsys: Capture) -> None:
        assert cli.main(["tasks"]) == 0
        names = capsys.readouterr().out.split()
        assert {"dog-run", "Hopper-v5", "mw-reach", "mt30", "bipedal-walker"} <= set(names)
        assert cli.main(["tasks", "HUM"]) == 0
        out = capsys.readouterr().out
        assert "humanoid-run" in out
        assert "dog-run" not in out
        assert "Humanoid-v5" in out
        assert "Humanoid-v3" not in out
        assert cli.main(["tasks", "pend"]) == 0
        assert "Pendulum-v1" in capsys.readouterr().out.split()

    def test_every_gymnasium_task_listed_can_be_made_and_none_is_left_out(self) -> None:
        gymnasium = pytest.importorskip("gymnasium")
        # Other tests register environments of their own.
        theirs = {
            s.id: str(s.entry_point) for s in gymnasium.registry.values() if "gymnasium.envs" in str(s.entry_point)
        }
        listed = {*SUITES["Gymnasium"].names} & {*theirs}
        made = {}
        for name in {*listed, *(name for name, entry in theirs.items() if "mujoco" not in entry)}:
            with (
                suppress(gymnasium.error.Error, ImportError),
                warnings.catch_warnings(),
            ):  # a package that is not here, an old id
                warnings.simplefilter("ignore")
                env = gymnasium.make(name)
                made[name] = isinstance(env.action_space, gymnasium.spaces.Box) and env.action_space.is_bounded()
                env.close()
        assert {name for name, fits in made.items() if fits} == listed & {*made}
        missing = listed - {*made}
        assert len(listed) - len(missing) >= 13
        assert missing <= {name for name in listed if lacks(name)}

    def test_what_a_task_lacks_is_said_alike_everywhere(self, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "Box2D", None)
        for name in ("bipedal-walker", "BipedalWalkerHardcore-v3", "lunarlander-continuous", "CarRacing-v3"):
            assert cli.main(["tasks", name.lower()]) == 0
            need = capsys.readouterr().out.partition(": ")[2].partition(" (")[0]
            assert need == "needs pip install 'tdmpc2-fast[box2d]'"
            assert cli.main(["train", *words(task=name)]) == 2
            assert capsys.readouterr().err == f"error: config key 'task': {name!r} {need}\n"

    def test_tasks_say_what_to_install(self, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert cli.main(["tasks"]) == 0
        out = capsys.readouterr().out
        assert "DMControl: needs pip install 'tdmpc2-fast[train]'" in out
        assert "tdmpc2-fast[box2d]" in out
        assert "Meta-World: not in this version" in out

    @pytest.mark.parametrize("ending", ["", ".pt"])
    @pytest.mark.parametrize("make", [tiny_config, tiny_multitask], ids=["one task", "several"])
    def test_info(self, make: Callable[..., Config], ending: str, empty_folder: Path, capsys: Capture) -> None:
        agent = TDMPC2(make(horizon=4))
        agent.save(empty_folder / f"a{ending}")
        assert cli.main(["info", f"a{ending}"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert f"{agent.model.total_params:,} learnable" in out
        dims = agent.cfg
        assert f"observation 5, action_dim {dims.action_dim}, latent_dim 16, mlp_dim 24, num_q 3" in out
        assert ("tasks 3, task_dim 4" in out) == dims.multitask
        assert ("horizon=4" in out) == (ending == "")
        assert "rho=" not in out
        assert ("current generation" in out) == (ending == ".pt")

    def test_info_of_the_older_generation(self, empty_folder: Path, capsys: Capture) -> None:
        state = tensors_only(TDMPC2(tiny_config()).model.state_dict())
        leaves = ("weight", "bias", "ln.weight", "ln.bias")
        for new, old in ((CRITICS, "_Qs.params."), (TARGETS, "_target_Qs.params.")):
            for key in [k for k in state if k.startswith(new)]:
                layer, leaf = key.removeprefix(new).split(".", 1)
                state[f"{old}{4 * int(layer) + leaves.index(leaf)}"] = state.pop(key)
        torch.save({"model": state}, "a.pt")
        assert cli.main(["info", "a.pt"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "older generation" in out
        assert f"{TDMPC2(tiny_config()).model.total_params:,} learnable" in out

    def test_info_of_pixels(self, empty_folder: Path, capsys: Capture) -> None:
        cfg = Config.from_dict(TINY | dict(obs="rgb", num_channels=4, latent_dim=64, device="cpu"))
        TDMPC2(cfg.with_env({"rgb": (9, 64, 64)}, 2, 50)).save(empty_folder / "a")
        assert cli.main(["info", "a"]) == 0
        assert "rgb channels 9" in capsys.readouterr().out

    def test_without_a_word_it_shows_its_help(self, capsys: Capture) -> None:
        assert cli.main([]) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        assert cli.main(["--help"]) == 0
        assert capsys.readouterr().out == shown.out

    def test_version(self, capsys: Capture) -> None:
        assert cli.main(["--version"]) == 0
        assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", capsys.readouterr().out)

    def test_the_installed_command_runs(self) -> None:
        command = [str(Path(sys.executable).with_name("tdmpc2-fast")), "--version"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def test_a_plugin_gets_the_words_as_they_came(self, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        got: list[str] = []

        class Entry:
            name = "bench"

            def load(self) -> Callable[[list[str]], int]:
                return lambda words: got.extend(words) or 3  # type: ignore[func-returns-value]

        monkeypatch.setattr(app, "entry_points", lambda **_: [Entry()])
        given = ["planner", "--help", "size=1,5", "--", "-x"]
        assert cli.main(["bench", *given]) == 3
        assert got == given

    def test_a_broken_plugin_leaves_the_help_whole(self, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        entry = EntryPoint("broken", "no_such_package.run:main", "tdmpc2_fast.commands")
        monkeypatch.setattr(app, "entry_points", lambda name="broken", **_: [entry] if name == "broken" else [])
        assert cli.main(["--help"]) == 0
        assert "Cannot be loaded: No module named 'no_such_package'" in capsys.readouterr().out

    def test_without_click_it_says_what_to_install(self, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "click", None)
        assert cli.main(["train"]) == 2
        assert "pip install 'tdmpc2-fast[train]'" in capsys.readouterr().err


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
        monkeypatch.setattr("tdmpc2_fast.train.envs._try", lambda cfg, env: None)  # it is to fail in the run
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


class TestHelp:
    def test_short_help(self, capsys: Capture) -> None:
        assert cli.main(["--help"]) == 0
        out = capsys.readouterr().out
        for command in ("train", "resume", "eval", "plot", "plan", "tasks", "info", "bench"):
            assert re.search(rf"^  {command} +[A-Z]", out, re.MULTILINE)
        assert "..." not in out.partition("Commands:")[2].partition("Examples")[0]
        assert len(out.splitlines()) < 30
        assert cli.main(["help"]) == 0
        assert capsys.readouterr().out == out

    @pytest.mark.parametrize("width", [80, 200])
    @pytest.mark.parametrize("command", ["train", "eval"])
    def test_every_key_is_in_the_help(
        self, command: str, width: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        assert cli.main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert max(map(len, out.splitlines())) <= width
        shown = [f for f in dataclasses.fields(Config) if f.name not in keys.FILLED_IN]
        shown += dataclasses.fields(keys.Options) if command == "train" else []
        text = " ".join(out.split())
        for f in shown:
            assert f"  {f.name}={keys.default_text(f)} " in out
            if width == 200:
                assert f"{tables._allowed(f)} " in out
                assert f.metadata["help"] in text
        assert ("preset=quick" in out) == (command == "train")
        assert "horizon=3                integer >= 1" in out
        for key in keys.FILLED_IN:
            assert f"  {key}=" not in out

    def test_groups_are_the_headings_of_config(self) -> None:
        source = (ROOT / "tdmpc2_fast/config.py").read_text().partition("class Config:")[2].partition("def ")[0]
        headings = re.findall(r"^    # (.+)\n    (\w+):", source, re.MULTILINE)
        assert len(headings) == len(keys._GROUPS)
        for (heading, first), (key, name) in zip(headings, keys._GROUPS.items(), strict=True):
            assert first == key
            assert name in heading

    @pytest.mark.parametrize("own", [keys.Options, keys.PlotOptions, keys.PlanOptions])
    def test_defaults_can_be_typed(self, own: type[Any]) -> None:
        for fields in keys.groups(own).values():
            for f in fields:
                default = Config.__dict__.get(f.name, f.default)
                got = keys.value_of(f, keys.default_text(f))
                assert got == DEFAULT_DIMS.get(f.name, default), f.name


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
        assert cli.main(["train", *words(seed="1,2", steps=4), "job=2"]) == 1  # nothing was learned
        assert (empty_folder / "runs/Pendulum-v1/default/2/eval.csv").exists()
        assert not (empty_folder / "runs/Pendulum-v1/default/1").exists()

    def test_a_failure_does_not_end_the_rest(self, empty_folder: Path) -> None:
        # Hopper-v5 terminates, which fails without episodic=true
        done = start("train", *words(task="Hopper-v5,Pendulum-v1", episode_length=100, steps=110, seed_steps=100))
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


class TestCompletion:
    def complete(self, *args: str) -> list[str]:
        """Of the last word, as zsh and fish ask."""
        found = ShellComplete(app.app, {}, "tdmpc2-fast", "_TDMPC2_FAST_COMPLETE").get_completions(
            list(args[:-1]), args[-1]
        )
        return [i.value if i.type == "plain" else f"<{i.type}>" for i in found]

    @pytest.mark.parametrize(
        ("args", "found"),
        [
            (("",), ["train", "resume", "eval", "plot", "plan", "tasks", "info", "bench"]),
            (("plot", "ref"), ["reference="]),
            (("plan", "deci"), ["decision="]),
            (("tr",), ["train"]),
            (("train", "hor"), ["horizon="]),
            (("train", "preset=1"), ["preset=1m", "preset=19m"]),
            (("train", "obs="), ["obs=state", "obs=rgb"]),
            (("train", "mpc=f"), ["mpc=false"]),
            (("train", "task=dog-"), ["task=dog-run", "task=dog-stand", "task=dog-trot", "task=dog-walk"]),
            (("train", "task=dog-run,humanoid-w"), ["task=dog-run,humanoid-walk"]),
            (("train", "task", "=", "walker-w"), ["walker-walk"]),  # bash breaks words at "="
            (("train", "task", "=", "dog-run", "obs", "="), ["state", "rgb"]),
            (("train", "horizon=3", "hor"), []),
            (("task=dog-run", "hor"), ["horizon="]),
            (("task=humanoid-w",), ["task=humanoid-walk"]),
            (("eval", "chec"), ["checkpoint=", "checkpoint_minutes="]),
            (("eval", "checkpoint=ru"), ["<file>"]),
            (("eval", "pre"), ["precision="]),
            (("info", "ru"), ["<file>"]),
        ],
    )
    def test_words(self, args: tuple[str, ...], found: list[str]) -> None:
        assert self.complete(*args) == found

    def test_through_bash(self) -> None:
        env = dict(_TDMPC2_FAST_COMPLETE="bash_source")
        script = "import sys; from tdmpc2_fast.train.cli import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **env}, check=False
        )
        assert "complete -o nosort -o nospace -F" in done.stdout
        env = dict(_TDMPC2_FAST_COMPLETE="bash_complete", COMP_WORDS="tdmpc2-fast train hori", COMP_CWORD="2")
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **env}, check=False
        )
        assert done.stdout == "plain,horizon=\n"


def test_the_grammar_needs_no_terminal_packages() -> None:
    code = (
        "import sys; sys.modules['click'] = sys.modules['rich'] = None; import tdmpc2_fast.train.cli.keys, "
        "tdmpc2_fast.train.cli.sweep; print(tdmpc2_fast.train.cli.keys.parse(['horizon=4']))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "{'horizon': 4}\n", done.stderr


class TestDocs:
    def rows(self, *columns: str) -> dict[str, list[str]]:
        """The cells behind the key, of all tables in docs/config.md with these columns."""
        text = (ROOT / "docs/config.md").read_text()
        found: dict[str, list[str]] = {}
        for table in re.split(r"\n\n", text):
            lines = [[c.strip().strip("`") for c in line.strip("|").split(" | ")] for line in table.splitlines()]
            if tuple(c.strip() for c in lines[0][: len(columns)]) == columns:
                assert not {r[0].strip() for r in lines[2:]} & set(found)
                found |= {r[0].strip("` "): [c.strip("` ") for c in r[1:]] for r in lines[2:]}
        return found

    def test_every_official_key_is_there_and_accepted(self) -> None:
        official = self.rows("key", "official default")
        recorded = json.loads((GOLDEN / "single_5m.json").read_text())["config"]
        older = {"disable_wandb", "terminated_coef", "cudagraphs"}
        assert set(official) == {*recorded, *older} - {"get"}
        for key, (default, status, *_) in official.items():
            notes: list[str] = []
            got = keys.parse([f"{key}={default}"], notes.append)
            assert (status == "not needed") == (key in keys.NOT_NEEDED), key
            if default != "???":
                assert bool(notes) == (status == "not needed"), key
            if status == "honoured":
                assert Config.from_dict(got) == Config(), key
            elif status == "differs" and default != "???" and key not in older:
                assert getattr(Config(), key) != got[key], key

    def test_every_key_here_is_there(self) -> None:
        official, ours = self.rows("key", "official default"), self.rows("key", "default", "meaning")
        assert {*official, *ours} >= {*Config.key_names(), *keys.OPTION_FIELDS}
        assert not {*official} & {*ours}
        for key, (default, _) in ours.items():
            assert default == keys.default_text({**keys.CONFIG_FIELDS, **keys.OPTION_FIELDS}[key]), key

    def test_every_command_is_there(self) -> None:
        headings = re.findall(r"^## `(\w+)", (ROOT / "docs/commands.md").read_text(), re.MULTILINE)
        assert {c.name for c in app.COMMANDS} <= set(headings)

    def test_presets_are_those_of_the_makefile(self) -> None:
        text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
        found = re.search(r"^TRAIN +\?= (.+)$", text, re.MULTILINE)
        assert found is not None
        assert keys.parse(found[1].split()) == keys.PRESETS["quick"]
