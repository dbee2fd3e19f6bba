"""The loop without an environment: a hand-written one, what it leaves, going on bit for bit, and ends of all kinds."""

from __future__ import annotations

import csv
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, random_episode
from torch import Tensor

from tdmpc2_fast import TDMPC2, Config, ReplayBuffer
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.errors import ConfigError, NonFiniteError
from tdmpc2_fast.learn.batch import Batch
from tdmpc2_fast.train.envs import complete, make_env
from tdmpc2_fast.train.log.run_log import WALL_CLOCK_OFFLINE
from tdmpc2_fast.train.log.status import Clock, Status
from tdmpc2_fast.train.run.checkpoints import Checkpoints, trained
from tdmpc2_fast.train.run.loops import offline
from tdmpc2_fast.train.run.loops.offline import OfflineTrainer
from tdmpc2_fast.train.run.stop import Stop, Stopped

pytest.importorskip("gymnasium")

QUICK = dict(
    TINY, task="Pendulum-v1", episode_length=10, steps=25, eval_freq=10, eval_episodes=1, iterations=1, display="none"
)


def config(**changes: Any) -> Config:
    cfg = Config.from_dict({**QUICK, "device": "cpu", "num_threads": 1, **changes})
    env = make_env(cfg, 0)
    cfg = complete(cfg, env)
    env.close()
    return cfg


class Recorded:
    """A few episodes in memory. `at`: called with the number of each batch before it is drawn."""

    def __init__(self, cfg: Config) -> None:
        self.buffer = ReplayBuffer(cfg.replace(steps=1000))
        for i in range(4):
            self.buffer.add(random_episode(cfg, 12, seed=i))
        self.drawn, self.closed = 0, False
        self.at = lambda number: None

    def sample(self) -> Batch:
        self.at(self.drawn)
        self.drawn += 1
        return self.buffer.sample()

    def state(self) -> dict[str, Tensor]:
        return self.buffer.state() | dict(drawn=torch.tensor(self.drawn))

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        rows = self.buffer.steps(0, self.buffer.written)
        self.buffer.restore({k: v for k, v in state.items() if k != "drawn"}, [(0, rows)])
        self.drawn = int(state["drawn"])

    def close(self) -> None:
        self.closed = True


def trainer_in(folder: Path, resumed: bool = False, stop: Stop | None = None, **changes: Any) -> OfflineTrainer:
    cfg, saved = config(**changes), None
    folder.mkdir(exist_ok=True)
    if resumed:
        saved = Checkpoints(folder, keep=1).newest(print)
        assert saved is not None
    return OfflineTrainer(cfg, Recorded(cfg), folder, saved, stop, facts=dict(data="4 episodes"))


def finished(trainer: OfflineTrainer) -> OfflineTrainer:
    trainer.run()
    trainer.log.close()
    return trainer


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / name, newline="") as f:
        return [{k: v for k, v in row.items() if k not in WALL_CLOCK_OFFLINE} for row in csv.DictReader(f)]


def everything(trainer: OfflineTrainer) -> dict[str, Any]:
    found: dict[str, Tensor] = dict(tensors_only(trainer.agent.model.state_dict()))
    found |= {f"updater {k}": v for k, v in trainer.agent.updater.state().items()}
    found |= {f"planner {k}": v for k, v in trainer.agent.planner.state().items()}
    found |= {f"data {k}": v for k, v in trainer.data.state().items()} | trainer.metrics
    assert trainer.evaluator is not None
    found |= {f"evaluation {k}": v for k, v in trainer.evaluator.planner.state().items()}
    bytes_ = {k: v.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for k, v in found.items()}
    return bytes_ | {name: rows(trainer.folder, name) for name in ("train.csv", "eval.csv")}


@pytest.fixture(autouse=True)
def rows_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "_BETWEEN_ROWS", 4)


def test_it_is_a_loop_of_updates(tmp_path: Path) -> None:
    trainer = finished(trainer_in(tmp_path))
    cfg = trainer.cfg
    agent, data = TDMPC2(cfg), Recorded(cfg)
    for _ in range(25):
        metrics = agent.update(data)
    mine = tensors_only(trainer.agent.model.state_dict())
    assert all(torch.equal(x, mine[k]) for k, x in tensors_only(agent.model.state_dict()).items())
    assert trainer.data.closed  # type: ignore[attr-defined]
    train = rows(tmp_path, "train.csv")
    assert [int(r["step"]) for r in train] == [4, 8, 10, 12, 16, 20, 24, 25]  # every fourth, and before evaluations
    assert [r["updates"] for r in train] == [r["step"] for r in train]
    assert float(train[-1]["total_loss"]) == float(metrics["total_loss"])
    assert [int(r["step"]) for r in rows(tmp_path, "eval.csv")] == [0, 10, 20, 25]
    assert trained(tmp_path / "checkpoints" / "latest.safetensors").startswith("step 25 (25 updates), return")
    assert set(trainer.log.clock.seconds) == {"draw", "update", "evaluation"}
    assert "draw" in trainer.result()


@pytest.mark.triton
def test_a_batch_that_kernels_do_not_take_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'batch_size': got 5000, allowed: at most 4096 with backend=triton"):
        trainer_in(tmp_path, backend="triton", batch_size=5000)
    assert not list(tmp_path.iterdir())
    trainer_in(tmp_path, backend="torch", batch_size=5000).log.close()


@pytest.mark.parametrize("at", [0, 7, 10, 19])
def test_it_goes_on_bit_for_bit(at: int, tmp_path: Path) -> None:
    straight = finished(trainer_in(tmp_path / "straight"))
    stop = Stop()
    stopped = trainer_in(tmp_path / "stopped", stop=stop)

    def ask(number: int) -> None:
        if number == at:
            stop.signal = signal.SIGTERM

    stopped.data.at = ask  # type: ignore[attr-defined]
    with pytest.raises(Stopped):
        stopped.run()
    stopped.log.close()
    assert stopped.progress.decisions == at + 1
    assert not (tmp_path / "stopped" / "replay").exists()
    resumed = finished(trainer_in(tmp_path / "stopped", resumed=True))
    assert everything(resumed) == everything(straight)


def test_it_stops_inside_an_evaluation_and_evaluates_again(tmp_path: Path) -> None:
    straight = finished(trainer_in(tmp_path / "straight"))
    stop = Stop()
    stopped = trainer_in(tmp_path / "stopped", stop=stop)
    while stopped.progress.decisions < 10:
        stopped.step()
    stop.signal = signal.SIGINT
    with pytest.raises(Stopped):
        stopped._evaluate()
    stopped.close()
    stopped.log.close()
    assert stopped.evaluator is not None
    resumed = finished(trainer_in(tmp_path / "stopped", resumed=True))
    assert rows(tmp_path / "stopped", "train.csv") == rows(tmp_path / "straight", "train.csv")
    mine = tensors_only(resumed.agent.model.state_dict())
    assert all(torch.equal(x, mine[k]) for k, x in tensors_only(straight.agent.model.state_dict()).items())


def test_an_error_of_the_data_leaves_a_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)

    def fail(number: int) -> None:
        if number == 13:
            raise OSError("the disk is gone")

    trainer.data.at = fail  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.run()
    saved = Checkpoints(tmp_path, keep=1).newest(print)
    assert saved is not None
    assert saved.values["decisions"] == 13
    assert int(saved.tensors["updater/steps"]) == 13


def test_data_that_is_not_finite_ends_it_with_whole_weights(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    draw = trainer.data.sample
    trainer.data.sample = lambda: draw()._replace(reward=torch.full((3, 8, 1), float("nan")))  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError):
        trainer.run()
    assert all(bool(p.isfinite().all()) for p in trainer.agent.model.parameters())


def test_callbacks_hear_of_updates_and_end_it(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    heard: list[tuple[str, int]] = []

    def hear(event: Any) -> bool:
        heard.append((event.kind, event.step))
        return event.step < 8

    trainer.call([hear])
    finished(trainer)
    assert heard == [("evaluation", 0), ("updates", 4), ("updates", 8), ("evaluation", 8)]


def test_the_table_counts_updates_and_has_no_replay(tmp_path: Path) -> None:
    console = pytest.importorskip("rich.console").Console(width=80, height=30, color_system=None)
    from tdmpc2_fast.train.log.live_table import table

    status = Status(config(), tmp_path, 1, {}, Clock(), "updates")
    status.decisions, status.row = 20, dict(consistency_loss=0.0123)
    status.clock.seconds = dict(update=98.0, draw=1.0)
    with console.capture() as shown:
        console.print(table(status, 80, 30))
    words = ("20 / 25 updates", "updates/s", "draw", "training", "consistency 0.0123")
    assert all(text in shown.get() for text in words)
    assert not any(text in shown.get() for text in ("replay", "random actions", "episode ", "decisions"))
