"""Updates beside the environments: the same numbers, really beside, and an orderly end when something fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from loop_oracle import everything

from tdmpc2_fast import Config, load
from tdmpc2_fast.benchmarks.harness import stand_in
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.errors import NonFiniteError
from tdmpc2_fast.train.envs.together import InProcess
from tdmpc2_fast.train.run.overlap import InThread, Updates
from tdmpc2_fast.train.run.trainer import OnlineTrainer

QUICK = dict(
    TINY,
    task=stand_in.NAME,
    num_samples=16,
    iterations=1,
    seed_steps=30,
    steps=201,
    eval_freq=90,
    eval_episodes=1,
    device="cpu",
    env_workers=0,
)
LONG = 60.0  # what happens happens at once; this is for a machine that is stuck


@pytest.fixture
def trainer_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., OnlineTrainer]]:
    """Trainers of a task whose episodes have 25 decisions, each in a folder of its own."""
    monkeypatch.setattr(stand_in, "_DECISIONS", 25)
    stand_in.install(2)
    made: list[OnlineTrainer] = []

    def make(**changes: Any) -> OnlineTrainer:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(OnlineTrainer(Config.from_dict({**QUICK, **changes}), folder))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()


@pytest.mark.parametrize("several", [dict(), dict(num_envs=3, utd=0.9, seed_steps=30, steps=120)], ids=["one", "three"])
def test_overlapped_and_serial_loops_are_bitwise_equal(several: Any, trainer_of: Callable[..., OnlineTrainer]) -> None:
    seed = int(np.random.default_rng().integers(2**31))
    keys = dict(dict(seed=seed, seed_steps=60, steps=101, eval_freq=80), **several)
    serial, overlapped = (trainer_of(overlap=o, **keys) for o in (False, True))
    assert type(serial._updates) is Updates
    assert isinstance(overlapped._updates, InThread)
    found = []
    for trainer in (serial, overlapped):
        trainer.run()
        found.append(everything(trainer))
    assert serial.agent.updater.steps == (30 + int(0.9 * (120 - 78)) if several else 100)
    assert "eval.csv" in found[0]
    assert found[0].keys() == found[1].keys()
    assert not [k for k, v in found[0].items() if v != found[1][k]], f"seed {seed}"


def past_pretraining(trainer: OnlineTrainer) -> OnlineTrainer:
    while not trainer.progress.seeded:
        trainer.step()
    trainer._updates.wait()
    return trainer


def replace_step(trainer: OnlineTrainer, monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    """Call `before` ahead of each step of the one environment."""
    assert isinstance(trainer.envs, InProcess)
    env = trainer.envs.envs[0]
    step = env.step

    def after(action: Any) -> Any:
        before()
        return step(action)

    monkeypatch.setattr(env, "step", after)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_environment_steps_while_an_update_runs(
    overlap: bool, trainer_of: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = past_pretraining(trainer_of(overlap=overlap))
    stepped = threading.Event()
    update = trainer.agent.update
    saw_the_step = []

    def slow(buffer: Any) -> Any:
        saw_the_step.append(stepped.wait(LONG if overlap else 0.2))
        return update(buffer)

    monkeypatch.setattr(trainer.agent, "update", slow)
    replace_step(trainer, monkeypatch, stepped.set)
    trainer.step()
    trainer._updates.wait()
    assert saw_the_step == [overlap]


def test_an_update_does_not_see_the_episode_that_ends_beside_it(
    trainer_of: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(overlap=True)
    seen = []
    update = trainer.agent.update

    def note(buffer: Any) -> Any:
        seen.append((trainer.progress.decisions, buffer.num_eps))
        return update(buffer)

    monkeypatch.setattr(trainer.agent, "update", note)
    while trainer.progress.decisions < 52:
        trainer.step()
    trainer._updates.wait()
    # Episodes end at 25 and at 50; pretraining belongs to the decision after the 30th.
    assert seen == [(31, 1)] * 30 + [(d, 1) for d in range(32, 51)] + [(51, 2), (52, 2)]


def test_an_episode_that_ends_with_the_run_is_kept_and_logged_with_the_metrics_of_its_last_update(
    trainer_of: Callable[..., OnlineTrainer],
) -> None:
    trainer = trainer_of(overlap=True, steps=50, eval_freq=50)
    trainer.run()
    assert trainer.buffer.num_eps == 2
    last = (trainer.folder / "train.csv").read_text().splitlines()[-1].split(",")
    header = (trainer.folder / "train.csv").read_text().splitlines()[0].split(",")
    row = dict(zip(header, last, strict=True))
    assert row["decisions"] == "50"
    assert float(row["pi_loss"]) == float(trainer.metrics["pi_loss"])
    assert [line.split(",")[0] for line in (trainer.folder / "eval.csv").read_text().splitlines()[1:]] == ["0", "50"]


def test_checkpoints_are_written_with_no_update_in_flight(
    trainer_of: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(overlap=True, eval_freq=1, steps=60)
    running, saved = threading.Event(), []
    update, save = trainer.agent.update, trainer.checkpoints.save

    def watched(buffer: Any) -> Any:
        running.set()
        try:
            return update(buffer)
        finally:
            running.clear()

    def note(*state: Any) -> Path:
        saved.append(not running.is_set() and trainer._updates._last is None)  # type: ignore[attr-defined]
        return save(*state)

    monkeypatch.setattr(trainer.agent, "update", watched)
    monkeypatch.setattr(trainer.checkpoints, "save", note)
    trainer.run()
    assert len(saved) >= 4
    assert all(saved)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_failed_update_ends_the_run_and_skips_those_behind_it(
    overlap: bool, trainer_of: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(overlap=overlap)
    update, calls = trainer.agent.update, []

    def fails(buffer: Any) -> Any:
        calls.append(trainer.agent.updater.steps)
        if len(calls) == 8:  # in the middle of pretraining
            raise NonFiniteError("update 7: value_loss is not finite")
        return update(buffer)

    monkeypatch.setattr(trainer.agent, "update", fails)
    with pytest.raises(NonFiniteError, match="value_loss"):
        trainer.run()
    assert calls == list(range(8))
    assert_saved(trainer)


def assert_saved(trainer: OnlineTrainer) -> None:
    """The last checkpoint holds the weights as they are."""
    saved = tensors_only(load(trainer.folder / "checkpoints/latest", device="cpu").model.state_dict())
    now = tensors_only(trainer.agent.model.state_dict())
    assert all(torch.equal(v, saved[k]) for k, v in now.items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_update_under_way_is_finished_when_the_step_beside_it_fails(
    error: type[BaseException], trainer_of: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = past_pretraining(trainer_of(overlap=True, utd=300.0))
    begun, failing = threading.Event(), threading.Event()
    update, before = trainer.agent.update, trainer.agent.updater.steps

    def slow(buffer: Any) -> Any:
        begun.set()
        assert failing.wait(LONG)
        return update(buffer)

    def fail() -> None:
        assert begun.wait(LONG)
        failing.set()
        raise error("of the environment")

    monkeypatch.setattr(trainer.agent, "update", slow)
    replace_step(trainer, monkeypatch, fail)
    with pytest.raises(error, match="of the environment"):
        trainer.run()
    # Those behind it are dropped, but for the few that may have begun before the error came through.
    assert before + 1 <= trainer.agent.updater.steps < before + 300
    assert_saved(trainer)


class TestInThread:
    @pytest.fixture
    def updates(self) -> Iterator[InThread]:
        made = InThread()
        yield made
        made.close()

    def test_runs_in_order_and_waits(self, updates: InThread) -> None:
        ran: list[int] = []
        go = threading.Event()
        updates.launch(lambda: ran.append(-1) if go.wait(LONG) else None)
        for i in range(20):
            updates.launch(lambda i=i: ran.append(i))  # type: ignore[misc]
        assert ran == []
        go.set()
        updates.wait()
        assert ran == list(range(-1, 20))

    def test_an_error_is_raised_once_and_the_rest_skipped(self, updates: InThread) -> None:
        ran: list[int] = []

        def fail() -> None:
            raise ValueError("first")

        updates.launch(fail)
        updates.launch(lambda: ran.append(1))
        with pytest.raises(ValueError, match="first"):
            updates.join()
        updates.wait()
        updates.launch(lambda: ran.append(2))
        updates.wait()
        assert ran == [2]

    def test_close_drops_what_has_not_begun(self, updates: InThread) -> None:
        ran: list[int] = []
        begun, go = threading.Event(), threading.Event()

        def first() -> None:
            begun.set()
            go.wait(LONG)
            ran.append(1)

        updates.launch(first)
        updates.launch(lambda: ran.append(2))
        assert begun.wait(LONG)
        threading.Timer(0.1, go.set).start()
        updates.close()
        assert ran == [1]
        updates.wait()
        updates.close()

    def test_the_thread_count_is_the_callers(self, updates: InThread) -> None:
        before, found = torch.get_num_threads(), []
        x = torch.randn(300_001)  # large enough for torch to split a sum, and for the split to show in its rounding
        try:
            for count in (1, 2, 1):
                torch.set_num_threads(count)
                updates.launch(lambda: found.append((torch.get_num_threads(), x.sum(), (x.exp() @ x).item())))
                updates.wait()
                assert found[-1] == (count, x.sum(), (x.exp() @ x).item())
        finally:
            torch.set_num_threads(before)
