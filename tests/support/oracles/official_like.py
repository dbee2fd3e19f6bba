"""An agent as the official code has them: its tensors under their names, its attributes, its draws in their order.

What it computes is the plain reference's. The official code itself is compared where a checkout is
(benchmarks/dropin.py, tests/benchmarks/test_dropin.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdmpc2_fast import Config, WorldModel
from tdmpc2_fast.benchmarks.baselines.official import OfficialConfig
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.learn.batch import Batch
from tdmpc2_fast.reference import ReferenceAgent
from tdmpc2_fast.rng import PlanNoise, UpdateNoise

_GROUPS = ("_encoder.", "_dynamics.", "_reward.", "_termination.", "_Qs.", "_task_emb.")


class Tree(nn.Module):
    """Tensors by dotted names, as parameters or buffers; in the order they come."""

    def __init__(self, tensors: Mapping[str, Tensor], learnable: bool) -> None:
        super().__init__()
        for name, x in tensors.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]  # type: ignore[assignment]
            if learnable:
                module.register_parameter(leaf, nn.Parameter(x.detach().clone()))
            else:
                module.register_buffer(leaf, x)


class Model(nn.Module):
    """The tensors of an official world model."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        state = tensors_only(WorldModel(cfg).state_dict())
        g = torch.Generator().manual_seed(1)  # as large as a trained model's: zero last layers make all values equal
        state = {
            k: torch.randn(x.shape, generator=g) / x.shape[-1] ** 0.5 if x.ndim > 1 else x for k, x in state.items()
        }
        if cfg.multitask:
            state["_action_masks"] = WorldModel(cfg)._action_masks.clone()
        for group in dict.fromkeys(k.split(".")[0] for k in state if "." in k and "target" not in k):
            part = {k.removeprefix(f"{group}."): x for k, x in state.items() if k.startswith(f"{group}.")}
            self.add_module(group, Tree(part, learnable=True))
        for name in ("_action_masks", "log_std_min", "log_std_dif"):
            if name in state:
                self.register_buffer(name, state[name])
        targets = {k.removeprefix("_target_Qs_params."): x for k, x in state.items() if "_target" in k}
        self._target_Qs_params = Tree(targets, learnable=False)
        self.init()

    def init(self) -> None:
        """Point the detached critics at the critics."""
        critics = dict(self._Qs.params.named_parameters())  # type: ignore[union-attr]
        self._detach_Qs_params = Tree({k: x.data for k, x in critics.items()}, learnable=False)


class OfficialLike(nn.Module):
    """The agent. cfg: what it is made of; `self.cfg` is a mutable copy, as officially."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = OfficialConfig(**cfg.to_dict(), compile=False, bin_size=cfg.bin_size)
        self.made_of, self.device = cfg, torch.device(cfg.device)
        self.model = Model(cfg).to(self.device)
        named = dict(self.model.named_parameters())
        groups: list[dict[str, Any]] = [dict(params=[p for n, p in named.items() if n.startswith(k)]) for k in _GROUPS]
        groups[0]["lr"] = cfg.lr * cfg.enc_lr_scale
        self.optim = torch.optim.Adam(groups, lr=cfg.lr)
        pi = [p for n, p in named.items() if n.startswith("_pi.")]
        self.pi_optim = torch.optim.Adam(pi, lr=cfg.lr, eps=1e-5)
        self.scale = nn.Module()
        self.scale.register_buffer("value", torch.ones(1, device=self.device))
        self.cfg.iterations += 2 * int(self.cfg.action_dim >= 20)
        self.discount = torch.tensor(cfg.discounts).to(self.device) if cfg.multitask else cfg.discounts[0]
        self.register_buffer("_prev_mean", torch.zeros(cfg.horizon, cfg.need("action_dim"), device=self.device))
        self.model.eval()
        self.model.init()

    @property
    def plan(self) -> Any:
        return self.__dict__.get("_plan_val") or self._plan

    def _reference(self) -> ReferenceAgent:
        """The reference, at work on this agent's tensors."""
        now = {k: getattr(self.cfg, k) for k in ("batch_size", "num_samples", "temperature", "min_std", "max_std")}
        it = ReferenceAgent(self.made_of.replace(**now), tensors_only(self.model.state_dict()))
        it.p = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        it.p = {k: x for k, x in it.p.items() if not k.startswith("_detach")}
        it.trained = {k: x for k, x in it.p.items() if isinstance(x, nn.Parameter)}
        it.pi = {k: x for k, x in it.trained.items() if k.startswith("_pi.")}
        it.optim, it.pi_optim, it.discount = self.optim, self.pi_optim, self.discount
        it.scale, it.prev_mean = self.scale.value, self._prev_mean  # type: ignore[assignment]
        return it

    @torch.no_grad()
    def _plan(self, obs: Tensor, t0: bool = False, eval_mode: bool = False, task: Tensor | None = None) -> Tensor:
        c, a, on = self.cfg, self.cfg.action_dim, self.device
        of_prior, of_samples = torch.empty(c.num_pi_trajs, a, device=on), torch.empty(c.num_samples, a, device=on)
        pi_eps = torch.stack([torch.randn_like(of_prior) for _ in range(c.horizon)])
        draws: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for _ in range(c.iterations):
            draws[0].append(torch.randn(c.horizon, c.num_samples - c.num_pi_trajs, a, device=on))
            draws[1].append(torch.randn_like(of_samples))
            draws[2].append(torch.randperm(c.num_q)[:2])
        samples, value_eps, members = (torch.stack(x) for x in draws)
        elite = torch.empty(c.num_elites, device=on).exponential_()
        action = torch.zeros(a, device=on) if eval_mode else torch.randn(a, device=on)
        noise = PlanNoise(pi_eps[None], samples[:, None], value_eps[:, None], members, elite[None], action[None])
        return self._reference().plan(obs, t0, eval_mode, task, noise)

    def act(self, obs: Tensor, t0: bool = False, eval_mode: bool = False, task: int | None = None) -> Tensor:
        index = None if task is None else torch.tensor([task])
        return self.plan(obs.unsqueeze(0), t0=t0, eval_mode=eval_mode, task=index).cpu()

    def _update(
        self, obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, task: Tensor | None = None
    ) -> dict[str, Tensor]:
        c = self.cfg
        like = torch.empty(c.horizon + 1, c.batch_size, c.action_dim, device=self.device)
        noise = UpdateNoise(
            td_eps=torch.randn_like(like[1:]),
            td_members=torch.randperm(c.num_q)[:2],
            pi_eps=torch.randn_like(like),
            pi_members=torch.randperm(c.num_q)[:2],
        )
        return self._reference().update(Batch(obs, action, reward, terminated, task), noise)

    def update(self, buffer: Any) -> dict[str, Tensor]:
        obs, action, reward, terminated, task = buffer.sample()
        return self._update(obs, action, reward, terminated, **({} if task is None else {"task": task}))

    def save(self, fp: Any) -> None:
        torch.save({"model": self.model.state_dict()}, fp)

    def load(self, fp: Any) -> None:
        self.model.load_state_dict(torch.load(fp, weights_only=True)["model"])
