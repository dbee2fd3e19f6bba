"""Batches drawn from a data set by the official law: an episode uniformly among all, then a start uniformly in it.

The random numbers of batch k are those of a counter-based generator (Philox) at k: nothing is carried from batch to
batch. So threads make them ahead in any order, what a run draws does not depend on how far they are, and its state is
the number of the next batch. Several ranks draw one batch of `ranks * batch_size` slices together, of which rank r
has the r-th part: 4 ranks of 256 slices draw what one rank of 1,024 draws, bit for bit.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import DataError, InputError
from tdmpc2_fast.learn.batch import Batch
from tdmpc2_fast.seeds import stream_seed

from .dataset import DataSet
from .index import Shard

_PER_BLOCK = 4  # random numbers at one position of Philox' counter
_GPU_THREADS = 4


class Draws:
    """A sampler of slices of `horizon + 1` steps, which threads make ahead; episodes too short for one are left out.

    Args:
        data: what to draw from: its tasks that `cfg.tasks` names, or of a single-task config the one of `cfg.task`.
        cfg: a completed config; narrower observations and actions are padded with zeros.
        device: where batches are wanted.
        rank: of this process among `ranks`; each gets `cfg.batch_size` slices.
        threads: how many make batches; none: one, and for a GPU four.

    waited: seconds that `sample` has waited for a batch.

    Raises:
        DataError: a task of the config is not there, is wider than the config says, or has no episode long enough.
    """

    def __init__(
        self,
        data: DataSet,
        cfg: Config,
        device: torch.device | str,
        rank: int = 0,
        ranks: int = 1,
        threads: int | None = None,
    ) -> None:
        self.data, self.cfg, self.device = data, cfg, torch.device(device)
        if not 0 <= rank < ranks:
            raise DataError(f"rank: got {rank}, allowed: 0 to {ranks - 1}")
        self._rank, self._key = rank, stream_seed(cfg.seed, "data")
        self._slice, self._pinned = cfg.horizon + 1, self.device.type == "cuda"
        self._width = cfg.observation_shape[0]
        self._numbers = _numbers(data, cfg)
        self._table()
        count = threads or (_GPU_THREADS if self._pinned else 1)
        self._pool = ThreadPoolExecutor(count, "draws")
        self._ahead: deque[Future[Batch]] = deque()
        self._most_ahead = 2 * count
        self._next, self._closed = 0, False
        self.waited = 0.0

    @property
    def num_sampleable(self) -> int:
        """The number of episodes with at least one slice."""
        return self.num_episodes if self._long is None else len(self._long)

    @property
    def num_episodes(self) -> int:
        """The number of episodes of these tasks, those too short for a slice among them."""
        return int(self._before[-1])

    @property
    def num_steps(self) -> int:
        """The number of their decisions."""
        return int(self._lengths.sum()) - self.num_episodes

    def sample(self) -> Batch:
        """Return the next batch, on the device: obs (H+1, B, O), action, reward, terminated (H, B, .), task (B,).

        Raises:
            InputError: after `close`.
        """
        if self._closed:
            raise InputError("sample: got a call after close, allowed: before it")
        while len(self._ahead) < self._most_ahead:
            self._ahead.append(self._pool.submit(self.batch, self._next + len(self._ahead)))
        start = time.monotonic()
        found = self._ahead[0].result()  # where it raises, the next call meets the same batch
        self.waited += time.monotonic() - start
        self._ahead.popleft()
        self._next += 1
        self._ahead.append(self._pool.submit(self.batch, self._next + len(self._ahead)))
        there = {k: x.to(self.device, non_blocking=True) for k, x in found._asdict().items() if x is not None}
        return found._replace(**there)

    def batch(self, number: int) -> Batch:
        """Return batch `number`, counted from 0, on the CPU, whatever was drawn before it."""
        count, steps = self.cfg.batch_size, np.arange(self._slice)[:, None]
        u = self._random(number, count)
        episode = (u[:, 0] * self.num_sampleable).astype(np.int64)
        episode = episode if self._long is None else self._long[episode]
        shard = np.searchsorted(self._before, episode, side="right") - 1
        first = self._starts[episode] + (u[:, 1] * (self._lengths[episode] - self._slice + 1)).astype(np.int64)

        found, (obs, action, reward, terminated, task) = self._empty(count)
        order = np.argsort(shard, kind="stable")
        bounds = np.flatnonzero(np.diff(shard[order], prepend=-1, append=len(self._before)))
        for a, b in itertools.pairwise(bounds):
            columns = order[a:b]
            number_of, index, ends = self._shards[shard[columns[0]]]
            rows = self.data.maps[number_of]
            at = first[columns] + steps
            obs[:, columns, : rows.obs.shape[1]] = rows.obs.take(at, axis=0)
            action[:, columns, : rows.action.shape[1]] = rows.action.take(at[1:], axis=0)
            reward[:, columns, 0] = rows.reward.take(at[1:])
            if ends:
                terminated[:, columns, 0] = rows.terminated.take(at[1:])
            task[columns] = index
            del rows  # or this shard would stay mapped while the next one needs room
        self.data.maps.look()
        return found if self.cfg.multitask else found._replace(task=None)

    def state(self) -> dict[str, Tensor]:
        """Return what `load_state` takes: the number of the next batch, and of how many shards and which."""
        count = len(self._shards)
        return dict(next=torch.tensor(self._next), shards=torch.tensor(count), data=self._fingerprint(count))

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another one stood: the next batch is bit for bit the one that would have come.

        Shards that were appended since are left out.

        Raises:
            DataError: that one drew from other data.
        """
        count = int(state["shards"])
        if count > len(self._of_tasks()) or not torch.equal(state["data"].cpu(), self._fingerprint(count)):
            raise DataError(
                f"data {str(self.data.folder)!r}: is not what the run has drawn from so far; allowed: the same shards "
                "of its tasks, behind which others may have been appended"
            )
        self._drop()
        if count != len(self._shards):
            self._table(count)
        self._next = int(state["next"])

    def close(self) -> None:
        """End the threads. The data set stays open."""
        self._closed = True
        self._drop()
        self._pool.shutdown()

    def _of_tasks(self) -> list[tuple[int, Shard]]:
        """Return the shards of the tasks that are drawn from, with their places in the data set."""
        return [(i, s) for i, s in enumerate(self.data.index.shards) if s.task in self._numbers]

    def _table(self, count: int | None = None) -> None:
        """Put down where each episode of the first `count` shards lies, or of all."""
        shards = self._of_tasks()[:count]
        self._shards = [(i, self._numbers[s.task], s.terminated > 0) for i, s in shards]
        lengths = [s.each_length() for _, s in shards]
        self._before = np.concatenate([[0], np.cumsum([len(x) for x in lengths])])
        self._lengths = np.concatenate(lengths).astype(np.int32)
        self._starts = np.concatenate([np.cumsum(x) - x for x in lengths]).astype(np.int32)
        long = self._lengths >= self._slice
        self._long: NDArray[np.int64] | None = None if long.all() else np.flatnonzero(long)
        drawn = {s.task for (_, s), x in zip(shards, lengths, strict=True) if (x >= self._slice).any()}
        for task in self._numbers:
            if task not in drawn:
                episodes = sum(s.episodes for _, s in shards if s.task == task)
                raise DataError(
                    f"data {str(self.data.folder)!r}: {self.data.index.tasks[task].name!r} has {episodes:,} episodes, "
                    f"none with a slice of {self._slice} rows (horizon + 1); allowed: at least one"
                )

    def _random(self, number: int, count: int) -> NDArray[np.float64]:
        """Return the two uniform numbers of each slice: (B, 2)."""
        block, skipped = divmod(2 * count * self._rank, _PER_BLOCK)
        bits = np.random.Philox(key=self._key, counter=[block, 0, 0, number])
        return np.random.Generator(bits).random(skipped + 2 * count)[skipped:].reshape(count, 2)

    def _empty(self, count: int) -> tuple[Batch, list[NDArray[np.float32] | NDArray[np.int64]]]:
        """Return a batch of zeros, and the same memory as arrays."""
        h, a = self.cfg.horizon, self.cfg.need("action_dim")
        shapes = [(h + 1, count, self._width), (h, count, a), (h, count, 1), (h, count, 1)]
        tensors = [torch.zeros(shape, pin_memory=self._pinned) for shape in shapes]
        tensors.append(torch.zeros(count, dtype=torch.int64, pin_memory=self._pinned))
        return Batch(*tensors), [x.numpy() for x in tensors]

    def _fingerprint(self, count: int) -> Tensor:
        """Return a digest of the first `count` shards, by their tasks' names."""
        told = [(self.data.index.tasks[s.task].name, s.sha256, s.lengths) for _, s in self._of_tasks()[:count]]
        return torch.frombuffer(bytearray(hashlib.sha256(repr(told).encode()).digest()), dtype=torch.uint8)

    def _drop(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()


def _numbers(data: DataSet, cfg: Config) -> dict[int, int]:
    """Return the index in the config of each task to draw from, by its number in the data set."""
    tasks = {t.name: (i, t) for i, t in enumerate(data.index.tasks)}
    held = {t.name for t in data.tasks}
    wanted, found = cfg.tasks if cfg.multitask else (cfg.task,), {}
    for i, name in enumerate(wanted):
        if name not in held:
            raise DataError(
                f"data {str(data.folder)!r}: has no episodes of {name!r}, allowed: tasks {', '.join(sorted(held))}"
            )
        number, task = tasks[name]
        width, actions = cfg.observation_shape[0], cfg.action_dims[i] if cfg.multitask else cfg.need("action_dim")
        exact = cfg.multitask or task.obs_dim == width
        if task.obs_dim > width or not exact or task.action_dim != actions:
            raise DataError(
                f"data {str(data.folder)!r}: {name!r} has observations and actions of {task.obs_dim} and "
                f"{task.action_dim} numbers, allowed: {width} and {actions}, as in the config"
            )
        found[number] = i
    return found
