"""The task embedding in an update by kernels: what torch looks up for them, and where its gradients go."""

from __future__ import annotations

import torch
from torch import Tensor

from tdmpc2_fast.kernels.update.chain import UpdateChain

from ..model.task_embedding import look_up
from ..model.world_model import WorldModel
from ..runtime.backend import matmul_precision
from .batch import UpdateTrace


class Tasks:
    """The tasks of a batch: `index` (B,), and the embedding's gradient (tasks, T), kept from update to update."""

    def __init__(self, model: WorldModel, chain: UpdateChain, grad: Tensor) -> None:
        cfg, device = model.cfg, model.device
        self.model, self.cfg, self.chain, self.grad = model, cfg, chain, grad
        self.index = torch.zeros(chain.sizes.batch, dtype=torch.int64, device=device)
        self._discounts = torch.tensor(cfg.discounts, device=device)
        self._masks = model._action_masks.clone()

    @property
    def weight(self) -> Tensor:
        """The embedding (tasks, T), of which a lookup renormalises the rows it reads."""
        return self.model._task_emb.weight.data

    def look_up(self) -> None:
        """Fill in what the kernels read of each task: embedding, mask and discount."""
        inputs, z, o = self.chain.inputs, self.cfg.latent_dim, self.chain.sizes.obs_dim
        e = look_up(self.weight, self.index)
        for x, at in ((inputs.obs, o), (inputs.x, z), (inputs.next_x, z)):
            x[..., at : at + self.cfg.task_dim] = e
        assert inputs.mask is not None
        inputs.mask.copy_(self._masks[self.index])
        inputs.discount.copy_(self._discounts[self.index])

    def look_up_again(self) -> None:
        """Fill in the embedding that the policy loss reads, after its step."""
        z = self.cfg.latent_dim
        self.chain.inputs.x[..., z : z + self.cfg.task_dim] = look_up(self.weight, self.index)

    def add_world_gradient(self, trace: UpdateTrace | None) -> None:
        """Add the world loss's gradient to what the policy loss before has left there, as the official code does."""
        state, z = self.chain.state, self.cfg.latent_dim
        if trace is not None and self.cfg.task_grad_leak and int(self.chain.world.step):
            trace.tensors["task_emb_grad_before"] = self.grad.clone()
        self.grad += self._by_task(state.d_obs[0, 0] + state.d_x[0, ..., z:].sum(0))

    def leave_policy_gradient(self) -> None:
        """Leave the policy loss's gradient to the next world update; nothing where `task_grad_leak` is off."""
        state, t = self.chain.state, self.cfg.task_dim
        if not self.cfg.task_grad_leak:
            self.grad.zero_()
            return
        factor = -0.5 * self.chain.losses.policy_weight / state.new_scale
        d = state.d_policy_task[0].sum(0) + (factor[:, None, None] * state.d_action[0, ..., :t]).sum(0)
        self.grad.copy_(self._by_task(d))

    def _by_task(self, d: Tensor) -> Tensor:
        """Return the sums over the rows of each task, in a fixed order: (B, T) -> (tasks, T)."""
        rows = self.index == torch.arange(len(self.cfg.tasks), device=d.device)[:, None]
        with matmul_precision(self.cfg.replace(precision="float32"), d.device):
            return rows.to(d.dtype) @ d
