"""Environments of a multi-task model: their widths, whose turn it is, and that they go on where others stood."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

pytest.importorskip("gymnasium")

from task_suite import ENDING, FAILING, NARROW, SIZES, TALL, WIDE

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.envs import complete, make_env, tried
from tdmpc2_fast.train.envs.answers import EnvError
from tdmpc2_fast.train.envs.apart.serve import NO_TASK, Obey, rows_of
from tdmpc2_fast.train.envs.apart.workers import Workers
from tdmpc2_fast.train.envs.base import Environments, Failures, env_seed, reset, step
from tdmpc2_fast.train.envs.multitask import TaskEnv
from tdmpc2_fast.train.envs.together import InProcess, environments
from tdmpc2_fast.train.run.rollouts import HostRollouts

TASKS = (WIDE, NARROW, TALL)
ONES = np.ones(2, np.float32)


def config(count: int = 1, tasks: tuple[str, ...] = TASKS, **changes: Any) -> Config:
    cfg = Config(task="set", tasks=tasks, num_envs=count, **(dict(TINY, device="cpu") | changes))
    return cfg.with_tasks([SIZES[name] for name in tasks])


def made(cfg: Config, seed: int = 3) -> TaskEnv:
    env = make_env(cfg, seed)
    assert isinstance(env, TaskEnv)
    return env


def test_the_environments_complete_the_config() -> None:
    env = make_env(Config(task="set", tasks=TASKS, model_size=1), 3)
    cfg = complete(Config(task="set", tasks=TASKS, model_size=1), env)
    assert cfg == Config(task="set", tasks=TASKS, model_size=1).with_tasks([SIZES[name] for name in TASKS])
    assert (env.obs_shape, env.action_dim, env.max_episode_steps, env.action_repeat) == ((4,), 2, 7, 1)
    assert (cfg.task_dim, cfg.seed_steps) == (96, 1000)


@pytest.mark.parametrize("task", range(3))
def test_observations_are_padded_and_actions_cut(task: int) -> None:
    cfg, (width, _, length) = config(), SIZES[TASKS[task]]
    env, alone = made(cfg).of(task), make_env(Config(task=TASKS[task]), 3)
    seen, wanted = reset(env), reset(alone)
    for decision in range(1, length + 1):
        assert seen.dtype == np.float32
        np.testing.assert_array_equal(seen, np.concatenate([wanted, np.zeros(4 - width, np.float32)]))
        action = np.array([0.5, -0.25], np.float32)
        found, other = step(env, action), step(alone, action[: alone.action_dim])
        assert found[1:] == other[1:]
        assert found.truncated == (decision == length)
        seen, wanted = found.obs, other.obs


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_tasks_take_turns_where_environments_are_fewer(count: int) -> None:
    cfg = config(count)
    with closing(environments(cfg, made(cfg), print)) if count == 1 else closing(here(cfg)) as envs:
        turns = []
        for _ in range(4):
            envs.reset(range(count))
            turns.append(list(envs.tasks()))
    each = [[(i + k * count if count < 3 else i) % 3 for i in range(count)] for k in range(4)]
    assert turns == each
    # Any three episodes in a row are of three tasks, and many environments play one each.
    assert sorted(np.concatenate(each)[:3]) == [0, 1, 2] if count <= 3 else each[0] == each[1]


def here(cfg: Config, **failing: Any) -> InProcess:
    return InProcess(cfg, make_env, Failures(cfg, print), **failing)


def play(envs: Environments, count: int, decisions: int, seed: int = 0) -> Iterator[tuple[Any, ...]]:
    """Yield tasks and what came of random actions; episodes are begun where one has ended."""
    rng = np.random.default_rng(seed)
    which = list(range(count))
    for _ in range(decisions):
        begun = envs.reset(which) if which else {}
        yield {i: obs.tolist() for i, obs in begun.items()}, list(envs.tasks())
        envs.step_async(rng.uniform(-1, 1, (count, 2)).astype(np.float32))
        found = [s for s in envs.step_wait() if s is not None]
        yield [(s.obs.tolist(), *s[1:]) for s in found], list(envs.tasks())
        which = [i for i, s in enumerate(found) if s.truncated]


@pytest.mark.parametrize("count", [2, 4])
def test_worker_processes_play_the_same(count: int) -> None:
    cfg = config(count, env_workers=2)
    there, ours = environments(cfg, made(cfg), print), here(cfg)
    assert isinstance(there, Workers)
    with closing(there), closing(ours):
        assert list(play(there, count, 20)) == list(play(ours, count, 20))


@pytest.mark.parametrize("workers", [0, 2])
def test_others_go_on_in_the_middle_of_episodes(workers: int) -> None:
    cfg = config(2)

    def rollouts() -> HostRollouts:
        envs = environments(cfg.replace(env_workers=workers), made(cfg, env_seed(cfg.seed, 0)), print)
        assert isinstance(envs, (InProcess, Workers))
        return HostRollouts(envs, cfg)

    def go_on(run: HostRollouts, start: int, stop: int) -> list[Any]:
        told: list[Any] = []
        for k in range(start, stop):
            told += [{n: x.tobytes() for n, x in e.rows().items()} for e in run.ended()]
            run.begin()
            run.take(np.random.default_rng(k).uniform(-1, 1, (2, 2)).astype(np.float32))
            run.step_async()
            run.step_wait()
        return told

    one, other = rollouts(), rollouts()
    with closing(one.envs), closing(other.envs):
        go_on(one, 0, 17)
        state = one.state(pytest.fail)
        other.restore(*state, pytest.fail)
        assert [e.task for e in other.running()] == [e.task for e in one.running()]
        assert go_on(other, 17, 40) == go_on(one, 17, 40) != []


def test_a_set_of_one_task_is_that_task() -> None:
    """But for its embedding: episodes and actions are the same."""
    cfg = config(tasks=(WIDE,))
    env, alone = made(cfg), make_env(Config(task=WIDE), 3)
    for _ in range(3):
        np.testing.assert_array_equal(reset(env), reset(alone))
        for _ in range(7):
            found, wanted = step(env, ONES), step(alone, ONES)
            np.testing.assert_array_equal(found.obs, wanted.obs)
            assert found[1:] == wanted[1:]
    assert cfg.discounts == [Config().discount(7)]
    assert (cfg.seed_steps, cfg.action_dim, cfg.obs_shape) == (1000, 2, {"state": (3,)})


def test_dead_dimensions_of_random_and_planned_actions_are_zero(livened: Any) -> None:
    cfg = config(3)
    envs = here(cfg)
    run = HostRollouts(envs, cfg)
    agent = livened(TDMPC2(cfg))
    with closing(envs):
        for act in (lambda: run.take(np.full((3, 2), 0.7, np.float32)), lambda: run.act(agent)):
            run.begin()
            act()
            run.step_async()
            run.step_wait()
        for task, episode in enumerate(run.running()):
            live = SIZES[TASKS[task]][1]
            rows = episode.rows()
            assert rows["task"].tolist() == [task] * 3
            assert rows["action"][1].tolist() == np.where(np.arange(2) < live, np.float32(0.7), 0).tolist()
            assert (rows["action"][2] != 0).tolist() == (np.arange(2) < live).tolist()


def test_the_agent_is_told_the_task_of_each_environment() -> None:
    cfg = config(2)
    envs = here(cfg)
    run, told = HostRollouts(envs, cfg), []

    class Agent:
        def act(self, obs: torch.Tensor, t0: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
            told.append((task.tolist(), t0.tolist()))
            return torch.zeros(2, 2)

    with closing(envs):
        for _ in range(8):
            list(run.ended())
            run.begin()
            run.act(Agent())  # type: ignore[arg-type]
            run.step_async()
            run.step_wait()
    # The second plays NARROW, of five decisions, then WIDE; the first WIDE, of seven, then TALL.
    expected = [([0, 1], [k == 0] * 2) for k in range(5)] + [([0, 0], [False, k == 5]) for k in (5, 6)]
    assert told == [*expected, ([2, 0], [True, False])]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_that_fails_goes_on_with_the_next_turn(workers: int) -> None:
    cfg = config(1, (WIDE, NARROW, TALL, FAILING), on_env_error="drop", env_workers=workers)
    notes: list[str] = []
    envs = environments(cfg, made(cfg), notes.append)
    assert isinstance(envs, (InProcess, Workers))
    with closing(envs):
        told = []
        for _ in range(29):
            envs.reset([0])
            told.append(envs.tasks()[0])
            for _ in range(SIZES[cfg.tasks[told[-1]]][2]):
                envs.step_async(np.zeros((1, 2), np.float32))
                if envs.step_wait() == [None]:
                    break
    assert told == ([0, 1, 2, 3] * 8)[:29]  # every third of FAILING fails
    assert len(notes) == 2
    assert all(FAILING in note for note in notes)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_process_that_replaces_a_lost_one_goes_on_with_the_next_turns(count: int) -> None:
    cfg, row = config(count), np.dtype([("obs", np.float32, (4,)), ("task", np.int64)])
    memory = bytearray(count * row.itemsize)
    tasks = rows_of(memory, row)["task"]
    tasks[:] = NO_TASK
    seen = []
    for anew in range(4):
        process = Obey(cfg, make_env, range(count), anew and 5, memory, row)  # more than one was lost elsewhere
        with closing(process):
            assert process.reset(range(count)) == {}
        seen.append(tasks.tolist())
    assert seen == [[(i + k * count if count < 3 else i) % 3 for i in range(count)] for k in range(4)]


def test_an_error_names_the_task() -> None:
    cfg = config(1, (FAILING, NARROW))
    envs = here(cfg)
    with closing(envs), pytest.raises(ZeroDivisionError) as e:
        list(play(envs, 1, 25))
    assert any(FAILING in note for note in e.value.__notes__)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(tasks=(WIDE, ENDING)), [ENDING, "terminated an episode", "multi-task"]),
        (dict(tasks=(WIDE, "no-such-task-v0x")), ["no-such-task-v0x"]),
        (dict(tasks=(WIDE, NARROW), horizon=6), ["horizon", "at most 5", NARROW]),
        (dict(tasks=(WIDE, FAILING), env_kwargs=dict(nonsense=1)), ["nonsense"]),
    ],
)
def test_what_no_set_can_have_is_refused_before_the_run(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        tried(Config(task="set", **changes))
    assert all(word in str(e.value) for word in words), str(e.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(action_dims=(2, 2, 1)), ["action_dims", "got 2 for " + NARROW, "allowed: 1"]),
        (dict(obs_shape={"state": (3,)}), ["obs_shape", "at least the 4", TALL]),
    ],
)
def test_sizes_that_an_environment_does_not_have_name_its_task(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        list(made(config().replace(**changes)).each())
    assert all(word in str(e.value) for word in words), str(e.value)


def test_an_episode_ends_where_the_config_says_as_of_one_task() -> None:
    alone = make_env(Config(task=TALL, episode_length=5), 3)
    env = list(made(config().replace(episode_lengths=(7, 5, 5))).each())[2]
    assert alone.max_episode_steps == env.max_episode_steps == 5
    for one in (alone, env):
        reset(one)
        found = [step(one, ONES[: one.action_dim]) for _ in range(5)]
        assert [s.truncated for s in found] == [False] * 4 + [True]


def test_a_simulator_of_many_is_no_part_of_a_set() -> None:
    with pytest.raises(ConfigError, match=r"playground:CheetahRun.*allowed in a multi-task model"):
        tried(Config(task="set", tasks=("playground:CheetahRun",)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((np.zeros(5), 0.0, False, False, {}), "observation"),
        ((np.zeros(4), 0.0, False, False, {}), "observation"),  # as wide as the widest task's
        ((np.full(2, np.nan), 0.0, False, False, {}), "observation"),
        ((np.zeros(2), np.nan, False, False, {}), "reward"),
        (None, "step: got NoneType"),
    ],
)
def test_an_answer_that_is_none_is_refused_as_ever(answer: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = made(config()).of(1)
    reset(env)
    monkeypatch.setattr(env.env, "step", lambda action: answer)
    with pytest.raises(EnvError, match=message):
        step(env, ONES)
