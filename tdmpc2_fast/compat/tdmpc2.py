"""The official `tdmpc2`: an agent with the official attributes, which plans and learns by our kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdmpc2_fast.kernels.update.optim import POLICY_EPS

from ..config import LARGE_ACTION_DIM, Config
from ..learn.batch import Batch, Sampler
from ..model import checkpoint
from ..runtime.backend import resolve_device
from ..runtime.surroundings import undisturbed
from ..seeds import stream_seed
from .accelerate import Acceleration
from .common.scale import RunningScale
from .common.world_model import WorldModel


class TDMPC2(nn.Module):
    """A TD-MPC2 agent with the constructor, methods and attributes of the official one.

    `model`, `optim`, `pi_optim`, `scale`, `discount` and `_prev_mean` are what the kernels work on.
    `acceleration` says which plan and learn.

    Args:
        cfg: the official `cfg`, completed by the environment, or a `Config`. Two are added to its `iterations` where
            there are 20 action dimensions or more, as by the official agent.
    """

    _prev_mean: Tensor

    @undisturbed
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        ours = Config.from_official(cfg)
        self.cfg = cfg
        self.device = resolve_device(ours.device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stream_seed(ours.seed, "init"))
            self.model = WorldModel(ours).to(self.device).eval()
        groups: list[dict[str, Any]] = [
            dict(params=self.model._encoder.parameters(), lr=ours.lr * ours.enc_lr_scale),
            *(dict(params=list(part.parameters())) for part in self._trained() if part is not None),
        ]
        capturable = self.device.type == "cuda"
        self.optim = torch.optim.Adam(groups, lr=ours.lr, capturable=capturable)
        pi = self.model._pi.parameters()
        self.pi_optim = torch.optim.Adam(pi, lr=ours.lr, eps=POLICY_EPS, capturable=capturable)
        self.scale = RunningScale(ours, self.device)
        if not isinstance(cfg, Config) and (ours.action_dim or 0) >= LARGE_ACTION_DIM:
            cfg.iterations += 2
        self.discount: float | Tensor = ours.discounts[0]
        if ours.multitask:
            self.discount = torch.tensor(ours.discounts, device=self.device)
        mean = torch.zeros(ours.horizon, ours.need("action_dim"), device=self.device)
        self.register_buffer("_prev_mean", mean)
        self.acceleration = Acceleration(self)

    def _trained(self) -> list[Any]:
        m: Any = self.model
        return [m._dynamics, m._reward, m._termination, m._Qs, getattr(m, "_task_emb", None)]

    def _get_discount(self, episode_length: int) -> float:
        """Return the discount for episodes of this many decisions."""
        return Config.from_official(self.cfg).discount(episode_length)

    def save(self, fp: str | Path) -> None:
        """Write the weights, whatever the name, in the official format: `{"model": state_dict}`."""
        checkpoint.save_official(self.model, fp)

    @undisturbed
    def load(self, fp: str | Path | Mapping[str, Any]) -> None:
        """Load weights: a file of either official generation or of ours, or a state dict, bare or wrapped.

        Raises:
            CheckpointError: of another model, not finite, no model at all, or unsafe: pickles are opened as
                weights only.
            InputError: neither a path nor a state dict.
        """
        checkpoint.load(self.model, fp)

    @torch.no_grad()
    def act(self, obs: Tensor, t0: bool = False, eval_mode: bool = False, task: int | None = None) -> Tensor:
        """Return the action for one observation (*obs_shape): (A,) on the CPU."""
        obs = torch.as_tensor(obs).to(self.device, non_blocking=True).unsqueeze(0)
        index = None if task is None else torch.tensor([task], device=self.device)
        if self.cfg.mpc:
            return self.plan(obs, t0=t0, eval_mode=eval_mode, task=index).cpu()
        action, info = self.model.pi(self.model.encode(obs, index), index)
        return (info["mean"] if eval_mode else action)[0].cpu()

    def plan(self, obs: Tensor, t0: bool = False, eval_mode: bool = False, task: Tensor | None = None) -> Tensor:
        """Plan an action for an observation (1, *obs_shape): (A,) on the agent's device."""
        return self.acceleration.plan(obs, t0, eval_mode, task)

    def _plan(self, obs: Tensor, t0: bool = False, eval_mode: bool = False, task: Tensor | None = None) -> Tensor:
        return self.plan(obs, t0, eval_mode, task)

    def update(self, buffer: Sampler) -> dict[str, Tensor]:
        """Take one training step on a batch from `buffer`, ours or the official one, and return the metrics."""
        return self.acceleration.learn_from(buffer)

    def _update(
        self, obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, task: Tensor | None = None
    ) -> dict[str, Tensor]:
        return self.acceleration.learn(Batch(obs, action, reward, terminated, task))

    @torch.no_grad()
    def _td_target(self, next_z: Tensor, reward: Tensor, terminated: Tensor, task: Tensor | None) -> Tensor:
        """Return the TD targets (H, B, 1) at latents (H, B, L)."""
        model = self.model
        action, _ = model.pi(next_z, task)
        discount = self.discount if task is None else self.discount[task].unsqueeze(-1)  # type: ignore[index]
        return reward + discount * (1 - terminated) * model.Q(next_z, action, task, return_type="min", target=True)
