"""Adding an episode to the replay buffer, and drawing a batch from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdmpc2_fast import Config, ReplayBuffer
from tdmpc2_fast.learn.updater import Batch
from tdmpc2_fast.rng import generator

from ..harness.measure import Case, Gate, Variant
from ..options import OBS_DIM, Options

_EPISODES, _STEPS = 100, 501


class EpisodeList:
    """The plain way: a list of episodes, slices stacked for each batch; the same law, the same draws."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.episodes: list[dict[str, Tensor]] = []
        self.generator = generator(cfg.seed, "replay", device)

    def add(self, episode: dict[str, Any]) -> None:
        """Keep an episode where batches are wanted."""
        self.episodes.append({k: torch.as_tensor(v).to(self.device) for k, v in episode.items()})

    def sample(self) -> Batch:
        """Slices of episodes drawn with equal chances, starts with equal chances in each."""
        b, length = self.cfg.batch_size, self.cfg.horizon + 1
        u = torch.rand(2, b, dtype=torch.float64, device=self.device, generator=self.generator).cpu()
        slices = []
        for i in range(b):
            episode = self.episodes[int(u[0, i] * len(self.episodes))]
            start = int(u[1, i] * (len(episode["reward"]) - length + 1))
            slices.append({k: v[start : start + length] for k, v in episode.items()})
        stacked = {k: torch.stack([s[k] for s in slices], 1) for k in slices[0]}
        action, reward, terminated = (stacked[k][1:] for k in ("action", "reward", "terminated"))
        return Batch(stacked["obs"], action, reward.unsqueeze(-1), terminated.unsqueeze(-1), None)


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """Adding once; sampling for each batch size."""
    yield partial(add, options)
    for batch in options.batch:
        yield partial(sample, options, batch)


def add(options: Options) -> Case:
    """One episode of 500 decisions into a buffer with room for 50,000."""
    cfg = options.config(5, options.actions[0], buffer_size=_EPISODES * _STEPS)
    ours, plain = ReplayBuffer(cfg, options.torch_device), EpisodeList(cfg, options.torch_device)
    episode = _episode(cfg, 0)

    def add_to_list() -> None:
        plain.add(episode)
        del plain.episodes[:-_EPISODES]

    mbyte = sum(v.nbytes for v in episode.values()) / 1e6
    name = "torch"
    return Case(
        "replay",
        "add an episode",
        {
            name: Variant(lambda: ours.add(episode)),
            "list of episodes": Variant(add_to_list, gate=partial(_same_after_adding, cfg, options.torch_device)),
        },
        shape=f"{_STEPS} x ({OBS_DIM} obs, {cfg.action_dim} actions)",
        unit="episodes",
        mbyte=mbyte,
    )


def _same_after_adding(cfg: Config, device: torch.device) -> Gate:
    """Whether both hold the same after more episodes than there is room for."""
    cfg = cfg.replace(buffer_size=3 * _STEPS)
    ours, plain = ReplayBuffer(cfg, device), EpisodeList(cfg, device)
    for i in range(5):
        ours.add(_episode(cfg, i))
        plain.add(_episode(cfg, i))
    del plain.episodes[:-3]
    return _same_batches(ours.sample(), plain.sample())


def _same_batches(ours: Batch, theirs: Batch) -> Gate:
    a, b = ([x for x in batch if x is not None] for batch in (ours, theirs))
    return Gate(float(not all(map(torch.equal, a, b))), 0)


def sample(options: Options, batch: int) -> Case:
    """A batch from 100 episodes."""
    cfg = options.config(5, options.actions[0], batch_size=batch, buffer_size=_EPISODES * _STEPS)
    ours, plain = ReplayBuffer(cfg, options.torch_device), EpisodeList(cfg, options.torch_device)
    for i in range(_EPISODES):
        episode = _episode(cfg, i)
        ours.add(episode)
        plain.add(episode)
    # Both draw from the same stream, so their first batches are the same.
    first = ours.sample(), plain.sample()

    return Case(
        "replay",
        "sample a batch",
        {"torch": Variant(ours.sample), "list of episodes": Variant(plain.sample, gate=partial(_same_batches, *first))},
        batch=batch,
        shape=f"{cfg.horizon + 1} steps x ({OBS_DIM} obs, {cfg.action_dim} actions)",
        unit="batches",
        mbyte=sum(x.numel() * x.element_size() for x in first[0] if x is not None) / 1e6,
    )


def _episode(cfg: Config, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng([cfg.seed, seed])
    action = rng.uniform(-1, 1, (_STEPS, cfg.need("action_dim"))).astype(np.float32)
    reward = rng.uniform(0, 2, _STEPS).astype(np.float32)
    action[0] = reward[0] = np.nan
    obs = rng.standard_normal((_STEPS, OBS_DIM)).astype(np.float32)
    return dict(obs=obs, action=action, reward=reward, terminated=np.zeros(_STEPS, np.float32))
