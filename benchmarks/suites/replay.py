"""Adding an episode to the replay buffer, and drawing a batch from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdmpc2_fast import Config, ReplayBuffer
from tdmpc2_fast.learn.ring import Ring
from tdmpc2_fast.learn.updater import Batch
from tdmpc2_fast.rng import generator
from tdmpc2_fast.train.envs.pixels import FRAMES, SIZE, Stack

from ..harness.agents import episode_of
from ..harness.measure import Case, Gate, Variant
from ..options import OBS_DIM, Options, each

_EPISODES, _STEPS = 100, 501
_PIXEL_EPISODES = 10


class EpisodeList:
    """The plain way: a list of episodes and slices stacked for each batch, by the same law and the same draws."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.episodes: list[dict[str, Tensor]] = []
        self.generator = generator(cfg.seed, "replay", device)

    def add(self, episode: dict[str, Any]) -> None:
        """Keep an episode on the device that batches are wanted on."""
        self.episodes.append({k: torch.as_tensor(v).to(self.device) for k, v in episode.items()})

    def sample(self) -> Batch:
        """Stack slices: episodes are equally likely, and so is every start in each."""
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
    """Yield adding once, and sampling for each batch size."""
    yield partial(add, options)
    yield from each(sample, options, "batch")
    yield from each(sample_pixels, options, "batch")


def add(options: Options) -> Case:
    """Return adding one episode of 500 decisions to a buffer with room for 50,000."""
    cfg, device = options.config(5, options.actions[0], buffer_size=_EPISODES * _STEPS), options.torch_device
    ours, plain = ReplayBuffer(cfg, device), EpisodeList(cfg, device)
    episode = _episode(cfg, 0)

    def add_to_list() -> None:
        plain.add(episode)
        del plain.episodes[:-_EPISODES]

    variants = {"torch": Variant(lambda: ours.add(episode))}
    variants["list of episodes"] = Variant(add_to_list, gate=partial(_same_after_adding, cfg, device))
    mbyte = sum(v.nbytes for v in episode.values()) / 1e6
    shape = f"{_STEPS} x ({OBS_DIM} obs, {cfg.action_dim} actions)"
    return Case("replay", "add an episode", variants, shape=shape, unit="episodes", mbyte=mbyte)


def _same_after_adding(cfg: Config, device: torch.device) -> Gate:
    """Return the gate of what both hold after more episodes than there is room for."""
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
    """Return drawing a batch from 100 episodes."""
    cfg = options.config(5, options.actions[0], batch_size=batch, buffer_size=_EPISODES * _STEPS)
    ours, plain = ReplayBuffer(cfg, options.torch_device), EpisodeList(cfg, options.torch_device)
    for i in range(_EPISODES):
        episode = _episode(cfg, i)
        ours.add(episode)
        plain.add(episode)
    shape = f"{cfg.horizon + 1} steps x ({OBS_DIM} obs, {cfg.action_dim} actions)"
    return _drawn("sample a batch", batch, shape, ours, "list of episodes", plain)


def sample_pixels(options: Options, batch: int) -> Case:
    """Return drawing a batch of stacked frames, each of which is kept once, or as often as it is seen."""
    keys = options.keys(5, obs="rgb", batch_size=batch, buffer_size=_PIXEL_EPISODES * _STEPS)
    cfg = Config.from_dict(keys).with_env({"rgb": (3 * FRAMES, SIZE, SIZE)}, options.actions[0], _STEPS - 1)
    once, whole = (ReplayBuffer(cfg, options.torch_device) for _ in range(2))
    whole._ring = Ring(cfg, whole.device, whole.capacity, channels=3 * FRAMES)
    states = options.config(5, options.actions[0])
    for i in range(_PIXEL_EPISODES):
        frames = np.random.default_rng([cfg.seed, i]).integers(0, 256, (_STEPS, 3, SIZE, SIZE), np.uint8)
        stack = Stack(FRAMES)
        episode = _episode(states, i) | dict(obs=np.stack([stack(x, first=t == 0) for t, x in enumerate(frames)]))
        once.add(episode)
        whole.add(episode)
    kept = " and ".join(f"{x.nbytes / len(x) / 1e3:.1f}" for x in (once, whole))
    shape = f"{cfg.horizon + 1} steps x {FRAMES} frames; {kept} kB a step"
    return _drawn("sample pixels", batch, shape, once, "whole observations", whole)


def _drawn(
    name: str, batch: int, shape: str, ours: ReplayBuffer, other: str, plain: ReplayBuffer | EpisodeList
) -> Case:
    """Return drawing batches from two buffers, which draw from the same stream: their first ones are the same."""
    first = ours.sample(), plain.sample()
    variants = {"torch": Variant(ours.sample), other: Variant(plain.sample, gate=partial(_same_batches, *first))}
    mbyte = sum(x.numel() * x.element_size() for x in first[0] if x is not None) / 1e6
    return Case("replay", name, variants, batch=batch, shape=shape, unit="batches", mbyte=mbyte)


def _episode(cfg: Config, seed: int) -> dict[str, Any]:
    return episode_of(cfg, _STEPS - 1, np.random.default_rng([cfg.seed, seed]))
