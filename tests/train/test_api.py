"""`tdmpc2_fast.train` as a program calls it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import TINY
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

import tdmpc2_fast
from tdmpc2_fast.errors import ConfigError, InputError
from tdmpc2_fast.train.api import Agent, Event, Interrupted, train

KEYS: dict[str, Any] = dict(TINY, seed_steps=45, steps=80, eval_freq=40, eval_episodes=1, tensorboard=False)
KEYS |= dict(display="none", iterations=1, num_threads=1, backend="torch")


class Drift(gym.Env[Any, Any]):
    """Three numbers that decay, in parts."""

    render_mode = None
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as environments have it)
    observation_space = spaces.Dict(b=spaces.Box(-9, 9, (2,)), a=spaces.Tuple([spaces.Discrete(3), spaces.Box(0, 1)]))
    action_space = spaces.Box(np.array([0, -3]), np.array([10, 3]), dtype=np.float64)

    def __init__(self) -> None:
        self.resets: list[int | None] = []
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.resets.append(seed)
        self.x = self.np_random.normal(size=2).clip(-1, 1)
        return self.see(), {}

    def see(self) -> Any:
        return {"b": self.x.astype(np.float32), "a": (1, np.zeros(1, np.float32))}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.steps += 1
        self.x = 0.9 * self.x
        return self.see(), -float(np.square(self.x).sum()), False, False, {}


def limited() -> Any:
    return gym.wrappers.TimeLimit(Drift(), 20)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda file: None)


def test_the_module_is_the_function() -> None:
    agent = tdmpc2_fast.train(limited, **KEYS)
    assert isinstance(agent, Agent)
    assert agent.status == 0
    assert agent.folder == Path("runs/limited/default/1")
    assert (agent.folder / "checkpoints" / "best.safetensors").exists()
    assert agent.evaluation is not None
    assert repr(agent).startswith("Agent(limited, return -")
    again = train(limited, **KEYS)  # nothing is overwritten
    assert again.folder == Path("runs/limited/default/1-2")
    assert again.evaluation == agent.evaluation


def test_an_environment_is_trained_and_evaluated_in_and_left_open() -> None:
    inner = Drift()
    recorded = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(inner, 20))
    agent = train(recorded, **KEYS, work_dir="run")
    assert agent.cfg.task == "Drift"
    assert inner.resets[0] is not None  # evaluation is first, and seeded
    assert agent.cfg.seed in inner.resets
    assert len(recorded.return_queue) == inner.steps // 20 == 80 // 20 + 3  # three evaluations
    obs, _ = recorded.reset()
    action = agent.act(obs)
    assert recorded.action_space.contains(action)
    found = agent.evaluate(episodes=2)
    assert found.lengths == [20, 20]
    other = agent.evaluate(limited, episodes=1)
    assert len(other.returns) == 1
    with pytest.raises(ConfigError, match=r"env: its obs_shape is .*\(3,\).*, allowed: .*\(6,\)"):
        agent.evaluate("Pendulum-v1", episodes=1)
    agent.save("mine")
    loaded = Agent(tdmpc2_fast.load("mine"), limited)
    loaded.tdmpc2.planner.prev_mean.copy_(agent.tdmpc2.planner.prev_mean)
    assert np.isfinite(loaded.act(obs)).all()


def test_acting_follows_an_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = train(limited, **KEYS)
    seen: list[bool] = []
    obs = Drift().reset()[0]
    agent.act(obs)
    assert agent._planner is not None
    plan = agent._planner.plan
    monkeypatch.setattr(agent._planner, "plan", lambda *a, **k: seen.append(k["t0"]) or plan(*a, **k))
    agent.act(obs)
    agent.reset()
    agent.act(obs)
    agent.act(obs, t0=True)
    assert seen == [False, True, True]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_is_called_for_each_environment(workers: int) -> None:
    agent = train(lambda: limited(), **KEYS, num_envs=2, env_workers=workers)
    assert agent.status == 0
    assert agent.cfg.num_envs == 2


def test_a_vector_is_trained_in_as_it_is() -> None:
    vector = SyncVectorEnv([limited] * 2)
    agent = train(vector, **KEYS)
    assert agent.status == 0
    assert agent.cfg.num_envs == 2
    assert vector.reset()  # still open


def test_names_and_discrete_actions() -> None:
    agent = train("CartPole-v1", **KEYS, episodic=True)
    env = gym.make("CartPole-v1")
    obs, _ = env.reset()
    assert env.action_space.contains(agent.act(obs))
    assert agent.cfg.action_dim == 2


def test_it_is_evaluated_where_asked() -> None:
    inner = Drift()
    elsewhere = gym.wrappers.TimeLimit(Drift(), 20)
    train(gym.wrappers.TimeLimit(inner, 20), eval_env=elsewhere, **KEYS)
    assert inner.steps == 80
    assert elsewhere.unwrapped.steps == 60
    agent = train("Pendulum-v1", eval_env="Pendulum-v1", **{**KEYS, "steps": 210, "eval_freq": 500})
    assert agent.evaluation is not None
    with pytest.raises(ConfigError, match=r"env: its obs_shape is .*\(3,\).*, allowed: .*\(6,\)"):
        train(limited, eval_env="Pendulum-v1", work_dir="not made", **KEYS)
    assert not Path("not made").exists()


def test_callbacks_are_told_and_end_a_run() -> None:
    events: list[Event] = []

    def stop(event: Event) -> bool | None:
        events.append(event)
        return False if event.kind == "evaluation" and event.step >= 60 else None

    agent = train(limited, callbacks=stop, **{**KEYS, "steps": 4000})
    assert [(e.kind, e.step) for e in events] == [
        ("evaluation", 0),
        ("episode", 20),
        ("episode", 40),
        ("evaluation", 40),
        ("episode", 60),
        ("episode", 80),
        ("evaluation", 80),
    ]
    assert "episode_reward" in events[1].values
    assert "return" in events[0].values
    assert events[-1].agent is agent.tdmpc2
    assert agent.status == 0
    text = (Path("runs/limited/default/1") / "eval.csv").read_text()
    assert len(text.splitlines()) == 4  # the last evaluation is not made twice

    def fails(event: Event) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(limited, callbacks=[fails], **KEYS)
    for wrong in ([3], 3):
        with pytest.raises(InputError, match="callbacks: got int, allowed: functions of one event"):
            train(limited, callbacks=wrong, **KEYS)  # type: ignore[arg-type]
    said = train(limited, callbacks=[lambda event: np.bool_(event.kind != "episode")], **{**KEYS, "steps": 4000})
    assert said.status == 1  # ended by the first episode, in which nothing is learned
    assert train(limited, callbacks=None, **KEYS).status == 0


def test_a_run_goes_on_where_it_was_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(event: Event) -> None:
        if event.step == 60:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="resume='auto', work_dir='run'") as e:
        train(limited, callbacks=interrupt, work_dir="run", **KEYS)
    assert e.value.status == 130
    assert isinstance(e.value, KeyboardInterrupt)
    agent = train(limited, work_dir="run", resume="auto", **KEYS)
    assert agent.status == 0
    finished = train(limited, work_dir="run", resume="auto", **KEYS)  # it is loaded
    assert finished.evaluation is None
    assert "to go on: train(env, resume='auto', work_dir='run', steps=160)" in capsys.readouterr().out
    assert np.isfinite(finished.act(Drift().reset()[0])).all()


def test_a_run_that_keeps_nothing_says_so() -> None:
    def interrupt(event: Event) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped; no checkpoint was written"):
        train(limited, callbacks=interrupt, save_agent=False, **KEYS)


def test_one_environment_made_twice_is_refused() -> None:
    one = limited()
    with pytest.raises(ConfigError, match="the function made the same environment twice"):
        train(lambda: one, **KEYS)


@pytest.mark.parametrize(
    ("env", "keys", "words"),
    [
        (limited, dict(stepz=3), "unknown config key 'stepz'. Did you mean 'steps'?"),
        ("walker-walk", dict(task="dog-run"), "'task': got 'dog-run', allowed: 'walker-walk'"),
        (Drift(), {}, "'episode_length': 'Drift' has no time limit"),
        (
            gym.wrappers.TimeLimit(Drift(), 20),
            dict(num_envs=2),
            "'num_envs': got 2, allowed: 1, of the environment given",
        ),
        (3, {}, "env: got builtins.int"),
    ],
)
def test_mistakes_are_answered_before_anything_begins(env: Any, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as e:
        train(env, **{**KEYS, **keys})
    assert words in str(e.value)
    assert not Path("runs").exists()


def test_importing_the_package_imports_no_simulator() -> None:
    code = "import tdmpc2_fast, sys; tdmpc2_fast.train; print(*{'gymnasium', 'dm_control', 'torch'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not out.stdout.split()
