"""Evaluation whose episodes are spread over the ranks of a run: each plays its share, and all know what came of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.plan.planner import Planner
from tdmpc2_fast.runtime.ranks import Ranks

from ...envs.given import Source
from ..evaluate import Evaluation, Evaluator
from ..stop import Stop, Stopped


class SharedEvaluator:
    """Plays this rank's share of `eval_episodes`, with seeds of its own; used as an `Evaluator`, by all ranks together.

    The episodes are others than those of one process, since each rank draws for its own.

    Args:
        agent, source: as for `Evaluator`.
        ranks: those that share it.
    """

    def __init__(self, agent: TDMPC2, source: Source | None, ranks: Ranks) -> None:
        cfg, self._ranks = agent.cfg, ranks
        self._tasks, self._multitask = cfg.tasks if cfg.multitask else (cfg.task,), cfg.multitask
        self._share = ranks.share(cfg.eval_episodes)
        own = cfg.replace(seed=ranks.own_seed(cfg), eval_episodes=max(1, self._share))
        self._own = Evaluator(agent, source, own)

    @property
    def planner(self) -> Planner:
        """The planner of this rank's episodes."""
        return self._own.planner

    def run(
        self,
        stop: Stop | None = None,
        busy: Callable[[int, int], None] = lambda done, total: None,
        video: Path | None = None,
        warn: Callable[[str], None] = print,
    ) -> Evaluation:
        """Play the share, wait for those of the others, and return all: episode i is of rank i modulo their number.

        Raises:
            Stopped: a rank was asked to stop.
        """
        own: dict[str, Any] = {}
        try:
            if self._share:
                found = self._own.run(stop, busy, video if self._ranks.first else None, warn)
                by_task = found.by_task or {self._tasks[0]: found}
                own["found"] = {k: [x.returns, x.successes, x.lengths] for k, x in by_task.items()}
        except Stopped as e:
            own["stopped"] = e.signal
        each = self._ranks.told(own)
        for x in each:
            if "stopped" in x:
                raise Stopped(x["stopped"])
        return _joined([x["found"] for x in each if "found" in x], self._tasks, self._multitask)

    def states(self) -> list[Any]:
        """Return the random states of this rank's environments between two evaluations."""
        return self._own.states()

    def restore(self, states: Sequence[Any], planner: Mapping[str, Tensor]) -> None:
        """Go on where another one of this rank stood, as `Evaluator.restore`."""
        self._own.restore(states, planner)

    def close(self) -> None:
        """Free the environments."""
        self._own.close()


def _joined(each: Sequence[Mapping[str, Any]], tasks: Sequence[str], multitask: bool) -> Evaluation:
    by_task = {}
    for name in tasks:
        own = [list(zip(*x[name], strict=True)) for x in each]
        episodes = [episode for together in zip_longest(*own) for episode in together if episode is not None]
        by_task[name] = Evaluation.of(name, episodes)
    return Evaluation.of_several(by_task) if multitask else by_task[tasks[0]]
