"""The environments of a multi-task model: each plays its task in the widths of all.

Observations are padded with zeros to the widest task's and actions cut to the task's own, as the official wrapper does.
Environment i of E plays task i modulo the number of tasks. Where there are fewer environments than tasks, the tasks
take turns from episode to episode: task (i + kE) modulo their number in the k-th, so that E episodes side by side are E
tasks in a row, and each environment comes by all of its tasks equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError

from .answers import array
from .base import Array, Env, close_all, env_seed, state_of, whole_sizes

Make = Callable[[Config, int], Env]


class Padded(Env):
    """The environment of one task in the widths of a multi-task model.

    Args:
        env: of the task; it is closed with this one.
        cfg: a completed multi-task config.
        task: index of the task.

    Raises:
        ConfigError: the environment is not of the sizes that the config has for the task; it names the task.
    """

    def __init__(self, env: Env, cfg: Config, task: int) -> None:
        self.env, self.task, self.name = env, task, cfg.tasks[task]
        self.obs_shape, self.action_dim = cfg.observation_shape, cfg.need("action_dim")
        self.max_episode_steps = env.max_episode_steps
        self.action_repeat, self.frames_per_second = env.action_repeat, env.frames_per_second
        for key, got, allowed in (
            ("action_dims", env.action_dim, cfg.action_dims[task]),
            ("episode_lengths", env.max_episode_steps, cfg.episode_lengths[task]),
        ):
            if got != allowed:
                close_all([env])
                raise ConfigError(f"config key {key!r}: got {allowed} for {self.name}, allowed: {got}, as it has")
        if env.obs_shape[0] > self.obs_shape[0]:
            close_all([env])
            ways = f"of at least the {env.obs_shape[0]} numbers that {self.name} observes"
            raise ConfigError(f"config key 'obs_shape': got {self.obs_shape} of 'state', allowed: {ways}")

    def _padded(self, obs: Any) -> NDArray[np.float32]:
        seen = array(obs, tuple(self.env.obs_shape), np.float32, "observation")
        found = np.zeros(self.obs_shape, np.float32)
        found[: len(seen)] = seen
        return found

    @override
    def reset(self) -> Array:
        return self._padded(self.env.reset())

    @override
    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        answer: Any = self.env.step(action[: self.env.action_dim])
        if not isinstance(answer, (tuple, list)) or len(answer) != 5:
            return answer  # type: ignore[return-value]
        return (self._padded(answer[0]), *answer[1:])

    @override
    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        return self.env.render(width, height)

    @override
    def overrides(self, cfg: Config) -> Config:
        return cfg  # the official code drops what a task fixes, such as rho, where there are several

    @override
    def random_state(self) -> Any:
        return self.env.random_state()

    @override
    def set_random_state(self, state: Any) -> None:
        self.env.set_random_state(state)

    @override
    def close(self) -> None:
        self.env.close()


class TaskEnv(Env):
    """One environment that plays its tasks of a multi-task model in turn; each is made when its turn comes.

    Its first episode is of the first task, until `begin_with` says otherwise.

    Args:
        cfg: a config with `tasks`, completed or to be by `complete`.
        seed: of each of them.
        make: makes the environment of a single task.

    task: index of the task that was reset last, or else comes first.
    """

    def __init__(self, cfg: Config, seed: int, make: Make) -> None:
        self._cfg, self._seed, self._make = cfg, seed, make
        self._raw: dict[int, Env] = {}
        self._envs: dict[int, Padded] = {}
        self._first = self._turn = 0  # task of the first episode, episodes begun
        self.task = 0

    def begin_with(self, index: int, turn: int = 0) -> None:
        """Play as environment `index` of the run, from its `turn`-th episode on."""
        self._first, self._turn = index, turn
        self.task = self._task_of(turn)

    def begin_after(self, task: int) -> None:
        """Play from the episode on that follows one of this task."""
        turns = range(len(self._cfg.tasks))  # they repeat after as many
        self.begin_with(self._first, 1 + next(turn for turn in turns if self._task_of(turn) == task))

    def _task_of(self, turn: int) -> int:
        count, envs = len(self._cfg.tasks), self._cfg.num_envs
        return (self._first + (turn * envs if envs < count else 0)) % count

    def _raw_of(self, task: int) -> Env:
        if task not in self._raw:
            self._raw[task] = self._make(self._cfg.of_task(self._cfg.tasks[task]), self._seed)
        return self._raw[task]

    def of(self, task: int) -> Padded:
        """Return the environment of a task, made now if it was not before."""
        if task not in self._envs:
            self._envs[task] = Padded(self._raw_of(task), self._cfg, task)
        return self._envs[task]

    def each(self) -> Iterator[Padded]:
        """Yield the environments of all tasks in their order."""
        yield from map(self.of, range(len(self._cfg.tasks)))

    def complete(self, cfg: Config) -> Config:
        """Return the config completed by the sizes of its tasks, whose environments are made where it has none yet.

        Raises:
            ConfigError: one cannot be made, or has no sizes that a model could have.
        """
        if not cfg.multitask:
            cfg = cfg.with_tasks([self._sizes(task) for task in range(len(cfg.tasks))])
        self._cfg = cfg = cfg.with_tasks()
        return cfg

    def _sizes(self, task: int) -> tuple[int, int, int]:
        env, name = self._raw_of(task), self._cfg.tasks[task]
        whole_sizes(env, name)
        shape = tuple(env.obs_shape)
        if len(shape) != 1:
            raise ConfigError(f"config key 'tasks': {name} observes {shape}, allowed: one dimension in each task")
        return shape[0], env.action_dim, env.max_episode_steps

    @property
    def name(self) -> str:
        """The task that is played, by its name."""
        return self._cfg.tasks[self.task]

    @property
    def obs_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The widest task's."""
        return self._cfg.observation_shape

    @property
    def action_dim(self) -> int:  # type: ignore[override]
        """The widest task's."""
        return int(self._cfg.need("action_dim"))

    @property
    def max_episode_steps(self) -> int:  # type: ignore[override]
        """The longest task's."""
        return int(self._cfg.need("episode_length"))

    @property
    def action_repeat(self) -> int:  # type: ignore[override]
        """Environment steps per decision where all tasks have as many, else 1: steps then count decisions."""
        repeats = {env.action_repeat for env in self.each()}
        return repeats.pop() if len(repeats) == 1 else 1

    @property
    def frames_per_second(self) -> float:  # type: ignore[override]
        """That of the task played."""
        return self.of(self.task).frames_per_second

    @property
    def notes(self) -> list[str]:
        """What the environments made so far have to say."""
        return list(dict.fromkeys(note for env in self._raw.values() for note in getattr(env, "notes", ())))

    @override
    def reset(self) -> Array:
        self.task, self._turn = self._task_of(self._turn), self._turn + 1
        return self.of(self.task).reset()

    @override
    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        return self.of(self.task).step(action)

    @override
    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        return self.of(self.task).render(width, height)

    @override
    def overrides(self, cfg: Config) -> Config:
        return cfg

    @override
    def random_state(self) -> Any:
        """Return whose turn it is and the states of the environments made; None where one cannot be told."""
        states = {self._cfg.tasks[task]: state_of(env) for task, env in sorted(self._raw.items())}
        if None in states.values():
            return None
        return dict(first=self._first, turn=self._turn, task=self.task, seed=self._seed, states=states)

    @override
    def set_random_state(self, state: Any) -> None:
        self._first, self._turn, self.task = state["first"], state["turn"], state["task"]
        if self._seed != state["seed"]:
            close_all(self._raw.values())
            self._raw, self._envs, self._seed = {}, {}, state["seed"]
        for name, found in state["states"].items():
            self._raw_of(self._cfg.tasks.index(name)).set_random_state(found)

    @override
    def close(self) -> None:
        close_all(self._raw.values())


def task_of(env: Env) -> int:
    """Return the task of the episode under way, by its index; 0 of an environment of one task."""
    return env.task if isinstance(env, TaskEnv) else 0


def placed(make: Make, cfg: Config, index: int, anew: int, failed: int | None = None) -> Env:
    """Make environment `index` of a run.

    anew: times environments of the run were made anew.
    failed: the task, by its index, of the episode that was lost in the environment that this one replaces; None where
        none is known of. One that plays several tasks goes on with the turn after it, or else leaves out `anew` turns,
        so that a task in which it always fails does not keep it from the next ones.
    """
    env = make(cfg, env_seed(cfg.seed, index, anew))
    if isinstance(env, TaskEnv):
        env.begin_with(index, anew)
        if failed is not None:
            env.begin_after(failed)
    return env
