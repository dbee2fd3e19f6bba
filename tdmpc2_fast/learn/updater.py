"""`Updater`: one training step of a world model, by torch or by the fused kernels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, kind_of
from ..model.world_model import WorldModel, model_checked
from ..rng import UpdateNoise
from ..runtime.access import access_to
from ..runtime.backend import Backend
from ..runtime.by_value import by_value, from_values
from ..runtime.chosen import Chosen
from ..runtime.ranks import ALONE, Ranks
from ..runtime.surroundings import undisturbed
from .backend import UpdateBackend
from .batch import Batch, Sampler, UpdateTrace
from .scale import RunningScale
from .torch_update import TorchUpdate

__all__ = ["Batch", "UpdateTrace", "Updater"]


def _carry(before: UpdateBackend, after: UpdateBackend) -> None:
    after.load_state(before.state())
    after.steps = before.steps


class Updater:
    """The optimisers, running scale and losses around one world model.

    What a step needs is allocated, and on a GPU captured in a CUDA graph, when the first one comes:
    an agent that only plans does without. A copy or a pickle takes `state` along, and builds the rest
    anew around its model.

    Args:
        model: the world model, trained in place.
        ranks: the processes that share each update. All of them take every step together, each with its share of
            the batch, `batch_size` / ranks slices; parameters, metrics and errors are the same on all.
    """

    def __init__(self, model: WorldModel, ranks: Ranks = ALONE) -> None:
        self.model, self.ranks = model, ranks
        cfg = model_checked(model).cfg
        self.cfg = cfg.replace(batch_size=ranks.equal(cfg, "batch_size"))
        by_torch = partial(TorchUpdate, model, ranks)
        self._chosen = Chosen[UpdateBackend](model, "Updater: learning", by_torch, self._by_kernels, _carry)

    def _by_kernels(self) -> UpdateBackend:
        from .kernel_update import KernelUpdate

        with access_to(self.model).writing():
            return KernelUpdate(self.model, ranks=self.ranks)

    @property
    def _update(self) -> UpdateBackend:
        return self._chosen.get()

    @property
    def backend(self) -> Backend:
        """The backend that learns, and why it is this one."""
        return self._chosen.backend

    @property
    def steps(self) -> int:
        """The number of updates so far."""
        return 0 if self._chosen.made is None else self._chosen.made.steps

    @property
    def scale(self) -> RunningScale:
        """The running scale of Q values, by which the policy loss is divided."""
        return self._update.scale

    @undisturbed
    def step(
        self, batch: Batch, noise: UpdateNoise | None = None, trace: UpdateTrace | None = None
    ) -> dict[str, Tensor]:
        """Train on one batch, of this rank's share, and return the official metrics as scalar tensors.

        Raises:
            InputError: a batch of the wrong shape.
            NonFiniteError: a loss or gradient is NaN or infinite; the parameters it belongs
                to, and the targets, were not updated. On a GPU, where the host does not wait
                for a step, this may be raised by a later call; until then nothing is updated.
        """
        batch = batch.checked(self.cfg)
        # Kernels fail when they are captured, which changes no parameter.
        with access_to(self.model).writing():
            return self._chosen.run(lambda update: update.step(batch, noise, trace))

    @undisturbed
    def step_on(self, buffer: Sampler) -> dict[str, Tensor]:
        """Train on a batch from a buffer; kernels draw it themselves from a `ReplayBuffer` on their device."""
        if not hasattr(buffer, "sample"):
            raise InputError(f"buffer: got {kind_of(buffer)}, allowed: a ReplayBuffer or the official Buffer")
        with access_to(self.model).writing():
            metrics = self._chosen.run(lambda update: update.step_from(buffer))
        return self.step(Batch(*buffer.sample())) if metrics is None else metrics

    def state(self) -> dict[str, Tensor]:
        """Return all that going on takes besides the parameters: both optimisers, scale, random stream, updates so far.

        Moments go by the names of their parameters, so that either backend takes the other's. The tensors
        are those at work: copy them.
        """
        made = self._chosen.made
        return {} if made is None else dict(made.state(), steps=torch.tensor(made.steps))

    @undisturbed
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned, in the same model; bit for bit on the same backend and device.

        On another, the random stream begins anew.
        """
        if not state:
            self._chosen.made = None
            return
        self._update.load_state(state)
        self._update.steps = int(state["steps"])

    @undisturbed
    def __getstate__(self) -> dict[str, Any]:
        self.synchronise()
        return dict(model=self.model, state=by_value(self.state()))

    @undisturbed
    def __setstate__(self, kept: dict[str, Any]) -> None:
        type(self).__init__(self, kept["model"])
        self.load_state(from_values(kept["state"]))

    def synchronise(self) -> None:
        """Wait for the device, and raise what an update failed with."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        if self._chosen.made is not None:
            self._chosen.made.synchronise()

    @undisturbed
    def td_target(self, next_z: Tensor, batch: Batch, eps: Tensor, members: Tensor) -> Tensor:
        """Return r + gamma (1 - terminated) min of two target critics at a policy action: (H, B, 1)."""
        with access_to(self.model).writing():  # what others did to the parameters is taken in first
            return self._update.td_target(next_z, batch, eps, members)
