"""The grammar of the command line, and its answers to mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import (
    Capture,
    in_an_empty_folder,  # noqa: F401
)

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.cli import keys

pytest.importorskip("dm_control")
pytest.importorskip("click")
pytest.importorskip("rich")

from tdmpc2_fast.train import cli


class TestGrammar:
    def test_numbers_as_people_write_them(self) -> None:
        got = keys.parse(
            ["steps=7_000_000", "lr=3e-4", "buffer_size=1e6", "vmax=+10", "vmin=-10", "batch_size=2*128", "seed=6/2"]
        )
        cfg = Config.from_dict(got)
        assert (cfg.steps, cfg.buffer_size, cfg.batch_size, cfg.seed, cfg.vmin) == (7_000_000, 1_000_000, 256, 3, -10)
        assert keys.parse(["steps=30+4", "eval_freq=30-4"]) == dict(steps=34, eval_freq=26)

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
            (["--overlap", "--horizon"], "allowed: overlap=true"),
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


def test_the_grammar_needs_no_terminal_packages() -> None:
    code = (
        "import sys; sys.modules['click'] = sys.modules['rich'] = None; import tdmpc2_fast.train.cli.keys, "
        "tdmpc2_fast.train.cli.sweep; print(tdmpc2_fast.train.cli.keys.parse(['horizon=4']))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "{'horizon': 4}\n", done.stderr
