"""The training loop, end to end on tiny models."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

from tdmpc2_fast import TDMPC2, Config, load
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.model.checkpoint import find_checkpoint
from tdmpc2_fast.train.envs import make_env
from tdmpc2_fast.train.envs.together import InProcess
from tdmpc2_fast.train.run import lifecycle as runs
from tdmpc2_fast.train.run.checkpoints import trained
from tdmpc2_fast.train.run.evaluate import Evaluation, Evaluator
from tdmpc2_fast.train.run.rollouts import HostRollouts
from tdmpc2_fast.train.run.threads import choose_threads, idle_cores
from tdmpc2_fast.train.run.trainer import OnlineTrainer

pytest.importorskip("dm_control")

QUICK = dict(
    TINY,
    task="Pendulum-v1",
    episode_length=20,
    seed_steps=25,
    steps=45,
    eval_freq=20,
    eval_episodes=2,
    iterations=2,
    device="cpu",
)


def run(tmp_path: Path, **changes: Any) -> OnlineTrainer:
    tmp_path.mkdir(exist_ok=True)
    trainer = OnlineTrainer(Config.from_dict({**QUICK, **changes}), tmp_path)
    trainer.run()
    return trainer


def rows(path: Path) -> list[dict[str, str]]:
    with open(path) as f:
        return list(csv.DictReader(f))


def weights(trainer: OnlineTrainer) -> dict[str, torch.Tensor]:
    return tensors_only(trainer.agent.model.state_dict())


def test_official_schedule_with_one_environment(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    # as many updates as seed steps at the first decision after them, then one per decision
    assert trainer.agent.updater.steps == 25 + (45 - 26)
    evals = rows(tmp_path / "eval.csv")
    assert list(evals[0]) == ["step", "reward", "seed"]
    assert [int(r["step"]) for r in evals] == [0, 20, 40, 45]
    train = rows(tmp_path / "train.csv")
    assert [int(r["decisions"]) for r in train] == [20, 40]
    assert train[0]["consistency_loss"] == ""
    assert float(train[1]["consistency_loss"]) > 0
    agent = load(tmp_path / "checkpoints" / "latest", device="cpu")
    assert all(torch.equal(v, weights(trainer)[k]) for k, v in tensors_only(agent.model.state_dict()).items())


def test_the_replay_holds_what_the_environment_gave(tmp_path: Path) -> None:
    trainer = run(tmp_path, episode_length=40, seed_steps=1000, steps=84, eval_freq=1000, eval_episodes=1, mpc=False)
    kept = trainer.buffer.steps(0, 82)
    env = make_env(trainer.cfg, trainer.cfg.seed)
    totals = []
    for start in (0, 41):
        obs, *seen = env.reset(), *(env.step(a.numpy()) for a in kept["action"][start + 1 : start + 41])
        assert kept["action"][start].isnan().all()
        assert np.array_equal(kept["obs"][start : start + 41].numpy(), np.stack([obs, *(o for o, *_ in seen)]))
        rewards = np.array([r for _, r, *_ in seen], np.float32)
        assert np.array_equal(kept["reward"][start + 1 : start + 41].numpy(), rewards)
        totals.append(float(rewards.sum()))
    assert not kept["terminated"].any()
    logged = rows(tmp_path / "train.csv")
    assert [float(r["episode_reward"]) for r in logged] == pytest.approx(totals, abs=0.01)
    columns = ("episode", "episode_length", "episode_terminated", "episode_success")
    assert [tuple(float(r[c]) for c in columns) for r in logged] == [(1, 40, 0, 0), (2, 40, 0, 0)]


def test_several_environments_share_the_loop(tmp_path: Path) -> None:
    trainer = run(tmp_path, num_envs=3, utd=0.5, steps=90, env_workers=0)
    assert trainer.buffer.num_eps == 3
    starts = trainer.buffer.steps(0, 63)["obs"][::21]
    assert not torch.equal(starts[0], starts[1])
    # Decisions come three at a time. The first episodes end at 60, after the seed steps; the updates of the
    # decision after that are the first to see them, as in the official code.
    assert trainer.agent.updater.steps == 25 + int(0.5 * (90 - 63))


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> OnlineTrainer:
    """A run of seed 1 that is over."""
    return run(tmp_path_factory.mktemp("short") / "run", seed=1, steps=35)


def test_same_seed_same_run(short_run: OnlineTrainer, tmp_path: Path) -> None:
    b, c = (run(tmp_path / n, seed=s, steps=35) for n, s in (("b", 1), ("c", 2)))
    assert all(torch.equal(v, weights(b)[k]) for k, v in weights(short_run).items())
    assert (short_run.folder / "eval.csv").read_text() == (tmp_path / "b/eval.csv").read_text()
    assert not all(torch.equal(v, weights(c)[k]) for k, v in weights(short_run).items())


def test_evaluation_does_not_disturb_training(short_run: OnlineTrainer, tmp_path: Path) -> None:
    other = run(tmp_path / "other", seed=1, steps=35, eval_freq=100_000, eval_episodes=3)
    assert len(rows(tmp_path / "other/eval.csv")) < len(rows(short_run.folder / "eval.csv"))
    assert all(torch.equal(v, weights(other)[k]) for k, v in weights(short_run).items())


def test_episodic_tasks_store_their_terminations(tmp_path: Path) -> None:
    changes = dict(task="Hopper-v5", episodic=True, episode_length=100, seed_steps=60, steps=100, eval_episodes=1)
    trainer = run(tmp_path / "a", **changes)
    assert trainer.buffer.steps(0, len(trainer.buffer))["terminated"].any()
    assert float(rows(tmp_path / "a/train.csv")[0]["episode_terminated"]) == 1.0
    with pytest.raises(ConfigError, match="episodic=true"):
        run(tmp_path / "b", **dict(changes, episodic=False))


def test_random_actions_go_on_until_an_episode_has_ended(tmp_path: Path) -> None:
    trainer = run(tmp_path, seed_steps=10, steps=25)
    # it ends at 20, and the updates of decision 21 are the first to see it
    assert trainer.agent.updater.steps == 10 + (25 - 21)


def test_what_was_learned_survives_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = OnlineTrainer(Config.from_dict(dict(QUICK, eval_freq=10_000)), tmp_path)
    assert isinstance(trainer.envs, InProcess)
    env = trainer.envs.envs[0]
    step = env.step

    def fail(action: np.ndarray) -> Any:
        if trainer.agent.updater.steps > 30:
            raise RuntimeError("the simulator broke")
        return step(action)

    monkeypatch.setattr(env, "step", fail)
    with pytest.raises(RuntimeError, match="simulator"):
        trainer.run()
    saved = tensors_only(load(tmp_path / "checkpoints/latest", device="cpu").model.state_dict())
    assert all(torch.equal(v, saved[k]) for k, v in weights(trainer).items())


@pytest.mark.parametrize("display", ["lines", "live"])
def test_what_is_shown_and_kept_reads_no_tensor_between_episodes(
    display: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading one would make the host wait for a GPU at every decision."""
    trainer = OnlineTrainer(Config.from_dict(dict(QUICK, display=display)), tmp_path)
    assert isinstance(trainer.rollouts, HostRollouts)
    while not trainer.metrics or len(trainer.rollouts.running()[0]) > 10:
        trainer.step()
    show, shown, reads = type(trainer.log._display).show, [], []
    monkeypatch.setattr(type(trainer.log._display), "show", lambda self, now: (shown.append(now), show(self, now)))
    trainer.log._display.due = 0.0
    step = trainer.log.step

    def watched(*args: Any) -> None:
        with monkeypatch.context() as m:
            for name in ("item", "tolist", "cpu", "numpy", "to", "__float__", "__bool__", "__int__"):
                m.setattr(torch.Tensor, name, lambda *args: reads.append(args))
            step(*args)

    monkeypatch.setattr(trainer.log, "step", watched)
    for _ in range(5):
        trainer.step()
    trainer.close()
    trainer.log.close()
    assert shown
    assert not reads


def test_evaluation_plays_every_episode_once(tmp_path: Path) -> None:
    trainer = OnlineTrainer(Config.from_dict(dict(QUICK, eval_episodes=19, mpc=False)), tmp_path)
    found = Evaluator(trainer.agent).run()
    assert len(found.returns) == len(found.lengths) == 19
    assert set(found.lengths) == {20}
    assert len(set(np.round(found.returns, 6))) == 19


@pytest.mark.parametrize("mpc", [True, False])
def test_an_episode_of_an_evaluation_does_not_depend_on_how_many_there_are(mpc: bool) -> None:
    cfg = Config.from_dict({**QUICK, "mpc": mpc, "episode_length": 8})
    cfg = cfg.with_env({"state": (3,)}, 1, 8)
    one, three, many = (Evaluator(TDMPC2(cfg.replace(eval_episodes=n))).run().returns for n in (1, 3, 18))
    assert one == many[:1]  # bit for bit
    assert three == many[:3]
    assert len({*many}) == 18


def evaluations(monkeypatch: pytest.MonkeyPatch, *returns: float) -> None:
    """Evaluations to come find these."""
    left = list(returns)
    monkeypatch.setattr(Evaluator, "run", lambda *_: Evaluation([left.pop(0)] * 2, [0.0] * 2, [40] * 2))


def best_of(folder: Path) -> tuple[str, int]:
    """What is told of the best weights, and at how many decisions the checkpoint was written that has them."""
    checkpoints = folder / "checkpoints"
    facts = json.loads((checkpoints / "best.json").read_text())["trained"]
    return trained(checkpoints / "best.safetensors"), facts["decisions"]


def test_an_agent_that_has_learned_nothing_is_not_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations(monkeypatch, 100, 200, -9, -5)  # at 0, 20, 40, 45
    run(tmp_path)
    assert best_of(tmp_path) == ("step 45 (45 decisions, 44 updates), return -5.0 ± 0.0 over 2 episodes", 45)
    best, latest = (load(tmp_path / "checkpoints" / n, device="cpu").model.state_dict() for n in ("best", "latest"))
    assert all(torch.equal(v, tensors_only(latest)[k]) for k, v in tensors_only(best).items())
    assert "return -5.0" in trained(tmp_path / "checkpoints/latest.safetensors")


def test_before_anything_is_learned_the_best_is_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations(monkeypatch, 100, 50)
    run(tmp_path / "a", steps=20)
    assert best_of(tmp_path / "a") == ("step 20 (20 decisions, no update yet), return 50.0 ± 0.0 over 2 episodes", 20)
    evaluations(monkeypatch, 100, 50, 60)  # what another run has learned is worth keeping
    run(tmp_path / "b", steps=30, checkpoint=str(tmp_path / "a/checkpoints/best"))
    assert best_of(tmp_path / "b")[1] == 0


def test_a_run_stopped_before_it_was_evaluated_again_stands_for_what_it_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations(monkeypatch, 100, 50)
    run(tmp_path, steps=20)
    checkpoints = tmp_path / "checkpoints"
    assert find_checkpoint(tmp_path) == checkpoints / "best.safetensors"
    told = json.loads((checkpoints / "latest.json").read_text())
    told["trained"]["updates"] = 7
    (checkpoints / "latest.json").write_text(json.dumps(told))
    assert find_checkpoint(tmp_path) == checkpoints / "latest.safetensors"
    (checkpoints / "best.json").unlink()  # nothing is told of it
    assert find_checkpoint(tmp_path) == checkpoints / "best.safetensors"


def test_the_best_stays_the_best_where_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    evaluations(monkeypatch, 100, 200, -5)
    assert runs.start(dict(QUICK, num_threads=1, steps=40, work_dir=str(folder))).status == 0
    before = best_of(folder)
    assert before == ("step 40 (40 decisions, 39 updates), return -5.0 ± 0.0 over 2 episodes", 40)
    evaluations(monkeypatch, -6)
    assert runs.resume(folder, dict(steps=50)).status == 0
    assert best_of(folder) == before
    assert f"best.safetensors: {before[0]}" in capsys.readouterr().out
    evaluations(monkeypatch, -4)
    assert runs.resume(folder, dict(steps=55)).status == 0
    assert best_of(folder)[1] == 55


def test_what_the_weights_are_of_is_unknown_where_nothing_tells(tmp_path: Path) -> None:
    agent = TDMPC2(Config.from_dict(QUICK).with_env({"state": (3,)}, 1, 40))
    for name in ("a.safetensors", "a.pt"):
        agent.save(tmp_path / name)
        assert trained(tmp_path / name) == "step and return unknown"
    (tmp_path / "a.json").write_text("{")
    assert trained(tmp_path / "a.safetensors") == "step and return unknown"
    other = dict(sha256="of other weights", trained=dict(step=1, decisions=1, updates=1))
    (tmp_path / "a.json").write_text(json.dumps(other))
    assert trained(tmp_path / "a.safetensors") == "step and return unknown"


STAT = """cpu  {u} 0 0 {i} 0 0 0 0 0 0
cpu0 0 0 0 0 0 0 0 0 0 0
cpu1 0 0 0 0 0 0 0 0 0 0
intr 0"""


@pytest.mark.parametrize(("busy", "idle", "cores"), [(0, 60, 2.0), (30, 30, 1.0), (60, 0, 0.0), (0, 0, 0.0)])
def test_idle_cores(busy: int, idle: int, cores: float) -> None:
    assert idle_cores(STAT.format(u=100, i=500), STAT.format(u=100 + busy, i=500 + idle)) == pytest.approx(cores)


def test_threads_follow_config_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        assert choose_threads(Config(num_threads=1)) == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert choose_threads(Config()) == 1
        assert choose_threads(Config(num_threads=2)) == 2
    finally:
        torch.set_num_threads(before)
