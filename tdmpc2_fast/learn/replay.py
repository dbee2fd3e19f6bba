"""Replay of whole episodes with the official sampling law, vectorised.

Steps lie one behind another in a ring (ring.py); a small table holds start and length of each episode.
A slice is drawn as in the official sampler: an episode uniformly, then a start uniformly
inside it, so steps of short episodes are drawn more often than steps of long ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import mode
from typing import Any

import torch
from torch import Tensor

from tdmpc2_fast.kernels.update.replay_gather import DeviceReplay

from ..config import Config
from ..errors import InputError, kind_of, warn
from ..inputs import as_tensor, indices, observation, pixels
from ..rng import generator, generator_state, set_generator
from ..runtime.backend import resolve_device
from ..runtime.by_value import by_value, from_values
from ..runtime.surroundings import undisturbed
from .batch import Batch
from .ring import Ring, begins, columns, pieces, row_bytes, storage_device

_FIELDS = ("obs", "action", "reward", "terminated", "task")


class ReplayBuffer:
    """A ring of steps, of capacity `min(buffer_size, steps)` as in the official code.

    Storage lives on the agent's device where it fits, else in (pinned) host memory, decided
    from the free memory measured when the first episode comes. Samples are always on the
    agent's device. A copy or a pickle holds the steps in use and goes on drawing as this one does.

    Pixels whose frames move up by one from step to step are kept a frame a step, and drawn whole.
    The episodes tell how many frames that are; where one disagrees with those before, all are kept
    anew in a form that suits it, with a warning that says what a step takes then.

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
        self._ring: Ring | None = None
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
        return self._table.nbytes + (0 if self._ring is None else self._ring.nbytes)

    @property
    def frames(self) -> int:
        """How many frames an observation stacks, each of which is kept once; 1 until an episode has come."""
        return 1 if self._ring is None else self._ring.frames

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
        length, start = len(rows["reward"]), self.written
        kept = min(length, self.capacity)
        self._put(start, {name: x[-kept:] for name, x in rows.items()}, free=length > kept)
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
        b, index, ring = self.cfg.batch_size, self._rows_in_use().table, self._held
        if self._generator is None:
            self._generator = generator(self.cfg.seed, "replay", self._device)
        u = torch.rand(2, b, dtype=torch.float64, device=self._device, generator=self._generator)
        episode = (u[0] * self.num_sampleable).long()
        start, length = index[episode].unbind(-1)
        first = start + (u[1] * (length - self._slice + 1)).long()
        steps = first + torch.arange(self._slice, device=self._device).unsqueeze(1)  # (H+1, B)

        def take(name: str, numbers: Tensor) -> Tensor:
            rows = ring.take(name, numbers)
            if rows.device.type != self.device.type:
                rows = rows.pin_memory()
            return rows.to(self.device, non_blocking=True)

        return Batch(
            obs=take("obs", steps),
            action=take("action", steps[1:]),
            reward=take("reward", steps[1:]).unsqueeze(-1),
            terminated=take("terminated", steps[1:]).unsqueeze(-1).float(),
            task=take("task", steps[0]) if "task" in ring else None,
        )

    def steps(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return steps by their numbers, copied to the CPU, as `restore` takes them. They must still be held."""
        return self._held.steps(start, stop)

    def kept(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return steps as `steps` does, but of pixels each frame once, which `restore` takes, too."""
        return self._held.kept(start, stop)

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
        for first, chunk in chunks:
            for start, rows in pieces(first, chunk, self.cfg.observation_shape):
                lost = max(self.written - self.capacity - start, 0)
                if lost < len(rows["reward"]):
                    rows = {k: x[lost:] for k, x in rows.items()}
                    # A file of frames tells how they are stacked, which a few steps alone may leave open.
                    wanted = chunk["frames"].shape[1] if "frames" in chunk else 0
                    self._put(start + lost, rows, self._ring is None, wanted)
        self._first = self._last = 0
        for start, length in state["episodes"].tolist():
            self._append(start, length)
        self._drop_overwritten()
        self._stale = True
        if self._ring is not None and any(k.startswith("rng.") for k in state):  # else kernels drew, or nothing did
            self._generator = generator(self.cfg.seed, "replay", self._device)
            set_generator(self._generator, state)

    def _put(self, start: int, rows: Mapping[str, Tensor], free: bool, wanted: int = 0) -> None:
        """Store steps as `Ring.put`, in a ring that can hold them; wanted: channels a frame to try first."""
        while self._ring is None or not self._ring.put(start, rows, free):
            self._ring, self._copied, self._stale = self._ring_for(start, rows["obs"], free, wanted), None, True

    def _ring_for(self, start: int, obs: Tensor, free: bool, wanted: int) -> Ring:
        """Return a ring for these observations with what is held: each frame once, where all are such stacks."""
        cfg, held, total = self.cfg, self._ring, self.cfg.observation_shape[0]
        before = None if held is None or free else held.steps(start - 1, start)["obs"][0]
        sizes = [c for c in range(1, total + 1) if total % c == 0] if cfg.obs == "rgb" else [total]
        # Where nothing moves, several fit: three frames are the official number, whole observations the last resort.
        sizes.sort(key=lambda c: (c != wanted, c == total, 3 * c != total, c))
        fitting = (c for c in sizes if begins(obs, c, before, free) is not None)
        if held is None:
            return Ring(cfg, self.device, self.capacity, next(fitting))
        why = f"replay: observations came that do not stack {held.frames} frames as those before them did"
        for channels in fitting:
            try:
                ring = Ring(cfg, self.device, self.capacity, channels)
            except InputError as e:
                raise InputError(f"{why}. {e}") from None
            if held.copy_to(ring):
                gbyte = [x.nbytes / 1e9 for x in (held, ring)]
                warn(f"{why}: from here on it takes {gbyte[1]:.3g} GB of memory, before {gbyte[0]:.3g}")
                return ring
        raise AssertionError("whole observations always fit")

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
            device = self._device
            self._copied = DeviceReplay(
                self._held.columns(),
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
    def _held(self) -> Ring:
        if self._ring is None:
            raise InputError("replay: got no episode yet, allowed: its steps after one was added")
        return self._ring

    @property
    def _device(self) -> torch.device:
        return self._held.device

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
        shapes = {name: shape for name, (shape, _) in columns(cfg, cfg.observation_shape[0]).items()}
        for name, x in rows.items():
            shape = (length, *shapes[name])
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

    def check_memory(self, frames: int = 1) -> int:
        """Return the bytes that the steps of this config take; nothing is allocated.

        frames: how many of them the environment stacks in an observation of pixels, as `train/envs/pixels.py` does.

        Raises:
            InputError: they will not fit into memory.
        """
        nbytes = row_bytes(self.cfg, self.cfg.observation_shape[0] // frames)
        storage_device(self.device, self.capacity, nbytes)
        return self.capacity * nbytes

    @undisturbed
    def __getstate__(self) -> dict[str, Any]:
        start = self.written - len(self)
        steps = [(start, by_value(self.kept(start, self.written)))] if self._ring is not None else []
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
