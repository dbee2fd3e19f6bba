"""A plan on the torch backend.

Computes what the official planner computes with what is not needed left out: only the two
drawn critics are evaluated; rewards and latents of the policy-prior sequences, whose actions
never change, are rolled out once per plan; the first step multiplies the one latent all
samples share only once; nothing is concatenated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdmpc2_fast.kernels.layers.policy_head import policy_action
from tdmpc2_fast.kernels.plan.mppi import elite_update, pick_elite, sample_actions, shift_mean, take_samples

from ..model.world_model import WorldModel, join
from ..rng import PlanNoise
from ..runtime.backend import matmul_precision
from ..runtime.profiling import annotate
from .trace import PlanTrace


@dataclass
class _Rollout:
    """Return so far, weight of what follows, and last latent of n sequences per environment."""

    G: Tensor  # (E, n, 1)
    weight: Tensor | float  # discount * (1 - terminated), (E, n, 1) or what broadcasts to it
    z: Tensor  # (E, n, L)


class TorchPlan:
    """Plans for `num_envs` environments with plain torch ops, on any device and in any float type."""

    counter = None  # draws come from the planner's generator

    def __init__(self, model: WorldModel, num_envs: int, generator: torch.Generator) -> None:
        cfg = model.cfg
        self.model, self.cfg, self.num_envs, self.generator = model, cfg, num_envs, generator
        self.prev_mean = torch.zeros(
            num_envs, cfg.horizon, cfg.need("action_dim"), device=model.device, dtype=model.dtype
        )
        self._discounts: Tensor | None = None
        if cfg.multitask:
            self._discounts = torch.tensor(cfg.discounts, device=model.device, dtype=model.dtype)

    def plan(
        self,
        obs: Tensor,
        t0: bool | Tensor,
        eval_mode: bool | Tensor,
        task: Tensor | None,
        noise: PlanNoise | None,
        trace: PlanTrace | None,
    ) -> Tensor:
        """Actions (E, A); arguments as checked by `Planner.plan`."""
        device = self.model.device
        obs = obs.to(device, non_blocking=True)
        first, evaluate = (torch.as_tensor(x).to(device).expand(self.num_envs) for x in (t0, eval_mode))
        if task is not None:
            task = task.to(device)
        if noise is None:
            noise = PlanNoise.draw(self.cfg, self.num_envs, self.generator, self.model.dtype)
        with matmul_precision(self.cfg, device):
            action, mean = self._plan(obs, first, evaluate, task, noise, trace)
        self.prev_mean.copy_(mean)
        return action

    def values(self, z: Tensor, actions: Tensor, task: Tensor | None, eps: Tensor, members: Tensor) -> Tensor:
        """Values (E, N) of sequences (E, H, N, A) from latents z (E, N, L).

        task: (E,) or None; eps: (E, N, A) of the terminal action; members: (2,) critics.
        """
        e = self.model.embed(task)
        e = None if e is None else e.unsqueeze(1)
        gamma = self.cfg.discounts[0] if task is None else self._discount_of(task)
        return self._value(self._rollout(z, e, actions, gamma), e, self.model.action_mask(task), eps, members)

    def _plan(
        self,
        obs: Tensor,
        t0: Tensor,
        eval_mode: Tensor,
        task: Tensor | None,
        noise: PlanNoise,
        trace: PlanTrace | None,
    ) -> tuple[Tensor, Tensor]:
        cfg, p = self.cfg, self.cfg.num_pi_trajs
        e = self.model.embed(task)
        with annotate("encode"):
            z = self.model.encode_parts(obs, e, noise.shift)
        e = None if e is None else e.unsqueeze(1)
        mask = self.model.action_mask(task)
        gamma = cfg.discounts[0] if task is None else self._discount_of(task)
        z0 = z.unsqueeze(1)

        actions = torch.empty(
            self.num_envs, cfg.horizon, cfg.num_samples, self.prev_mean.shape[-1], device=z.device, dtype=z.dtype
        )
        with annotate("prior"):
            prior = self._prior(z0, e, mask, gamma, noise.pi_eps, actions[:, :, :p]) if p else None
        if trace is not None:
            trace.record(z=z, pi_actions=actions[:, :, :p])

        mean = shift_mean(self.prev_mean, t0)
        std = torch.full_like(mean, cfg.max_std)
        for i in range(cfg.effective_iterations):
            with annotate("iteration"):
                samples = sample_actions(mean, std, noise.samples[i], mask)
                actions[:, :, p:] = samples
                rollout = self._rollout(z0, e, samples, gamma)
                if prior is not None:
                    rollout = _concat(prior, rollout, per_sample_weight=cfg.episodic)
                values = self._value(rollout, e, mask, noise.value_eps[i], noise.members[i])
                elites, score, mean, std = elite_update(
                    values, actions, cfg.num_elites, cfg.temperature, cfg.min_std, cfg.max_std, mask
                )
            if trace is not None:
                trace.record(actions=actions, values=values, elites=elites, scores=score, means=mean, stds=std)

        with annotate("select"):
            pick = pick_elite(score, noise.elite)
            chosen = take_samples(actions, elites.gather(1, pick.unsqueeze(1))).squeeze(2)
            explore = (~eval_mode).unsqueeze(1) * std[:, 0] * noise.action
            action = (chosen[:, 0] + explore).clamp(-1, 1)
        if trace is not None:
            trace.record(chosen=chosen, picked=pick)
        return action, mean

    def _discount_of(self, task: Tensor) -> Tensor:
        assert self._discounts is not None
        return self._discounts[task].view(-1, 1, 1)

    def _prior(
        self,
        z: Tensor,
        e: Tensor | None,
        mask: Tensor | None,
        gamma: Tensor | float,
        eps: Tensor,
        actions: Tensor,
    ) -> _Rollout:
        """Draw policy sequences from z (E, 1, L) into `actions` (E, H, P, A) and roll them out."""
        out = None
        for t in range(self.cfg.horizon):
            actions[:, t] = self._policy(z, e, mask, eps[:, t])
            out = self._step(out, z, e, actions[:, t], gamma)
            z = out.z
        assert out is not None
        return out

    def _rollout(self, z: Tensor, e: Tensor | None, actions: Tensor, gamma: Tensor | float) -> _Rollout:
        """Roll out given sequences (E, H, n, A) from z (E, 1, L)."""
        out = None
        for a in actions.unbind(1):
            out = self._step(out, z, e, a, gamma)
            z = out.z
        assert out is not None
        return out

    def _step(self, so_far: _Rollout | None, z: Tensor, e: Tensor | None, a: Tensor, gamma: Tensor | float) -> _Rollout:
        """One step: reward of (z, a), next latent, then discount, then termination of that latent."""
        model = self.model
        parts = join(z, e, a)
        reward = model.scalar(model._reward(*parts))
        z = model._dynamics(*parts)
        G, weight = (0.0, 1.0) if so_far is None else (so_far.G, so_far.weight)
        G = G + weight * reward
        weight = weight * gamma
        if self.cfg.episodic:
            # Terminated is sticky: a zero weight stays zero.
            weight = weight * (model.termination(z) <= 0.5)
        return _Rollout(G, weight, z)

    def _value(self, rollout: _Rollout, e: Tensor | None, mask: Tensor | None, eps: Tensor, members: Tensor) -> Tensor:
        """Return of each sequence with the terminal value of two critics at a policy action: (E, N)."""
        model = self.model
        action = self._policy(rollout.z, e, mask, eps)
        q0, q1 = (model.scalar(x) for x in model.critic_logits(join(rollout.z, e, action), members))
        return (rollout.G + rollout.weight * ((q0 + q1) / 2)).squeeze(-1)

    def _policy(self, z: Tensor, e: Tensor | None, mask: Tensor | None, eps: Tensor) -> Tensor:
        logits = self.model._pi(*join(z, e))
        return policy_action(logits, eps, *self.model.log_std_range, None if mask is None else mask.unsqueeze(1))


def _concat(prior: _Rollout, rest: _Rollout, per_sample_weight: bool) -> _Rollout:
    """Prior sequences first, as the official planner orders its samples."""
    weight = rest.weight
    if per_sample_weight:
        assert isinstance(prior.weight, Tensor)
        assert isinstance(weight, Tensor)
        weight = torch.cat([prior.weight, weight], 1)
    return _Rollout(torch.cat([prior.G, rest.G], 1), weight, torch.cat([prior.z, rest.z], 1))
