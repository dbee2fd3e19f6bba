"""The official state dict, both generations of it, and ours.

Ours holds tensors only. The official one adds an alias of the critics (`_detach_Qs_params`)
and TensorDict leftovers (`__batch_size`, `__device`); the older generation numbers the
critics' parameters `_Qs.params.N`, N = 4*layer + {weight, bias, ln.weight, ln.bias}, and has
no alias, masks or log-std bounds. What programs around it add to the names, and the dicts they
put it in, is taken off by `unwrapped`.
"""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, InputError
from ..inputs import as_tensor
from .foreign import whose

CRITICS, ALIAS, TARGETS = "_Qs.params.", "_detach_Qs_params.", "_target_Qs_params."
_LEAVES = ("weight", "bias", "ln.weight", "ln.bias")
_OLD_KEY = re.compile(r"(_Qs\.params\.|_target_Qs\.params\.)(\d+)$")
_HEADS = ("_encoder", "_dynamics", "_reward", "_pi", "_Qs")
_OURS = {*_HEADS, "_target_Qs", "_target_Qs_params", "_detach_Qs", "_detach_Qs_params"}
_OURS |= {"_termination", "_task_emb", "_action_masks", "log_std_min", "log_std_dif"}
# Segments that torch.compile, DataParallel, FSDP and activation checkpointing put into names.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_DEEPEST, _MOST_NAMES = 64, 1_000_000
_LEFTOVER = re.compile(r"\.__(batch_size|device)$")


def add_official_entries(
    state: Mapping[str, Any], prefix: str, num_q: int, device: torch.device
) -> OrderedDict[str, Any]:
    """Return our state dict with everything the official `load_state_dict` insists on, in its order."""
    out: OrderedDict[str, Any] = OrderedDict()

    def leftovers(group: str) -> None:
        out[f"{prefix}{group}__batch_size"] = torch.Size([num_q])
        out[f"{prefix}{group}__device"] = None if device.type == "cpu" else device

    critics = {k: v for k, v in state.items() if k.startswith(prefix + CRITICS)}
    targets = {k: v for k, v in state.items() if k.startswith(prefix + TARGETS)}
    out.update((k, v) for k, v in state.items() if k not in critics and k not in targets)
    out.update(critics)
    leftovers(CRITICS)
    out.update((k.replace(CRITICS, ALIAS, 1), v) for k, v in critics.items())
    leftovers(ALIAS)
    out.update(targets)
    leftovers(TARGETS)
    return out


def tensors_only(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the entries that carry information: no alias, no leftovers."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and not k.startswith(ALIAS)}


def unwrapped(state: Mapping[Any, Any], name: str) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of the one model in `state` by their official names, and what was taken off to find them.

    A name begins at its first segment that is one of a model's; what stands before it, dicts and prefixes
    alike, says where the model is. The text is empty for a state dict itself, and in official files' `model`.

    Raises:
        CheckpointError: `state` holds no model, or more than one.
    """
    places: dict[tuple[str, ...], dict[str, Tensor]] = {}
    dicts: dict[tuple[str, ...], tuple[str, ...]] = {}
    others, inside = list[tuple[tuple[str, ...], tuple[str, ...], Any]](), set[tuple[tuple[str, ...], str]]()
    for nest, key, value in _leaves(state, name):
        path = (*nest, *key.split("."))
        at = next((i for i, part in enumerate(path) if part in _OURS), None)
        if at is None:
            others.append((nest, path, value))
            continue
        place = path[:at]
        dicts.setdefault(place, nest)
        inside |= {(place, part) for part in path[at:] if part in _WRAPPERS}
        official = ".".join(part for part in path[at:] if part not in _WRAPPERS)
        if official in places.setdefault(place, {}):
            raise CheckpointError(f"checkpoint {name}: {official} is in it under two names, wrapped and plain")
        places[place][official] = value
    # Targets tell a model from what goes by its names, too, such as the moments of an optimiser.
    models = [p for p, held in places.items() if any(k.startswith(("_target_Qs.", TARGETS)) for k in held)]
    models = models or [p for p, held in places.items() if any(k.startswith(_HEADS) for k in held)]
    if len(models) != 1:
        found = " and ".join(_place(p, dicts[p]) or "the file itself" for p in models)
        what = f"more than one model, in {found}; load one of them as a state dict"
        if not models:
            names = whose(".".join(path) for _, path, _ in others)
            what = f"no TD-MPC2 model{names}, allowed: the state dict of one, whatever is around it"
        raise CheckpointError(f"checkpoint {name}: holds {what}")
    place = models[0]
    nest = dicts[place]
    tensors = places[place]
    for where, path, value in others:  # beside the model; what other dicts hold is of the training
        if where == nest and path[: len(place)] == place:
            tensors[".".join(path[len(place) :])] = value
    try:
        tensors = {k: as_tensor(v, k) for k, v in tensors.items() if isinstance(v, (Tensor, np.ndarray))}
    except InputError as e:
        raise CheckpointError(f"checkpoint {name}: {e}") from e
    off = [] if place in ((), ("model",)) and nest == place else [_place(place, nest)]
    off += sorted({f"{part!r} inside names" for p, part in inside if p == place})
    return tensors, ", ".join(off)


def _leaves(
    state: Mapping[Any, Any], name: str, nest: tuple[str, ...] = (), count: Iterator[int] | None = None
) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Yield, for each entry that has a name, the names of the dicts around it, its own, and its value."""
    count = itertools.count() if count is None else count
    for key, value in state.items():
        if len(nest) > _DEEPEST or next(count) > _MOST_NAMES:  # as of dicts in themselves, or many times in others
            where = f"dicts more than {_DEEPEST} deep" if len(nest) > _DEEPEST else f"more than {_MOST_NAMES:,} names"
            raise CheckpointError(f"checkpoint {name}: holds {where}, allowed: a state dict")
        if isinstance(key, str):
            if isinstance(value, Mapping):
                yield from _leaves(value, name, (*nest, key), count)
            else:
                yield nest, key, value


def _place(place: tuple[str, ...], nest: tuple[str, ...]) -> str:
    """Write dicts and prefix as a person would."""
    parts = ["".join(f"[{key!r}]" for key in place[: len(nest)])]
    parts += [f"the prefix '{'.'.join(place[len(nest) :])}.'"] if len(place) > len(nest) else []
    return " with ".join(filter(None, parts))


def dims(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the tensors of a model, by their official names, say about its config, by the config's keys.

    Besides: `observation`, the width of a state or the channels of an image, and `tasks`, how many.

    Raises:
        CheckpointError: tensors it takes are missing, or no layers.
    """
    try:
        return _dims(tensors)
    except (KeyError, IndexError, TypeError) as e:
        raise CheckpointError(f"checkpoint: no whole TD-MPC2 model: {e}") from e


def _dims(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    encoder = sorted(k for k, x in tensors.items() if k.startswith("_encoder.") and x.ndim > 1)
    kind = encoder[0].split(".")[1] if encoder else ""
    first, embedding = tensors[f"_encoder.{kind}.{2 if kind == 'rgb' else 0}.weight"], tensors.get("_task_emb.weight")
    task_dim = 0 if embedding is None else embedding.shape[1]
    found: dict[str, Any] = dict(
        obs=kind,
        observation=first.shape[1] - task_dim,
        action_dim=len(tensors["_pi.2.bias"]) // 2,
        latent_dim=len(tensors["_dynamics.2.bias"]),
        mlp_dim=len(tensors["_pi.0.bias"]),
        num_q=len(tensors["_Qs.params.0.weight"]),
        num_bins=len(tensors["_reward.2.bias"]),
        episodic="_termination.0.weight" in tensors,
        tasks=0 if embedding is None else len(embedding),
        task_dim=task_dim,
    )
    if kind == "rgb":
        return found | dict(num_channels=len(first))
    return found | dict(num_enc_layers=len(encoder), enc_dim=len(first))


def of_older_generation(tensors: Mapping[str, Any]) -> bool:
    """Tell whether names are those of the official code's older generation, which numbers the critics' parameters."""
    return any(_OLD_KEY.match(k) for k in tensors)


def from_official_entries(state: MutableMapping[str, Any], prefix: str, own: Mapping[str, Tensor]) -> None:
    """Turn, in place, any generation of official state dict into our keys.

    `own`: our buffers by full name, which fill in those an old file does not have.
    """
    for key in [k for k in state if k.startswith(prefix)]:
        name = key[len(prefix) :]
        old = _OLD_KEY.match(name)
        stale_mask = name == "_action_masks" and key not in own
        if name.startswith(ALIAS) or _LEFTOVER.search(name) or stale_mask:
            del state[key]
        elif old:
            group = CRITICS if old[1].startswith("_Qs") else TARGETS
            layer, leaf = divmod(int(old[2]), 4)
            state[f"{prefix}{group}{layer}.{_LEAVES[leaf]}"] = state.pop(key)
    for key, value in own.items():
        state.setdefault(key, value)
