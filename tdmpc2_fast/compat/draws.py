"""The draws of a plan and an update, in the order in which the official code makes them.

torch's random functions give one tensor after another within `given`, so that code written around
them, the official one above all, can be compared draw by draw with ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..learn.batch import Batch
from ..rng import PlanNoise, UpdateNoise

_OF_A_SIZE = (torch.randn, torch.randint)
_LIKE = (torch.randn_like, Tensor.exponential_)


def plan_order(noise: PlanNoise) -> Iterator[Tensor]:
    """Yield the draws of a plan for one environment."""
    if noise.shift is not None:
        yield noise.shift
    yield from noise.pi_eps[0] if noise.pi_eps.shape[2] else ()
    for i in range(len(noise.samples)):
        yield noise.samples[i, 0]
        yield noise.value_eps[i, 0]
        yield noise.members[i]
    yield noise.elite[0]
    yield noise.action[0]


def update_order(noise: UpdateNoise) -> Iterator[Tensor]:
    """Yield the draws of an update without dropout, whose masks have no fixed order."""
    if noise.shift_next is not None:
        yield from noise.shift_next
    yield noise.td_eps
    yield noise.td_members
    if noise.shift_first is not None:
        yield noise.shift_first
    yield noise.pi_eps
    yield noise.pi_members


class given(TorchFunctionMode):
    """A context in which torch's random functions give these tensors, one after another.

    Raises:
        RuntimeError: within, a draw of another shape is asked for, or one more.
    """

    def __init__(self, draws: Iterator[Tensor]) -> None:
        super().__init__()
        self._draws = draws

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randperm:
            return self._next()
        if func in _LIKE:
            return self._next(args[0].shape).to(args[0])
        if func in _OF_A_SIZE:
            size = kwargs.get("size", args if isinstance(args[0], int) else args[0])
            draw = self._next(torch.Size(size))
            return draw if kwargs.get("dtype") is None else draw.to(kwargs["dtype"])
        return func(*args, **kwargs)

    def _next(self, shape: torch.Size | None = None) -> Tensor:
        draw = next(self._draws, None)
        if draw is None:
            raise RuntimeError("it draws more random numbers than the official code")
        if shape is not None and draw.shape != shape:
            raise RuntimeError(f"it draws random numbers of {tuple(shape)}, the official code of {tuple(draw.shape)}")
        return draw.clone()


def updated(agent: Any, batch: Batch, noise: UpdateNoise) -> dict[str, Any]:
    """Have an official agent's own `update` learn from a batch by these draws, and return its metrics.

    Older generations take batches without terminations.

    Raises:
        ValueError: it takes neither 4 nor 5 values from `buffer.sample()`.
    """
    for fields in (batch, (*batch[:3], batch.task)):
        buffer = SimpleNamespace(sample=lambda fields=fields: tuple(fields))
        try:
            with given(update_order(noise)):
                return dict(agent.update(buffer).items())
        except ValueError as e:
            if "too many values to unpack" not in str(e):
                raise
    raise ValueError("it takes neither 4 nor 5 values from buffer.sample()")
