"""Turns at a model's parameters on a GPU, whatever stream or thread reads and writes them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch

from ..model.world_model import WorldModel


class Access:
    """Orders what plans read of a model's parameters, and what updates and loads write, over the streams of a GPU.

    An event each stands for all reads and all writes so far: a stream that records it has waited for the one
    before. The lock keeps threads from coming between another's wait and its record. Elsewhere nothing is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        if self._on_gpu:
            self._lock = threading.RLock()
            self._read, self._written = torch.cuda.Event(), torch.cuda.Event()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Have the current stream read within what was written before."""
        if not self._on_gpu:
            yield
            return
        with self._lock:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._written)
            try:
                yield
            finally:
                stream.wait_event(self._read)
                self._read.record(stream)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Have the current stream write within, when all before have read and written."""
        if not self._on_gpu:
            yield
            return
        with self._lock:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._read)
            stream.wait_event(self._written)
            try:
                yield
            finally:
                self._written.record(stream)


_accesses: WeakKeyDictionary[WorldModel, dict[torch.device, Access]] = WeakKeyDictionary()


def access_to(model: WorldModel) -> Access:
    """Return the turns at a model's parameters on the device it is on; one object for all who ask."""
    here = _accesses.setdefault(getattr(model, "_orig_mod", model), {})
    device = model.device
    return here.get(device) or here.setdefault(device, Access(device))
