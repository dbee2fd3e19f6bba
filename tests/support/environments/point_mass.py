"""A point mass that drifts in a square, twice: many in torch on a device, and one in numpy, to the same last bit.

Its arithmetic is sums and products in float32, which round alike everywhere. Where an episode begins and how long
it is follows from the seed and the number of the episode by whole numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdmpc2_fast import Config
from tdmpc2_fast.train.envs import SUITES, Suite
from tdmpc2_fast.train.envs.base import Env, RenderError
from tdmpc2_fast.train.envs.device.base import DeviceEnvironments, DeviceStep, device_of
from tdmpc2_fast.train.envs.device.view import View

DEVICE, HOST = "point-masses", "point-mass"
LONGEST, SHORTEST = 12, 6
_EDGE, _STEP, _DRAG = 1.0, 0.25, 0.5


class Breaks(NamedTuple):
    """Where numbers become NaN: what is told after this decision (0: the reset) of an episode (from 1) of one."""

    field: str
    env: int
    episode: int
    decision: int


def _drawn(seed: Any, episode: Any) -> Any:
    """Return numbers below 2**16 for an episode: three, for two places and a length. Arrays or tensors of int64."""
    mixed = (seed % 65_521) * 40_503 + episode * 30_011
    return [(mixed * k + 12_345) % 65_536 for k in (1_103, 2_477, 3_571)]


class PointMasses(DeviceEnvironments):
    """As many as there are seeds. `deadly`: to leave the square terminates an episode."""

    obs_shape: tuple[int, ...] = (4,)
    action_dim = 2
    max_episode_steps = LONGEST
    action_repeat = 1

    def __init__(self, seeds: Sequence[int], device: torch.device, deadly: bool = False) -> None:
        self.num_envs, self.device, self.deadly = len(seeds), device, deadly
        self.breaks: Breaks | None = None
        self.tells_its_state = True
        self.closed = False
        self._each = torch.arange(len(seeds), device=device)
        self._seeds = torch.tensor(seeds, device=device)
        self._episodes = torch.zeros_like(self._seeds)
        self._decisions, self._lengths = torch.zeros_like(self._seeds), torch.zeros_like(self._seeds)
        self._place = torch.zeros(len(seeds), 2, device=device)
        self._speed = torch.zeros(len(seeds), 2, device=device)

    def reset(self, mask: Tensor) -> Tensor:
        x, y, length = _drawn(self._seeds, self._episodes)
        place = torch.stack([x, y], 1).float() / 65_536 - 0.5
        self._place = torch.where(mask.unsqueeze(1), place, self._place)
        self._speed = self._speed.masked_fill(mask.unsqueeze(1), 0)
        self._lengths = torch.where(mask, SHORTEST + length % (LONGEST - SHORTEST + 1), self._lengths)
        self._decisions = self._decisions.masked_fill(mask, 0)
        self._episodes = self._episodes + mask
        return self._broken("obs", torch.cat([self._place, self._speed], 1))

    def step(self, actions: Tensor) -> DeviceStep:
        self._speed = self._speed * _DRAG + actions * _STEP
        self._place = self._place + self._speed
        self._decisions = self._decisions + 1
        reward = 1 - self._place[:, 0] * self._place[:, 0] - self._place[:, 1] * self._place[:, 1]
        outside = (self._place.abs() > _EDGE).any(1)
        return DeviceStep(
            self._broken("obs", torch.cat([self._place, self._speed], 1)),
            self._broken("reward", reward),
            outside if self.deadly else torch.zeros_like(outside),
            self._decisions >= self._lengths,
            self._broken("success", (~outside).float()),
        )

    def _broken(self, field: str, x: Tensor) -> Tensor:
        if self.breaks is None or self.breaks.field != field:
            return x
        _, env, episode, decision = self.breaks
        here = (self._each == env) & (self._episodes == episode) & (self._decisions == decision)
        return x.masked_fill(here.view(-1, *[1] * (x.ndim - 1)), torch.nan)

    def random_state(self) -> Any:
        return [self._seeds.tolist(), self._episodes.tolist()] if self.tells_its_state else None

    def set_random_state(self, state: Any) -> None:
        self._seeds, self._episodes = (torch.tensor(x, device=self.device) for x in state)

    _KEPT = ("_place", "_speed", "_decisions", "_lengths")

    def state(self) -> Mapping[str, Tensor] | None:
        return {k: getattr(self, k) for k in self._KEPT} if self.tells_its_state else None

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if {*state} != {*self._KEPT}:
            raise ValueError("a point mass has no such state")
        for k, x in state.items():
            setattr(self, k, x.to(self.device))

    def close(self) -> None:
        self.closed = True


class PointMass(Env):
    """One of them, in numpy."""

    obs_shape: tuple[int, ...] = (4,)
    action_dim = 2
    max_episode_steps = LONGEST
    action_repeat = 1
    frames_per_second = 10.0

    def __init__(self, seed: int, deadly: bool = False) -> None:
        self._seed, self._deadly, self._episodes = seed, deadly, 0

    def reset(self) -> NDArray[np.float32]:
        x, y, length = _drawn(self._seed, self._episodes)
        self._place = np.array([x, y], np.float32) / np.float32(65_536) - np.float32(0.5)
        self._speed = np.zeros(2, np.float32)
        self._length = SHORTEST + length % (LONGEST - SHORTEST + 1)
        self._decisions = 0
        self._episodes += 1
        return np.concatenate([self._place, self._speed])

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self._speed = self._speed * np.float32(_DRAG) + action * np.float32(_STEP)
        self._place = self._place + self._speed
        self._decisions += 1
        squares = self._place * self._place
        reward = np.float32(1) - squares[0] - squares[1]
        outside = bool((np.abs(self._place) > _EDGE).any())
        ends = self._deadly and outside, self._decisions >= self._length
        return np.concatenate([self._place, self._speed]), float(reward), *ends, {"success": float(not outside)}

    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        raise RenderError("a point mass has no pictures")

    def overrides(self, cfg: Config) -> Config:
        return cfg

    def random_state(self) -> Any:
        return [self._seed, self._episodes]

    def set_random_state(self, state: Any) -> None:
        self._seed, self._episodes = state

    def close(self) -> None:
        pass


def make(cfg: Config, seed: int) -> Env:
    return View(PointMasses([seed], device_of(cfg), cfg.episodic), 10.0)


def together(cfg: Config, seeds: Sequence[int]) -> PointMasses:
    return PointMasses(seeds, device_of(cfg), cfg.episodic)


def make_on_host(cfg: Config, seed: int) -> Env:
    return PointMass(seed, cfg.episodic)


def install() -> None:
    """Make both known by their names."""
    SUITES[DEVICE] = Suite((DEVICE,), "torch", "train", DEVICE.__eq__, make, together=together)
    SUITES[HOST] = Suite((HOST,), "numpy", "train", HOST.__eq__, make_on_host)
