"""The processes of a run under `torchrun`, and what they tell each other.

Tensors of an update go by NCCL between GPUs, and by gloo between CPUs. What a loop has to agree on, counts and
little texts, goes by gloo in a group of its own, so that a GPU is not waited for. A process without others has
`ALONE`, which imports nothing of torch.distributed and does nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..errors import CheckpointError, ConfigError, RanksError
from ..seeds import stream_seed

_TOLD: dict[str, type[Exception]] = dict(checkpoint=CheckpointError, config=ConfigError, disk=OSError)


class Ranks:
    """The ranks of a run, of which this process is one; made by `joined`.

    What is about shares each rank finds by itself; all other calls are made by all ranks, in the same order.

    rank: of this process, from 0. count: how many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1, control: Any = None) -> None:
        self.rank, self.count, self._control = rank, count, control

    @property
    def first(self) -> bool:
        """Whether this process is the one that shows, logs and writes."""
        return self.rank == 0

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.count}"

    # ---- shares

    def share(self, whole: int) -> int:
        """Return how many of `whole` things are this rank's: one more on the first ranks where they do not divide."""
        return whole // self.count + (self.rank < whole % self.count)

    def equal(self, cfg: Config, key: str) -> int:
        """Return this rank's share of a config key that is of the whole run, the same on all ranks.

        Raises:
            ConfigError: the number of ranks does not divide it.
        """
        whole: int = getattr(cfg, key)
        if whole % self.count:
            raise ConfigError(
                f"config key {key!r}: got {whole}, of the whole run on {self.count} ranks, allowed: a multiple of "
                f"{self.count}"
            )
        return whole // self.count

    def part(self, cfg: Config) -> Config:
        """Return the config of this rank's own environments and replay: its share of them, and a seed of its own.

        Raises:
            ConfigError: the number of ranks does not divide `num_envs` or `batch_size`.
        """
        if self.count == 1:
            return cfg
        equal = {key: self.equal(cfg, key) for key in ("num_envs", "batch_size")}
        sizes = {key: -(-getattr(cfg, key) // self.count) for key in ("buffer_size", "steps")}
        return cfg.replace(seed=self.own_seed(cfg), **equal, **sizes)

    def own_seed(self, cfg: Config) -> int:
        """Return the seed of what this rank draws for itself; the first one's is the run's."""
        return cfg.seed if self.first else stream_seed(cfg.seed, repr(self)) % 2**32

    # ---- tensors of an update, on the device

    def sum(self, x: Tensor) -> None:
        """Add up x, contiguous and of one shape on all ranks, in place; all get the same sum, bit for bit."""
        if self.count > 1:
            import torch.distributed as dist

            with self._reached():
                dist.all_reduce(x)

    def gather(self, x: Tensor, out: Tensor) -> None:
        """Write x (B, ...) of all ranks into `out` (ranks B, ...), both contiguous, in the order of the ranks."""
        if self.count == 1:
            out.copy_(x)
            return
        import torch.distributed as dist

        with self._reached():
            dist.all_gather(list(out.chunk(self.count)), x)

    def whole(self, x: Tensor) -> Tensor:
        """Return x (B, ...) of all ranks as (ranks B, ...); x itself where there is one."""
        if self.count == 1:
            return x
        x = x.contiguous()
        out = x.new_empty(self.count * x.shape[0], *x.shape[1:])
        self.gather(x, out)
        return out

    @torch.no_grad()
    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Give all ranks the tensors of the first one, in place."""
        if self.count > 1:
            import torch.distributed as dist

            with self._reached():
                for x in tensors:
                    held = x.contiguous()
                    dist.broadcast(held, 0)
                    if held is not x:
                        x.copy_(held)

    # ---- what a loop agrees on, on the host

    def most(self, *numbers: int) -> tuple[int, ...]:
        """Return of each number the largest that a rank gave."""
        if self.count == 1:
            return numbers
        import torch.distributed as dist

        x = torch.tensor(numbers, dtype=torch.int64)
        with self._reached():
            dist.all_reduce(x, dist.ReduceOp.MAX, self._control)
        return tuple(x.tolist())

    def told(self, value: Any) -> list[Any]:
        """Return what each rank gave, JSON-ready, in the order of the ranks."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        (longest,) = self.most(len(text))
        mine = torch.full((longest + 8,), 32, dtype=torch.uint8)  # JSON does not mind blanks
        mine[: len(text)] = text
        found = [torch.empty_like(mine) for _ in range(self.count)]
        with self._reached():
            dist.all_gather(found, mine, self._control)
        return [json.loads(bytes(x.tolist())) for x in found]

    def every(self, holds: bool) -> bool:
        """Tell whether something holds on all ranks."""
        return not self.most(int(not holds))[0]

    def any(self, holds: bool) -> bool:
        """Tell whether something holds on a rank."""
        return bool(self.most(int(holds))[0])

    def done(self, work: Callable[[], Any]) -> list[Any]:
        """Do something on each rank; return what it gave, JSON-ready, in the order of the ranks.

        What one rank raises of `_TOLD` all of them raise, so that none waits for another.
        """
        if self.count == 1:
            return [work()]
        found: dict[str, Any] = {}
        try:
            found["value"] = work()
        except tuple(_TOLD.values()) as e:
            kind = next(name for name, kind in _TOLD.items() if isinstance(e, kind))
            found = dict(kind=kind, text=str(e))
        each = self.told(found)
        for rank, x in enumerate(each):
            if "kind" in x:
                raise _TOLD[x["kind"]](x["text"] if rank == 0 else f"rank {rank}: {x['text']}")
        return [x["value"] for x in each]

    def of_first(self, value: Any = None) -> Any:
        """Return what the first rank gave, JSON-ready; what the others give does not matter."""
        return value if self.count == 1 else self.told(value if self.first else None)[0]

    # ---- beginning and end

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:  # torch.distributed's errors are such
            said = re.sub(r"\[/\S+\] ", "", " ".join(str(e).split()))[:160]
            raise RanksError(
                f"{self}: the others cannot be reached any more: one of them ended, or hung for longer than "
                f"rank_timeout allows ({said}). The run ends; what was written last is whole, and "
                "resume=auto goes on from there"
            ) from e

    def leave(self, well: bool = True) -> None:
        """End the process group: when all ranks are through, or where this one cannot go on, at once."""
        if self.count == 1:
            return
        import torch.distributed as dist

        if well:
            self.most(0)  # no one goes while another one still needs it
        # A group of gloo that lives on until the interpreter ends aborts the process then, now and again. One of NCCL
        # would wait for what is under way on the device, and its end is that of the process.
        self._control = None
        if well or dist.get_backend() == "gloo":
            with contextlib.nullcontext() if well else contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        self.rank, self.count = 0, 1


ALONE = Ranks()
"""A process without others."""


def under_torchrun() -> bool:
    """Tell whether this process is one of several that torchrun, or SLURM through it, started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def among(device: str, minutes: float) -> Iterator[Ranks]:
    """Be one of the ranks within; arguments and errors are those of `joined`."""
    ranks = joined(device, minutes)
    try:
        yield ranks
    except BaseException:
        ranks.leave(well=False)
        raise
    ranks.leave()


def joined(device: str, minutes: float) -> Ranks:
    """Join the other processes of torchrun, and wait until all have; `ALONE` where there are none.

    On GPUs each process of a machine takes the one of its number there, LOCAL_RANK.

    Args:
        device: the config key: auto, cpu or cuda.
        minutes: how long ranks wait for each other.

    Raises:
        ConfigError: a device by its number, or fewer GPUs than processes on this machine.
        RanksError: the others did not come.
    """
    if not under_torchrun():
        return ALONE
    import torch.distributed as dist

    missing = [key for key in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if missing:
        raise RanksError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set without {missing[0]}, allowed: all by torchrun")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if not on_gpu and device not in ("auto", "cpu"):
        raise ConfigError(f"config key 'device': got {device!r} on several ranks, allowed: auto, cpu, cuda")
    local = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"config key 'device': got {device!r} with {local + 1} or more processes on a machine of "
                f"{torch.cuda.device_count()} GPUs, allowed: --nproc-per-node of at most that, or device=cpu"
            )
        torch.cuda.set_device(local)
    timeout = timedelta(minutes=minutes)
    try:
        own = torch.device("cuda", local) if on_gpu else None
        store, rank, count = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
        # torchrun's store outlives a restart, and what is left in it leads to processes that are gone.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]
        kind = "nccl" if on_gpu else "gloo"
        dist.init_process_group(kind, store=store, rank=rank, world_size=count, timeout=timeout, device_id=own)
        control = dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as e:
        raise RanksError(f"rank {os.environ['RANK']}: the others did not come: {' '.join(str(e).split())[:300]}") from e
    return Ranks(dist.get_rank(), dist.get_world_size(), control)
