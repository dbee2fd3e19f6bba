"""Planning and learning as the official code does them, one environment, nothing left out.

Read beside sections 3.1 and 3.2 of the paper. All randomness comes in as `PlanNoise` and
`UpdateNoise`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config
from ..learn.updater import Batch, UpdateTrace
from ..plan.trace import PlanTrace
from ..rng import PlanNoise, UpdateNoise
from . import model as m


class ReferenceAgent:
    """The reference agent.

    Args:
        cfg: a completed config.
        params: tensors by official name, targets and buffers included; copied.
    """

    def __init__(self, cfg: Config, params: Mapping[str, Tensor]) -> None:
        self.c = c = cfg
        self.p = {k: v.detach().clone() for k, v in params.items()}
        self.device = device = next(iter(self.p.values())).device
        self.target_names = [k for k in self.p if k.startswith("_target_Qs_params.")]
        constants = {*self.target_names, "_action_masks", "log_std_min", "log_std_dif"}
        self.trained = {k: v.requires_grad_() for k, v in self.p.items() if k not in constants}
        self.pi = {k: v for k, v in self.trained.items() if k.startswith("_pi.")}
        encoder = [v for k, v in self.trained.items() if k.startswith("_encoder.")]
        rest = [v for k, v in self.trained.items() if k not in self.pi and not k.startswith("_encoder.")]
        groups: list[dict[str, Any]] = [dict(params=encoder, lr=c.lr * c.enc_lr_scale), dict(params=rest)]
        on_gpu = device.type == "cuda"
        self.optim = torch.optim.Adam(groups, lr=c.lr, capturable=on_gpu)
        self.pi_optim = torch.optim.Adam(self.pi.values(), lr=c.lr, eps=1e-5, capturable=on_gpu)
        self.scale = torch.ones(1, device=device)
        self.prev_mean = torch.zeros(c.horizon, c.need("action_dim"), device=device)
        self.discount: float | Tensor
        if c.multitask:
            self.discount = torch.tensor([c.discount(n) for n in c.episode_lengths], device=device)
        else:
            self.discount = c.discount(c.need("episode_length"))

    def q_value(
        self, z: Tensor, a: Tensor, task: Tensor | None, how: str, members: Tensor, target: bool = False
    ) -> Tensor:
        """Evaluate all critics, of which the two drawn give the minimum or the average."""
        q = m.critics(self.p, z, a, task, self.c, "_target_Qs_params" if target else "_Qs.params")
        values = m.two_hot_inv(q[members[:2]], self.c)
        return values.min(0).values if how == "min" else values.sum(0) / 2

    @torch.no_grad()
    def estimate_value(self, z: Tensor, actions: Tensor, task: Tensor | None, eps: Tensor, members: Tensor) -> Tensor:
        """Compute the return of action sequences (H, N, A) from z (N, L), with a terminal value: (N, 1)."""
        c = self.c
        G: Tensor | float = 0.0
        discount: Tensor | float = 1.0
        terminated = torch.zeros(z.shape[0], 1, device=z.device)
        for t in range(c.horizon):
            reward = m.two_hot_inv(m.reward(self.p, z, actions[t], task, c), c)
            z = m.next_latent(self.p, z, actions[t], task, c)
            G = G + discount * (1 - terminated) * reward
            discount = discount * (self.discount[task] if isinstance(self.discount, Tensor) else self.discount)
            if c.episodic:
                ends = (torch.sigmoid(m.termination(self.p, z, c)) > 0.5).float()
                terminated = torch.clip(terminated + ends, max=1.0)
        action, _ = m.policy(self.p, z, task, c, eps)
        return G + discount * (1 - terminated) * self.q_value(z, action, task, "avg", members)

    @torch.no_grad()
    def plan(
        self,
        obs: Tensor,
        t0: bool,
        eval_mode: bool,
        task: Tensor | None,
        noise: PlanNoise,
        trace: PlanTrace | None = None,
    ) -> Tensor:
        """Plan by MPPI for one environment: obs (1, ...) -> action (A,). `noise` has E = 1."""
        c, p = self.c, self.p
        trace = trace or PlanTrace()
        h, n, k, a = c.horizon, c.num_samples, c.num_pi_trajs, c.need("action_dim")
        z = m.encode(p, obs, task, c, noise.shift)
        trace.record(z=z)
        actions = torch.empty(h, n, a, device=z.device)
        _z = z.repeat(k, 1)
        for t in range(h if k > 0 else 0):
            actions[t, :k], _ = m.policy(p, _z, task, c, noise.pi_eps[0, t])
            if t < h - 1:
                _z = m.next_latent(p, _z, actions[t, :k], task, c)
        trace.record(pi_actions=actions[:, :k].unsqueeze(0))

        z = z.repeat(n, 1)
        mean = torch.zeros(h, a, device=z.device)
        std = torch.full((h, a), float(c.max_std), device=z.device)
        if not t0:
            mean[:-1] = self.prev_mean[1:]
        for i in range(c.effective_iterations):
            sampled = mean.unsqueeze(1) + std.unsqueeze(1) * noise.samples[i, 0]
            actions[:, k:] = sampled.clamp(-1, 1)
            if c.multitask:
                actions = actions * p["_action_masks"][task]
            value = self.estimate_value(z, actions, task, noise.value_eps[i, 0], noise.members[i]).nan_to_num(0)
            elites = torch.topk(value.squeeze(1), c.num_elites, dim=0).indices
            elite_value, elite_actions = value[elites], actions[:, elites]
            score = torch.exp(c.temperature * (elite_value - elite_value.max(0).values))
            score = score / score.sum(0)
            mean = (score.unsqueeze(0) * elite_actions).sum(1) / (score.sum(0) + 1e-9)
            spread = (score.unsqueeze(0) * (elite_actions - mean.unsqueeze(1)) ** 2).sum(1) / (score.sum(0) + 1e-9)
            std = spread.sqrt().clamp(c.min_std, c.max_std)
            if c.multitask:
                mean, std = mean * p["_action_masks"][task], std * p["_action_masks"][task]
            trace.record(
                actions=actions.unsqueeze(0),
                values=value.T,
                elites=elites.unsqueeze(0),
                scores=score.T,
                means=mean.unsqueeze(0),
                stds=std.unsqueeze(0),
            )
        gumbel = score.squeeze(1).log() - noise.elite[0].log()
        pick = gumbel.softmax(0).argmax(-1)
        chosen = elite_actions.index_select(1, pick.unsqueeze(0)).squeeze(1)
        trace.record(chosen=chosen.unsqueeze(0), picked=pick.unsqueeze(0))
        action = chosen[0]
        if not eval_mode:
            action = action + std[0] * noise.action[0]
        self.prev_mean.copy_(mean)
        return action.clamp(-1, 1)

    @torch.no_grad()
    def td_target(self, next_z: Tensor, batch: Batch, eps: Tensor, members: Tensor) -> Tensor:
        """Return r + gamma (1 - terminated) min Q_target(z', pi(z'))."""
        action, _ = m.policy(self.p, next_z, batch.task, self.c, eps)
        discount = self.discount[batch.task].unsqueeze(-1) if isinstance(self.discount, Tensor) else self.discount
        q = self.q_value(next_z, action, batch.task, "min", members, target=True)
        return batch.reward + discount * (1 - batch.terminated) * q

    def update(self, batch: Batch, noise: UpdateNoise, trace: UpdateTrace | None = None) -> dict[str, Tensor]:
        """Take one training step and return the official metrics."""
        c, p, task = self.c, self.p, batch.task
        with torch.no_grad():
            next_z = m.encode(p, batch.obs[1:], task, c, noise.shift_next)
            td_target = self.td_target(next_z, batch, noise.td_eps, noise.td_members)

        zs = torch.empty(c.horizon + 1, c.batch_size, c.latent_dim, device=self.device)
        z = m.encode(p, batch.obs[0], task, c, noise.shift_first)
        zs[0] = z
        consistency: Tensor | float = 0.0
        for t in range(c.horizon):
            z = m.next_latent(p, z, batch.action[t], task, c)
            consistency = consistency + F.mse_loss(z, next_z[t]) * c.rho**t
            zs[t + 1] = z
        qs = m.critics(p, zs[:-1], batch.action, task, c, dropout=noise.value_dropout)
        rewards = m.reward(p, zs[:-1], batch.action, task, c)

        reward_loss: Tensor | float = 0.0
        value_loss: Tensor | float = 0.0
        for t in range(c.horizon):
            reward_loss = reward_loss + m.soft_ce(rewards[t], batch.reward[t], c).mean() * c.rho**t
            for q in qs[:, t]:
                value_loss = value_loss + m.soft_ce(q, td_target[t], c).mean() * c.rho**t
        info = dict(
            consistency_loss=torch.as_tensor(consistency / c.horizon),
            reward_loss=torch.as_tensor(reward_loss / c.horizon),
            value_loss=torch.as_tensor(value_loss / (c.horizon * c.num_q)),
            termination_loss=torch.zeros((), device=self.device),
        )
        if c.episodic:
            terminal = m.termination(p, zs[1:], c)
            info["termination_loss"] = F.binary_cross_entropy_with_logits(terminal, batch.terminated)
            info |= _f1(torch.sigmoid(terminal[-1]).squeeze(-1), batch.terminated[-1].squeeze(-1))
        info["total_loss"] = (
            c.consistency_coef * info["consistency_loss"]
            + c.reward_coef * info["reward_loss"]
            + c.termination_coef * info["termination_loss"]
            + c.value_coef * info["value_loss"]
        )
        if trace is not None and c.multitask and p["_task_emb.weight"].grad is not None:
            trace.tensors["task_emb_grad_before"] = p["_task_emb.weight"].grad.clone()
        info["total_loss"].backward()
        _record(trace, {k: v for k, v in self.trained.items() if k not in self.pi})
        info["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.trained.values(), c.grad_clip_norm)
        self.optim.step()
        self.optim.zero_grad(set_to_none=True)

        info |= self.update_pi(zs.detach(), task, noise, trace)
        with torch.no_grad():
            for name in self.target_names:
                p[name].lerp_(p[name.replace("_target_Qs_params", "_Qs.params")], c.tau)
        if trace is not None:
            trace.tensors.update(td_target=td_target, zs=zs.detach())
        return {k: v.detach().mean() for k, v in info.items()}

    def update_pi(
        self, zs: Tensor, task: Tensor | None, noise: UpdateNoise, trace: UpdateTrace | None
    ) -> dict[str, Tensor]:
        """Train the policy; its gradient on the task embedding stays, as in the official code."""
        c = self.c
        action, info = m.policy(self.p, zs, task, c, noise.pi_eps)
        constant = {k: v.detach() if k.startswith("_Qs.") else v for k, v in self.p.items()}
        dropout = None
        if noise.pi_dropout is not None:
            dropout = torch.ones(c.num_q, *noise.pi_dropout.shape[1:], device=self.device)
            dropout[noise.pi_members[:2]] = noise.pi_dropout
        q = m.critics(constant, zs, action, task, c, dropout=dropout)
        qs = m.two_hot_inv(q[noise.pi_members[:2]], c).sum(0) / 2
        with torch.no_grad():
            low, high = (_percentile(qs[0].detach(), x) for x in (5, 95))
            self.scale.lerp_(torch.clamp(high - low, min=1.0), c.tau)
        qs = qs / self.scale
        rho = torch.pow(c.rho, torch.arange(len(qs), device=self.device))
        pi_loss = (-(c.entropy_coef * info["scaled_entropy"] + qs).mean(dim=(1, 2)) * rho).mean()
        pi_loss.backward()
        _record(trace, self.pi)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.pi.values(), c.grad_clip_norm)
        self.pi_optim.step()
        self.pi_optim.zero_grad(set_to_none=True)
        return dict(
            pi_loss=pi_loss,
            pi_grad_norm=grad_norm,
            pi_entropy=info["entropy"],
            pi_scaled_entropy=info["scaled_entropy"],
            pi_scale=self.scale.clone(),
        )


def _record(trace: UpdateTrace | None, params: Mapping[str, Tensor]) -> None:
    if trace is not None:
        trace.grads.update((k, v.grad.clone()) for k, v in params.items() if v.grad is not None)


def _percentile(x: Tensor, percent: float) -> Tensor:
    """Interpolate linearly between the sorted values of x (B, 1)."""
    ordered = torch.sort(x, dim=0).values
    position = percent * (len(x) - 1) / 100
    low = int(position)
    high = min(low + 1, len(x) - 1)
    return ordered[low] * (1 - (position - low)) + ordered[high] * (position - low)


def _f1(prob: Tensor, target: Tensor, eps: float = 1e-9) -> dict[str, Tensor]:
    tp = ((prob > 0.5) & (target == 1)).sum()
    fn = ((prob <= 0.5) & (target == 1)).sum()
    fp = ((prob > 0.5) & (target == 0)).sum()
    recall, precision = tp / (tp + fn + eps), tp / (tp + fp + eps)
    return dict(
        termination_rate=target.sum() / len(target), termination_f1=2 * precision * recall / (precision + recall + eps)
    )
