"""What of an official agent decides over its plans and updates, read as it is now, and our config of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import LARGE_ACTION_DIM, Config
from ..errors import InputError

_KEYS = tuple(
    f.name
    for f in dataclasses.fields(Config)
    if f.metadata["group"] not in ("evaluation", "logging", "misc", "of this project") or f.name == "seed"
)
_OF_ADAM = ("betas", "eps", "weight_decay", "amsgrad", "maximize")
_READ_ONCE = ("dropout", "simnorm_dim")
_CONSTANTS = ("log_std_min", "log_std_dif", "_action_masks")


def plain_model(agent: Any) -> Any:
    """Return an agent's world model, without what torch.compile has put around it."""
    return getattr(agent.model, "_orig_mod", agent.model)


class Readings:
    """Reads an agent.

    Args:
        agent: the official agent.
        keys: of our config, which its own does not have.
    """

    def __init__(self, agent: Any, keys: Mapping[str, Any]) -> None:
        self.agent, self.keys = agent, dict(keys)
        self._seen: list[tuple[int, int]] = []  # buffers of the model
        self._constants: dict[str, Any] = {}  # and their values

    def now(self) -> tuple[Any, ...]:
        """Return all settings that a plan or an update depends on, to be compared with later ones."""
        agent, device = self.agent, self.device
        optims = [optim for name in ("optim", "pi_optim") if (optim := getattr(agent, name, None)) is not None]
        groups = [(id(o), float(g["lr"]), *map(g.get, _OF_ADAM)) for o in optims for g in o.param_groups]
        discount = tuple(agent.discount.tolist()) if isinstance(agent.discount, Tensor) else agent.discount
        precision = torch.get_float32_matmul_precision() if device.type == "cuda" else ""
        values = [getattr(agent.cfg, key, None) for key in _KEYS]
        return (values, groups, self.constants(), discount, precision, device, agent.model)

    @property
    def device(self) -> torch.device:
        """The device that the agent's model is on."""
        return next(self.agent.model.parameters()).device  # type: ignore[no-any-return]

    def constants(self) -> dict[str, Any]:
        """Return the values of the model's buffers, read anew where somebody wrote to them."""
        held = plain_model(self.agent)._buffers
        found = {name: held[name] for name in _CONSTANTS if held.get(name) is not None}
        seen = [(x.data_ptr(), x._version) for x in found.values()]
        if seen != self._seen:
            self._seen, self._constants = seen, {name: x.tolist() for name, x in found.items()}
        return self._constants

    def config(self) -> Config:
        """Return our config of the agent.

        Raises:
            ConfigError, InputError: it has settings that ours cannot have.
        """
        agent, keys, constants = self.agent, self.keys, self.constants()
        cfg = Config.from_official(agent.cfg)
        changes: dict[str, Any] = dict(device=str(self.device), num_envs=1, **keys)
        if cfg is not agent.cfg and (cfg.action_dim or 0) >= LARGE_ACTION_DIM:
            changes["iterations"] = cfg.iterations - 2  # which the agent has added, and ours adds again
        if "log_std_min" in constants:
            low = constants["log_std_min"]
            changes |= dict(log_std_min=low, log_std_max=low + constants["log_std_dif"])
        live = [[float(i < n) for i in range(cfg.action_dim or 0)] for n in cfg.action_dims]
        if constants.get("_action_masks", live) != live:
            raise InputError("agent.model._action_masks: got others than cfg.action_dims makes, allowed: the same")
        if "precision" not in keys and self.device.type == "cuda":
            changes["precision"] = "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        if cfg.multitask:
            wanted, got = torch.tensor(cfg.discounts), torch.as_tensor(agent.discount).cpu()
            if got.shape != wanted.shape or not torch.allclose(got, wanted):
                of = "of cfg.episode_lengths"
                raise InputError(f"agent.discount: got {got.tolist()}, allowed: {wanted.tolist()}, {of}")
        elif agent.discount != cfg.discounts[0]:
            changes |= dict(discount_min=float(agent.discount), discount_max=float(agent.discount))
        found = cfg.replace(**changes)
        for key in _READ_ONCE:  # by the official code, too
            self.keys.setdefault(key, getattr(found, key))
        return found
