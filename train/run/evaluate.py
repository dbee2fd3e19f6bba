"""Evaluation: whole episodes, planning without exploration noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError, did_you_mean
from tdmpc2_fast.plan.planner import Planner
from tdmpc2_fast.seeds import stream_seed

from ..envs import APART, dmcontrol
from ..envs.base import FAILURES, Array, Env, Failures, check_actions, close_all, reset, state_of, step
from ..envs.given import Source
from ..envs.multitask import TaskEnv
from ..pictures.video import Film
from .stop import Stop

_MOST_ENVS = 16


@dataclass(frozen=True)
class Evaluation:
    """Returns, successes and lengths (in decisions) of the episodes, in order.

    by_task: of a multi-task model, the same by the name of the task, in the order of the episodes; else empty.
    normalized_score: as in the paper, 0 to 100: the return of DMControl's tasks by 10, the successes in percent of
        Meta-World's, MyoSuite's and ManiSkill's, and the mean over tasks. NaN where the scale of one is not known.
    """

    returns: list[float]
    successes: list[float]
    lengths: list[int]
    by_task: Mapping[str, Evaluation] = field(default_factory=dict)
    normalized_score: float = field(default=math.nan, compare=False)

    @classmethod
    def of(cls, task: str, episodes: Sequence[tuple[float, float, int]]) -> Evaluation:
        """Return that of a task, whose episodes are return, success and length each."""
        returns, successes, lengths = (list(x) for x in zip(*episodes, strict=True))
        return cls(returns, successes, lengths, {}, score(task, returns, successes))

    @classmethod
    def of_several(cls, by_task: Mapping[str, Evaluation]) -> Evaluation:
        """Return that of several tasks, with as many episodes each."""
        each = list(by_task.values())
        returns, successes, lengths = (
            [x for e in each for x in getattr(e, name)] for name in ("returns", "successes", "lengths")
        )
        return cls(returns, successes, lengths, by_task, float(np.mean([e.normalized_score for e in each])))

    def columns(self) -> dict[str, float | None]:
        """Return what a log has of several tasks: the normalised score, and return and success of each, by name."""
        if not self.by_task:
            return {}
        found: dict[str, float | None] = {"normalized_score": _known(self.normalized_score)}
        for name, e in self.by_task.items():
            found |= {f"return+{name}": e.mean_return, f"success+{name}": float(np.mean(e.successes))}
        return found

    @property
    def merit(self) -> float:
        """What the best weights of a run have most of: the normalised score of several tasks, if any, else returns."""
        return self.normalized_score if self.by_task and math.isfinite(self.normalized_score) else self.mean_return

    @property
    def mean_return(self) -> float:
        """The mean over the episodes."""
        return float(np.mean(self.returns))

    @property
    def std_return(self) -> float:
        """The standard deviation over the episodes."""
        return float(np.std(self.returns))


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def score(task: str, returns: Sequence[float], successes: Sequence[float]) -> float:
    """Return the normalised score of a task, as `Evaluation` says; NaN where none is customary."""
    if task in dmcontrol.TASKS or task in dmcontrol.MORE:
        return float(np.mean(returns)) / 10
    return 100 * float(np.mean(successes)) if any(task in suite.module.TASKS for suite in APART.values()) else math.nan


def named(cfg: Config, tasks: Sequence[str] = ()) -> list[str]:
    """Return these tasks of a multi-task model, in its order; all of them where none is named.

    Of a model of one task that is this one.

    Raises:
        ConfigError: one that it does not have.
    """
    if not cfg.multitask:
        if tasks:
            got = ",".join(tasks)
            raise ConfigError(f"config key 'tasks': got {got}, allowed: none, of a model of {cfg.task} alone")
        return [cfg.task]
    for name in tasks:
        if name not in cfg.tasks:
            close = did_you_mean(name, cfg.tasks)
            raise ConfigError(f"config key 'tasks': got {name!r}, allowed: {', '.join(cfg.tasks)}.{close}")
    return [name for name in cfg.tasks if not tasks or name in tasks]


class Evaluator:
    """Plays `eval_episodes` episodes, with environments and planner of its own.

    Training environments and the training planner's warm start are left alone. An environment
    plays every sixteenth episode, so that where an episode begins does not depend on how many are
    asked for. On the CPU they are played one after another, so that nothing in them does: a plan
    for several environments draws for all of them, and products of more rows round differently.
    On a GPU, where a wider plan takes hardly longer, they are played side by side.

    Of a multi-task model every task is played as often. The sixteen are shared among the tasks, each of which has one
    at least; on a GPU all tasks are played at once.

    Args:
        agent: what acts.
        source: where the environments come from; default by the agent's task.
        cfg: with another number of episodes; default the agent's.
        tasks: those of a multi-task model to play; default all.
    """

    def __init__(
        self,
        agent: TDMPC2,
        source: Source | None = None,
        cfg: Config | None = None,
        tasks: Sequence[str] = (),
    ) -> None:
        cfg = cfg or agent.cfg
        self.agent, self.cfg, self._source = agent, cfg, source or Source()
        self.tasks = named(cfg, tasks)
        count = 1 if self._source.shared else min(cfg.eval_episodes, max(1, _MOST_ENVS // max(1, len(cfg.tasks))))
        # Environment i is of task i modulo their number.
        self.envs: list[Env] = []
        try:
            for i in range(count * len(self.tasks)):
                self.envs.append(self._made(i))
        except BaseException:
            close_all(self.envs)
            raise
        width = 1 if agent.device.type == "cpu" else len(self.envs)
        self.planner = Planner(agent.model, width, seed=stream_seed(cfg.seed, "eval"))

    def run(
        self,
        stop: Stop | None = None,
        busy: Callable[[int, int], None] = lambda done, total: None,
        video: Path | None = None,
        warn: Callable[[str], None] = print,
    ) -> Evaluation:
        """Play the episodes, as many side by side as the planner plans for; of one that fails, another one.

        Args:
            stop: asked after every decision.
            busy: told, after every decision, how many have been made and will be at most.
            video: an mp4 of the first episode, where given.
            warn: told where there is none.

        Raises:
            Stopped: `stop` said so; environments and planner stand where they stood then.
        """
        found: list[list[tuple[float, float, int]]] = [[] for _ in self.tasks]
        failures = Failures(self.cfg, warn)
        before, expected = 0, self._most_decisions()
        for which in self._rounds(found):
            longest = max(self.envs[i].max_episode_steps for i in which)
            with Film(None if before else video, self.envs[which[0]], warn) as film:
                for done in self._round(which, film, found, failures):
                    busy(before + done, max(expected, before + longest))
                    if stop is not None:
                        stop.check()
            before += longest
        count = self.cfg.eval_episodes
        by_task = {name: Evaluation.of(name, own[:count]) for name, own in zip(self.tasks, found, strict=True)}
        return Evaluation.of_several(by_task) if self.cfg.multitask else by_task[self.cfg.task]

    def _rounds(self, found: Sequence[Sequence[object]]) -> Iterator[list[int]]:
        """Yield which environments play an episode next, until each task has as many as are wanted in `found`."""
        tasks, width, wanted = len(self.tasks), self.planner.num_envs, self.cfg.eval_episodes
        if width == 1:
            for task, own in enumerate(found):
                for i in itertools.takewhile(lambda _, own=own: len(own) < wanted, itertools.count()):  # type: ignore[misc]
                    yield [(i * tasks + task) % len(self.envs)]
            return
        for i in itertools.takewhile(lambda _: min(map(len, found)) < wanted, itertools.count()):
            first = i * width % len(self.envs)
            yield list(range(first, first + width))

    def _most_decisions(self) -> int:
        """Return the decisions of all rounds, if all go to their end and no episode fails."""
        lengths, count = [env.max_episode_steps for env in self.envs[: len(self.tasks)]], self.cfg.eval_episodes
        if self.planner.num_envs == 1:
            return count * sum(lengths)
        return -(-count * len(lengths) // self.planner.num_envs) * max(lengths)

    def _round(
        self,
        which: Sequence[int],
        film: Film,
        found: Sequence[list[tuple[float, float, int]]],
        failures: Failures,
    ) -> Iterator[int]:
        """Play an episode in each of these environments, as many as are planned for; yield the decisions made.

        What comes of the episodes is added to `found`, by task, when all have ended.
        """
        count = len(which)
        obs = [self._begun(i, failures) for i in which]
        total, success, length = [0.0] * count, [0.0] * count, [0] * count
        running, dropped, t0 = [True] * count, [False] * count, True
        while any(running):
            was_running = running[0]
            if was_running:
                film.add(self._caption(which[0], total[0], length[0]))
            seen = np.stack(obs)
            actions = self._act(seen, t0, which)
            check_actions(actions, seen)
            t0 = False
            for i in (i for i in range(count) if running[i]):
                try:
                    now = step(self.envs[which[i]], actions[i])
                except FAILURES as e:
                    self._made_anew(which[i], failures, e)
                    running[i], dropped[i] = False, True
                    continue
                obs[i] = now.obs
                total[i] += now.reward
                length[i] += 1
                success[i] = now.success
                running[i] = not (now.terminated or now.truncated or length[i] >= self.envs[which[i]].max_episode_steps)
            if was_running and not running[0]:
                film.add(self._caption(which[0], total[0], length[0]))
            yield max(length)
        for i in itertools.compress(range(count), (not d for d in dropped)):
            found[which[i] % len(self.tasks)].append((total[i], success[i], length[i]))

    def _begun(self, i: int, failures: Failures) -> Array:
        """Start an episode in environment i; return its observation."""
        while True:
            try:
                return reset(self.envs[i])
            except FAILURES as e:
                self._made_anew(i, failures, e)

    def _made_anew(self, i: int, failures: Failures, error: BaseException) -> None:
        """Make environment i anew after an error, unless that is to end the run."""
        failures.replace(self.envs, i, error, lambda i: self._made(i, f" after {failures.dropped}"))

    def _made(self, i: int, after: str = "") -> Env:
        number, task = divmod(i, len(self.tasks))
        of = f" of {self.tasks[task]}" if self.cfg.multitask else ""
        made = self._source.make(self.cfg, stream_seed(self.cfg.seed, f"eval env {number}{of}{after}") % 2**31)
        return made.of(self.cfg.tasks.index(self.tasks[task])) if isinstance(made, TaskEnv) else made

    def _caption(self, i: int, total: float, decisions: int) -> str:
        return f"{self.tasks[i % len(self.tasks)]}   return {total:.1f}   decision {decisions}"

    def states(self) -> list[Any]:
        """Return the random states of the environments between two evaluations."""
        return [state_of(env) for env in self.envs]

    def restore(self, states: Sequence[Any], planner: Mapping[str, Tensor]) -> None:
        """Go on where another evaluator stood: `states` are of its environments, `planner` is of its planner."""
        for env, state in zip(self.envs, states, strict=False):  # eval_episodes may be others now
            if state is not None:
                env.set_random_state(state)
        if planner["prev_mean"].shape == self.planner.prev_mean.shape:
            self.planner.load_state(planner)

    def _act(self, obs: np.ndarray, t0: bool, which: Sequence[int]) -> np.ndarray:
        batch = torch.from_numpy(obs)
        task: dict[str, Any] = {}
        if self.cfg.multitask:
            task["task"] = torch.tensor([self.cfg.tasks.index(self.tasks[i % len(self.tasks)]) for i in which])
        if not self.cfg.mpc:
            return np.asarray(self.agent.act(batch, eval_mode=True, **task))
        return self.planner.plan(batch, t0=t0, eval_mode=True, **task).cpu().numpy()

    def close(self) -> None:
        """Free the environments."""
        close_all(self.envs)
