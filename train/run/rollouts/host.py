"""Episodes of environments that give numpy arrays, kept as lists of their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.config import Config

from ...envs import check_episodic
from ...envs.base import Actions, Environments, EnvState, check_actions
from ..episode import Episode
from .base import CANNOT_TELL, Rollouts


class HostRollouts(Rollouts):
    """The episodes under way in `Environments`.

    episodes: by environment; None where one is to be begun.
    """

    def __init__(self, envs: Environments, cfg: Config) -> None:
        self.envs, self.cfg, self.failures = envs, cfg, envs.failures
        self.episodes: list[Episode | None] = [None] * cfg.num_envs
        self._actions: Actions | None = None

    @property
    def restarts(self) -> int:
        """Times processes were started anew, over the whole run."""
        return self.envs.restarts

    @property
    def at_boundary(self) -> bool:
        """Whether an environment is between two episodes."""
        return any(e is None or e.ended for e in self.episodes)

    @property
    def any_ended(self) -> bool:
        """Whether `ended` has something to tell."""
        return any(e is not None and e.ended for e in self.episodes)

    @override
    def ended(self) -> Iterator[Episode]:
        for i, episode in enumerate(self.episodes):
            if episode is not None and episode.ended:
                self.episodes[i] = None
                yield episode

    @override
    def begin(self) -> None:
        which = [i for i, e in enumerate(self.episodes) if e is None]
        if which:
            for i, obs in self.envs.reset(which).items():
                self.episodes[i] = Episode(obs, self.cfg.need("action_dim"), self._task_of(i))

    def _task_of(self, i: int) -> int | None:
        return self.envs.tasks()[i] if self.cfg.multitask else None

    @override
    def take(self, actions: Actions) -> None:
        self._actions = actions
        if self.cfg.multitask:  # a task's own dimensions alone are done, and zeros in the others learned
            widths = np.array(self.cfg.action_dims)[self._tasks(self.running())]
            self._actions = np.where(np.arange(actions.shape[1]) < widths[:, None], actions, np.float32(0))

    @override
    def act(self, agent: TDMPC2) -> None:
        episodes = self.running()
        obs = torch.from_numpy(np.stack([e.obs[-1] for e in episodes]))
        t0 = torch.tensor([len(e) == 0 for e in episodes])
        task = torch.tensor(self._tasks(episodes)) if self.cfg.multitask else None
        self._actions = agent.act(obs, t0, task=task).numpy()
        check_actions(self._actions, obs.numpy())

    def _tasks(self, episodes: Sequence[Episode]) -> list[int]:
        return [e.task for e in episodes if e.task is not None]

    @override
    def step_async(self) -> None:
        assert self._actions is not None, "take or act comes first"
        self.envs.step_async(self._actions)

    @override
    def step_wait(self) -> None:
        assert self._actions is not None, "step_async comes first"
        for i, (episode, step) in enumerate(zip(self.running(), self.envs.step_wait(), strict=True)):
            if step is None:
                self.episodes[i] = None
                continue
            check_episodic(self.cfg, step, None if episode.task is None else self.cfg.tasks[episode.task])
            episode.append(self._actions[i], step)

    def running(self) -> list[Episode]:
        """Return the episodes under way: while a step is taken, one of each environment."""
        return [e for e in self.episodes if e is not None]

    @override
    def state(self, warn: Callable[[str], None]) -> tuple[dict[str, Mapping[str, Tensor]], Any]:
        states = self.envs.states()
        for i, state in enumerate(states):
            if state is None:  # made anew just now
                self.episodes[i] = None
            elif state.now is None:
                warn(CANNOT_TELL)
        return {f"episode {i}": e.tensors() for i, e in enumerate(self.episodes) if e is not None}, states

    @override
    def restore(self, parts: Mapping[str, Mapping[str, Tensor]], rest: Any, warn: Callable[[str], None]) -> None:
        """Play the episodes under way again; drop those that come out differently."""
        states = [EnvState(*(state or (None, None))) for state in rest]
        kept = {i: parts[f"episode {i}"] for i in range(len(states)) if f"episode {i}" in parts}
        actions = {i: k["action"].numpy()[1:] for i, k in kept.items()}
        for i, steps in self.envs.restore(states, actions).items():
            self.episodes[i] = Episode.replayed(kept[i], steps, self._task_of(i))
            if self.episodes[i] is None:
                warn(
                    f"{self.cfg.task}, environment {i}: the same actions gave other observations, so the episode under "
                    "way is dropped and a new one begun; the run goes on, but not bit for bit"
                )
