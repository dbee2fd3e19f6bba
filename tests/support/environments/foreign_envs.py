"""Gymnasium environments as people have them, each strange in one way; imported by its name, as theirs are."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from foreign_plain import Plain
from foreign_spaces import *  # noqa: F403
from gymnasium import spaces

# ---- constructors and metadata


class ModesWithoutArgument(Plain):
    """Says that it draws, and takes no `render_mode`."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["human", "rgb_array"], "render_fps": None}


class SwallowsArguments(Plain):
    """Hands its arguments to a base that takes none."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class WithoutModes(Plain):
    metadata: ClassVar[Any] = {}


class Draws(Plain):
    """Draws; frame rate 0, a list of frames."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 0}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def render(self) -> Any:
        return [np.zeros((20, 30, 3), np.uint8), np.full((20, 30, 3), 255, np.uint8)]


class Settings(Plain):
    def __init__(self, gain: float = 1.0, ranges: Any = (0, 1), parts: Any = None) -> None:
        self.gain, self.ranges, self.parts = gain, ranges, parts

    def reward(self) -> Any:
        return float(self.gain)


class ChangesSettings(Plain):
    """Takes out of its settings what it reads."""

    def __init__(self, parts: Any = None) -> None:
        self.gain = parts.pop("gain")

    def reward(self) -> Any:
        return float(self.gain)


class ByFunction(Plain):
    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode


def make_it(**kwargs: Any) -> ByFunction:
    return ByFunction(**kwargs)


def make_limited() -> Any:
    return gym.wrappers.TimeLimit(Plain(), 12)


# ---- what is drawn from


class OldRandom(Plain):
    def draw(self, seed: int | None) -> Any:
        if seed is not None or not hasattr(self, "x"):
            self.np_random: Any = np.random.RandomState(seed)
        return self.np_random.normal(size=3)


class OtherBits(Plain):
    def draw(self, seed: int | None) -> Any:
        if seed is not None or not hasattr(self, "x"):
            self.np_random = np.random.Generator(np.random.SFC64(seed))
        return self.np_random.normal(size=3)


class PythonsRandom(Plain):
    def draw(self, seed: int | None) -> Any:
        if seed is not None or not hasattr(self, "x"):
            self.np_random: Any = random.Random(seed)
        return np.array([self.np_random.gauss(0, 1) for _ in range(3)])


class OwnGenerator(Plain):
    """Made at the first reset, which is the one that has a seed."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        return super().reset(seed=seed)

    def draw(self, seed: int | None) -> Any:
        return self.rng.normal(size=3)


class Secret(Plain):
    def draw(self, seed: int | None) -> Any:
        self.np_random: Any = random.SystemRandom()
        return np.ones(3)


class Untold(Plain):
    def draw(self, seed: int | None) -> Any:
        self.np_random: Any = object()
        return np.ones(3)


# ---- numbers, flags, observations, in other forms


class InArrays(Plain):
    def reward(self) -> Any:
        return np.array([-1.0])

    def ends(self) -> Any:
        return np.array([False])

    def info(self) -> Any:
        return {"is_success": np.array([True])}


class InTensors(Plain):
    def observe(self) -> Any:
        return torch.from_numpy(self.x).requires_grad_()

    def reward(self) -> Any:
        return torch.tensor(-1.0, requires_grad=True)

    def ends(self) -> Any:
        return torch.tensor(0)

    def info(self) -> Any:
        return {"success": torch.tensor([1.0], dtype=torch.bfloat16)}


class InLists(Plain):
    def observe(self) -> Any:
        return [float(v) for v in self.x]

    def reward(self) -> Any:
        return np.int64(-1)

    def info(self) -> Any:
        return {"success": None}


class Column(Plain):
    def observe(self) -> Any:
        return self.x.reshape(3, 1)

    def info(self) -> Any:
        return None


class Batch(Plain):
    def observe(self) -> Any:
        return self.x.reshape(1, 3).astype(np.float16)


class OneBuffer(Plain):
    """Gives the same array every time."""

    def observe(self) -> Any:
        if not hasattr(self, "out"):
            self.out = np.zeros(3, np.float32)
        self.out[:] = self.x
        return self.out


class NoReward(Plain):
    def reward(self) -> Any:
        return None


class TwoRewards(Plain):
    def reward(self) -> Any:
        return np.array([1.0, 2.0])


class RewardInWords(Plain):
    def reward(self) -> Any:
        return "1.0"


class NoFlag(Plain):
    def ends(self) -> Any:
        return None


class SuccessInWords(Plain):
    def info(self) -> Any:
        return {"success": "yes"}


class InfoInAList(Plain):
    def info(self) -> Any:
        return ["success"]


class FourValues(Plain):
    def step(self, action: Any) -> Any:
        obs, reward, done, _, info = super().step(action)
        return obs, reward, done, info


class NoInfoAtReset(Plain):
    def reset(self, **kwargs: Any) -> Any:
        return super().reset(**kwargs)[0]


class Ragged(Plain):
    def observe(self) -> Any:
        return [1.0, [2.0, 3.0]]


class TooMany(Plain):
    def observe(self) -> Any:
        return np.zeros(4)


class NoObservation(Plain):
    def observe(self) -> Any:
        return None


class TooLarge(Plain):
    """Beyond float32, in which a reward is kept."""

    def reward(self) -> Any:
        return 1e39


class NoNumber(Plain):
    def observe(self) -> Any:
        return np.array([0, np.nan, 0])


# ---- rewards and lengths that are hard to learn from


class Huge(Plain):
    def reward(self) -> Any:
        return 1e6 if self.t % 10 == 0 else 0.0


class Piling(Plain):
    """No reward is beyond the bins, and what they add up to is."""

    def reward(self) -> Any:
        return 5_000.0


class Slow(Plain):
    """Beyond them only behind the end of time: 1,500 / (1 - 0.95)."""

    def reward(self) -> Any:
        return 1_500.0


class OneStep(Plain):
    def ends(self) -> Any:
        return True


class Ends(Plain):
    def ends(self) -> Any:
        return self.t >= 7


# ---- failures


class Diverges(Plain):
    """Once in a while."""

    steps = 0

    def step(self, action: Any) -> Any:
        type(self).steps += 1
        if self.steps % 33 == 0:
            raise FloatingPointError("the simulation diverged")
        return super().step(action)


class DivergesSilently(Plain):
    steps = 0

    def reward(self) -> Any:
        type(self).steps += 1
        return float("nan") if self.steps % 33 == 0 else 1.0


class FailsAtReset(Plain):
    resets = 0

    def reset(self, **kwargs: Any) -> Any:
        type(self).resets += 1
        if self.resets % 4 == 3:
            raise OSError("no scene")
        return super().reset(**kwargs)


class Exits(Plain):
    steps = 0

    def step(self, action: Any) -> Any:
        type(self).steps += 1
        if self.steps % 33 == 0:
            raise SystemExit(0)
        return super().step(action)


class WithoutOptions(Plain):
    def reset(self, seed: int | None = None) -> Any:  # type: ignore[override]
        return super().reset(seed=seed)


class WrongClass(Plain):
    observation_space = spaces.Discrete(5)

    def observe(self) -> Any:
        return -1


class AlwaysFails(Plain):
    def step(self, action: Any) -> Any:
        raise FloatingPointError("the simulation diverged")


class CannotClose(Plain):
    def close(self) -> None:
        raise OSError("the simulator is gone already")


for _name, _class in list(globals().items()):
    if isinstance(_class, type) and issubclass(_class, Plain):
        gym.register(f"Foreign{_name}-v0", entry_point=_class, max_episode_steps=10 if _name == "OneStep" else 20)
gym.register("ForeignFunction-v0", entry_point=make_it, max_episode_steps=20)
gym.register("ForeignLambda-v0", entry_point=lambda: Plain(), max_episode_steps=20)
gym.register("ForeignLimited-v0", entry_point=make_limited)
gym.register(
    "ForeignTimed-v0",  # whose wrapper insists on Gymnasium's time limit
    entry_point=Plain,
    max_episode_steps=20,
    additional_wrappers=(gym.wrappers.TimeAwareObservation.wrapper_spec(),),
)
gym.register("ForeignUnversioned", entry_point=Plain, max_episode_steps=20)
gym.register("ForeignEndless-v0", entry_point=Plain)
