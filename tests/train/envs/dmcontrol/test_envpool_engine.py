"""EnvPool beside dm_control: the same decisions from the same states, first states alike; and as a run has it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from dm_states import PLACE

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.envs.base import EnvState, Failures, Step, env_seed
from tdmpc2_fast.train.envs.dmcontrol.envpool_engine import TASKS, EnvPool, check, flattened, pool_of

there = pytest.mark.skipif(find_spec("envpool") is None, reason="needs the extra [envpool]")

# Decisions for which two copies of a task stay together, and how closely: contacts magnify rounding. A quadruped's
# heading is only known as closely as it is found. A dog differs by 1e-6 at once, between releases of MuJoCo.
TOGETHER = {"quadruped": (5, 1e-5), "dog": (2, 1e-4)}


def loaded(task: str, seed: int = 0) -> Any:
    """dm_control's own environment."""
    from dm_control import suite

    domain, name = task.replace("-", "_").split("_", 1)
    return suite.load({"cup": "ball_in_cup"}.get(domain, domain), name, task_kwargs={"random": seed})


def config(task: str, num_envs: int = 1, **values: Any) -> Config:
    spec = loaded(task)
    size = sum(int(np.prod(v.shape)) for v in spec.observation_spec().values())
    cfg = Config(task=task, model_size=1, num_envs=num_envs, env_kwargs={"engine": "envpool"}, **values)
    return cfg.with_env({"state": (size,)}, spec.action_spec().shape[0], 500)


def engine(cfg: Config, **values: Any) -> EnvPool:
    return EnvPool(cfg, Failures(cfg, print), **values)


def decided(pool: EnvPool, actions: np.ndarray) -> list[Step]:
    pool.step_async(actions)
    found = pool.step_wait()
    assert all(found)
    return found  # type: ignore[return-value]


def seen_by(values: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.ravel(v) for v in values.values()]).astype(np.float32)


def placed(task: str, seed: int) -> Any:
    """dm_control's environment where EnvPool's begins its first episode."""
    env, domain = loaded(task), task.split("-")[0]
    env.reset()
    pool = pool_of(task, [seed])
    first = {k: v[0] for k, v in pool.reset()[0].items()}

    actions = np.random.default_rng(0).uniform(-1, 1, (20, env.action_spec().shape[0]))
    theirs = [{k: v[0] for k, v in pool.step(a[None])[0].items()} for a in actions]
    pool.close()
    known: dict[str, Any] = {}

    def begun() -> None:
        env.reset()
        PLACE[domain](env.physics, first, **known)

    if domain == "fish":
        # Nothing pulls it down, so it moves the same however it lies; how upright it is tells how it lay.
        begun()
        turns = []
        for a in actions:
            env.step(a)
            turns.append(env.physics.named.data.xmat["torso"].reshape(3, 3)[:, 2].copy())
        known["up"] = np.linalg.lstsq(np.array(turns), [float(o["upright"]) for o in theirs], rcond=None)[0]
    if domain in ("fish", "humanoid"):
        begun()
        for a in actions[:3]:
            ours = env.step(a).observation["velocity"]
        known["heading"] = np.arctan2(*theirs[2]["velocity"][1::-1]) - np.arctan2(*ours[1::-1])
    if domain == "quadruped":
        known["heading"] = found_heading(env, begun, known, actions, theirs)
    begun()
    return env


def found_heading(
    env: Any, begin: Callable[[], None], known: dict[str, Any], actions: np.ndarray, theirs: list[dict[str, Any]]
) -> float:
    """Which way it looks, of which nothing tells but how it slides once it touches the ground."""
    from scipy.optimize import minimize_scalar

    def apart(heading: float) -> list[float]:
        known["heading"] = heading
        begin()
        seen = [env.step(a).observation for a in actions]
        return [max(float(np.abs(o[k] - t[k]).max()) for k in o) for o, t in zip(seen, theirs, strict=True)]

    touched = next((i for i, x in enumerate(apart(0)) if x > 1e-9), len(actions))

    def distance(heading: float) -> float:
        return float(np.log(sum(apart(heading)[: touched + 3])))

    near = min(np.linspace(0, 2 * np.pi, 40), key=distance)
    return float(minimize_scalar(distance, bounds=(near - 0.16, near + 0.16), options=dict(xatol=1e-12)).x)


@there
@pytest.mark.parametrize("task", TASKS)
def test_a_decision_is_what_dm_control_does(task: str) -> None:
    decisions, tolerance = TOGETHER.get(task.split("-")[0], (20, 1e-6))
    for seed in range(3):
        env, cfg = placed(task, seed), config(task, seed=seed)
        ours = engine(cfg)
        obs = ours.reset([0])[0]
        assert obs.shape == cfg.observation_shape
        want = seen_by(env.task.get_observation(env.physics))
        assert np.abs((obs - want) / (1 + np.abs(want))).max() <= tolerance
        for action in np.random.default_rng(seed).uniform(-1, 1, (decisions, 1, cfg.need("action_dim"))):
            found = decided(ours, action.astype(np.float32))[0]
            steps = [env.step(action[0].astype(np.float32).astype(np.float64)) for _ in range(2)]
            assert found.reward == pytest.approx(steps[0].reward + steps[1].reward, abs=tolerance)
            want = seen_by(steps[1].observation)
            assert np.abs((found.obs - want) / (1 + np.abs(want))).max() <= tolerance
        ours.close()


RARE = [
    "acrobot-swingup",
    "cartpole-balance-sparse",
    "hopper-hop",
    "hopper-stand",
    "pendulum-swingup",
    "reacher-easy",
    "reacher-hard",
]


@there
@pytest.mark.slow
@pytest.mark.parametrize("task", RARE)
def test_rare_rewards_come_at_the_same_time(task: str) -> None:
    """In 60 environments at once, some of which begin near what is rewarded."""
    count, env = 60, loaded(task)
    cfg = config(task, count, seed=1)
    pool, ours = pool_of(task, [env_seed(1, i) for i in range(count)]), engine(cfg)
    raw = pool.reset()[0]
    first = ours.reset(range(count))
    assert np.array_equal(flattened(task, raw), np.stack([first[i] for i in range(count)]))
    actions = np.random.default_rng(1).uniform(-1, 1, (count, cfg.need("action_dim"))).astype(np.float32)
    rewards = np.array([[step.reward for step in decided(ours, actions)] for _ in range(10)])
    for i in range(count):
        env.reset()
        PLACE[task.split("-")[0]](env.physics, {k: v[i] for k, v in raw.items()})
        steps = [env.step(actions[i].astype(np.float64)).reward for _ in range(20)]
        assert rewards[:, i] == pytest.approx(np.reshape(steps, (10, 2)).sum(1), abs=1e-6)
    assert 0 < (rewards > 1e-3).mean() < 1
    for each in pool, ours:
        each.close()


@there
def test_a_fish_is_rewarded_for_what_it_sees() -> None:
    from dm_control.utils.rewards import tolerance

    pool, physics = pool_of("fish-swim", range(60)), loaded("fish-swim").physics
    pool.reset()
    seen, rewards, *_ = pool.step(np.zeros((60, 5)))
    radii = physics.named.model.geom_size[["mouth", "target"], 0].sum()
    near = tolerance(np.linalg.norm(seen["target"], axis=1), bounds=(0, radii), margin=2 * radii)
    assert rewards == pytest.approx((7 * near + (seen["upright"].ravel() + 1) / 2) / 8, abs=1e-6)
    assert near.max() > 0.1
    pool.close()


@there
@pytest.mark.parametrize(("task", "theirs"), [("cup-catch", "ball-in-cup-catch"), ("finger-spin", "finger-spin")])
def test_what_is_left_out_differs(task: str, theirs: str) -> None:
    """Where this fails, EnvPool was mended and the task can be let in."""
    count, env, pool = 25, loaded(task), pool_of(theirs, range(25))
    raw, actions = pool.reset()[0], np.random.default_rng(1).uniform(-1, 1, (count, 2))
    steps = [pool.step(actions) for _ in range(20)]
    differ = 0
    for i in range(count):
        env.reset()
        PLACE[task.split("-")[0]](env.physics, {k: v[i] for k, v in raw.items()})
        for seen, rewards, *_ in steps:
            found = env.step(actions[i])
            apart = np.abs(found.observation["position"] - seen["position"][i]).max()
            differ += bool(found.reward != rewards[i] or apart > 1e-3)
    assert differ
    pool.close()


@there
@pytest.mark.parametrize("task", TASKS)
def test_first_states_come_from_the_same_distribution(task: str) -> None:
    """Means and spreads of all observed numbers, which are random with a given seed, and far from their limits."""
    count, env, pool = 200, loaded(task), pool_of(task, [0])
    theirs = np.stack([flattened(task, pool.reset()[0])[0] for _ in range(count)]).astype(np.float64)
    ours = np.stack([seen_by(env.reset().observation) for _ in range(count)]).astype(np.float64)
    error = np.sqrt((theirs.var(0) + ours.var(0)) / count)
    assert (np.abs(theirs.mean(0) - ours.mean(0)) <= 5 * error + 1e-6).all()
    spread = np.maximum(ours.std(0), 1e-6)
    assert (np.abs(np.log(np.maximum(theirs.std(0), 1e-6) / spread)) < 0.5).all()
    pool.close()


def played(pool: EnvPool, decisions: int, seed: int = 0) -> tuple[np.ndarray, list[list[Step]]]:
    shape = decisions, pool.cfg.num_envs, pool.cfg.need("action_dim")
    actions = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
    return actions, [decided(pool, a) for a in actions]


def same(a: Iterable[Step], b: Iterable[Step]) -> bool:
    return all(np.array_equal(x.obs, y.obs) and x[1:] == y[1:] for x, y in zip(a, b, strict=True))


@there
def test_an_episode_ends_after_its_decisions() -> None:
    """Its last observation is its own, and an environment that is not begun anew goes on beside one that is."""
    cfg = config("pendulum-swingup", 2)
    pool, alone = engine(cfg), engine(cfg)
    for each in pool, alone:
        each.reset([0, 1])
    actions, steps = played(pool, 500)
    _, others = played(alone, 500)
    assert not any(s.truncated or s.terminated for row in steps[:-1] for s in row)
    assert all(s.truncated and not s.terminated for s in steps[-1])
    assert all(same(a, b) for a, b in zip(steps, others, strict=True))
    assert [*pool.reset([1])] == [1]
    gone_on, anew = decided(pool, actions[0])
    assert (gone_on.truncated, anew.truncated) == (True, False)
    assert np.abs(gone_on.obs - steps[-1][0].obs).max() < 1
    for each in pool, alone:
        each.close()


@there
@pytest.mark.parametrize("task", ["cheetah-run", "hopper-hop"])
def test_environments_stand_where_they_stood(task: str) -> None:
    """One in its third episode, one in its second, one between two; in a pool made with other seeds."""
    cfg = config(task, 3, seed=5)
    pool, other = engine(cfg), engine(cfg, restarts=2)
    pool.reset([0, 1, 2])
    played(pool, 7)
    pool.reset([0])
    played(pool, 4)
    first = pool.reset([0, 1])
    actions, steps = played(pool, 6, seed=1)
    states = [EnvState(*s) for s in json.loads(json.dumps(pool.states()))]
    done = {i: actions[:, i] for i in (0, 1)}
    found = other.restore(states, done)
    assert sorted(found) == [0, 1]
    for i in done:
        assert np.array_equal(found[i][0].obs, first[i])
        assert same(found[i][1:], [row[i] for row in steps])
    assert other.states() == states
    assert np.array_equal(pool.reset([2])[2], other.reset([2])[2])
    assert all(same(a, b) for a, b in zip(played(pool, 5)[1], played(other, 5)[1], strict=True))
    for each in pool, other:
        each.close()


@there
def test_each_environment_has_a_seed_of_its_own() -> None:
    """`env_seed` gives it, however many environments and threads there are."""
    many, one = engine(config("walker-walk", 3, seed=8, env_workers=2)), engine(config("walker-walk", seed=8))
    third = pool_of("walker-walk", [env_seed(8, 2)])
    first = many.reset([0, 1, 2])
    assert np.array_equal(first[0], one.reset([0])[0])
    assert np.array_equal(first[2], flattened("walker-walk", third.reset()[0])[0])
    assert not np.array_equal(first[0], first[1])
    for each in many, one, third:
        each.close()


@there
def test_what_diverged_is_dropped_and_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    cfg = config("pendulum-swingup", 2, on_env_error="drop")
    pool = EnvPool(cfg, Failures(cfg, notes.append))
    pool.reset([0, 1])
    take = pool._pool.step

    def broken(actions: Any, ids: Any) -> Any:
        seen, reward, *rest = take(actions, ids)
        return seen, np.where(np.arange(2) == 1, np.nan, reward), *rest

    with monkeypatch.context() as patch:
        patch.setattr(pool._pool, "step", broken)
        pool.step_async(np.zeros((2, 1), np.float32))
        fine, lost = pool.step_wait()
    assert fine is not None
    assert lost is None
    assert "environment 1: reward: got nan" in notes[0]
    pool.reset([1])
    assert all(decided(pool, np.zeros((2, 1), np.float32)))
    pool.close()


def test_what_cannot_be_stepped_by_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(**values: Any) -> Config:
        return Config(**{"task": "walker-walk", "model_size": 1, "env_kwargs": {"engine": "envpool"}, **values})

    check(settings())
    with pytest.raises(
        ConfigError, match=r"'env\.engine': got 'envpool', allowed: with the 24 DMControl tasks .* not with 'cup-catch'"
    ):
        check(settings(task="cup-catch"))
    with pytest.raises(ConfigError, match=r"'obs': got 'rgb', allowed: 'state' with env\.engine=envpool"):
        check(settings(obs="rgb"))
    with pytest.raises(ConfigError, match=r"'env\.task_kwargs': got .*, allowed: nothing with env\.engine=envpool"):
        check(settings(env_kwargs={"engine": "envpool", "task_kwargs": {"x": 1}}))
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ConfigError, match=r"'envpool' needs envpool; pip install 'tdmpc2-fast\[envpool\]'"):
        pool_of("walker-walk", [1])
