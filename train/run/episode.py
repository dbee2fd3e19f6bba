"""One episode of training, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..envs.base import Actions, Array, Step


class Played(Protocol):
    """An episode that has ended, wherever it is kept."""

    def __len__(self) -> int:
        """Return its decisions."""
        ...

    @property
    def task(self) -> int | None:
        """Its index in a multi-task model."""
        ...

    @property
    def total(self) -> float:
        """Its return."""
        ...

    @property
    def success(self) -> float:
        """What its last decision told of success."""
        ...

    @property
    def terminates(self) -> bool:
        """Whether it ended in a state without a future."""
        ...

    @property
    def peak(self) -> float:
        """The size of its largest reward."""
        ...

    @property
    def rewards(self) -> NDArray[Any]:
        """The rewards (T,); for those on a device, this waits for it."""
        ...

    def rows(self) -> dict[str, Any]:
        """Return the episode as `ReplayBuffer.add` takes it."""
        ...


class Episode:
    """The steps of one episode as they come; row 0 is the reset, with NaN action and reward.

    task: its index in a multi-task model.
    """

    def __init__(self, obs: Array, action_dim: int, task: int | None = None) -> None:
        self.task = task
        self.obs = [obs]
        self.action = [np.full(action_dim, np.nan, dtype=np.float32)]
        self.reward, self.terminated = [np.nan], [np.nan]
        self.ended = False
        self.success = 0.0

    def __len__(self) -> int:
        return len(self.obs) - 1

    def append(self, action: Actions, step: Step) -> None:
        """Add a decision and what came of it."""
        self.obs.append(step.obs)
        self.action.append(action)
        self.reward.append(step.reward)
        self.terminated.append(float(step.terminated))
        self.ended = step.terminated or step.truncated
        self.success = step.success

    @property
    def total(self) -> float:
        """The return so far."""
        return float(np.sum(self.reward[1:]))

    @property
    def terminates(self) -> bool:
        """Whether it ended in a state without a future."""
        return self.terminated[-1] == 1

    @property
    def peak(self) -> float:
        """The size of its largest reward."""
        return max(map(abs, self.reward[1:]))

    @property
    def rewards(self) -> NDArray[Any]:
        """The rewards (T,)."""
        return np.asarray(self.reward[1:])

    @property
    def actions(self) -> Actions:
        """The actions so far: (T, A)."""
        return np.stack(self.action)[1:]

    def rows(self) -> dict[str, Any]:
        """Return the episode as `ReplayBuffer.add` takes it."""
        rows = dict(
            obs=np.stack(self.obs),
            action=np.stack(self.action),
            reward=np.asarray(self.reward, dtype=np.float32),
            terminated=np.asarray(self.terminated, dtype=np.float32),
        )
        return rows if self.task is None else rows | dict(task=np.full(len(self.obs), self.task))

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it, for `replayed`."""
        exact = dict(reward=np.asarray(self.reward), flags=np.array([self.ended, self.success]))
        return {k: torch.from_numpy(v) for k, v in (self.rows() | exact).items()}

    @classmethod
    def replayed(cls, kept: Mapping[str, Tensor], steps: list[Step], task: int | None = None) -> Episode | None:
        """Return the episode that `tensors` was called of, played again; None where it came out differently.

        task: that it was played again in.
        """
        action = kept["action"].numpy()
        episode = cls(steps[0].obs, action.shape[1], task)
        for a, step in zip(action[1:], steps[1:], strict=True):
            episode.append(a, step)
        same = all(_equal(x.numpy(), kept[k].numpy()) for k, x in episode.tensors().items())
        return episode if same else None


def _equal(x: NDArray[Any], y: NDArray[Any]) -> bool:
    return x.shape == y.shape and x.tobytes() == y.tobytes()
