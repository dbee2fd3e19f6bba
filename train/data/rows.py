"""Episodes as rows, in the form that every source gives and every shard has, and what must be true of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.errors import DataError

Floats = NDArray[np.float32]
Lengths = NDArray[np.int64]
_MOST_ACTION = 1.001  # with room for rounding
_MOST = 1e18  # the square of more is infinite in float32


class Rows(NamedTuple):
    """Episodes of one task, one behind another; R rows in all.

    The first row of an episode has the observation of its reset, and NaN as action and reward; each other row has an
    action, and the reward, observation and end that came of it.
    """

    obs: Floats  # (R, O)
    action: Floats  # (R, A)
    reward: Floats  # (R,)
    terminated: NDArray[np.bool_]  # (R,), True in last rows only


class Episodes(Protocol):
    """Episodes of one task from one place, read when they are asked for."""

    @property
    def task(self) -> str:
        """The name of their task."""
        ...

    @property
    def obs_dim(self) -> int:
        """O."""
        ...

    @property
    def action_dim(self) -> int:
        """A."""
        ...

    @property
    def origin(self) -> str:
        """Where they come from, in a line."""
        ...

    @property
    def identity(self) -> str:
        """What no other episodes of the same lengths have."""
        ...

    @property
    def lengths(self) -> Lengths:
        """Rows of each episode."""
        ...

    def rows(self, first: int, stop: int) -> Rows:
        """Return episodes from `first` to before `stop`, in memory of their own."""
        ...


class Kept(NamedTuple):
    """Episodes that are in memory."""

    task: str
    obs_dim: int
    action_dim: int
    origin: str
    lengths: Lengths
    held: Rows

    @property
    def identity(self) -> str:
        """What no other episodes of the same lengths have."""
        return hashlib.sha256(b"".join(x.tobytes() for x in self.held)).hexdigest()

    def rows(self, first: int, stop: int) -> Rows:
        """Return episodes from `first` to before `stop`."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return cut(self.held, int(ends[first]), int(ends[stop]))


def kept(task: str, episodes: Sequence[dict[str, Any]], origin: str) -> Kept:
    """Return episodes that `Episode.rows` or `ReplayBuffer.steps` gave, as the rows of one task."""
    lengths = np.array([len(e["reward"]) for e in episodes], np.int64)
    parts = {k: np.concatenate([np.asarray(e[k], np.float32) for e in episodes]) for k in ("obs", "action", "reward")}
    ends = np.concatenate([np.nan_to_num(np.asarray(e["terminated"], np.float32)) > 0.5 for e in episodes])
    rows = Rows(parts["obs"], parts["action"], parts["reward"], ends)
    return Kept(task, rows.obs.shape[1], rows.action.shape[1], origin, lengths, rows)


def cut(rows: Rows, start: int, stop: int) -> Rows:
    """Return rows from `start` to before `stop`, in memory of their own."""
    obs, action, reward = (x[start:stop].copy() for x in (rows.obs, rows.action, rows.reward))
    return Rows(obs, action, reward, rows.terminated[start:stop].copy())


def firsts(lengths: Lengths) -> Lengths:
    """Return the row at which each episode begins, and behind them the number of all rows."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def pieces(lengths: Lengths, most: int) -> Iterator[tuple[int, int]]:
    """Yield first and last (excluded) of consecutive episodes that together have at most so many rows, or of one."""
    ends, first = firsts(lengths), 0
    while first < len(lengths):
        stop = int(np.searchsorted(ends, ends[first] + most, side="right")) - 1
        stop = max(stop, first + 1)
        yield first, stop
        first = stop


def judged(rows: Rows, lengths: Lengths, where: str, number: int = 0) -> Rows:
    """Return rows with NaN where an episode begins, or raise `DataError` for numbers nothing can be learned from.

    where: names their place in the message; number: of the first of these episodes there.
    """
    begin, ends = firsts(lengths)[:-1], firsts(lengths)[1:] - 1
    action, reward = rows.action.copy(), rows.reward.copy()
    action[begin], reward[begin] = 0, 0
    for name, x in (("obs", rows.obs), ("action", action), ("reward", reward)):
        most, allowed = (_MOST_ACTION, "-1 to 1") if name == "action" else (_MOST, f"{-_MOST:g} to {_MOST:g}")
        good = (np.abs(x) <= most).reshape(len(x), -1)  # NaN is not
        if not good.all():
            row = int(good.all(1).argmin())
            got = x.reshape(len(x), -1)[row][~good[row]][0]
            what = f"of {got:.6g}, allowed: {allowed}" if np.isfinite(got) else "that is NaN or infinite"
            raise DataError(f"{where}: {_place(begin, row, number)} has {name} {what}")
    early = rows.terminated.copy()
    early[ends] = False
    if early.any():
        raise DataError(f"{where}: {_place(begin, int(early.argmax()), number)} terminates an episode that goes on")
    action[begin], reward[begin] = np.nan, np.nan
    return rows._replace(action=action, reward=reward)


def returns(rows: Rows, lengths: Lengths) -> NDArray[np.float64]:
    """Return the sum of rewards of each episode."""
    reward = np.nan_to_num(rows.reward.astype(np.float64))
    return np.add.reduceat(reward, firsts(lengths)[:-1])


def _place(begin: Lengths, row: int, number: int) -> str:
    episode = int(np.searchsorted(begin, row, side="right")) - 1
    return f"step {row - int(begin[episode])} of episode {number + episode}"
