"""Evaluation: whole episodes, planning without exploration noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.config import Config
from tdmpc2_fast.plan.planner import Planner
from tdmpc2_fast.seeds import stream_seed

from ..envs.base import FAILURES, Array, Env, Failures, check_actions, close_all, reset, state_of, step
from ..envs.given import Source
from ..pictures.video import Film
from .stop import Stop

_MOST_ENVS = 16


@dataclass(frozen=True)
class Evaluation:
    """Returns, successes and lengths (in decisions) of the episodes, in order."""

    returns: list[float]
    successes: list[float]
    lengths: list[int]

    @property
    def mean_return(self) -> float:
        """The mean over the episodes."""
        return float(np.mean(self.returns))

    @property
    def std_return(self) -> float:
        """The standard deviation over the episodes."""
        return float(np.std(self.returns))


class Evaluator:
    """Plays `eval_episodes` episodes, with environments and planner of its own.

    Training environments and the training planner's warm start are left alone. An environment
    plays every sixteenth episode, so that where an episode begins does not depend on how many are
    asked for. On the CPU they are played one after another, so that nothing in them does: a plan
    for several environments draws for all of them, and products of more rows round differently.
    On a GPU, where a wider plan takes hardly longer, they are played side by side.

    Args:
        agent: what acts.
        source: where the environments come from; default by the agent's task.
        cfg: with another number of episodes; default the agent's.
    """

    def __init__(self, agent: TDMPC2, source: Source | None = None, cfg: Config | None = None) -> None:
        cfg = cfg or agent.cfg
        self.agent, self.cfg, self._source = agent, cfg, source or Source()
        count = 1 if self._source.shared else min(cfg.eval_episodes, _MOST_ENVS)
        self.envs: list[Env] = [self._made(i) for i in range(count)]
        width = 1 if agent.device.type == "cpu" else count
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
        found: list[tuple[float, float, int]] = []
        failures = Failures(self.cfg, warn)
        count, width, length = self.cfg.eval_episodes, self.planner.num_envs, self.envs[0].max_episode_steps
        rounds = -(-count // width)
        for i in itertools.takewhile(lambda _: len(found) < count, itertools.count()):
            with Film(None if i else video, self.envs[0], warn) as film:
                for done in self._round(i * width % len(self.envs), film, found, failures):
                    busy(i * length + done, max(rounds, i + 1) * length)
                    if stop is not None:
                        stop.check()
        returns, successes, lengths = (list(x) for x in zip(*found[:count], strict=True))
        return Evaluation(returns, successes, lengths)

    def _round(
        self, first: int, film: Film, found: list[tuple[float, float, int]], failures: Failures
    ) -> Iterator[int]:
        """Play an episode in as many environments as are planned for, from `first` on; yield the decisions made.

        What comes of the episodes is added to `found` when all have ended.
        """
        count = self.planner.num_envs
        obs = [self._begun(first + i, failures) for i in range(count)]
        total, success, length = [0.0] * count, [0.0] * count, [0] * count
        running, dropped, t0 = [True] * count, [False] * count, True
        while any(running):
            was_running = running[0]
            if was_running:
                film.add(self._caption(total[0], length[0]))
            seen = np.stack(obs)
            actions = self._act(seen, t0)
            check_actions(actions, seen)
            t0 = False
            for i in (i for i in range(count) if running[i]):
                try:
                    now = step(self.envs[first + i], actions[i])
                except FAILURES as e:
                    self._made_anew(first + i, failures, e)
                    running[i], dropped[i] = False, True
                    continue
                obs[i] = now.obs
                total[i] += now.reward
                length[i] += 1
                success[i] = now.success
                running[i] = not (now.terminated or now.truncated or length[i] >= self.envs[0].max_episode_steps)
            if was_running and not running[0]:
                film.add(self._caption(total[0], length[0]))
            yield max(length)
        found += itertools.compress(zip(total, success, length, strict=True), (not d for d in dropped))

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
        return self._source.make(self.cfg, stream_seed(self.cfg.seed, f"eval env {i}{after}") % 2**31)

    def _caption(self, total: float, decisions: int) -> str:
        return f"{self.cfg.task}   return {total:.1f}   decision {decisions}"

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

    def _act(self, obs: np.ndarray, t0: bool) -> np.ndarray:
        batch = torch.from_numpy(obs)
        if not self.cfg.mpc:
            return np.asarray(self.agent.act(batch, eval_mode=True))
        return self.planner.plan(batch, t0=t0, eval_mode=True).cpu().numpy()

    def close(self) -> None:
        """Free the environments."""
        close_all(self.envs)
