"""Batches of which a share comes from a data set and the rest from what a run plays itself: offline to online."""

from __future__ import annotations

import torch

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.learn.batch import Batch
from tdmpc2_fast.learn.replay import ReplayBuffer

from .offline import Stream


def shares(cfg: Config) -> tuple[int, int]:
    """Return how many slices of a batch come from the replay and from the data set: both at least one.

    Raises:
        ConfigError: a batch of a single slice.
    """
    if cfg.mix is None:
        return cfg.batch_size, 0
    if cfg.batch_size < 2:
        raise ConfigError(f"config key 'batch_size': got {cfg.batch_size}, allowed with mix: at least 2")
    data = min(max(round(cfg.mix * cfg.batch_size), 1), cfg.batch_size - 1)
    return cfg.batch_size - data, data


class Mixed:
    """Draws from a replay and from a data set, each of which makes batches of its share; the replay's come first."""

    def __init__(self, replay: ReplayBuffer, data: Stream) -> None:
        self.replay, self.data = replay, data

    def sample(self) -> Batch:
        """Return the next batch, on the replay's device."""
        own, more = self.replay.sample(), self.data.sample()
        return Batch(
            obs=torch.cat([own.obs, more.obs], 1),
            action=torch.cat([own.action, more.action], 1),
            reward=torch.cat([own.reward, more.reward], 1),
            terminated=torch.cat([own.terminated, more.terminated], 1),
            task=None if own.task is None or more.task is None else torch.cat([own.task, more.task]),
        )
