"""A plan on the torch backend.

Computes what the official planner computes with what is not needed left out: only the two
drawn critics are evaluated; rewards and latents of the policy-prior sequences, whose actions
never change, are rolled out once per plan; the first step multiplies the one latent all
samples share only once; nothing is concatenated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from tdmpc2_fast.kernels.layers.policy_head import policy_action
from tdmpc2_fast.kernels.plan.mppi import Rule, explore, pick_elite, refine, sample_actions, shift_mean, take_samples

from ..model.world_model import WorldModel, join
from ..rng import PlanNoise
from ..runtime.access import access_to
from ..runtime.backend import matmul_precision
from ..runtime.profiling import annotate
from .backend import PlanBackend, PlanRequest
from .trace import PlanTrace


class _Task(NamedTuple):
    """What the task of each environment brings into a plan; embedding and mask in a multi-task model only."""

    e: Tensor | None  # (E, 1, T)
    mask: Tensor | None  # (E, A)
    discount: Tensor | float  # (E, 1, 1), or that of the one task


@dataclass
class _Rollout:
    """Return so far, weight of what follows, and last latent of n sequences per environment."""

    G: Tensor  # (E, n, 1)
    weight: Tensor | float  # discount * (1 - terminated), (E, n, 1) or what broadcasts to it
    z: Tensor  # (E, n, L)


class TorchPlan(PlanBackend):
    """Plans for `num_envs` environments with plain torch ops, on any device and in any float type."""

    counter = None

    def __init__(self, model: WorldModel, num_envs: int, generator: torch.Generator) -> None:
        cfg = model.cfg
        self.model, self.cfg, self.num_envs, self.generator = model, cfg, num_envs, generator
        self.prev_mean = torch.zeros(
            num_envs, cfg.horizon, cfg.need("action_dim"), device=model.device, dtype=model.dtype
        )
        self._discounts = torch.tensor(cfg.discounts, device=model.device, dtype=model.dtype)

    @override
    @torch.no_grad()
    def plan(self, request: PlanRequest) -> Tensor:
        device = self.model.device
        t0, evaluate = (torch.as_tensor(x).to(device).expand(self.num_envs) for x in (request.t0, request.eval_mode))
        noise = request.noise or PlanNoise.draw(self.cfg, self.num_envs, self.generator, self.model.dtype)
        obs = request.obs.to(device, non_blocking=True)
        with access_to(self.model).reading(), matmul_precision(self.cfg, device):
            action, mean = self.step(self.prev_mean, obs, t0, evaluate, request.task, noise, request.trace)
        self.prev_mean.copy_(mean)
        return action

    @override
    def values(self, z: Tensor, actions: Tensor, task: Tensor | None, eps: Tensor, members: Tensor) -> Tensor:
        given = self._task(task)
        return self._value(self._rollout(z, actions, given), given, eps, members)

    def _task(self, index: Tensor | None) -> _Task:
        if index is None:
            return _Task(self.model.embed(None), None, self.cfg.discounts[0])
        index = index.to(self.model.device)
        e, discount = self.model.embed(index), self._discounts[index].view(-1, 1, 1)
        return _Task(None if e is None else e.unsqueeze(1), self.model.action_mask(index), discount)

    def step(
        self,
        prev_mean: Tensor,
        obs: Tensor,
        t0: Tensor,
        eval_mode: Tensor,
        index: Tensor | None,
        noise: PlanNoise,
        trace: PlanTrace | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the actions (E, A) and the last mean (E, H, A) of a plan that starts from `prev_mean` (E, H, A).

        Everything it needs is an argument and nothing is written, so that it can be exported; index: (E,) tasks.
        """
        cfg, p, task = self.cfg, self.cfg.num_pi_trajs, self._task(index)
        with annotate("encode"):
            z = self.model.encode_parts(obs, None if task.e is None else task.e.squeeze(1), noise.shift)
        z0 = z.unsqueeze(1)

        with annotate("prior"):
            prior = self._prior(z0, task, noise.pi_eps) if p else None
        if trace is not None:
            trace.record(z=z, pi_actions=noise.pi_eps if prior is None else prior[0])

        mean = shift_mean(prev_mean, t0)
        std, rule = torch.full_like(mean, cfg.max_std), Rule.of(cfg)
        for i in range(cfg.effective_iterations):
            with annotate("iteration"):
                actions = sample_actions(mean, std, noise.samples[i], task.mask)
                rollout = self._rollout(z0, actions, task)
                if prior is not None:
                    actions = torch.cat([prior[0], actions], 2)
                    rollout = _concat(prior[1], rollout, per_sample_weight=cfg.episodic)
                values = self._value(rollout, task, noise.value_eps[i], noise.members[i])
                elites, score, mean, std = refine(values, actions, rule, task.mask)
            if trace is not None:
                trace.record(actions=actions, values=values, elites=elites, scores=score, means=mean, stds=std)

        with annotate("select"):
            pick = pick_elite(score, noise.elite)
            chosen = take_samples(actions, elites.gather(1, pick.unsqueeze(1))).squeeze(2)
            action = explore(chosen[:, 0], std[:, 0], noise.action, eval_mode)
        if trace is not None:
            trace.record(chosen=chosen, picked=pick)
        return action, mean

    def _prior(self, z: Tensor, task: _Task, eps: Tensor) -> tuple[Tensor, _Rollout]:
        """Draw policy sequences (E, H, P, A) from z (E, 1, L) and roll them out."""
        out, actions = None, []
        for e in eps.unbind(1):
            actions.append(self._policy(z, task, e))
            out = self._step(out, z, actions[-1], task)
            z = out.z
        assert out is not None
        return torch.stack(actions, 1), out

    def _rollout(self, z: Tensor, actions: Tensor, task: _Task) -> _Rollout:
        """Roll out given sequences (E, H, n, A) from z (E, 1, L)."""
        out = None
        for a in actions.unbind(1):
            out = self._step(out, z, a, task)
            z = out.z
        assert out is not None
        return out

    def _step(self, so_far: _Rollout | None, z: Tensor, a: Tensor, task: _Task) -> _Rollout:
        """Take one step: reward of (z, a), next latent, then discount, then termination of that latent."""
        model = self.model
        parts = join(z, task.e, a)
        reward = model.scalar(model._reward(*parts))
        z = model._dynamics(*parts)
        G, weight = (0.0, 1.0) if so_far is None else (so_far.G, so_far.weight)
        G = G + weight * reward
        weight = weight * task.discount
        if self.cfg.episodic:
            # Terminated is sticky: a zero weight stays zero.
            weight = weight * (model.termination(z) <= 0.5).to(z.dtype)
        return _Rollout(G, weight, z)

    def _value(self, rollout: _Rollout, task: _Task, eps: Tensor, members: Tensor) -> Tensor:
        """Return the value of each sequence, two critics' at a policy action after its last step included: (E, N)."""
        model = self.model
        action = self._policy(rollout.z, task, eps)
        q0, q1 = (model.scalar(x) for x in model.critic_logits(join(rollout.z, task.e, action), members))
        return (rollout.G + rollout.weight * ((q0 + q1) / 2)).squeeze(-1)

    def _policy(self, z: Tensor, task: _Task, eps: Tensor) -> Tensor:
        logits = self.model._pi(*join(z, task.e))
        mask = None if task.mask is None else task.mask.unsqueeze(1)
        return policy_action(logits, eps, *self.model.log_std_range, mask)


def _concat(prior: _Rollout, rest: _Rollout, per_sample_weight: bool) -> _Rollout:
    """Put the prior's sequences first, as the official planner orders its samples."""
    weight = rest.weight
    if per_sample_weight:
        assert isinstance(prior.weight, Tensor)
        assert isinstance(weight, Tensor)
        weight = torch.cat([prior.weight, weight], 1)
    return _Rollout(torch.cat([prior.G, rest.G], 1), weight, torch.cat([prior.z, rest.z], 1))
