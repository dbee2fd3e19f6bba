"""Weights for a new task from a model of others: what fits is taken, what the task adds begins as a fresh model's.

Fine-tuning as in the paper's few-shot experiment (section 4.3): a multi-task model stays one, of the new task, whose
embedding begins as that of a similar task. Widths may differ where a task shows: observations, actions, embedding.

    encoder, first layer   columns [obs, e]      dynamics, reward, critics: [z, e, a]      policy, termination: [z, e]
    policy, last layer     rows [mean, log std]  task embedding: a row a task

Of each part the columns (or rows) that both models have are taken, from the first on, as padding has them in official
multi-task models; further ones keep what the model was made with. So the new model computes what the old one did
wherever the inputs that it has more are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compat.state_dict import from_official_entries, tensors_only, unwrapped
from ..config import DEFAULT_DIMS, Config
from ..errors import CheckpointError, ConfigError, did_you_mean
from ..runtime.access import access_to
from .checkpoint import find_checkpoint, read
from .official import OfficialModel
from .world_model import WorldModel

SHARED = (
    *("model_size", *(k for k in DEFAULT_DIMS if k != "num_channels"), "num_channels"),
    *("simnorm_dim", "num_bins", "vmin", "vmax", "log_std_min", "log_std_max", "obs"),
)
"""Config keys that a model has in common with the one it begins from."""

_FIRST = dict(_dynamics="zea", _reward="zea", _Qs="zea", _target_Qs_params="zea", _pi="ze", _termination="ze")


@dataclass(frozen=True)
class Donor:
    """A model whose weights are taken: its state dict by our names, its config, and what messages call it."""

    state: Mapping[str, Tensor]
    cfg: Config
    name: str

    @classmethod
    def read(cls, path: str | Path) -> Donor:
        """Read a checkpoint of ours, the best one of a run's folder, an official file or one of the Hub.

        Raises:
            CheckpointError: no such file, an unsafe one, or one that holds no whole model.
        """
        found = find_checkpoint(path)
        state, cfg = read(found)
        name = repr(str(path))
        if cfg is None:
            cfg = _config_of(OfficialModel(state, name))
        tensors, _ = unwrapped(state, name)
        from_official_entries(tensors, "", {})
        bad = [k for k, x in tensors.items() if not bool(torch.isfinite(x).all())]
        if bad:
            raise CheckpointError(f"checkpoint {name}: {bad[0]} holds NaN or infinity; take an earlier checkpoint")
        return cls(tensors, cfg, name)

    def keys(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config keys of a run that begins from this model: those given, and the model's architecture.

        Raises:
            ConfigError: one given that makes another architecture, an `init_task` that the model does not have, or one
                that nothing would begin with.
        """
        own = {k: getattr(self.cfg, k) for k in SHARED}
        given = Config.from_dict(values)
        for key in SHARED:
            if values.get(key) is not None and getattr(given, key) != own[key]:
                raise ConfigError(
                    f"config key {key!r}: got {values[key]!r}, allowed: {own[key]!r}, as in the model of init, or none"
                )
        if given.init_task is not None and given.init_task not in self.cfg.tasks:
            known = f"one of {', '.join(self.cfg.tasks)}" if self.cfg.tasks else "none, since init has a single task"
            close = did_you_mean(given.init_task, self.cfg.tasks)
            raise ConfigError(f"config key 'init_task': got {given.init_task!r}, allowed: {known}.{close}")
        if given.init_task is not None and all(task in self.cfg.tasks for task in given.tasks or (given.task,)):
            raise ConfigError(
                f"config key 'init_task': got {given.init_task!r}, allowed: none, since init has an embedding of "
                f"{', '.join(given.tasks or (given.task,))} already, which is taken"
            )
        return {**own, **values, **({"task_dim": self.cfg.task_dim} if given.multitask and self.cfg.multitask else {})}

    def fitted(self, cfg: Config) -> Config:
        """Return a completed config for a model that begins from this one.

        From a multi-task model it is one, of the config's task or tasks, and as wide as both need.

        Raises:
            ConfigError: `freeze` names a part whose first layer has columns that this model has not.
        """
        cfg = self._several(cfg) if self.cfg.multitask else cfg
        for part in cfg.freeze.split("+") if cfg.freeze is not None and cfg.obs == "state" else ():
            first = "_encoder.state.0.weight" if part == "encoder" else f"_{part}.0.weight"
            _, mine, theirs = _parts(first, cfg, self.cfg)
            if any(own > old for own, old in zip(mine, theirs, strict=True)):
                raise ConfigError(
                    f"config key 'freeze': got {cfg.freeze!r}, allowed: no {part}, which sees more here than in the "
                    "model of init: the weights of what is new would stay random"
                )
        return cfg

    def _several(self, cfg: Config) -> Config:
        own, more = cfg.observation_shape[0], self.cfg.observation_shape[0]
        width = max(cfg.need("action_dim"), self.cfg.need("action_dim"))
        wide = dict(obs_shape={"state": (max(own, more),)}, action_dim=width, task_dim=self.cfg.task_dim)
        if cfg.multitask:
            return cfg.replace(**wide)
        return cfg.replace(
            multitask=True,
            tasks=(cfg.task,),
            action_dims=(cfg.need("action_dim"),),
            episode_lengths=(cfg.need("episode_length"),),
            **wide,
        )


def _config_of(model: OfficialModel) -> Config:
    """Return the config of an official model, whose tasks need no names here where they are none of the known sets."""
    if not model.tasks:
        return model.config(dict(task="init"), partial=True)
    if model.task_set is not None:
        return model.config({})
    widths = model.action_dims or (model.dims["action_dim"],) * model.tasks
    names = tuple(f"task {i}" for i in range(model.tasks))
    return model.config(dict(task="init", tasks=names, action_dims=widths, episode_lengths=(1,) * model.tasks))


@torch.no_grad()
def begin_from(model: WorldModel, donor: Donor, init_task: str | None = None) -> str:
    """Set the weights of a fresh model to what it takes from another one, and say what that is.

    Args:
        model: as `Donor.fitted` has it; what nothing is taken for stays as it is.
        donor: the model that is begun from.
        init_task: the donor's task whose embedding a task begins with that it does not have; None: the mean of all.

    Raises:
        CheckpointError: the architectures differ.
    """
    cfg, theirs = model.cfg, donor.cfg
    differing = [k for k in SHARED if k != "model_size" and getattr(cfg, k) != getattr(theirs, k)]
    if cfg.obs == "rgb" and cfg.observation_shape != theirs.observation_shape:
        differing.append("observation_shape")
    if theirs.multitask and (not cfg.multitask or cfg.task_dim != theirs.task_dim):
        differing.append("task_dim")
    if differing:
        facts = ", ".join(f"{k} is {getattr(theirs, k)} in it and {getattr(cfg, k)} here" for k in differing)
        raise CheckpointError(f"checkpoint {donor.name}: no weights for this model: {facts}")
    mine, new = tensors_only(model.state_dict()), list[str]()
    taken: dict[str, Tensor] = {}
    for name, x in mine.items():
        if name in ("_action_masks", "log_std_min", "log_std_dif"):  # of this config
            taken[name] = x
        elif name == "_task_emb.weight":
            taken[name] = _embedding(x, donor, cfg.tasks, init_task, new)
        elif name not in donor.state:
            taken[name] = x
            new += [name.split(".")[0]] * (name.split(".")[0] not in new)
        else:
            taken[name] = _spliced(x, donor.state[name].to(x), *_parts(name, cfg, theirs))
    with access_to(model).writing():
        model.load_state_dict(taken)
    return _told(donor, cfg, new)


def _parts(name: str, cfg: Config, theirs: Config) -> tuple[int, Sequence[int], Sequence[int]]:
    """Return a dim of a parameter, and the sizes of its parts there in this model and in the other one."""

    def sizes(c: Config, letters: str) -> list[int]:
        known = dict(o=c.observation_shape[0], z=c.latent_dim, e=c.task_dim, a=c.need("action_dim"))
        return [known[letter] for letter in letters]

    head, _, layer = name.partition(".")
    if name == "_encoder.state.0.weight":
        return -1, sizes(cfg, "oe"), sizes(theirs, "oe")
    if head in _FIRST and layer in ("0.weight", "params.0.weight"):
        return -1, sizes(cfg, _FIRST[head]), sizes(theirs, _FIRST[head])
    if name in ("_pi.2.weight", "_pi.2.bias"):  # mean and log std of each action
        return 0, sizes(cfg, "aa"), sizes(theirs, "aa")
    return 0, (), ()


def _spliced(new: Tensor, old: Tensor, dim: int, mine: Sequence[int], theirs: Sequence[int]) -> Tensor:
    """Return `new` with what `old` has of each part along `dim`; without parts, `old`."""
    if not mine:
        if new.shape != old.shape:
            raise CheckpointError(f"init: a tensor is {tuple(old.shape)}, this model has {tuple(new.shape)}")
        return old
    found = new.clone()
    for to, own, width in zip(found.split(list(mine), dim), old.split(list(theirs), dim), mine, strict=True):
        count = min(width, own.shape[dim])
        to.narrow(dim, 0, count).copy_(own.narrow(dim, 0, count))
    return found


def _embedding(fresh: Tensor, donor: Donor, tasks: Sequence[str], init_task: str | None, new: list[str]) -> Tensor:
    """Return an embedding row a task: its own in the other model, or that of `init_task`, or the mean."""
    if not donor.cfg.multitask:
        new.append("task embedding")
        return fresh
    rows = donor.state["_task_emb.weight"].to(fresh)
    found = []
    for task in tasks:
        like = task if task in donor.cfg.tasks else init_task
        found.append(rows.mean(0) if like is None else rows[donor.cfg.tasks.index(like)])
        if like != task:
            new.append(
                f"the embedding of {task}, which begins as {'the mean of all' if like is None else f'that of {like}'}"
            )
    return torch.stack(found)


def _told(donor: Donor, cfg: Config, new: list[str]) -> str:
    """Say what was taken and what begins anew."""
    theirs, dropped = donor.cfg, list[str]()
    for what, own, more in (
        ("observation", theirs.observation_shape[0], cfg.observation_shape[0]),
        ("action", theirs.need("action_dim"), cfg.need("action_dim")),
    ):
        if more > own:
            new.append(f"{what} dims {own + 1} to {more}")
        elif more < own:
            dropped.append(f"{what} dims {more + 1} to {own}")
    kind = f"a model of {len(theirs.tasks)} tasks" if theirs.multitask else f"a model of {theirs.task}"
    facts = [f"begins from {donor.name}, {kind}, with all its weights"]
    facts += [f"left out: {', '.join(dropped)}"] if dropped else []
    return "; ".join([*facts, f"new: {', '.join(new)}"] if new else facts)
