"""The ops of an update, each alone, at the shapes an update gives them: forward and backward in one execution.

The product is the differentiable op, as anybody's module would call it, or the optimiser's launches.
They run where Triton does; elsewhere torch's autograd does the work, and there is nothing to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdmpc2_fast.kernels.autograd.layer import normed_linear
from tdmpc2_fast.kernels.autograd.losses import squashed_gaussian, two_hot_cross_entropy
from tdmpc2_fast.kernels.layers.policy_head import policy_head
from tdmpc2_fast.kernels.layers.two_hot import soft_cross_entropy
from tdmpc2_fast.kernels.update.optim import WORLD_EPS, FlatParameters, Outcome, Rates, adam_step, squared_norm

from ..harness.measure import CannotMeasureError, Case
from ..harness.ops import Op, OpBench, mbyte, op_cases
from ..options import Options

OPS = ("layer", "two_hot_loss", "policy", "optimiser")


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """Yield every op at each size, batch and precision."""
    return op_cases(OPS, _Bench, options, "size", "batch", "precisions")


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], d: Tensor) -> Op:
    """Forward and backward: an op whose result is all gradients, flat."""

    def run() -> Tensor:
        found = torch.autograd.grad(function(*inputs), inputs, d)
        return torch.cat([g.float().flatten() for g in found])

    return run


class _Bench(OpBench):
    """Inputs of one size, and the ops on them."""

    def __init__(self, options: Options, size: int, batch: int, precision: str) -> None:
        super().__init__(options, "update-kernels", size, precision, batch=batch)
        if not self.fused:
            raise CannotMeasureError("kernels of updates need a GPU; elsewhere torch's autograd computes them")
        self.batch, self.rows = batch, self.cfg.horizon * batch

    def _leaves(self, *tensors: Tensor) -> list[Tensor]:
        return [x.to(self.precision.dtype).requires_grad_() for x in tensors]

    def differentiable(
        self, name: str, fused: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], **more: Any
    ) -> Case:
        """A case of two functions and their gradients; what arrives at their result is drawn."""
        with torch.no_grad():
            result = plain(*inputs)
            d = self.randn(*result.shape).to(result.dtype)
        ours = gradients(fused, inputs, d)
        return self.case(
            name,
            ours,
            ours,
            gradients(plain, inputs, d),
            compiled=lambda: gradients(torch.compile(plain), inputs, d),
            mbyte=mbyte(*inputs, *inputs, d),
            **more,
        )

    def layer(self) -> Case:
        """Second layers of reward and all critics: Mish(LN(x W + b))."""
        d, groups = self.cfg.mlp_dim, 1 + self.cfg.num_q
        inputs = self._leaves(
            self.randn(groups, self.rows, d),
            self.randn(groups, d, d) / d**0.5,
            self.randn(groups, d),
            1 + 0.3 * self.randn(groups, d),
            0.3 * self.randn(groups, d),
        )

        def plain(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            y = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
            return F.mish(F.layer_norm(y, y.shape[-1:]) * gamma.unsqueeze(1) + beta.unsqueeze(1))

        return self.differentiable(
            "normed linear and its gradients",
            partial(normed_linear, precision=self.precision.name),
            plain,
            inputs,
            gflop=3 * 2 * groups * self.rows * d * d / 1e9,
            shape=f"{groups} x ({self.rows}, {d}) by ({d}, {d})",
        )

    def two_hot_loss(self) -> Case:
        """Last layers of reward and all critics, to their losses."""
        s, groups = self.cfg, 1 + self.cfg.num_q
        d, bins = s.mlp_dim, s.num_bins
        code: Any = dict(num_bins=bins, vmin=s.vmin, vmax=s.vmax)
        inputs = self._leaves(
            self.randn(groups, self.rows, d), self.randn(groups, bins, d) / d**0.5, self.randn(groups, bins)
        )
        target = 3 * self.randn(groups, self.rows).exp() - 3

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            logits = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
            return soft_cross_entropy(logits.float(), target.unsqueeze(-1), **code).squeeze(-1)

        return self.differentiable(
            "two-hot loss and its gradients",
            partial(two_hot_cross_entropy, target=target, precision=self.precision.name, **code),
            plain,
            inputs,
            gflop=3 * 2 * groups * self.rows * d * bins / 1e9,
            shape=f"{groups} x ({self.rows}, {d}) by ({d}, {bins})",
        )

    def policy(self) -> Case:
        """Actions, log-probability and scaled entropy of the policy at all latents of an update."""
        s, a_dim = self.cfg, self.options.actions[0]
        rows = self.rows + self.batch
        inputs, eps = self._leaves(self.randn(rows, 2 * a_dim)), self.randn(rows, a_dim)
        ends: Any = dict(low=s.log_std_min, high=s.log_std_max)

        def together(action: Tensor, log_prob: Tensor, entropy: Tensor) -> Tensor:
            return torch.cat([action.float(), log_prob.unsqueeze(-1), entropy.unsqueeze(-1)], -1)

        def plain(logits: Tensor) -> Tensor:
            out = policy_head(logits.float(), eps, **ends)
            return together(out.action, out.log_prob.squeeze(-1), out.scaled_entropy.squeeze(-1))

        return self.differentiable(
            "policy and its gradients",
            lambda logits: together(*squashed_gaussian(logits, eps, **ends)),
            plain,
            inputs,
            shape=f"({rows}, {2 * a_dim})",
        )

    def optimiser(self) -> Case:
        """Norm, clipping and Adam over all parameters of reward and critics, beside torch's fused Adam."""
        s, lr, eps = self.cfg, self.cfg.lr, WORLD_EPS
        k = s.latent_dim + s.task_dim + self.options.actions[0]
        head = k * s.mlp_dim + s.mlp_dim**2 + (s.num_bins + 6) * s.mlp_dim
        count = (1 + s.num_q) * head
        start, grad = self.randn(count), 10 * self.randn(count)
        flat = FlatParameters.zeros(count, self.precision, self.device)._replace(grad=grad)
        param = flat.param
        outcome = Outcome(torch.zeros_like(flat.step), torch.zeros(1, device=self.device), 1)
        rates, how = Rates(lr=lr, eps=eps, max_norm=s.grad_clip_norm), self.how
        leaf, clipped = start.clone().requires_grad_(), grad.clone()
        leaf.grad = clipped
        adam = torch.optim.Adam([leaf], lr=lr, eps=eps, fused=True, capturable=self.device.type == "cuda")

        def reset() -> None:
            for x in (flat.exp_avg, flat.exp_avg_sq, flat.step, outcome.flag, *adam.state[leaf].values()):
                x.zero_()
            param.copy_(start)
            leaf.detach().copy_(start)
            clipped.copy_(grad)

        def fused() -> Tensor:
            squared_norm(grad, flat.partials, flat.step, pdl=self.how.pdl)
            adam_step(flat, rates, None, outcome, how=how)
            return param

        def plain() -> Tensor:
            torch.nn.utils.clip_grad_norm_([leaf], s.grad_clip_norm)
            adam.step()
            return leaf.detach()

        return self.case(
            "norm, clip and Adam",
            fused,
            fused,
            plain,
            reset=reset,
            summary=lambda x: (x - start).double(),
            limit=1e-3,
            mbyte=mbyte(*3 * [param, param], grad),
            shape=f"{count} parameters",
        )
