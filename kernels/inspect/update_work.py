"""What an update costs, counted from the arguments of the launches of a dry run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..backward.gradient_tile import Gradient
from ..device.launch import How, Launch, Precision, log_launches
from ..layers.rows import Rows
from ..update.buffers import UpdateSizes
from ..update.chain import UpdateChain
from .plan_work import not_interpreted
from .work import Work, launch_work


def update_work(sizes: UpdateSizes, precision: Precision) -> Work:
    """Count an update of these sizes, from states, the drawing of its batch left out.

    Tensor-core precisions, batch 256 (1M, 5M) or 1024, GFLOP beside those the products need by hand:
    1M 8.5 (8.8), 5M 29.2 (30.7), 19M 412 (431), 48M 1060 (1092), 317M 6583 (6717). So no product is
    computed that need not be.
    """
    log, operations = dry_update(sizes, precision)
    work = [launch_work(launch) for launch in log]
    kernels = Counter(launch.name for launch in log) + operations
    return Work(
        launches=sum(kernels.values()),
        kernels=dict(kernels),
        flops=sum(w.flops for w in work),
        padded_flops=sum(w.padded_flops for w in work),
    )


def dry_update(
    sizes: UpdateSizes, precision: Precision, arch: int = 90, once: bool | None = None
) -> tuple[list[Launch], Counter[str]]:
    """Return the launches of an update as on a GPU of a compute capability, and torch's operations; none is executed.

    once: see `UpdateChain`.
    """
    with not_interpreted():
        # Nothing is computed, and no memory taken.
        update = UpdateChain(sizes, How.of_chip(arch, precision), torch.device("meta"), once)
        with log_launches(dry=True) as log, _Operations() as operations:
            update.run()
    return log, operations.found


@dataclass(frozen=True)
class UpdateMemory:
    """Bytes an update holds as long as it lives; nothing else is allocated in one.

    Attributes:
        parameters: of the model, its targets, and both as operands of products.
        optimiser: gradients and moments.
        working: batch, draws, pre-activations, their gradients, losses.
    """

    parameters: int
    optimiser: int
    working: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.parameters + self.optimiser + self.working


def update_memory(sizes: UpdateSizes, precision: Precision) -> UpdateMemory:
    """Count what `UpdateChain` allocates."""
    update = UpdateChain(sizes, How(precision), torch.device("meta"))
    optimisers = (update.world, update.policy)
    parameters = [(x.param, x.shadow) for x in (*optimisers, update.target)]
    moments = [(x.grad, x.exp_avg, x.exp_avg_sq, x.partials, x.step) for x in optimisers]
    working = [vars(x) for x in (update.inputs, update.draws, update.state, update.losses)]
    return UpdateMemory(*(_bytes(x) for x in (parameters, moments, working)))


def _bytes(x: Any) -> int:
    """Count the bytes of all storages in lists, tuples, dicts and the buffers of rows."""
    found: dict[int, int] = {}

    def walk(x: Any) -> None:
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            found[storage._cdata] = storage.nbytes()
        elif isinstance(x, dict):
            walk(list(x.values()))
        elif isinstance(x, (list, tuple)):
            for y in x:
                walk(y)
        elif isinstance(x, (Rows, Gradient)):
            walk(vars(x))

    walk(x)
    return sum(found.values())


class _Operations(TorchDispatchMode):
    """Counts those operations of torch that are kernels; views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))
