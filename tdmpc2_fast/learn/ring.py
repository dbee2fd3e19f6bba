"""The memory of a replay: its last steps in a ring, and of stacked pixels each frame once.

An observation of N channels stacks K = N / C frames of C channels, the oldest first, where they move up by one from
step to step and an episode's first frame fills all places. Then a step adds one frame, and observations are built
from frames when they are read: `kernels/update/replay_gather.py` has the rule. K - 1 rows more than there are steps
keep the frames that the oldest step shares with those overwritten, so every step held can be read.

Nothing is taken on trust: `put` compares, and refuses what is no such stack. With K = 1 it takes everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tdmpc2_fast.kernels.update.replay_gather import Steps, frame_rows

from ..config import Config
from ..errors import InputError

_DEVICE_HEADROOM = 2.5  # official rule: the replay lives on the GPU if this many times its size is free
_HOST_SHARE = 0.8  # of the free memory that the advice leaves to the replay: the model wants some, too
_PIECE = 2**26  # bytes of observations that are whole at a time, where frames are taken apart or put together


class Ring:
    """The last `capacity` steps by their numbers, on one device.

    Args:
        cfg: a completed config.
        device: where batches are wanted; `storage_device` says what follows.
        capacity: steps.
        channels: C, a divisor of the observation's N; of states N itself.

    Raises:
        InputError: there is not enough memory.
    """

    def __init__(self, cfg: Config, device: torch.device, capacity: int, channels: int) -> None:
        self.capacity, self.channels = capacity, channels
        self.shape = cfg.observation_shape
        self.frames = self.shape[0] // channels  # K
        self.start = self.stop = 0  # numbers of the first step put, and after the last
        where, pin = storage_device(device, capacity, row_bytes(cfg, channels))
        self._columns = {
            name: torch.empty((self._rows(name), *shape), dtype=dtype, device=where, pin_memory=pin)
            for name, (shape, dtype) in columns(cfg, channels).items()
        }
        self._columns["obs"][: self.frames - 1] = 0  # the rows before the first step's are saved with it

    @property
    def device(self) -> torch.device:
        """Where the steps are."""
        return self._columns["reward"].device

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return sum(x.numel() * x.element_size() for x in self._columns.values())

    def put(self, start: int, rows: Mapping[str, Tensor], free: bool) -> bool:
        """Store steps from number `start` on, which follow those held; tell whether they could be stored.

        rows: `obs` (n, *shape) and the other columns, n at most the capacity.
        free: the first may be any stack, since it overwrites, or comes before, every other step.
        """
        n, k, obs = len(rows["reward"]), self.frames, rows["obs"]
        numbers = torch.arange(start, start + n)
        if k > 1:
            before = None if free or start == self.start else self.take("obs", torch.tensor(start - 1))
            anew = begins(obs, self.channels, before, free)
            if anew is None:
                return False
            # At an episode's first step K - 1 frames repeat the next, and at each one after it one less.
            left = 0 if before is None else max(int(self._columns["repeats"][(start - 1) % self.capacity]) - 1, 0)
            since = torch.arange(n)
            began = torch.where(anew.cpu(), since, left - (k - 1)).cummax(0).values
            rows = {**rows, "obs": obs[:, -self.channels :], "repeats": (k - 1 - since + began).clamp(min=0)}
            if free:
                self._write("obs", numbers[0] + torch.arange(k - 1), obs[0].unflatten(0, (k, self.channels))[:-1])
        for name in self._columns:
            self._write(name, numbers + (k - 1 if name == "obs" else 0), rows[name])
        self.start, self.stop = start if free else self.start, start + n
        return True

    def take(self, name: str, numbers: Tensor) -> Tensor:
        """Return a column at steps (...) by their numbers, on the ring's device: (..., *shape)."""
        column, numbers = self._columns[name], numbers.to(self.device)
        if name != "obs":
            return column.index_select(0, (numbers % self.capacity).flatten()).view(*numbers.shape, *column.shape[1:])
        index = frame_rows(numbers, self._columns.get("repeats"), self.capacity, self.frames)
        return column.index_select(0, index.flatten()).view(*numbers.shape, *self.shape)

    def steps(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return steps by their numbers, copied to the CPU, with whole observations."""
        numbers = torch.arange(start, stop)
        return {name: self.take(name, numbers).cpu() for name in self._columns if name != "repeats"}

    def kept(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return steps as `steps` does, but of stacks `frames` (n + K - 1, C, ...) and `repeats` in place of `obs`."""
        if self.frames == 1:
            return self.steps(start, stop)
        numbers = torch.arange(start, stop + self.frames - 1)
        found = {name: self.take(name, numbers[: stop - start]).cpu() for name in self._columns if name != "obs"}
        frames = self._columns["obs"][(numbers % self._rows("obs")).to(self.device)]
        return {"frames": frames.cpu(), **found}

    def copy_to(self, other: Ring) -> bool:
        """Put the steps held into an empty ring; tell whether it could hold them."""
        oldest = max(self.start, self.stop - self.capacity)
        numbers = range(oldest, self.stop, _rows_of_a_piece(self._columns["obs"][0].nbytes * self.frames))
        return all(other.put(a, self.steps(a, min(a + numbers.step, self.stop)), free=a == oldest) for a in numbers)

    def columns(self) -> Steps:
        """Return the steps as kernels read them."""
        x = self._columns
        return Steps(x["obs"].flatten(1), x["action"], x["reward"], x["terminated"], x.get("task"), x.get("repeats"))

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def _rows(self, name: str) -> int:
        return self.capacity + (self.frames - 1 if name == "obs" else 0)

    def _write(self, name: str, numbers: Tensor, x: Tensor) -> None:
        column = self._columns[name]
        column[(numbers % len(column)).to(column.device)] = x.to(column.device, column.dtype)


def begins(obs: Tensor, channels: int, before: Tensor | None, free: bool) -> Tensor | None:
    """Return at which steps a stack begins anew; None where observations are no stacks of so many channels a frame.

    Args:
        obs: (n, N, ...), in their order.
        channels: of a frame.
        before: (N, ...), the one before them, if any.
        free: nothing is asked of the first.

    Returns:
        (n,) bool: False where all frames but the last are those of the step before, moved up by one; True where they
        are not, and all frames are equal.
    """
    if channels == obs.shape[1]:
        return torch.zeros(len(obs), dtype=torch.bool, device=obs.device)
    follows = torch.zeros(len(obs), dtype=torch.bool, device=obs.device)
    follows[1:] = _same(obs[1:, :-channels], obs[:-1, channels:])
    if before is not None:
        follows[0] = torch.equal(obs[0, :-channels], before[channels:].to(obs.device))
    anew = ~follows
    first = obs[anew]
    filled = _same(first[:, :-channels], first[:, channels:])
    if free:
        anew[0], filled[0] = filled[0], True
    return anew if bool(filled.all()) else None


def _same(x: Tensor, y: Tensor) -> Tensor:
    return (x == y).flatten(1).all(1)


def pieces(start: int, rows: Mapping[str, Tensor], shape: tuple[int, ...]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield number and rows of steps that `Ring.steps` or `Ring.kept` returned, a few at a time, observations whole.

    shape: of an observation.
    """
    total = len(rows["reward"])
    others = {name: x for name, x in rows.items() if name not in ("obs", "frames", "repeats")}
    if "frames" in rows:
        k = shape[0] // rows["frames"].shape[1]
        index = frame_rows(torch.arange(total), rows["repeats"], total, k)
    else:
        index = torch.arange(total).unsqueeze(1)
    source = rows["frames" if "frames" in rows else "obs"]
    each = _rows_of_a_piece(source[0].nbytes * index.shape[1])
    for a in range(0, total, each):
        piece = {name: x[a : a + each] for name, x in others.items()}
        yield start + a, {"obs": source[index[a : a + each]].flatten(1, 2).view(-1, *shape), **piece}


def columns(cfg: Config, channels: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of what is kept of a step, with so many channels of its observation."""
    shape = cfg.observation_shape
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = dict(
        obs=((channels, *shape[1:]), torch.uint8 if cfg.obs == "rgb" else torch.float32),
        action=((cfg.need("action_dim"),), torch.float32),
        reward=((), torch.float32),
        terminated=((), torch.bool),
    )
    found |= dict(task=((), torch.int64)) if cfg.multitask else {}
    return found | (dict(repeats=((), torch.int64)) if channels < shape[0] else {})


def row_bytes(cfg: Config, channels: int) -> int:
    """Return the bytes that a step takes, with so many channels of its observation."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in columns(cfg, channels).values())


def _rows_of_a_piece(nbytes: int) -> int:
    return max(1, _PIECE // nbytes)


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
