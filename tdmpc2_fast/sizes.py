"""What kernels are told of a config: the sizes of a plan and of an update."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from torch import Tensor

from tdmpc2_fast.kernels.layers.sizes import ModelSizes
from tdmpc2_fast.kernels.plan.buffers import PlanSizes
from tdmpc2_fast.kernels.update.buffers import UpdateSizes

from .config import Config
from .model.world_model import WorldModel

_Sizes = TypeVar("_Sizes", bound=ModelSizes)


def plan_sizes(cfg: Config, num_envs: int) -> PlanSizes:
    """Return the sizes of a plan for this config."""
    return _sizes(PlanSizes, cfg, envs=num_envs, iterations=cfg.effective_iterations)


def update_sizes(model: WorldModel, ranks: int = 1) -> UpdateSizes:
    """Return the sizes of an update of this model, or of one rank's share of it."""
    cfg: Config = model.cfg
    return _sizes(
        UpdateSizes,
        cfg,
        batch=cfg.batch_size // ranks,
        ranks=ranks,
        encoder_numel=sum(map(pixel_room, model._encoder.parameters())) if cfg.obs == "rgb" else 0,
        num_tasks=len(cfg.tasks) if cfg.multitask else 0,
    )


def pixel_room(p: Tensor) -> int:
    """Return how many floats a parameter of the pixel encoder takes in a flat buffer: whole cache lines."""
    return -(-p.numel() // 32) * 32


def _sizes(kind: type[_Sizes], cfg: Config, **own: Any) -> _Sizes:
    """Return sizes by their names in the config; `own` are those with another name there."""
    shape = cfg.observation_shape
    own |= dict(obs_dim=0 if cfg.obs == "rgb" else shape[0], action_dim=cfg.need("action_dim"))
    return kind(**own, **{f.name: getattr(cfg, f.name) for f in fields(kind) if f.name not in own})
