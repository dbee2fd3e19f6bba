"""Replay of whole episodes with the official sampling law, vectorised.

Steps lie one behind another in a ring; a small table holds start and length of each episode.
A slice is drawn as in the official sampler: an episode uniformly, then a start uniformly
inside it, so steps of short episodes are drawn more often than steps of long ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from statistics import mode
from typing import Any

import torch
from torch import Tensor

from tdmpc2_fast.kernels.update.replay_gather import DeviceReplay, Steps

from ..config import Config
from ..errors import InputError, kind_of
from ..inputs import as_tensor, indices, observation, pixels
from ..rng import generator, generator_state, set_generator
from ..runtime.backend import resolve_device
from ..runtime.by_value import by_value, from_values
from ..runtime.surroundings import undisturbed
from .batch import Batch

_DEVICE_HEADROOM = 2.5  # official rule: the replay lives on the GPU if this many times its size is free
_HOST_SHARE = 0.8  # of the free memory that the advice leaves to the replay: the model wants some, too
_FIELDS = ("obs", "action", "reward", "terminated", "task")


class ReplayBuffer:
    """A ring of steps, of capacity `min(buffer_size, steps)` as in the official code.

    Storage lives on the agent's device where it fits, else in (pinned) host memory, decided
    from the free memory measured when the first episode comes. Samples are always on the
    agent's device. A copy or a pickle holds the steps in use and goes on drawing as this one does.

    Args:
        cfg: a completed config, or the official `cfg` object.
        device: where samples are wanted; the storage follows if it fits.
    """

    @undisturbed
    def __init__(self, cfg: Config | Any, device: torch.device | str = "cpu") -> None:
        self.cfg = cfg = Config.from_official(cfg)
        if not isinstance(device, (str, torch.device)):
            raise InputError(f"device: got {kind_of(device)}, allowed: a torch.device or its name")
        self.device = resolve_device(str(device))
        self.capacity = min(cfg.buffer_size, cfg.steps)
        if self.capacity < cfg.horizon + 1:
            raise InputError(
                f"buffer capacity min(buffer_size, steps): got {self.capacity}, "
                f"allowed: at least horizon + 1 = {cfg.horizon + 1}"
            )
        self._slice = cfg.horizon + 1
        self._store: dict[str, Tensor] = {}
        self.written = 0  # steps ever stored, numbered in this order; the ring position is this modulo the capacity
        self.num_eps = 0  # episodes ever added
        # Episodes a slice can come from, oldest first, in rows first..last of a growing table
        # (absolute start, length). A row outlives the drop of its oldest steps.
        self._table = torch.zeros(64, 2, dtype=torch.int64)
        self._first = self._last = 0
        self._copied: DeviceReplay | None = None  # the rows in use, where the storage is
        self._stale = True  # whether that copy is
        self._generator: torch.Generator | None = None

    def __len__(self) -> int:
        """Return the number of steps held."""
        return min(self.written, self.capacity)

    @property
    def num_sampleable(self) -> int:
        """The number of episodes (or rests of them that the ring still holds) with at least one slice."""
        return self._last - self._first

    @property
    def nbytes(self) -> int:
        """The size of the storage in bytes, tables included."""
        tensors = [*self._store.values(), self._table]
        return sum(t.numel() * t.element_size() for t in tensors)

    @undisturbed
    @torch.no_grad()
    def add(self, episode: Mapping[str, Any]) -> int:
        """Add a whole episode and return the number of episodes added so far.

        episode: `obs` (T, *obs_shape), `action` (T, A), `reward` (T,), optionally
        `terminated` (T,), which may be None, and `task` (T,); a dict or TensorDict of tensors, arrays or lists,
        `obs` also in a dict under its kind. Row 0 holds the reset's
        observation and, as in the official code, NaN action and reward, which no sample
        ever contains. Of an episode longer than the buffer the last steps stay.
        """
        rows = self._check(episode)
        kept = min(len(rows["reward"]), self.capacity)
        start = self.written
        self._put(torch.arange(start, start + kept), {name: x[-kept:] for name, x in rows.items()})
        self.written += kept
        self._drop_overwritten()
        if kept >= self._slice:
            self._append(start, kept)
        self._stale = True
        self.num_eps += 1
        return self.num_eps

    @undisturbed
    def sample(self) -> Batch:
        """Draw `batch_size` slices: obs (H+1, B, ...), action, reward, terminated (H, B, .), task (B,)."""
        b, index = self.cfg.batch_size, self._rows_in_use().table
        if self._generator is None:
            self._generator = generator(self.cfg.seed, "replay", self._device)
        u = torch.rand(2, b, dtype=torch.float64, device=self._device, generator=self._generator)
        episode = (u[0] * self.num_sampleable).long()
        start, length = index[episode].unbind(-1)
        first = start + (u[1] * (length - self._slice + 1)).long()
        steps = (first + torch.arange(self._slice, device=self._device).unsqueeze(1)) % self.capacity  # (H+1, B)

        def take(name: str, index: Tensor) -> Tensor:
            rows = self._store[name].index_select(0, index.flatten())
            if rows.device.type != self.device.type:
                rows = rows.pin_memory()
            return rows.view(*index.shape, *rows.shape[1:]).to(self.device, non_blocking=True)

        return Batch(
            obs=take("obs", steps),
            action=take("action", steps[1:]),
            reward=take("reward", steps[1:]).unsqueeze(-1),
            terminated=take("terminated", steps[1:]).unsqueeze(-1).float(),
            task=take("task", steps[0]) if "task" in self._store else None,
        )

    def steps(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return steps by their numbers, copied to the CPU, as `restore` takes them. They must still be held."""
        where = torch.arange(start, stop) % self.capacity
        return {name: store[where.to(store.device)].cpu() for name, store in self._store.items()}

    def state(self) -> dict[str, Tensor]:
        """Return all but the steps: episodes in use, counts, random stream."""
        found = dict(
            episodes=self._table[self._first : self._last],
            written=torch.tensor(self.written),
            num_eps=torch.tensor(self.num_eps),
        )
        return found if self._generator is None else found | generator_state(self._generator)

    @undisturbed
    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], chunks: Iterable[tuple[int, dict[str, Tensor]]]) -> None:
        """Fill an empty buffer with steps kept earlier and with what `state` returned then.

        chunks: number of the first step and the steps, in order; all that `state` counts on. A
        smaller buffer keeps the last of them.
        """
        self.written = int(state["written"])
        self.num_eps = int(state["num_eps"])
        for start, rows in chunks:
            numbers = torch.arange(start, start + len(rows["reward"]))
            held = numbers >= self.written - self.capacity
            self._put(numbers[held], {name: x[held] for name, x in rows.items()})
        self._first = self._last = 0
        for start, length in state["episodes"].tolist():
            self._append(start, length)
        self._drop_overwritten()
        self._stale = True
        if self._store and any(name.startswith("rng.") for name in state):  # else kernels drew, or nothing did
            self._generator = generator(self.cfg.seed, "replay", self._device)
            set_generator(self._generator, state)

    def _put(self, numbers: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Store steps by their numbers; the storage is made for the first."""
        if not self._store:
            device, pin = storage_device(self.device, self.capacity, self._row_bytes())
            self._store = {
                name: torch.empty((self.capacity, *shape), dtype=dtype, device=device, pin_memory=pin)
                for name, (shape, dtype) in self._columns().items()
            }
        for name, store in self._store.items():
            store[(numbers % self.capacity).to(store.device)] = rows[name].to(store.device, store.dtype)

    @undisturbed
    def on_device(self) -> DeviceReplay | None:
        """Return what kernels on the agent's device draw batches from, or None where the storage is elsewhere."""
        found = self._rows_in_use()
        return found if self._device.type == self.device.type else None

    def _rows_in_use(self) -> DeviceReplay:
        """Return the table of episodes where the storage is, brought up to date."""
        if self.num_sampleable == 0:
            raise InputError(
                f"replay: got {self.num_eps} episodes, none of {self._slice} or more steps "
                "(horizon + 1); allowed: sampling after at least one such episode"
            )
        if self._copied is None:
            store, device = self._store, self._device
            self._copied = DeviceReplay(
                Steps(
                    store["obs"].flatten(1), store["action"], store["reward"], store["terminated"], store.get("task")
                ),
                # No two of the episodes in use begin less than a slice apart.
                table=torch.zeros(self.capacity // self._slice + 1, 2, dtype=torch.int64, device=device),
                first=torch.zeros(1, dtype=torch.int64, device=device),
                count=torch.zeros(1, dtype=torch.int64, device=device),
            )
        if self._stale:
            self._copied.table[: self.num_sampleable] = self._table[self._first : self._last].to(self._device)
            self._copied.count.fill_(self.num_sampleable)
            self._stale = False
        return self._copied

    @property
    def _device(self) -> torch.device:
        return self._store["reward"].device

    def _check(self, episode: Mapping[str, Any]) -> dict[str, Tensor]:
        cfg = self.cfg
        rows: dict[str, Tensor] = {}
        if not isinstance(episode, Mapping):
            raise InputError(f"episode: got {kind_of(episode)}, allowed: a dict of arrays")
        keys = set(episode.keys())
        if "terminated" in keys and episode["terminated"] is None:
            keys.remove("terminated")
        needed = ["obs", "action", "reward", *(["task"] if cfg.multitask else [])]
        for name in needed:
            if name not in keys:
                raise InputError(f"episode: got keys {sorted(map(str, keys))}, allowed: {needed} at least")
        rows["obs"] = observation(episode["obs"], cfg, "episode['obs']")
        for name in _FIELDS[1:]:
            if name in keys and (name != "task" or cfg.multitask):
                rows[name] = as_tensor(episode[name], f"episode[{name!r}]")
        # Where lengths differ, the one that most parts have is meant.
        length = mode(len(x) if x.ndim else 0 for x in rows.values())
        if length == 0:
            raise InputError("episode: got no steps, allowed: at least one")
        columns = self._columns()
        for name, x in rows.items():
            shape = (length, *columns[name][0])
            if tuple(x.shape) != shape:
                raise InputError(f"episode[{name!r}]: got shape {tuple(x.shape)}, allowed: {shape}")
        for name, first in (("obs", 0), ("action", 1), ("reward", 1)):
            if name != "obs" or cfg.obs == "state":  # as stored: what float32 cannot hold is not finite
                rows[name] = rows[name].to(torch.float32)
                if not bool(rows[name][first:].isfinite().all()):
                    what = f"NaN or infinity from row {first} on"
                    raise InputError(f"episode[{name!r}]: got {what}, allowed: finite numbers")
        if cfg.obs == "rgb":
            obs = pixels(rows["obs"], "episode['obs']")
            rows["obs"] = obs.to(torch.uint8)
            if not torch.equal(rows["obs"].to(obs.dtype), obs):
                raise InputError("episode['obs']: got pixels between whole numbers, allowed: 0 to 255")
        if "task" in rows:
            rows["task"] = indices(rows["task"], "episode['task']", len(cfg.tasks))

        rows.setdefault("terminated", torch.zeros(length, dtype=torch.bool))
        rows["terminated"] = rows["terminated"].nan_to_num(0) > 0.5
        return rows

    def check_memory(self) -> None:
        """Raise `InputError` where the replay of this config will not fit into memory; nothing is allocated."""
        storage_device(self.device, self.capacity, self._row_bytes())

    def _row_bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self._columns().values())

    def _columns(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of what is kept of a step."""
        cfg = self.cfg
        columns: dict[str, tuple[tuple[int, ...], torch.dtype]] = dict(
            obs=(cfg.observation_shape, torch.uint8 if cfg.obs == "rgb" else torch.float32),
            action=((cfg.need("action_dim"),), torch.float32),
            reward=((), torch.float32),
            terminated=((), torch.bool),
        )
        return columns | (dict(task=((), torch.int64)) if cfg.multitask else {})

    @undisturbed
    def __getstate__(self) -> dict[str, Any]:
        start = self.written - len(self)
        steps = [(start, by_value(self.steps(start, self.written)))] if self._store else []
        return dict(cfg=self.cfg, device=self.device, state=by_value(self.state()), steps=steps)

    @undisturbed
    def __setstate__(self, kept: dict[str, Any]) -> None:
        type(self).__init__(self, kept["cfg"], kept["device"])
        steps = ((start, from_values(rows)) for start, rows in kept["steps"])
        self.restore(from_values(kept["state"]), steps)

    def _append(self, start: int, length: int) -> None:
        if self._last == self._table.shape[0]:
            live = self._table[self._first : self._last]
            table = torch.zeros(max(64, 2 * live.shape[0]), 2, dtype=torch.int64)
            table[: live.shape[0]] = live
            self._table, self._first, self._last = table, 0, live.shape[0]
        self._table[self._last, 0] = start
        self._table[self._last, 1] = length
        self._last += 1

    def _drop_overwritten(self) -> None:
        """Cut what the ring has overwritten off the oldest episodes, and drop those too short for a slice."""
        oldest = self.written - self.capacity
        while self._first < self._last:
            start, length = self._table[self._first].tolist()
            lost = oldest - start
            if lost <= 0:
                return
            if length - lost >= self._slice:
                self._table[self._first, 0] = start + lost
                self._table[self._first, 1] = length - lost
                return
            self._first += 1


def storage_device(device: torch.device, rows: int, row_bytes: int) -> tuple[torch.device, bool]:
    """Return where so many rows of replay go, by the memory that is free, and whether they are pinned there.

    Raises:
        InputError: there is not enough memory; the message has the `buffer_size` that fits.
    """
    nbytes = rows * row_bytes
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if _DEVICE_HEADROOM * nbytes < free:
            return device, False
    available = _host_memory()
    if available is not None and nbytes > available:
        fits = int(_HOST_SHARE * available) // row_bytes
        unit = 10 ** max(len(str(fits)) - 2, 0)
        raise InputError(
            f"buffer_size: got a replay of {nbytes / 1e9:.1f} GB for {rows:,} steps, allowed: at most the "
            f"{available / 1e9:.1f} GB of memory free now; make buffer_size smaller, {fits // unit * unit} fits"
        )
    return torch.device("cpu"), device.type == "cuda"


def _host_memory() -> int | None:
    """Return the bytes of host memory available, or None where the system does not tell."""
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
