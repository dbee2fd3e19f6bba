"""The one place where torch takes over from kernels that turn out not to fit the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from tdmpc2_fast.kernels.device.launch import KERNEL_ERRORS, natively

from ..errors import BackendError
from ..model.world_model import WorldModel
from .backend import Backend, resolve_backend
from .surroundings import default_dtype, undisturbed

T = TypeVar("T")
R = TypeVar("R")


class Chosen(Generic[T]):
    """The implementation of planning or learning that a model's config and device ask for, made when first used.

    what: who does what, for messages, as in "Planner: planning".
    by_torch, by_kernels: make the implementation.
    carry: has the second go on from where the first is.
    """

    def __init__(
        self,
        model: WorldModel,
        what: str,
        by_torch: Callable[[], T],
        by_kernels: Callable[[], T],
        carry: Callable[[T, T], None],
    ) -> None:
        self.backend: Backend = resolve_backend(model.cfg, model.device, model.dtype)
        self.made: T | None = None
        self._cfg, self._what, self._by_torch, self._by_kernels = model.cfg, what, by_torch, by_kernels
        self._carry = carry

    @undisturbed
    def get(self) -> T:
        """Return the implementation."""
        if self.made is None and self.backend.name != "torch":
            with default_dtype(torch.float32), natively(self.backend.name == "cpu"):
                self.made = self._by_kernels()
        self.made = self.made or self._by_torch()
        return self.made

    def run(self, work: Callable[[T], R]) -> R:
        """Return what `work` does with the implementation; with torch's from now on where a kernel cannot run.

        Raises:
            BackendError: a kernel cannot run, and the config does not leave the choice.
        """
        try:
            return work(self.get())
        except KERNEL_ERRORS as e:
            why = f"a kernel cannot run on this device: {str(e).strip().splitlines()[-1]}"
            if self._cfg.backend == "triton" or self._cfg.precision == "bfloat16":
                raise BackendError(f"backend='triton' cannot run: {why}") from e
            who, doing = self._what.split(": ")
            warnings.warn(f"{who}: {why}; {doing} with torch", RuntimeWarning, stacklevel=3)
            before, self.backend, self.made = self.made, Backend("torch", why), None
            if before is not None:
                self._carry(before, self.get())
        return work(self.get())
