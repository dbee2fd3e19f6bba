"""The official state dict, both generations of it, and ours.

Ours holds tensors only. The official one adds an alias of the critics (`_detach_Qs_params`)
and TensorDict leftovers (`__batch_size`, `__device`); the older generation numbers the
critics' parameters `_Qs.params.N`, N = 4*layer + {weight, bias, ln.weight, ln.bias}, and has
no alias, masks or log-std bounds.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

CRITICS, ALIAS, TARGETS = "_Qs.params.", "_detach_Qs_params.", "_target_Qs_params."
_LEAVES = ("weight", "bias", "ln.weight", "ln.bias")
_OLD_KEY = re.compile(r"(_Qs\.params\.|_target_Qs\.params\.)(\d+)$")
_LEFTOVER = re.compile(r"\.__(batch_size|device)$")


def add_official_entries(
    state: Mapping[str, Any], prefix: str, num_q: int, device: torch.device
) -> OrderedDict[str, Any]:
    """Our state dict with everything the official `load_state_dict` insists on, in its order."""
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
    """The entries that carry information: no alias, no leftovers."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and not k.startswith(ALIAS)}


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
