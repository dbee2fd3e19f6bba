"""The config of a file that has none, as official ones: what its tensors say, and of the task what is known of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..compat.state_dict import dims, from_official_entries, of_older_generation, unwrapped
from ..config import DEFAULT_DIMS, MODEL_SIZES, Config
from ..config_values import checked
from ..errors import CheckpointError
from ..task_sets import TASK_SETS, TASKS, set_dims, set_keys, settings_of

_ARCHITECTURE = ("model_size", *DEFAULT_DIMS)
_DIGITS = 5  # of a number that a file has in float32


class OfficialModel:
    """What the tensors of a model say of it.

    Args:
        state: a checkpoint's content of any generation, whatever is wrapped around the model.
        name: the checkpoint, for messages.

    Raises:
        CheckpointError: there is no whole model in it.
    """

    def __init__(self, state: Mapping[Any, Any], name: str) -> None:
        tensors, _ = unwrapped(state, name)
        self.name = name
        self.older = of_older_generation(tensors)
        masks = tensors.get("_action_masks")
        from_official_entries(tensors, "", {})
        self.dims = dims(tensors)
        _check_whole(tensors, self.dims, name)
        self.tasks: int = self.dims["tasks"]
        self.action_dims: tuple[int, ...] = ()
        if masks is not None and self.tasks and masks.shape == (self.tasks, self.dims["action_dim"]):
            self.action_dims = tuple(int(n) for n in masks.nan_to_num(0, 0, 0).sum(-1).tolist())
        self.log_std = _range(tensors.get("log_std_min"), tensors.get("log_std_dif"))

    @property
    def model_size(self) -> int | None:
        """The published size that has these dims, if there is one."""
        return model_size_of(self.dims, self.task_set)

    @property
    def task_set(self) -> str | None:
        """The official set of tasks that has as many, as wide, if there is one."""
        for name in TASK_SETS:
            keys = set_keys(name, None)
            widths = (keys["obs_shape"]["state"][0], keys["action_dim"])
            if self.tasks == len(keys["tasks"]) and widths == (self.dims["observation"], self.dims["action_dim"]):
                return name if self.action_dims in ((), keys["action_dims"]) else None
        return None

    def config(self, given: Mapping[str, Any], partial: bool = False) -> Config:
        """Return the config of this model, with the keys given beside what its tensors say.

        partial: whether an environment completes it: keys that it knows may be missing.

        Raises:
            CheckpointError: keys are missing that neither the tensors nor what is known of the task tell.
            ConfigError: a bad value.
        """
        fields = {f.name: f for f in dataclasses.fields(Config)}
        Config.from_dict({k: v for k, v in given.items() if k not in fields})  # mistyped ones come first
        given = {k: v if v is None else checked(fields[k], v) for k, v in given.items()}
        values = self._architecture() | (self._several(given) if self.tasks else self._one(given, partial))
        values |= {k: v for k, v in given.items() if k not in _ARCHITECTURE}
        if self.dims["num_bins"] <= 1 and "num_bins" not in given:
            self._ask(["num_bins"], "num_bins=1 where it regresses symlog values, 0 where plain ones")
        missing = [k for k in ("task", "tasks", "action_dims", "episode_lengths") if k not in values]
        missing = [k for k in missing if self.tasks or k == "task"]
        if "episode_length" not in values and not self.tasks and not partial:
            missing.append("episode_length")
        if missing:
            self._ask(missing, self._example(missing))
        if self.tasks and len(values["tasks"]) != self.tasks:
            got = f"{len(values['tasks'])} tasks ({values['task']})"
            raise CheckpointError(f"checkpoint {self.name}: got {got}, allowed: the {self.tasks} that it has")
        cfg = Config.from_dict(values).replace(**{k: v for k, v in given.items() if k in _ARCHITECTURE})
        if cfg.episode_length is None:
            return cfg
        return cfg.with_env(cfg.need("obs_shape"), cfg.need("action_dim"), cfg.episode_length)

    def published(self) -> str:
        """Say which of the official models has these tasks and dims."""
        size = "no published size" if self.model_size is None else f"model_size {self.model_size}"
        if not self.tasks:
            return f"a single-task model, {size}"
        return f"{self.task_set or f'no set of {self.tasks} tasks that is known'}, {size}"

    def needs(self) -> str:
        """Say what `load` has to be given beside the file."""
        if self.task_set:
            return "nothing"
        if self.tasks:
            return self._example(["tasks", *([] if self.action_dims else ["action_dims"]), "episode_lengths"])
        extra = "" if self.dims["num_bins"] > 1 else ", num_bins=1 or 0"
        return f"task=NAME{extra}, and episode_length=N where the task is no official one"

    def _architecture(self) -> dict[str, Any]:
        found = {k: v for k, v in self.dims.items() if k not in ("observation", "tasks", "num_bins")}
        width = self.dims["observation"]
        found["obs_shape"] = {"rgb": (width, 64, 64)} if self.dims["obs"] == "rgb" else {"state": (width,)}
        if self.dims["num_bins"] > 1:
            found["num_bins"] = self.dims["num_bins"]
        return found | self.log_std | dict(model_size=self.model_size)

    def _one(self, given: Mapping[str, Any], partial: bool) -> dict[str, Any]:
        """Return what is known of the one task of this model."""
        task = given.get("task")
        if task in TASK_SETS:
            raise CheckpointError(
                f"checkpoint {self.name}: got task={task!r}, allowed: one task, the model has no more"
            )
        known = TASKS.get(str(task))
        if known is None or partial:
            return {}
        own = (self.dims["observation"], self.dims["action_dim"])
        widths = (known.obs_dim, known.action_dim)
        if "episode_length" not in given and self.dims["obs"] == "state" and widths not in (own, (None, None)):
            raise CheckpointError(
                f"checkpoint {self.name}: no model of {task}, whose observation and action have widths "
                f"{widths[0]} and {widths[1]}: its own are {own[0]} and {own[1]}; give the task it was trained on, "
                "or episode_length=N for a task of this name that is none of the official ones"
            )
        return settings_of(str(task))

    def _several(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is known of the tasks of this model."""
        found: dict[str, Any] = dict(multitask=True)
        found |= dict(action_dims=self.action_dims) if self.action_dims else {}
        name = given.get("task", self.task_set)
        if name != self.task_set and name in TASK_SETS:
            tasks, own = len(TASK_SETS[name]), f"{self.tasks} of widths {self.dims['observation']} and "
            raise CheckpointError(
                f"checkpoint {self.name}: no model of {name}, which has {tasks} tasks: its own are {own}"
                f"{self.dims['action_dim']}{f'; it is one of {self.task_set}' if self.task_set else ''}"
            )
        if name in TASK_SETS and "tasks" not in given:
            keys = set_keys(name, None)
            return (
                found
                | {k: keys[k] for k in ("tasks", "action_dims", "episode_lengths")}
                | dict(task=name, episode_length=max(keys["episode_lengths"]))
            )
        if given.get("episode_lengths"):
            found["episode_length"] = max(given["episode_lengths"])
        return found | dict(task=given.get("task", "several"))

    def _ask(self, missing: list[str], example: str) -> None:
        raise CheckpointError(
            f"checkpoint {self.name}: official files carry no config, and tensors do not tell {' and '.join(missing)}; "
            f"give {example}"
        )

    def _example(self, missing: list[str]) -> str:
        examples = dict(
            task="task=NAME, as in task='dog-run'",
            episode_length="episode_length=N, in decisions",
            tasks=f"tasks=({self.tasks} names)",
            action_dims=f"action_dims=({self.tasks} widths)",
            episode_lengths=f"episode_lengths=({self.tasks} lengths in decisions)",
        )
        return ", ".join(examples[k] for k in missing)


def model_size_of(found: Mapping[str, Any], task_set: str | None = None) -> int | None:
    """Return the published size that has the dims found, in a set of tasks if one is given; None if there is none."""
    for size, own in MODEL_SIZES.items():
        wanted = own | (set_dims(task_set, size) if task_set else {})
        if all(found[k] == wanted[k] for k in wanted if k in found):
            return size
    return None


def _check_whole(tensors: Mapping[str, Tensor], found: Mapping[str, Any], name: str) -> None:
    """Raise `CheckpointError` where weights are missing or fit no dims: no file makes a model larger than itself."""
    z, d, a, t, q = (found[k] for k in ("latent_dim", "mlp_dim", "action_dim", "task_dim", "num_q"))
    logits = found["num_bins"]
    heads: dict[str, tuple[tuple[int, ...], int, int]] = {
        "_dynamics.": ((), z + t + a, z),
        "_reward.": ((), z + t + a, logits),
        "_pi.": ((), z + t, 2 * a),
        "_Qs.params.": ((q,), z + t + a, logits),
    }
    heads |= {"_termination.": ((), z + t, 1)} if found["episodic"] else {}
    wanted: dict[str, tuple[int, ...]] = {}
    for head, (lead, wide, out) in heads.items():
        wanted |= {f"{head}0.weight": (*lead, d, wide), f"{head}1.weight": (*lead, d, d)}
        wanted[f"{head}2.weight"] = (*lead, out, d)
    if found["obs"] == "state":
        e, last = found["enc_dim"], found["num_enc_layers"] - 1
        wanted |= {f"_encoder.state.{i}.weight": (e, e) for i in range(1, last)}
        wanted[f"_encoder.state.{last}.weight"] = (z, e)
    else:
        c = found["num_channels"]
        wanted |= {f"_encoder.rgb.{i}.weight": (c, c, k, k) for i, k in ((4, 5), (6, 3), (8, 3))}
    for key, shape in wanted.items():
        got = tuple(tensors[key].shape) if key in tensors else None
        if got != shape:
            what = f"no {key}" if got is None else f"{key} is {got}, allowed beside its other tensors: {shape}"
            raise CheckpointError(f"checkpoint {name}: no whole TD-MPC2 model: {what}")


def _range(low: Tensor | None, width: Tensor | None) -> dict[str, Any]:
    """Return the range of the policy's log std by the config's keys, where a file tells it."""
    if low is None or width is None or low.numel() != 1 or width.numel() != 1:
        return {}
    if not bool(torch.isfinite(low) & torch.isfinite(width)):
        return {}
    if low.dtype.is_floating_point:  # a decimal number, as the file has rounded it
        return dict(log_std_min=round(float(low), _DIGITS), log_std_max=round(float(low) + float(width), _DIGITS))
    return dict(log_std_min=int(low), log_std_max=int(low) + int(width))
