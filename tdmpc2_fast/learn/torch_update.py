"""One training step in plain torch: world model, policy prior, target critics (paper, eq. 3-5).

The numbers are the official ones; what is left out is what they do not need: TD targets and
policy loss evaluate only the two critics drawn, and in the policy loss the critics are
constants whose first layer reads the fixed latent once, outside the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from tdmpc2_fast.kernels.layers.policy_head import policy_head
from tdmpc2_fast.kernels.layers.two_hot import soft_cross_entropy
from tdmpc2_fast.kernels.update.optim import POLICY_EPS

from ..errors import NonFiniteError
from ..model.world_model import WorldModel, join
from ..rng import UpdateNoise, generator, generator_state, set_generator
from ..runtime.backend import matmul_precision
from ..runtime.profiling import annotate
from ..runtime.ranks import ALONE, Ranks
from ..runtime.torch_cache import have_a_cache
from .backend import TASK_GRADIENT, UpdateBackend
from .batch import Batch, Sampler, UpdateTrace
from .metrics import termination_statistics
from .scale import RunningScale

MOMENTS = ("exp_avg", "exp_avg_sq")
OWN = "rng.own"


class TorchUpdate(UpdateBackend):
    """Optimisers, running scale and losses around one world model.

    Args:
        model: the world model, trained in place.
        ranks: as of `Updater`.
    """

    def __init__(self, model: WorldModel, ranks: Ranks = ALONE) -> None:
        cfg = model.cfg.replace(batch_size=ranks.equal(model.cfg, "batch_size"))
        self.model, self.cfg, self.ranks, device = model, cfg, ranks, model.device
        self.generator = generator(cfg.seed, "update", device)
        # What ranks draw for their own slices; the critics are drawn alike.
        self.own_generator = None if ranks.count == 1 else generator(cfg.seed, f"update of {ranks}", device)
        named = list(model.world_parameters())
        encoder = [p for n, p in named if n.startswith("_encoder.")]
        rest = [p for n, p in named if not n.startswith("_encoder.")]
        have_a_cache()
        # Kernels that learned before have left the rows of first layers apart, which fused Adam refuses on a GPU.
        for p in model.parameters():
            if device.type == "cuda" and not p.is_contiguous():
                p.data = p.data.contiguous()
        groups: list[dict[str, Any]] = [dict(params=encoder, lr=cfg.lr * cfg.enc_lr_scale), dict(params=rest)]
        self.optim = torch.optim.Adam(groups, lr=cfg.lr, fused=True)
        self.pi_optim = torch.optim.Adam(model._pi.parameters(), lr=cfg.lr, eps=POLICY_EPS, fused=True)
        self.scale = RunningScale(cfg.tau, device, model.dtype)
        self._rho = cfg.rho ** torch.arange(cfg.horizon + 1, device=device, dtype=torch.float32)
        self.discount: Tensor | float = cfg.discounts[0]
        if cfg.multitask:
            self.discount = torch.tensor(cfg.discounts, device=device, dtype=model.dtype)
        self._frozen = model.frozen()
        self.steps = 0

    @override
    def step(self, batch: Batch, noise: UpdateNoise | None, trace: UpdateTrace | None) -> dict[str, Tensor]:
        model = self.model
        batch = batch.to(self.cfg, model.device, model.dtype)
        noise = noise or UpdateNoise.draw(self.cfg, self.generator, model.dtype, self.own_generator)
        with torch.enable_grad(), matmul_precision(self.cfg, model.device):
            return self._step(batch, noise, trace)

    @override
    def step_from(self, buffer: Sampler) -> None:
        return None

    @override
    def synchronise(self) -> None:
        return  # a step has waited for its own end

    @override
    def state(self) -> dict[str, Tensor]:
        found = dict(scale=self.scale.value, **generator_state(self.generator))
        if self.own_generator is not None:
            found |= generator_state(self.own_generator, OWN)
        for prefix, (optim, params) in self._optimisers().items():
            for name, p in params.items():
                for key, x in optim.state[p].items():
                    found[f"{prefix}.step" if key == "step" else f"{key}.{name}"] = x
        if self.cfg.multitask and self.model._task_emb.weight.grad is not None:
            found[TASK_GRADIENT] = self.model._task_emb.weight.grad
        return found

    @override
    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        device = self.model.device
        self.scale.value.copy_(state["scale"])
        set_generator(self.generator, state)
        if self.own_generator is not None:
            set_generator(self.own_generator, state, OWN)
        for prefix, (optim, params) in self._optimisers().items():
            if f"{prefix}.step" not in state:  # it has not taken a step
                continue
            for name, p in params.items():
                if f"{MOMENTS[0]}.{name}" not in state:  # it is frozen
                    continue
                moments = {key: torch.empty_like(p).copy_(state[f"{key}.{name}"]) for key in MOMENTS}
                step = state[f"{prefix}.step"].to(device, torch.float32).reshape(()).clone()
                optim.state[p] = dict(step=step, **moments)
        if TASK_GRADIENT in state and self.cfg.multitask:
            self.model._task_emb.weight.grad = state[TASK_GRADIENT].to(device, copy=True)

    def _optimisers(self) -> dict[str, tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]]:
        policy = {f"_pi.{n}": p for n, p in self.model._pi.named_parameters()}
        return dict(world=(self.optim, dict(self.model.world_parameters())), policy=(self.pi_optim, policy))

    def _step(self, batch: Batch, noise: UpdateNoise, trace: UpdateTrace | None) -> dict[str, Tensor]:
        model = self.model
        model.train()
        try:
            with annotate("td_target"):
                e = model.embed(batch.task)
                next_z, td_target = self._targets(batch, e, noise)
            with annotate("world"):
                zs, info = self._world_step(batch, next_z, td_target, noise, trace)
            with annotate("policy"):
                info |= self._policy_step(zs, batch.task, noise, trace)
            model.soft_update_target_Q()
        finally:
            model.eval()
        if trace is not None:
            trace.tensors.update(td_target=td_target, zs=zs)
        self.steps += 1
        return self._averaged({k: v.detach().mean() for k, v in info.items()})

    def _world_step(
        self, batch: Batch, next_z: Tensor, td_target: Tensor, noise: UpdateNoise, trace: UpdateTrace | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.model
        e = model.embed(batch.task)
        leaked = model._task_emb.weight.grad if self.cfg.multitask else None
        if trace is not None and leaked is not None:
            trace.tensors["task_emb_grad_before"] = leaked.clone()
        zs, info = self._world_losses(batch, e, next_z, td_target, noise)
        (info["total_loss"] / self.ranks.count).backward()
        params = dict(model.world_parameters())
        for name in self._frozen:
            params[name].grad = None  # neither in the norm nor in the step
        info["grad_norm"] = self._clip(params, info, trace)
        self.optim.step()
        self.optim.zero_grad(set_to_none=True)
        return zs.detach(), info

    def _policy_step(
        self, zs: Tensor, task: Tensor | None, noise: UpdateNoise, trace: UpdateTrace | None
    ) -> dict[str, Tensor]:
        model = self.model
        e = model.embed(task)
        if e is not None and not self.cfg.task_grad_leak:
            e = e.detach()
        info = self._policy_losses(zs, task, e, noise)
        # Backward also reaches the task embedding, whose gradient no one clears: the next
        # world update inherits it. That is what the official code does.
        (info["pi_loss"] / self.ranks.count).backward()
        params = {f"_pi.{n}": p for n, p in model._pi.named_parameters()}
        info["pi_grad_norm"] = self._clip(params, {"pi_loss": info["pi_loss"]}, trace)
        self.scale.value.copy_(info["pi_scale"])
        self.pi_optim.step()
        self.pi_optim.zero_grad(set_to_none=True)
        return info

    @override
    @torch.no_grad()
    def td_target(self, next_z: Tensor, batch: Batch, eps: Tensor, members: Tensor) -> Tensor:
        return self._td_target(next_z, batch, self.model.embed(batch.task), eps, members)

    def _td_target(self, next_z: Tensor, batch: Batch, e: Tensor | None, eps: Tensor, members: Tensor) -> Tensor:
        model, task = self.model, batch.task
        logits = model._pi(*join(next_z, e))
        action = policy_head(logits, eps, *model.log_std_range, model.action_mask(task)).action
        q0, q1 = (model.scalar(x) for x in model.critic_logits(join(next_z, e, action), members, target=True))
        discount = self.discount if task is None else self.discount[task].unsqueeze(-1)  # type: ignore[index]
        return batch.reward + discount * (1 - batch.terminated) * torch.minimum(q0, q1)

    # ---- pure tensor programs. The embedding's lookup, which renormalises its weight in place, is left to
    # their callers.

    @torch.no_grad()
    def _targets(self, batch: Batch, e: Tensor | None, noise: UpdateNoise) -> tuple[Tensor, Tensor]:
        """Return the latents of the next observations (H, B, L) and the TD targets (H, B, 1)."""
        next_z = self.model.encode_parts(batch.obs[1:], e, noise.shift_next)
        return next_z, self._td_target(next_z, batch, e, noise.td_eps, noise.td_members)

    def _world_losses(
        self, batch: Batch, e: Tensor | None, next_z: Tensor, td_target: Tensor, noise: UpdateNoise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the latents (H+1, B, L) and the losses, `total_loss` among them."""
        cfg, model, h = self.cfg, self.model, self.cfg.horizon
        bins = (cfg.num_bins, cfg.vmin, cfg.vmax)
        rho = self._rho[:h]

        # Latent rollout
        latents = [model.encode_parts(batch.obs[0], e, noise.shift_first)]
        for a in batch.action.unbind(0):
            latents.append(model._dynamics(torch.cat(join(latents[-1], e, a), -1)))
        zs = torch.stack(latents)
        consistency = ((zs[1:] - next_z).square().mean((1, 2)) * rho).sum() / h

        # Predictions: reward and all critics read the same input
        x = torch.cat(join(zs[:-1], None if e is None else e.expand(h, -1, -1), batch.action), -1)
        reward = soft_cross_entropy(model._reward(x), batch.reward, *bins).mean((1, 2))
        dropout = 0.0 if noise.value_dropout is None else noise.value_dropout
        logits = model.critic_logits((x,), None, dropout=dropout)
        value = torch.stack([soft_cross_entropy(q, td_target, *bins).mean((1, 2)) for q in logits])

        info = dict(
            consistency_loss=consistency,
            reward_loss=(reward * rho).sum() / h,
            value_loss=(value * rho).sum() / (h * cfg.num_q),
            termination_loss=torch.zeros((), device=zs.device),
        )
        if cfg.episodic:
            terminal = model.termination(zs[1:], unnormalized=True)
            info["termination_loss"] = F.binary_cross_entropy_with_logits(terminal, batch.terminated)
            whole = self.ranks.whole
            info |= termination_statistics(whole(terminal[-1].detach().sigmoid()), whole(batch.terminated[-1]))
        info["total_loss"] = (
            cfg.consistency_coef * info["consistency_loss"]
            + cfg.reward_coef * info["reward_loss"]
            + cfg.value_coef * info["value_loss"]
            + cfg.termination_coef * info["termination_loss"]
        )
        return zs, info

    def _policy_losses(
        self, zs: Tensor, task: Tensor | None, e: Tensor | None, noise: UpdateNoise
    ) -> dict[str, Tensor]:
        """Return the loss, the policy's metrics, and the running scale after this step."""
        cfg, model = self.cfg, self.model
        logits = model._pi(*join(zs, e))
        out = policy_head(logits, noise.pi_eps, *model.log_std_range, model.action_mask(task))
        dropout = 0.0 if noise.pi_dropout is None else noise.pi_dropout
        q0, q1 = (
            model.scalar(x)
            for x in model.critic_logits(join(zs, e, out.action), noise.pi_members, detach=True, dropout=dropout)
        )
        qs = (q0 + q1) / 2
        scale = self.scale.after(self.ranks.whole(qs[0].detach()))
        qs = qs / scale
        loss = (-(cfg.entropy_coef * out.scaled_entropy + qs).mean((1, 2)) * self._rho).mean()
        return dict(pi_loss=loss, pi_entropy=-out.log_prob, pi_scaled_entropy=out.scaled_entropy, pi_scale=scale)

    def _add_up(self, grads: list[Tensor]) -> None:
        """Add up gradients over all ranks, in one collective."""
        if self.ranks.count == 1:
            return
        flat = torch.cat([g.flatten() for g in grads])
        self.ranks.sum(flat)
        for g, whole in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(whole.view_as(g))

    def _averaged(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the means of scalars over all ranks; what is the same on each stays."""
        if self.ranks.count == 1:
            return scalars
        x = torch.stack([v.mean().to(self.model.dtype) for v in scalars.values()])
        self.ranks.sum(x)
        return dict(zip(scalars, x / self.ranks.count, strict=True))

    def _clip(self, params: dict[str, nn.Parameter], losses: dict[str, Tensor], trace: UpdateTrace | None) -> Tensor:
        """Clip gradients by their global norm, which is returned; refuse non-finite ones before anything is updated."""
        self._add_up([p.grad for p in params.values() if p.grad is not None])
        if trace is not None:
            trace.grads.update((n, p.grad.clone()) for n, p in params.items() if p.grad is not None)
        norm = nn.utils.get_total_norm([p.grad for p in params.values() if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            losses = self._averaged({k: v.detach() for k, v in losses.items()})
            bad = [n for n, x in losses.items() if not bool(torch.isfinite(x).all())]
            if not bad:
                bad = [n for n, p in params.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
            self.optim.zero_grad(set_to_none=True)
            self.pi_optim.zero_grad(set_to_none=True)
            raise NonFiniteError(
                f"update {self.steps}: {', '.join(bad[:3]) or 'gradient norm'} is not finite; "
                f"the step of {next(iter(params)).split('.')[0]} and what follows it was not taken"
            )
        nn.utils.clip_grads_with_norm_(params.values(), self.cfg.grad_clip_norm, norm)
        return norm
