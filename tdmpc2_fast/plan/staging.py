"""What the host gives a plan on a GPU, sent there in one copy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_SLOTS = 32
_ALIGNED = 16  # bytes: kernels read as many at once


class _Slot(NamedTuple):
    """Pinned memory, and arrays in it: as one tensor costs more to write to than an array."""

    memory: Tensor
    parts: dict[str, Any]


class Staging:
    """A block of a GPU's memory with parts in it, and pinned memory of the host that it is copied from.

    A copy is under way when the next part is written, so slots take turns. After half of them an event is recorded,
    and waited for before they are written again: the host gets no more than that many plans ahead of the device.

    Args:
        like: tensors of the device, by name; `parts` has others like them, in the block.
    """

    def __init__(self, like: dict[str, Tensor]) -> None:
        places, size = {}, 0
        for name, x in like.items():
            places[name] = slice(size, size + x.nbytes)
            size += -(-x.nbytes // _ALIGNED) * _ALIGNED
        device = next(iter(like.values())).device
        self._block = torch.zeros(size, dtype=torch.uint8, device=device)
        self.parts = {k: self._block[at].view(like[k].dtype).view(like[k].shape) for k, at in places.items()}
        self._slots = []
        for memory in torch.zeros(_SLOTS, size, dtype=torch.uint8, pin_memory=True):
            parts = {k: memory[at].view(like[k].dtype).view(like[k].shape).numpy() for k, at in places.items()}
            self._slots.append(_Slot(memory, parts))
        self._halves = torch.cuda.Event(), torch.cuda.Event()
        self._next = 0

    def send(self, values: dict[str, bool | Tensor]) -> None:
        """Write flags and tensors, on the host or the device, into all parts."""
        at = self._next
        half, within = divmod(at, _SLOTS // 2)
        if not within:
            self._halves[half].synchronize()
        memory, parts = self._slots[at]
        there = {}
        for name, value in values.items():
            if value is True or value is False:
                parts[name].fill(value)
            elif value.is_cuda:
                there[name] = value
            else:
                parts[name][...] = value.numpy()
        self._block.copy_(memory, non_blocking=True)
        for name, value in there.items():
            self.parts[name].copy_(value)
        if within == _SLOTS // 2 - 1:
            self._halves[half].record()
        self._next = (at + 1) % _SLOTS
