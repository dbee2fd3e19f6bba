"""Runs of one model on several tasks, end to end: what is learned from, logged, evaluated and gone on with."""

from __future__ import annotations

import csv
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Capture
from conftest import TINY
from loop_oracle import everything

pytest.importorskip("gymnasium")
pytest.importorskip("dm_control")
pytest.importorskip("rich")

from task_suite import NARROW, SIZES, TALL, WIDE

import tdmpc2_fast
from tdmpc2_fast import TDMPC2, Config, Planner, load
from tdmpc2_fast.errors import ConfigError, InputError
from tdmpc2_fast.seeds import stream_seed
from tdmpc2_fast.train import cli
from tdmpc2_fast.train.envs import make_env
from tdmpc2_fast.train.run.checkpoints import Checkpoints
from tdmpc2_fast.train.run.evaluate import Evaluation, Evaluator, score
from tdmpc2_fast.train.run.stop import Stop, Stopped
from tdmpc2_fast.train.run.trainer import OnlineTrainer

TASKS = [WIDE, NARROW, TALL]
QUICK = dict(
    TINY,
    task="set",
    tasks=TASKS,
    num_samples=16,
    iterations=1,
    seed_steps=30,
    steps=60,
    eval_freq=25,
    eval_episodes=2,
    device="cpu",
    num_threads=1,
    display="none",
)


def trainer(folder: Path, **changes: Any) -> OnlineTrainer:
    folder.mkdir(exist_ok=True)
    return OnlineTrainer(Config.from_dict({**QUICK, **changes}), folder)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_a_run_learns_and_logs_every_task(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    found = run.run()
    train, evals = rows(tmp_path / "train.csv"), rows(tmp_path / "eval.csv")
    assert [row["task"] for row in train[:7]] == (TASKS * 3)[:7]
    assert [int(row["episode_length"]) for row in train[:3]] == [7, 5, 6]
    assert all(math.isfinite(float(row["total_loss"])) for row in train[7:])
    steps = run.buffer.steps(run.buffer.written - len(run.buffer), run.buffer.written)
    assert steps["task"].tolist() == (3 * ([0] * 8 + [1] * 6 + [2] * 7))[-60:]  # what the ring holds of nine episodes
    dead = torch.tensor([[a >= SIZES[TASKS[t]][1] for a in range(2)] for t in steps["task"].tolist()])
    live = steps["action"].isfinite() & ~dead
    assert (steps["action"][dead & steps["action"].isfinite()] == 0).all()
    assert (steps["action"][live] != 0).all()
    assert list(evals[0]) == [
        *("step", "reward", "seed", "normalized_score"),
        *(f"{what}+{name}" for name in TASKS for what in ("return", "success")),
    ]
    assert list(found.by_task) == TASKS
    last = evals[-1]
    for name, of in found.by_task.items():
        assert float(last[f"return+{name}"]) == pytest.approx(of.mean_return, abs=1e-4)
        assert float(last[f"success+{name}"]) == pytest.approx(np.mean(of.successes), abs=1e-4)
    assert float(last["reward"]) == pytest.approx(np.mean([e.mean_return for e in found.by_task.values()]), abs=0.06)
    assert last["normalized_score"] == ""  # nobody published a scale for them
    cfg = json.loads((tmp_path / "config.json").read_text())
    assert (cfg["multitask"], cfg["tasks"], cfg["action_dims"]) == (True, TASKS, [2, 1, 1])
    assert load(tmp_path).cfg.tasks == tuple(TASKS)


class StopAfter(Stop):
    """Asks for an end when it was asked so often whether to."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self.left = asked

    def wanted(self) -> int:
        self.left -= 1
        return signal.SIGTERM if self.left < -1 else 0


@pytest.mark.parametrize(
    ("count", "workers", "asked"),
    # The first evaluation asks 36 times, then each decision does once; 20 is in the middle of that evaluation.
    [(1, 0, 20), (1, 0, 50), (1, 0, 110), (2, 0, 60), (2, 2, 75), (4, 0, 47), (4, 2, 52)],
)
def test_a_run_that_is_stopped_goes_on_bit_for_bit(count: int, workers: int, asked: int, tmp_path: Path) -> None:
    keys = dict(num_envs=count, env_workers=workers, steps=60 * count, eval_freq=25 * count, seed_steps=30 * count)
    whole = trainer(tmp_path / "whole", **keys)
    whole.run()
    cfg, folder = Config.from_dict({**QUICK, **keys}), tmp_path / "parts"
    folder.mkdir()
    with pytest.raises(Stopped):
        OnlineTrainer(cfg, folder, stop=StopAfter(asked)).run()
    saved = Checkpoints(folder, 2).newest(pytest.fail)
    assert saved is not None
    assert (saved.values["decisions"] > 0) == (asked > 36)
    assert saved.values["decisions"] < 60 * count
    after = OnlineTrainer(cfg, folder, saved)
    after.run()
    assert everything(after) == everything(whole)


def by_hand(agent: TDMPC2, episodes: int) -> dict[str, list[float]]:
    """The returns of an evaluation, from environments of single tasks and a planner, and nothing else."""
    cfg, found = agent.cfg, {}
    planner = Planner(agent.model, 1, seed=stream_seed(cfg.seed, "eval"))
    for task, name in enumerate(cfg.tasks):
        width, actions, length = SIZES[name]
        envs = [
            make_env(Config(task=name), stream_seed(cfg.seed, f"eval env {i} of {name}") % 2**31)
            for i in range(min(episodes, 5))
        ]
        found[name] = [0.0] * episodes
        for n in range(episodes):
            env = envs[n % len(envs)]
            obs = env.reset()
            for t in range(length):
                padded = torch.zeros(1, 4)
                padded[0, :width] = torch.from_numpy(obs)
                action = planner.plan(padded, t0=t == 0, eval_mode=True, task=task)[0].numpy()
                assert not action[actions:].any()
                obs, reward, *_ = env.step(action[:actions])
                found[name][n] += reward
    return found


@pytest.mark.parametrize("episodes", [2, 7])
def test_an_evaluation_is_what_a_loop_by_hand_gives(episodes: int, livened: Callable[[TDMPC2], TDMPC2]) -> None:
    cfg = Config.from_dict({**QUICK, "eval_episodes": episodes}).with_tasks([SIZES[name] for name in TASKS])
    agent = livened(TDMPC2(cfg))
    told: list[tuple[int, int]] = []
    found = Evaluator(agent).run(busy=lambda done, total: told.append((done, total)))
    assert {name: of.returns for name, of in found.by_task.items()} == by_hand(agent, episodes)
    assert found.lengths == [n for name in TASKS for n in [SIZES[name][2]] * episodes]
    total = 18 * episodes
    assert told == [(n, total) for n in range(1, total + 1)]
    some = Evaluator(agent, tasks=[TALL, WIDE]).run()
    assert list(some.by_task) == [WIDE, TALL]
    assert some.by_task[WIDE] == found.by_task[WIDE]
    with pytest.raises(ConfigError, match="allowed: task_suite:Wide"):
        Evaluator(agent, tasks=["walker-walk"])


@pytest.mark.parametrize("episodes", [2, 7])
def test_side_by_side_as_many_episodes_of_each_are_played(episodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: environments of all tasks in one plan."""
    cfg = Config.from_dict({**QUICK, "eval_episodes": episodes}).with_tasks([SIZES[name] for name in TASKS])
    agent = TDMPC2(cfg)
    evaluator = Evaluator(agent)
    width = 3 * min(episodes, 5)
    assert len(evaluator.envs) == width
    evaluator.planner = Planner(agent.model, width)
    asked = []
    plan = evaluator.planner.plan

    def watched(obs: torch.Tensor, **given: Any) -> torch.Tensor:
        asked.append(given["task"].tolist())
        return plan(obs, **given)

    monkeypatch.setattr(evaluator.planner, "plan", watched)
    found = evaluator.run()
    assert all(task == [0, 1, 2] * (width // 3) for task in asked)
    assert len(asked) == 7 * -(-episodes // 5)
    assert [of.lengths for of in found.by_task.values()] == [[SIZES[name][2]] * episodes for name in TASKS]


def test_the_score_is_the_published_one() -> None:
    assert score("walker-walk", [500.0, 700.0], [0.0, 0.0]) == 60.0
    assert score("mw-reach", [4000.0, 0.0], [1.0, 0.0]) == 50.0
    assert score("myo-reach", [3.0], [1.0]) == score("pick-cube", [3.0], [1.0]) == 100.0
    assert math.isnan(score("Pendulum-v1", [-900.0], [0.0]))
    episodes = {"walker-walk": [(800.0, 0.0, 500)], "mw-reach": [(4000.0, 1.0, 100)]}
    both = Evaluation.of_several({name: Evaluation.of(name, e) for name, e in episodes.items()})
    assert (both.normalized_score, both.merit, both.mean_return) == (90.0, 90.0, 2400.0)
    assert both.columns() == {
        "normalized_score": 90.0,
        **{"return+walker-walk": 800.0, "success+walker-walk": 0.0},
        **{"return+mw-reach": 4000.0, "success+mw-reach": 1.0},
    }
    assert Evaluation.of("walker-walk", episodes["walker-walk"]).columns() == {}


def test_the_commands_know_the_tasks(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = {k: v for k, v in QUICK.items() if k not in ("task", "tasks")} | dict(eval_episodes=1, work_dir="run")
    words = [f"{k}={v}" for k, v in short.items()]
    assert cli.main(["train", f"task={','.join(TASKS)}", "as=set", *words]) == 0
    assert {"curve.png", "eval.csv"} <= {p.name for p in Path("run").iterdir()}
    capsys.readouterr()
    assert cli.main(["eval", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": return")[0] for line in lines[1:]] == [*TASKS, "set"]
    assert cli.main(["eval", "run", f"tasks={NARROW}"]) == 0
    assert [line.partition(": return")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [NARROW, "set"]
    assert cli.main(["eval", "run", "tasks=other"]) == 2
    assert "'tasks': got 'other', allowed: task_suite:Wide" in capsys.readouterr().err
    for command in ("eval", "plan"):
        for other, allowed in (
            (NARROW, f"; tasks={NARROW} plays"),
            ("cup-catch", f", whose tasks are {WIDE}, {NARROW}"),
        ):
            assert cli.main([command, "run", f"task={other}"]) == 2
            assert f"'task': got {other!r}, allowed: 'set', as the multi-task model is called{allowed}" in "".join(
                capsys.readouterr().err.splitlines()
            )
    assert cli.main(["plan", "run", "decision=2"]) == 2
    assert "allowed: one of task_suite:Wide" in capsys.readouterr().err
    assert cli.main(["plan", "run", "decision=2", f"tasks={NARROW}", "out=plan.png"]) == 0
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["info", "run"]) == 0
    assert "tasks 3" in capsys.readouterr().out
    assert cli.main(["resume", "run", "steps=70"]) == 0
    assert rows(Path("run/eval.csv"))[-1]["step"] == "70"
    again = [*(w for w in words if not w.startswith("steps=")), "steps=80", "resume=auto"]
    assert cli.main(["train", f"task={','.join(TASKS)}", "as=set", *again]) == 0
    assert rows(Path("run/eval.csv"))[-1]["step"] == "80"
    assert cli.main(["train", f"task={','.join(TASKS[:2])}", "as=set", *again]) == 2
    assert "'tasks'" in capsys.readouterr().err


def test_a_program_gives_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {k: v for k, v in QUICK.items() if k not in ("task", "tasks")}
    events: list[str] = []
    agent = tdmpc2_fast.train([WIDE, NARROW], as_="both", callbacks=lambda e: events.extend(e.values), **keys)
    assert (agent.cfg.task, agent.cfg.tasks, agent.folder) == ("both", (WIDE, NARROW), Path("runs/both/default/1"))
    assert {"task", f"return+{NARROW}"} <= {*events}
    assert list(agent.evaluate(episodes=1, tasks=[NARROW]).by_task) == [NARROW]
    assert agent.act(np.zeros(2), task=NARROW).shape == (1,)
    assert agent.act(np.zeros(3), task=WIDE).shape == (2,)
    for call in (lambda: agent.act(np.zeros(3)), lambda: agent.act(np.zeros(3), task=TALL)):
        with pytest.raises(ConfigError, match=r"allowed: task_suite:Wide-v0, task_suite:Narrow-v0"):
            call()
    for task, width, own in ((WIDE, 2, 3), (WIDE, 4, 3), (NARROW, 1, 2)):  # what pads NARROW to WIDE may be there
        with pytest.raises(InputError, match=f"obs: got {width} numbers, allowed: {own}, as {task} observes"):
            agent.act(np.zeros(width), task=task)
    assert agent.act(np.zeros(3), task=NARROW).shape == (1,)
    one = tdmpc2_fast.train([NARROW], as_="one", **keys)
    assert one.act(np.zeros(2)).shape == (1,)
    with pytest.raises(ConfigError, match="as"):
        tdmpc2_fast.train([WIDE, NARROW], **keys)
    with pytest.raises(ConfigError, match=r"as_: got .*list"):
        tdmpc2_fast.train(WIDE, as_="both", **keys)
    with pytest.raises(ConfigError, match="env: got"):
        agent.evaluate(env=WIDE)
    with pytest.raises(ConfigError, match="made by name"):
        tdmpc2_fast.train(task=[WIDE, NARROW], as_="both", eval_env=WIDE, **keys)
    gymnasium = pytest.importorskip("gymnasium")
    with pytest.raises(ConfigError, match="made by name"):
        tdmpc2_fast.train(gymnasium.make(WIDE), tasks=[WIDE, NARROW], **keys)


def test_official_tasks_of_dmcontrol_are_played_together(tmp_path: Path) -> None:
    pair = ["pendulum-swingup", "cartpole-balance"]
    run = trainer(tmp_path, tasks=pair, steps=1010, seed_steps=1000, eval_episodes=1, eval_freq=10_000, mpc=False)
    found = run.run()
    assert [row["task"] for row in rows(tmp_path / "train.csv")] == pair
    assert found.lengths == [500, 500]
    assert found.normalized_score == pytest.approx(found.mean_return / 10)
    assert float(rows(tmp_path / "eval.csv")[-1]["normalized_score"]) == pytest.approx(found.normalized_score, abs=1e-3)
    assert rows(tmp_path / "eval.csv")[-1]["step"] == "2020"  # each repeats actions twice


def test_an_official_checkpoint_is_played_in_some_of_its_tasks(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    agent = TDMPC2(Config(task="mt30", model_size=1, device="cpu"))
    agent.save("mt30-1M.pt")
    words = ["eval", "mt30-1M.pt", "eval_episodes=1", "mpc=false", "device=cpu"]
    assert cli.main([*words, "tasks=cup-catch,pendulum-spin"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.partition(": return")[0] for line in lines] == ["cup-catch", "pendulum-spin", "mt30"]
    assert "normalised score" in lines[2]
    assert "normalised score" not in lines[0]
    # The same by hand: the policy's mean in an environment of the task alone.
    env = make_env(Config(task="cup-catch"), stream_seed(1, "eval env 0 of cup-catch") % 2**31)
    prior, index = TDMPC2(agent.cfg.replace(mpc=False)), agent.cfg.tasks.index("cup-catch")
    prior.load("mt30-1M.pt")
    obs, total = env.reset(), 0.0
    for _ in range(500):
        padded = torch.zeros(24)
        padded[:8] = torch.from_numpy(obs)
        mean = prior.act(padded, eval_mode=True, task=index).numpy()
        obs, reward, *_ = env.step(mean[:2])
        total += reward
    assert lines[0].startswith(f"cup-catch: return {total:.1f} ")
