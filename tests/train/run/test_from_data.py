"""Runs from data sets, fine-tuning, and both at once, as a person starts them: by keys."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from data_sets import make_data

from tdmpc2_fast import Config, load
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.errors import ConfigError, DataError, NonFiniteError
from tdmpc2_fast.model.files import read_tensors
from tdmpc2_fast.train import cli
from tdmpc2_fast.train.log.run_log import WALL_CLOCK, WALL_CLOCK_OFFLINE
from tdmpc2_fast.train.run import lifecycle
from tdmpc2_fast.train.run.loops.base import Trainer
from tdmpc2_fast.train.run.loops.choice import keys_of
from tdmpc2_fast.train.run.loops.mixed import Mixed, shares
from tdmpc2_fast.train.run.loops.offline import OfflineTrainer
from tdmpc2_fast.train.run.rollouts import HostRollouts

pytest.importorskip("gymnasium")

QUICK = dict(TINY, iterations=1, num_samples=16, device="cpu", num_threads=1, display="none", eval_episodes=1)
PENDULUM = dict(QUICK, task="Pendulum-v1", episode_length=9)
OFFLINE = dict(PENDULUM, steps=12, eval_freq=5)
MIXED = dict(PENDULUM, steps=50, seed_steps=15, eval_freq=20, mix=0.25)


def run(folder: Path, **keys: Any) -> lifecycle.Outcome:
    return lifecycle.start({**keys, "work_dir": str(folder)})


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return [{k: v for k, v in r.items() if k not in WALL_CLOCK + WALL_CLOCK_OFFLINE} for r in csv.DictReader(f)]


def left(folder: Path) -> dict[str, Any]:
    """What a finished run leaves: all tensors of its last checkpoint, and the rows of its files."""
    newest = max((p for p in (folder / "checkpoints").iterdir() if p.is_dir()), key=lambda p: int(p.name[:4]))
    found: dict[str, Any] = {}
    for name in ("agent", "training"):
        for key, x in read_tensors(newest / f"{name}.safetensors")[0].items():
            found[f"{name} {key}"] = x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    values = json.loads((newest / "manifest.json").read_text())["values"]
    del values["log"]
    return found | dict(values=values, train=rows(folder / "train.csv"), eval=rows(folder / "eval.csv"))


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Asks the next run to stop after so many steps."""
    stop_or_save = Trainer._stop_or_save

    def stop_at(count: int) -> None:
        def ask(trainer: Trainer) -> None:
            if trainer.progress.decisions >= count:
                trainer.stop.signal = signal.SIGTERM
                monkeypatch.setattr(Trainer, "_stop_or_save", stop_or_save)
            stop_or_save(trainer)

        monkeypatch.setattr(Trainer, "_stop_or_save", ask)

    return stop_at


@pytest.mark.parametrize(("keys", "at"), [(OFFLINE, 7), (MIXED, 33)], ids=["offline", "mixed"])
def test_a_run_from_data_goes_on_bit_for_bit(
    keys: dict[str, Any], at: int, tmp_path: Path, stop_after: Callable[[int], None]
) -> None:
    data = make_data(tmp_path / "data", "Pendulum-v1")
    whole = run(tmp_path / "whole", **keys, data_dir=str(data))
    assert whole.status == 0
    stop_after(at)
    assert run(tmp_path / "parts", **keys, data_dir=str(data)).status == 128 + signal.SIGTERM
    moved = data.rename(tmp_path / "moved")
    assert lifecycle.resume(tmp_path / "parts", dict(data_dir=str(moved))).status == 0
    assert left(tmp_path / "parts") == left(tmp_path / "whole")


def test_several_tasks_are_learned_from_data(tmp_path: Path) -> None:
    pytest.importorskip("dm_control")
    data = make_data(tmp_path / "data", "cup-catch", "reacher-easy", "Pendulum-v1")
    keys = dict(QUICK, task="two", tasks=("reacher-easy", "cup-catch"), steps=4, eval_freq=100, mpc=False)
    outcome = run(tmp_path / "run", **keys, data_dir=str(data))
    assert outcome.agent is not None
    assert outcome.agent.updater.steps == 4
    assert outcome.evaluation is not None
    assert list(outcome.evaluation.by_task) == ["reacher-easy", "cup-catch"]
    assert [r["step"] for r in rows(tmp_path / "run" / "eval.csv")] == ["0", "4"]
    assert (tmp_path / "run" / "curve.svg").exists() or (tmp_path / "run" / "curve.png").exists()
    assert load(tmp_path / "run").cfg.tasks == ("reacher-easy", "cup-catch")


def test_the_official_sets_have_the_official_batch() -> None:
    assert keys_of(dict(task="mt30", data_dir="x"), None)["batch_size"] == 1024
    assert keys_of(dict(task="mt30", data_dir="x", batch_size=64), None)["batch_size"] == 64
    assert "batch_size" not in keys_of(dict(task="walker-walk", data_dir="x"), None)
    assert "batch_size" not in keys_of(dict(task="mt30"), None)


def test_data_that_does_not_fit_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    def refused(data: Path, **changes: Any) -> str:
        with pytest.raises((DataError, ConfigError)) as e:
            run(tmp_path / "run", **{**OFFLINE, **changes}, data_dir=str(data))
        assert not (tmp_path / "run").exists()
        return str(e.value)

    assert "no episodes of 'Pendulum-v1'" in refused(make_data(tmp_path / "other", "cup-catch"))
    wide = make_data(tmp_path / "wide", "Pendulum-v1", **{"Pendulum-v1": (4, 1)})
    assert "observations and actions of 4 and 1 numbers, allowed: 3 and 1" in refused(wide)
    long = make_data(tmp_path / "long", "Pendulum-v1", length=10)
    assert "has episodes of 10 decisions, allowed: at most 9" in refused(long)
    short = make_data(tmp_path / "short", "Pendulum-v1", length=2)
    assert "none with a slice of 4 rows" in refused(short)
    assert "is not there" in refused(tmp_path / "none")
    good = make_data(tmp_path / "good", "Pendulum-v1")
    assert "'batch_size': got 1, allowed with mix: at least 2" in refused(good, mix=0.5, batch_size=1)


def test_keys_that_do_nothing_without_playing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = dict(utd=4, seed_steps=9, num_envs=3, env_workers=0, buffer_size=70, overlap=True)
    data = str(make_data(tmp_path / "data", "Pendulum-v1"))
    shown = dict(OFFLINE, display="lines", steps=2)
    run(tmp_path / "run", **{**shown, **keys}, data_dir=data, on_env_error="drop")
    said = "".join(capsys.readouterr())
    assert [k for k, v in keys.items() if f"{k}={v} has no effect: the run learns from data alone" in said] == [*keys]
    assert said.count("has no effect") == len(keys)
    assert lifecycle.resume(tmp_path / "run", dict(steps=3, overlap=False)).status == 0
    assert "overlap=False has no effect" in "".join(capsys.readouterr())
    run(tmp_path / "plain", **shown, data_dir=data)
    assert "has no effect" not in "".join(capsys.readouterr())


def test_other_data_is_no_continuation(tmp_path: Path, stop_after: Callable[[int], None]) -> None:
    stop_after(7)
    run(tmp_path / "run", **OFFLINE, data_dir=str(make_data(tmp_path / "data", "Pendulum-v1")))
    other = make_data(tmp_path / "other", "Pendulum-v1", episodes=5)
    with pytest.raises(DataError, match="is not what the run has drawn from"):
        lifecycle.resume(tmp_path / "run", dict(data_dir=str(other)))
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"no such folder, seen from .*; data_dir=FOLDER says where it is now"):
        lifecycle.resume(tmp_path / "run", {})


def test_a_run_does_not_turn_into_one_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(make_data(tmp_path / "data", "Pendulum-v1"))
    run(tmp_path / "offline", **OFFLINE, data_dir=data)
    run(tmp_path / "online", **{**PENDULUM, "steps": 20, "seed_steps": 18, "eval_freq": 100})
    for name, given, allowed in (
        ("offline", "none", f"has {data!r}, allowed: the folder where its data is now"),
        ("online", data, "has None, allowed: none, since it learns without data"),
    ):
        assert cli.main(["resume", str(tmp_path / name), f"data_dir={given}", "steps=400"]) == 2
        assert allowed in capsys.readouterr().err


def test_a_run_goes_on_with_what_it_had_where_more_was_appended(
    tmp_path: Path, stop_after: Callable[[int], None]
) -> None:
    data = make_data(tmp_path / "data", "Pendulum-v1")
    whole = run(tmp_path / "whole", **OFFLINE, data_dir=str(data))
    assert whole.status == 0
    stop_after(7)
    run(tmp_path / "parts", **OFFLINE, data_dir=str(data))
    make_data(data, "Pendulum-v1", "cup-catch", episodes=3)
    assert lifecycle.resume(tmp_path / "parts", {}).status == 0
    assert left(tmp_path / "parts") == left(tmp_path / "whole")


def test_widths_are_checked_of_each_task(tmp_path: Path) -> None:
    """A multi-task config has the widest alone."""
    pytest.importorskip("dm_control")
    data = make_data(tmp_path / "data", "cup-catch", "reacher-easy", **{"reacher-easy": (7, 2)})
    keys = dict(QUICK, task="two", tasks=("reacher-easy", "cup-catch"), steps=4, eval_freq=100, mpc=False)
    with pytest.raises(DataError, match="'reacher-easy' has observations of 7 numbers, allowed: 6, as its environment"):
        run(tmp_path / "run", **keys, data_dir=str(data))
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_are_looked_for_in_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise NonFiniteError("update 0: is not finite")

    monkeypatch.setattr(OfflineTrainer, "step", broken)
    with pytest.raises(NonFiniteError) as e:
        run(tmp_path / "run", **OFFLINE, data_dir=str(make_data(tmp_path / "data", "Pendulum-v1")))
    assert f"data check {tmp_path / 'data'}" in e.value.__notes__[0]


def test_a_share_of_each_batch_comes_from_the_data() -> None:
    cfg = Config(batch_size=8, data_dir="x", mix=0.25).with_env({"state": (3,)}, 1, 9)
    assert shares(cfg) == (6, 2)
    assert [shares(cfg.replace(mix=mix))[1] for mix in (0.01, 0.99)] == [1, 7]
    assert shares(cfg.replace(mix=None)) == (8, 0)


def test_mixed_batches_are_both_parts_side_by_side(tmp_path: Path) -> None:
    from conftest import random_episode

    from tdmpc2_fast import ReplayBuffer
    from tdmpc2_fast.train.data.dataset import DataSet
    from tdmpc2_fast.train.data.draws import Draws

    data = DataSet.open(make_data(tmp_path / "data", "a", "b"))
    cfg = Config.from_dict(dict(TINY, device="cpu", task="two", tasks=("a", "b"))).with_tasks([(3, 1, 9), (3, 1, 9)])

    def parts() -> tuple[ReplayBuffer, Draws]:
        buffer = ReplayBuffer(cfg.replace(batch_size=6))
        buffer.add(random_episode(cfg, 10, task=1))
        return buffer, Draws(data, cfg.replace(batch_size=2), "cpu")

    (buffer, draws), (replay, stream) = parts(), parts()
    mixed = Mixed(replay, stream)
    for _ in range(3):
        own, more, found = buffer.sample(), draws.sample(), mixed.sample().checked(cfg)
        for x, y, both in zip(own, more, found, strict=True):
            dim = both.ndim > 1
            assert torch.equal(both, torch.cat([x, y], int(dim)))
    draws.close()
    stream.close()


def test_a_new_task_begins_from_a_model_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dm_control")
    keys = dict(QUICK, steps=3, eval_freq=100, mpc=False)
    data = make_data(tmp_path / "data", "cup-catch", "reacher-easy")
    run(tmp_path / "two", **keys, task="two", tasks=("reacher-easy", "cup-catch"), data_dir=str(data))
    own = {k: v for k, v in QUICK.items() if k not in ("latent_dim", "mlp_dim", "enc_dim", "num_q")}
    new = dict(own, task="Pendulum-v1", episode_length=9, seed_steps=18, eval_freq=100, freeze="encoder")
    new |= dict(init=str(tmp_path / "two"), init_task="cup-catch", work_dir=str(tmp_path / "fine"))
    outcome = lifecycle.start(dict(new, steps=40))
    assert outcome.status == 0
    agent, donor = outcome.agent, load(tmp_path / "two")
    assert agent is not None
    assert (agent.cfg.tasks, agent.cfg.action_dims, agent.cfg.observation_shape) == (("Pendulum-v1",), (1,), (8,))
    assert agent.updater.steps > 18
    mine, theirs = (tensors_only(a.model.state_dict()) for a in (agent, donor))
    assert all(torch.equal(x, theirs[k]) for k, x in mine.items() if k.startswith("_encoder."))
    assert not torch.equal(mine["_dynamics.0.weight"], theirs["_dynamics.0.weight"])
    assert lifecycle.resume(tmp_path / "fine", dict(steps=50)).status == 0
    resumed = lifecycle.start(dict(new, steps=60, resume="auto"))
    assert resumed.status == 0
    assert resumed.agent is not None
    assert resumed.agent.updater.steps == agent.updater.steps + 20
    mine = tensors_only(resumed.agent.model.state_dict())
    assert all(torch.equal(x, theirs[k]) for k, x in mine.items() if k.startswith("_encoder."))
    assert cli.main(["eval", str(tmp_path / "fine"), "eval_episodes=2"]) == 0
    assert "Pendulum-v1" in capsys.readouterr().out


def test_a_wider_task_and_data_of_it_beside_the_replay(tmp_path: Path) -> None:
    pytest.importorskip("dm_control")
    first = run(tmp_path / "one", **{**PENDULUM, "steps": 40, "seed_steps": 18, "eval_freq": 100})
    assert first.agent is not None
    keys = {k: v for k, v in QUICK.items() if k not in ("latent_dim", "mlp_dim", "enc_dim", "num_q")}
    data = make_data(tmp_path / "data", "reacher-easy")
    more = dict(task="reacher-easy", data_dir=str(data), mix=0.5, steps=505, seed_steps=500, eval_freq=600, mpc=False)
    outcome = run(tmp_path / "fine", **keys, **more, init=str(tmp_path / "one"), utd=0.02)
    assert outcome.status == 0
    assert outcome.agent is not None
    assert outcome.agent.cfg.latent_dim == first.agent.cfg.latent_dim
    assert not outcome.agent.cfg.multitask
    assert outcome.agent.updater.steps == 500 + int(0.02 * 4)


@pytest.mark.parametrize("key", ["init", "checkpoint", None])
def test_an_agent_that_has_learned_plays_its_seed_episodes(
    key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**PENDULUM, "steps": 20, "seed_steps": 18, "eval_freq": 100}
    run(tmp_path / "one", **keys)
    chosen: list[str] = []
    for name in ("act", "take"):
        known = getattr(HostRollouts, name)

        def noted(self: HostRollouts, given: Any, name: str = name, known: Any = known) -> None:
            chosen.append(name)
            known(self, given)

        monkeypatch.setattr(HostRollouts, name, noted)
    begin = {} if key is None else {key: str(tmp_path / "one" / "checkpoints" / "latest")}
    assert run(tmp_path / "two", **keys, **begin).status == 0
    assert chosen == (["take"] * 19 + ["act"] if key is None else ["act"] * 20)
    capsys.readouterr()
    run(tmp_path / "short", **keys | dict(steps=18, display="lines"), **begin)
    assert f"comes after seed_steps=18{' random' * (key is None)} decisions" in "".join(capsys.readouterr())


def test_a_run_stopped_while_its_agent_plays_goes_on_bit_for_bit(
    tmp_path: Path, stop_after: Callable[[int], None]
) -> None:
    keys = {**PENDULUM, "steps": 30, "seed_steps": 18, "eval_freq": 100}
    run(tmp_path / "one", **keys)
    keys["init"] = str(tmp_path / "one")
    assert run(tmp_path / "whole", **keys).status == 0
    stop_after(7)
    assert run(tmp_path / "parts", **keys).status == 128 + signal.SIGTERM
    assert lifecycle.resume(tmp_path / "parts", {}).status == 0
    assert left(tmp_path / "parts") == left(tmp_path / "whole")


def test_wrong_ways_to_begin_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no such file"):
        run(tmp_path / "run", **OFFLINE, init=str(tmp_path / "none.pt"))
    with pytest.raises(ConfigError, match="'init': got 'x', allowed: none where checkpoint is given"):
        run(tmp_path / "run", **OFFLINE, init="x", checkpoint="y")
    with pytest.raises(ConfigError, match="'freeze': got 'encoder', allowed: none without init or checkpoint"):
        run(tmp_path / "run", **OFFLINE, freeze="encoder")
    run(tmp_path / "one", **{**PENDULUM, "steps": 20, "seed_steps": 18, "eval_freq": 100})
    with pytest.raises(ConfigError, match=r"'latent_dim': got 8, allowed: 16, as in the model of init"):
        run(tmp_path / "run", **{**PENDULUM, "latent_dim": 8}, init=str(tmp_path / "one"))
    assert not (tmp_path / "run").exists()
