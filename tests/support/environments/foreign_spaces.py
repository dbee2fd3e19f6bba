"""Gymnasium environments with strange actions or observations."""

from __future__ import annotations

from typing import Any

import numpy as np
from foreign_plain import Plain
from gymnasium import spaces

# ---- action spaces


def acting(name: str, space: Any) -> type[Plain]:
    return type(name, (Plain,), {"action_space": space})


HALVES = spaces.Box(np.array([-1, 0, 5]), np.array([1, 0, 7]), dtype=np.float64)
ACTIONS = dict(
    Integers=spaces.Box(0, 10, (1,), np.int64),
    Bytes=spaces.Box(0, 255, (2,), np.uint8),
    Switch=spaces.Box(0, 1, (2,), bool),
    PartlyFixed=spaces.Box(np.array([-1, 0], np.float32), np.array([1, 0], np.float32)),
    Uneven=HALVES,
    Tiny=spaces.Box(-1e-30, 1e8, (2,), np.float32),
    Half=spaces.Box(-0.1, 0.3, (3,), np.float16),
    Grid=spaces.Box(-2, 2, (2, 3), np.float32),
    Scalar=spaces.Box(-2, 2, (), np.float32),
)
REFUSED_ACTIONS = dict(
    Discrete=spaces.Discrete(3),
    ActionsInParts=spaces.Dict(a=spaces.Box(-1, 1, (1,))),
    Unbounded=spaces.Box(-np.inf, np.inf, (1,), np.float32),
    HalfBounded=spaces.Box(np.array([-1, 0], np.float32), np.array([np.inf, 1], np.float32)),
    Overflowing=spaces.Box(-3.4e38, 3.4e38, (1,), np.float32),
    Countless=spaces.Box(0, 2**60, (1,), np.int64),
    AllFixed=spaces.Box(1, 1, (2,), np.float32),
    Empty=spaces.Box(-1, 1, (0,), np.float32),
)
for _name, _space in {**ACTIONS, **REFUSED_ACTIONS}.items():
    globals()[_name] = acting(_name, _space)


# ---- observations of other kinds


class Picture(Plain):
    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def observe(self) -> Any:
        return np.full(self.observation_space.shape, 40 + self.t, np.uint8)


class ChannelsFirst(Picture):
    observation_space = spaces.Box(0, 255, (3, 84, 96), np.uint8)


class Stacked(Picture):
    observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)


class WithAlpha(Picture):
    observation_space = spaces.Box(0, 255, (64, 64, 4), np.uint8)


class SixteenFrames(Picture):
    observation_space = spaces.Box(0, 255, (16, 64, 64), np.uint8)


class ManyChannels(Picture):
    observation_space = spaces.Box(0, 255, (64, 64, 17), np.uint8)


class StackedColours(Picture):
    observation_space = spaces.Box(0, 255, (2, 48, 64, 3), np.uint8)


class Grey(Picture):
    observation_space = spaces.Box(0, 255, (30, 40), np.uint8)


class Shares(Picture):
    """From 0 to 1."""

    observation_space = spaces.Box(0, 1, (32, 32, 3), np.float32)

    def observe(self) -> Any:
        return np.full((32, 32, 3), 0.2, np.float32)


class OnePart(Picture):
    observation_space = spaces.Dict(pixels=spaces.Box(0, 255, (64, 64, 3), np.uint8))

    def observe(self) -> Any:
        return {"pixels": np.full((64, 64, 3), 40 + self.t, np.uint8), "more": None}


class CameraAndNumbers(Plain):
    observation_space = spaces.Dict(camera=spaces.Box(0, 255, (64, 64, 3), np.uint8), speed=spaces.Box(-1, 1, (2,)))


class Table(Plain):
    observation_space = spaces.Box(-1, 1, (3, 2))


class Parts(Plain):
    observation_space = spaces.Dict(
        place=spaces.Box(-1, 1, (2, 2)),
        mode=spaces.Discrete(3, start=5),
        more=spaces.Tuple([spaces.MultiBinary(2), spaces.MultiDiscrete([2, 3])]),
    )

    def observe(self) -> Any:
        return {"place": [[1, 2], [3, 4]], "mode": np.array([6]), "more": ([0, 1], np.array([1, 2]))}


class MissingPart(Parts):
    def observe(self) -> Any:
        return {"place": [[1, 2], [3, 4]], "mode": 6}


class WordsInParts(Plain):
    observation_space = spaces.Dict(
        speed=spaces.Box(-1, 1, (2,)), inner=spaces.Dict(log=spaces.Sequence(spaces.Discrete(2)))
    )
