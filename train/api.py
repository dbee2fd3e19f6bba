"""`train`: one call that trains on an environment, by name or as an object. The command `train` makes it, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.agent import load as load_agent
from tdmpc2_fast.errors import ConfigError, InputError, kind_of
from tdmpc2_fast.plan.planner import Planner
from tdmpc2_fast.task_sets import own_set

from .envs import make_env, same_form
from .envs.answers import NotHereError
from .envs.base import close_all
from .envs.given import source_of
from .run.evaluate import Evaluation, Evaluator, named
from .run.events import Callback, Event

__all__ = ["Agent", "Callback", "Evaluation", "Event", "Interrupted", "train"]


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or another signal; `resume="auto"` goes on from its checkpoint, if it writes any.

    status: that of a command stopped by this signal.
    """

    def __init__(self, status: int, folder: Path) -> None:
        how = f"to go on: resume='auto', work_dir={str(folder)!r}"
        super().__init__(f"stopped; {how if (folder / 'checkpoints').is_dir() else 'no checkpoint was written'}")
        self.status = status


class Agent:
    """A trained agent in terms of its environment: its observations in, its actions out.

    Args:
        tdmpc2: the agent that plans and learns.
        env: its environment, as `train` takes it.

    tdmpc2: that agent, for all else: `model`, `planner`, `update`, batches of observations.
    folder: where the run left its files; None of an agent that no run made.
    evaluation: the last one of the run.
    status: 0, or 1 where nothing was learned or the last weights could not be written.
    """

    def __init__(self, tdmpc2: TDMPC2, env: Any = None) -> None:
        self.tdmpc2, self.cfg = tdmpc2, tdmpc2.cfg
        self._source = source_of(self.cfg.task if env is None else env)
        self._form = same_form(self._source.form(self.cfg), self.cfg)
        self._form.close()  # its spaces are all that is wanted
        self._planner: Planner | None = None
        self._begun = False
        self._widths: dict[str, int | None] = {}
        self.folder: Path | None = None
        self.evaluation: Evaluation | None = None
        self.status = 0

    def reset(self) -> None:
        """Begin a new episode: the next plan starts from no earlier one, the next image fills its stack of frames."""
        self._begun = False

    def act(
        self, obs: Any, t0: bool | None = None, eval_mode: bool = True, task: str | None = None
    ) -> NDArray[Any] | Any:
        """Return the environment's action for one observation of its observation space.

        Args:
            obs: as `reset` and `step` of the environment return it.
            t0: whether it begins an episode; None: whether it is the first since `reset`, or at all.
            eval_mode: leave out exploration noise.
            task: the one of a multi-task model that the environment is of, by its name; default its only one.

        Returns:
            an action of the environment's action space, in its shape and dtype.

        Raises:
            ConfigError: no task where there are several, or one that the model does not have.
            InputError: not as many numbers as the task observes, with or without the zeros that pad them.
        """
        if self.cfg.multitask:
            return self._act_in(obs, t0, eval_mode, task)
        first = not self._begun if t0 is None else t0
        self._begun = True
        seen, done = getattr(self._form, "seen", None), getattr(self._form, "done", None)
        state = np.asarray(obs, np.float32) if seen is None else seen(obs, first)
        batch = torch.from_numpy(np.ascontiguousarray(state)).unsqueeze(0)
        if self.cfg.mpc:
            self._planner = self._planner or Planner(self.tdmpc2.model, 1)
            action = self._planner.plan(batch, t0=first, eval_mode=eval_mode)[0]
        else:
            action = self.tdmpc2.act(batch, eval_mode=eval_mode)[0]
        found: NDArray[np.float32] = action.cpu().numpy()
        return found if done is None else done(found)

    def _act_in(self, obs: Any, t0: bool | None, eval_mode: bool, task: str | None) -> NDArray[np.float32]:
        cfg = self.cfg
        if task is None and len(cfg.tasks) > 1:
            raise ConfigError(f"task: got None, allowed: {', '.join(cfg.tasks)}")
        index = cfg.tasks.index(named(cfg, cfg.tasks if task is None else [task])[0])
        state, width = np.asarray(obs, np.float32).ravel(), cfg.observation_shape[0]
        own = self._width(cfg.tasks[index])
        if len(state) > width or (own is not None and len(state) not in (own, width)):
            allowed = f"at most {width}" if own is None else f"{own}, as {cfg.tasks[index]} observes"
            raise InputError(f"obs: got {len(state)} numbers, allowed: {allowed}")
        first = not self._begun if t0 is None else t0
        self._begun = True
        batch = torch.from_numpy(np.pad(state, (0, width - len(state)))).unsqueeze(0)
        if cfg.mpc:
            self._planner = self._planner or Planner(self.tdmpc2.model, 1)
            action = self._planner.plan(batch, t0=first, eval_mode=eval_mode, task=index)[0]
        else:
            action = self.tdmpc2.act(batch, eval_mode=eval_mode, task=index)[0]
        found: NDArray[np.float32] = action.cpu().numpy()[: cfg.action_dims[index]]
        return found

    def _width(self, task: str) -> int | None:
        """Return how many numbers a task observes, which its environment tells; None where that is not installed."""
        if task not in self._widths:
            try:
                env = make_env(self.cfg.of_task(task), self.cfg.seed)
            except NotHereError:
                self._widths[task] = None
            else:
                self._widths[task] = env.obs_shape[0]
                close_all([env])
        return self._widths[task]

    def evaluate(
        self,
        env: Any = None,
        episodes: int | None = None,
        video: str | Path | None = None,
        tasks: Sequence[str] = (),
    ) -> Evaluation:
        """Play episodes without exploration, and return what came of them.

        Args:
            env: where, as `train` takes it; None: the environment it was trained in.
            episodes: how many; None: `eval_episodes` of the config.
            video: an mp4 of the first one, where given.
            tasks: those of a multi-task model to play; default all.

        Raises:
            ConfigError: an environment with other observations or actions, or a task that the model does not have.
        """
        if self.cfg.multitask and env is not None:
            raise ConfigError(f"env: got {kind_of(env)}, allowed: tasks=, names of tasks of the model")
        source = self._source if env is None else source_of(env)
        cfg = self.cfg if episodes is None else self.cfg.replace(eval_episodes=episodes)
        evaluator = Evaluator(self.tdmpc2, source, cfg, tasks)
        try:
            for each in evaluator.envs if not cfg.multitask else ():
                same_form(each, self.cfg)
            return evaluator.run(video=None if video is None else Path(video))
        finally:
            evaluator.close()

    def save(self, fp: str | Path) -> None:
        """Save the weights: safetensors with the config, or the official format for a name ending in `.pt`."""
        self.tdmpc2.save(fp)

    def __repr__(self) -> str:
        result = "" if self.evaluation is None else f", return {self.evaluation.mean_return:.1f}"
        return f"Agent({self.cfg.task}{result})"


def train(
    env: Any = None,
    *,
    callbacks: Callback | Sequence[Callback] | None = None,
    eval_env: Any = None,
    as_: str | None = None,
    tell: Callable[..., None] = lambda **facts: None,
    **keys: Any,
) -> Agent:
    """Train an agent on an environment and return it.

        agent = tdmpc2_fast.train("walker-walk", steps=100_000)
        agent = tdmpc2_fast.train(gymnasium.make("Pendulum-v1"), steps=20_000, model_size=1)
        agent = tdmpc2_fast.train(["walker-walk", "cup-catch"], as_="two", steps=200_000)  # one model for both

    Files go to a folder of their own, as of the command: `work_dir=`, or runs/TASK/EXP_NAME/SEED.

    Args:
        env: the name of a task, or a list of several, which one model learns; a Gymnasium id; a `gymnasium.Env`; a
            function that makes one; or a `gymnasium.vector.VectorEnv`. One environment is trained and evaluated in, an
            episode after another; a function is called for each environment that is wanted. What is handed over stays
            open.
        as_: what several tasks are called together.
        callbacks: functions that are told of every `Event`; one that returns False ends the run.
        eval_env: where it is evaluated, as `env`; default the same, or others of its kind.
        tell: told the folder, and the last evaluation.
        keys: those of `Config`, by their official names, as on the command line: `steps`, `seed`, `model_size`, ...

    Raises:
        ConfigError: a key or an environment that cannot be used; nothing was begun.
        Interrupted: Ctrl-C or another signal stopped it; a checkpoint is written.
        Exception: what the environment or a callback raised.
    """
    from .run import lifecycle

    env, keys = _of_several(env, as_, keys)
    source = source_of(env)
    for key, value in source.keys.items():
        if keys.get(key, value) != value and key != "task":
            raise ConfigError(f"config key {key!r}: got {keys[key]!r}, allowed: {value!r}, of the environment given")
    if isinstance(env, str) and keys.get("task", env) != env:
        raise ConfigError(f"config key 'task': got {keys['task']!r}, allowed: {env!r}, which is the environment given")
    each = callbacks if isinstance(callbacks, (list, tuple)) else (callbacks,) if callbacks is not None else ()
    for callback in each:
        if not callable(callback):
            raise InputError(f"callbacks: got {kind_of(callback)}, allowed: functions of one event")
    given = lifecycle.Given(tell, source, None if eval_env is None else source_of(eval_env), tuple(each))
    outcome = lifecycle.start({**source.keys, **keys}, given)
    if outcome.status >= 128:
        raise Interrupted(outcome.status, outcome.folder)
    agent = Agent(outcome.agent or load_agent(outcome.folder), source)
    agent.folder, agent.evaluation, agent.status = outcome.folder, outcome.evaluation, outcome.status
    return agent


def _of_several(env: Any, name: str | None, keys: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return environment and keys of a run where a list of tasks is given, and both as they are where none is."""
    listed = keys.get("task") if env is None else env
    if not isinstance(listed, (list, tuple)) or not all(isinstance(task, str) for task in listed):
        if name is not None:
            raise ConfigError(f"as_: got {name!r}, allowed: the name of several tasks, where a list of them is given")
        return env, keys
    return None, keys | own_set(listed, name)
