"""What an update costs, counted from the arguments of the launches of a dry run, as work.py does for a plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .launch import Launch, Precision, log_launches
from .update import FusedUpdate
from .update_buffers import UpdateSizes
from .work import launch_work, not_interpreted


@dataclass(frozen=True)
class UpdateWork:
    """What one update costs, the drawing of its batch left out.

    Attributes:
        launches: kernels launched, ours and torch's.
        kernels: launches by name; torch's by the name of the operation.
        flops: of the products, a multiplication and an addition being two.
        padded_flops: of the products as tiles execute them, with what is masked.
    """

    launches: int
    kernels: dict[str, int]
    flops: int
    padded_flops: int


def update_work(sizes: UpdateSizes, precision: Precision) -> UpdateWork:
    """Count an update of these sizes, from states.

    Tensor-core precisions, batch 256 (1M, 5M) or 1024, GFLOP beside those the products need by hand:
    1M 8.5 (8.8), 5M 29.2 (30.7), 19M 412 (431), 48M 1060 (1092), 317M 6583 (6717). So no product is
    computed that need not be.
    """
    log, operations = dry_update(sizes, precision)
    work = [launch_work(launch) for launch in log]
    kernels = Counter(launch.name for launch in log) + operations
    return UpdateWork(
        launches=sum(kernels.values()),
        kernels=dict(kernels),
        flops=sum(w.flops for w in work),
        padded_flops=sum(w.padded_flops for w in work),
    )


def dry_update(sizes: UpdateSizes, precision: Precision, pdl: bool = False) -> tuple[list[Launch], Counter[str]]:
    """Launches of an update as on a GPU, none of them executed, and torch's operations beside them."""
    with not_interpreted():
        # Nothing is computed, so memory is taken as it is touched: hardly.
        update = FusedUpdate(sizes, precision, torch.device("cpu"), pdl=pdl)
        with log_launches(dry=True) as log, _Operations() as operations:
            update.run()
    return log, operations.found


class _Operations(TorchDispatchMode):
    """Counts torch's operations that are kernels: views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))
