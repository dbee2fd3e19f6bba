"""`Updater`: one training step of a world model, by torch or by the fused kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import KERNEL_ERRORS

from ..errors import InputError, kind_of
from ..model.world_model import WorldModel, model_checked
from ..rng import UpdateNoise
from ..runtime.backend import Backend, resolve_backend, without_kernels
from ..runtime.by_value import by_value, from_values
from ..runtime.surroundings import default_dtype, undisturbed
from .batch import Batch, UpdateTrace
from .replay import ReplayBuffer
from .scale import RunningScale
from .torch_update import TorchUpdate

if TYPE_CHECKING:
    from .triton_update import TritonUpdate

__all__ = ["Batch", "UpdateTrace", "Updater"]


class Sampler(Protocol):
    """What an update draws from: our `ReplayBuffer`, or the official `Buffer`."""

    def sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """obs (H+1, B, ...), action, reward, terminated (H, B, .), task (B,) or None."""
        ...


class Updater:
    """Optimisers, running scale and losses around one world model.

    What a step needs is allocated, and on a GPU captured in a CUDA graph, when the first one comes:
    an agent that only plans does without. A copy or a pickle takes `state` along, and builds the rest
    anew around its model.

    Args:
        model: the world model, trained in place.
    """

    def __init__(self, model: WorldModel) -> None:
        self.model, self.cfg = model, model_checked(model).cfg
        self.backend: Backend = resolve_backend(model.cfg, model.device, model.dtype)
        self._made: TorchUpdate | TritonUpdate | None = None

    @property
    @undisturbed
    def _update(self) -> TorchUpdate | TritonUpdate:
        if self._made is None:
            if self.backend.name == "triton":
                from .triton_update import TritonUpdate

                with default_dtype(torch.float32):
                    self._made = TritonUpdate(self.model)
            else:
                self._made = TorchUpdate(self.model)
        return self._made

    @property
    def steps(self) -> int:
        """Updates so far."""
        return 0 if self._made is None else self._made.steps

    @property
    def scale(self) -> RunningScale:
        """Of Q values, by which the policy loss is divided."""
        return self._update.scale

    @undisturbed
    def step(
        self, batch: Batch, noise: UpdateNoise | None = None, trace: UpdateTrace | None = None
    ) -> dict[str, Tensor]:
        """Train on one batch and return the official metrics as scalar tensors.

        Raises:
            InputError: a batch of the wrong shape.
            NonFiniteError: a loss or gradient is NaN or infinite; the parameters it belongs
                to, and the targets, were not updated. On a GPU, where the host does not wait
                for a step, this may be raised by a later call; until then nothing is updated.
        """
        batch = batch.checked(self.cfg)
        try:
            return self._update.step(batch, noise, trace)
        except KERNEL_ERRORS as e:  # when it is captured, which changes no parameter
            self.backend, self._made = without_kernels(self.cfg, e, "Updater: learning"), None
        return self._update.step(batch, noise, trace)

    @undisturbed
    def step_on(self, buffer: Sampler) -> dict[str, Tensor]:
        """`step` on a batch from a buffer; kernels draw it themselves from a `ReplayBuffer` on their device."""
        if not hasattr(buffer, "sample"):
            raise InputError(f"buffer: got {kind_of(buffer)}, allowed: a ReplayBuffer or the official Buffer")
        update = self._update
        if isinstance(buffer, ReplayBuffer) and not isinstance(update, TorchUpdate):
            replay = buffer.on_device()
            if replay is not None and replay.table.device == self.model.device:
                try:
                    return update.step_from(replay)
                except KERNEL_ERRORS as e:
                    self.backend, self._made = without_kernels(self.cfg, e, "Updater: learning"), None
        return self.step(Batch(*buffer.sample()))

    def state(self) -> dict[str, Tensor]:
        """All that going on takes besides the parameters: both optimisers, scale, random stream, updates so far.

        Moments go by the names of their parameters, so that either backend takes the other's. The tensors
        are those at work: copy them.
        """
        return {} if self._made is None else dict(self._made.state(), steps=torch.tensor(self._made.steps))

    @undisturbed
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned, in the same model; bit for bit on the backend and device it is of.

        On another, the random stream begins anew.
        """
        if not state:
            self._made = None
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
        """Wait for the device; raises what an update failed with."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        if self._made is not None and not isinstance(self._made, TorchUpdate):
            self._made.synchronise()

    @undisturbed
    def td_target(self, next_z: Tensor, batch: Batch, eps: Tensor, members: Tensor) -> Tensor:
        """r + gamma (1 - terminated) min of two target critics at a policy action: (H, B, 1)."""
        return self._update.td_target(next_z, batch, eps, members)
