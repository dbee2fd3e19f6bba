"""Gymnasium's spaces, judged once: what a space cannot be used for is said before the first step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.errors import ConfigError

from .answers import EnvError, array, number, unusable
from .pixels import Images, is_image

_COUNTED = 2**53  # integers up to which float64 tells one from the next
_MOST_CHOICES = 128


def action_space(space: Any, name: str) -> ActionSpace:
    """Return how actions (A,) in [-1, 1] become those of an environment's space.

    name: of the environment, for errors.

    Raises:
        ConfigError: a space of another kind, or one that cannot be scaled to.
    """
    import gymnasium

    spaces = gymnasium.spaces
    refuse = functools.partial(_refused, name, "action", space, "task")
    if isinstance(space, spaces.Box):
        return _Box(space, refuse)
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return _Choices(space, refuse)
    raise refuse("allowed: a Box with finite bounds, Discrete, MultiDiscrete or MultiBinary")


def facts(name: str, actions: ActionSpace, observations: ObservationSpace) -> list[str]:
    """Return what a person should know of how spaces are used, one line for each fact."""
    found = [f"{name}: {fact}" for fact in actions.facts]
    if observations.flattened is not None:
        shape, size = observations.flattened, observations.shape[0]
        found.append(f"{name}: observations {shape} are flattened to {size:,} numbers")
    return found


class ActionSpace(Protocol):
    """How actions (A,) in [-1, 1] become those of a space."""

    size: int
    """A."""
    facts: list[str]
    """What a person should know of it."""

    def __call__(self, action: NDArray[np.float32]) -> NDArray[Any]:
        """Return the space's action for one of (A,)."""
        ...


class _Choices(ActionSpace):
    """A Discrete, MultiDiscrete or MultiBinary space, relaxed: each choice is the largest of as many numbers.

    A choice of n takes n dimensions of the agent's action; the environment gets the index of the largest (the lowest
    one of equals), the model learns and plans over the numbers. A MultiBinary's take two each: off and on.
    """

    def __init__(self, space: Any, refuse: Callable[[str], ConfigError]) -> None:
        discrete = hasattr(space, "n") and not np.ndim(space.n) and not getattr(space, "shape", None)
        self._shape, self._dtype = space.shape, space.dtype
        counts = space.n if discrete else getattr(space, "nvec", np.full(space.shape, 2))
        self._counts = [int(n) for n in np.ravel(counts)]
        self._start = np.broadcast_to(np.ravel(getattr(space, "start", 0)), len(self._counts))
        self.size = sum(self._counts)
        if not self._counts or max(self._counts) < 2:
            raise refuse("allowed: something to choose")
        if self.size > _MOST_CHOICES:
            raise refuse(f"allowed: at most {_MOST_CHOICES} choices in all, each of which is a dimension to plan over")
        text = " + ".join(map(str, self._counts)) if len(self._counts) <= 8 else f"{len(self._counts)} groups of"
        self.facts = [f"discrete actions are relaxed: {text} numbers, the largest of which is chosen"]

    @override
    def __call__(self, action: NDArray[np.float32]) -> NDArray[Any]:
        parts = np.split(np.asarray(action), np.cumsum(self._counts)[:-1])
        chosen = np.array([int(part.argmax()) for part in parts]) + self._start
        found: NDArray[Any] = chosen.astype(self._dtype).reshape(self._shape)[()]  # of Discrete, a number
        return found


class _Box(ActionSpace):
    """A Box: -1, 0 and 1 are exactly its low, middle and high.

    Every action made is contained in the Box. Integers are rounded to the nearest; a dimension
    whose bounds are equal is that constant. Boxes of several dimensions are filled in C order.
    """

    def __init__(self, space: Any, refuse: Callable[[str], ConfigError]) -> None:
        self._shape, self._dtype = space.shape, space.dtype
        low, high = (np.ravel(x).astype(np.float64) for x in (space.low, space.high))
        if low.size == 0:
            raise refuse("allowed: at least one dimension")
        if not space.is_bounded() or not np.isfinite([low, high]).all():
            raise refuse("allowed: finite bounds in every dimension")
        if not (low <= high).all():
            raise refuse("allowed: no lower bound above its upper one")
        if (low == high).all():
            raise refuse("all its dimensions are fixed, which leaves nothing to choose")
        self._whole = self._dtype.kind in "biu"
        if self._whole and max(-low.min(), high.max()) > _COUNTED:
            raise refuse("allowed: integers of up to 2**53, which can be scaled to")
        if (high - low).max() > np.finfo(np.float32).max:
            raise refuse("allowed: bounds whose difference float32 can hold")
        self._low, self._high = low, high
        self._middle, self._half = low / 2 + high / 2, high / 2 - low / 2
        self.size = int(low.size)
        fixed = [int(i) for i in np.flatnonzero(low == high)]
        self.facts = [f"low and high of these actions are equal, so they stay there: {fixed}"] if fixed else []

    @override
    def __call__(self, action: NDArray[np.float32]) -> NDArray[Any]:
        a = np.asarray(action, np.float64)
        x = np.clip(self._middle + a * self._half, self._low, self._high)
        if self._whole:
            x = np.rint(x)
        x = np.where(a <= -1, self._low, np.where(a >= 1, self._high, x))
        return x.astype(self._dtype).reshape(self._shape)


class ObservationSpace:
    """How an environment's observations become float32 (n,) or, of images, uint8 (C, 64, 64).

    Numbers are flattened in the order of `gymnasium.spaces.flatten`.

    Args:
        space: the environment's.
        kind: `cfg.obs`.
        name: of the environment, for errors.

    Raises:
        ConfigError: observations of another kind, or a part that has no fixed size.
    """

    def __init__(self, space: Any, kind: str, name: str) -> None:
        refuse = functools.partial(_refused, name, "observation", space)
        self._parts = list(parts(space))
        images = [path for path, part in self._parts if is_image(part)]
        others = [path for path, _ in self._parts if path not in images]
        self._images: Images | None = None
        if images and (others or len(images) > 1):
            beside = f"{_named(images[0])} is an image beside {_named((others or images[1:])[0])}"
            keep = "gymnasium.wrappers.FilterObservation keeps some of its parts"
            raise refuse("task", f"allowed: one image, or numbers alone, and {beside}; {keep}")
        if images and kind != "rgb":
            wrap = "wrap it in gymnasium.wrappers.FlattenObservation to learn from their pixels as plain numbers"
            raise refuse("obs", f"it observes images: set obs=rgb, or {wrap}")
        if kind == "rgb":
            if not images:
                allowed = "obs=state, or images: a Box of uint8, or of numbers from 0 to 1 or 255"
                raise refuse("obs", f"got 'rgb', allowed: {allowed}")
            self._images = Images(self._parts[0][1])
            self.shape: tuple[int, ...] = self._images.shape
            return
        size = 0
        for path, part in self._parts:
            if not _has_fixed_size(part):
                without = f"{_named(path)} ({_in_a_line(part)})"
                raise refuse("task", f"{without} has no fixed size and cannot be flattened into numbers")
            size += _flat_size(part)
        if size == 0:
            raise refuse("task", "allowed: at least one number")
        self.shape = (size,)

    @property
    def frames(self) -> int:
        """How many frames an observation stacks, as far as that is done here."""
        return 1 if self._images is None else self._images.frames

    @property
    def flattened(self) -> tuple[int, ...] | None:
        """The shape of the one Box of several dimensions that is flattened; None where there is no such thing."""
        shape = self._parts[0][1].shape if len(self._parts) == 1 else None
        return shape if self._images is None and shape is not None and len(shape) > 1 else None

    def __call__(self, obs: Any, first: bool) -> NDArray[Any]:
        """Return an observation as models take it; `first`: it begins an episode.

        Raises:
            EnvError: it is none of this space.
        """
        found = [(part, *_at(obs, path)) for path, part in self._parts]
        if self._images is not None:
            _, value, field = found[0]
            return self._images(value, field, first)
        return np.concatenate([_flat(part, value, field) for part, value, field in found])


def parts(space: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield path and space of every part of a Dict or Tuple, in order; of another space, itself."""
    import gymnasium

    if isinstance(space, gymnasium.spaces.Dict):
        inner: Any = space.spaces.items()
    elif isinstance(space, gymnasium.spaces.Tuple):
        inner = enumerate(space.spaces)
    else:
        yield path, space
        return
    for key, part in inner:
        yield from parts(part, (*path, key))


def _refused(name: str, kind: str, space: Any, key: str, what: str) -> ConfigError:
    return ConfigError(f"config key {key!r}: {name!r} has the {kind} space {_in_a_line(space)}; {what}")


def _in_a_line(space: Any) -> str:
    return " ".join(str(space).split())


def _named(path: tuple[Any, ...]) -> str:
    return f"its part {'/'.join(map(str, path))!r}" if path else "it"


def _has_fixed_size(part: Any) -> bool:
    try:
        return bool(part.is_np_flattenable) and _flat_size(part) >= 0
    except (AttributeError, NotImplementedError):  # no space at all, or one of somebody's own
        return False


def _flat_size(part: Any) -> int:
    import gymnasium

    return int(gymnasium.spaces.utils.flatdim(part))


def _at(obs: Any, path: tuple[Any, ...]) -> tuple[Any, str]:
    """Return what lies at a path in an observation, and the name of that field."""
    field = "observation"
    for key in path:
        try:
            obs = obs[key]
        except (KeyError, IndexError, TypeError) as e:
            raise unusable(field, obs, f"one with the part {key!r}") from e
        field += f"[{key!r}]"
    return obs, field


def _flat(part: Any, value: Any, field: str) -> NDArray[np.float32]:
    """Return a part of an observation as numbers, float32 (n,)."""
    import gymnasium

    spaces = gymnasium.spaces
    if isinstance(part, spaces.Box):
        return array(value, part.shape, np.float32, field).ravel()
    if isinstance(part, spaces.Discrete):
        value, given = number(value, field), value
        if not (value.is_integer() and part.contains(int(value))):
            raise unusable(field, given, f"one of {_in_a_line(part)}")
        value = int(value)
    elif isinstance(part, (spaces.MultiBinary, spaces.MultiDiscrete)):
        given = array(value, part.shape, None, field)
        value = given.astype(part.dtype)
        if not ((value == given).all() and part.contains(value)):
            raise unusable(field, given, f"one of {_in_a_line(part)}")
    try:
        return np.asarray(spaces.utils.flatten(part, value), np.float32).ravel()
    except EnvError:
        raise
    except Exception as e:  # each space has errors of its own for what is not in it
        raise unusable(field, value, f"one of {part}") from e
