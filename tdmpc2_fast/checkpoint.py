"""Weights on disk: safetensors with a JSON manifest, and official `.pt` files.

`NAME.safetensors` holds the tensors and, in its header, the manifest: format, config and a
checksum of the tensors. `NAME.json` is a copy of the manifest for people and scripts; loading
does not need it. Files are written under a temporary name, flushed to disk and renamed, so
an interrupted save leaves the previous checkpoint whole. Pickles are read with
`weights_only=True` only: a file that would run code is refused.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .compat.state_dict import from_official_entries, tensors_only
from .config import Config
from .errors import CheckpointError, ConfigError
from .files import as_bytes, read_tensors, replacing, write_tensors
from .world_model import WorldModel

FORMAT = "tdmpc2-fast/1"


def save(model: WorldModel, path: str | Path) -> Path:
    """Write the weights of `model`; returns the file written.

    A path ending in `.pt` writes the official format, anything else safetensors + JSON.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    if path.suffix == ".pt":
        with replacing(path) as tmp:
            torch.save({"model": state}, tmp)
        return path
    path = path.with_name(path.name.removesuffix(".safetensors") + ".safetensors")
    tensors = {k: v.detach().cpu() for k, v in tensors_only(state).items()}
    manifest = dict(format=FORMAT, sha256=_digest(tensors), config=model.cfg.to_dict())
    write_tensors(path, tensors, {"manifest": json.dumps(manifest)})
    with replacing(path.with_suffix(".json")) as tmp:
        tmp.write_text(json.dumps(manifest, indent=1) + "\n")
    return path


def read(path: str | Path, map_location: torch.device | str = "cpu") -> tuple[dict[str, Any], Config | None]:
    """State dict of a checkpoint file and, for one of ours, its config.

    Raises:
        CheckpointError: no such file, or one that is truncated, altered or unsafe.
    """
    path = Path(path)
    if not path.is_file() and path.with_name(path.name + ".safetensors").is_file():
        path = path.with_name(path.name + ".safetensors")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, map_location)
    return _read_pickle(path, map_location), None


def load_into(model: WorldModel, state: dict[str, Any], name: str = "state dict") -> None:
    """Load any generation of state dict; a mismatch names the first tensors that differ."""
    state = dict(state["model"]) if "model" in state and isinstance(state["model"], dict) else dict(state)
    probe = dict(state)
    own = dict(model.named_buffers(recurse=False))
    from_official_entries(probe, "", own)
    mine = tensors_only(model.state_dict())
    wrong = [
        f"{k} is {tuple(probe[k].shape)}, this model has {tuple(mine[k].shape)}"
        for k in mine
        if isinstance(probe.get(k), Tensor) and probe[k].shape != mine[k].shape
    ]
    missing = [k for k in mine if k not in probe]
    extra = [k for k in probe if k not in mine]
    if wrong or missing or extra:
        facts = wrong[:2] + [f"no {k}" for k in missing[:2]] + [f"unknown {k}" for k in extra[:2]]
        raise CheckpointError(
            f"checkpoint {name}: made for another model ({len(wrong)} shapes differ, {len(missing)} tensors "
            f"missing, {len(extra)} unknown): {'; '.join(facts)}. Check model_size, task and obs."
        )
    for key in ("log_std_min", "log_std_dif"):
        if float(probe[key]) != float(mine[key]):
            raise CheckpointError(
                f"checkpoint {name}: {key} is {float(probe[key])}, this config has {float(mine[key])}; "
                "set log_std_min and log_std_max to the checkpoint's"
            )
    model.load_state_dict(state)


def _read_safetensors(path: Path, map_location: torch.device | str) -> tuple[dict[str, Any], Config]:
    tensors, metadata = read_tensors(path)
    try:
        manifest = json.loads(metadata["manifest"])
        kind = manifest["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise CheckpointError(f"checkpoint {str(path)!r}: no manifest of tdmpc2-fast in its header") from e
    if kind != FORMAT:
        raise CheckpointError(f"checkpoint {str(path)!r}: format {kind!r}, allowed: {FORMAT!r}")
    if _digest(tensors) != manifest.get("sha256"):
        raise CheckpointError(f"checkpoint {str(path)!r}: checksum differs from its manifest; the file was altered")
    try:
        config = Config.from_dict(manifest["config"])
    except (ConfigError, KeyError, TypeError) as e:
        raise CheckpointError(f"checkpoint {str(path)!r}: its config cannot be used: {e}") from e
    return {k: v.to(map_location) for k, v in tensors.items()}, config


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of all tensors."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name]
        h.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        h.update(as_bytes(x))
    return h.hexdigest()


def _read_pickle(path: Path, map_location: torch.device | str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as e:
        # Torch's message opens with how to run the file all the same; pass on only what was found.
        found = [line.strip(" .") for line in str(e).splitlines() if "nsupported" in line]
        raise CheckpointError(
            f"checkpoint {str(path)!r}: refused, it holds more than weights or is damaged"
            + (f" ({found[0]})" if found else "")
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise CheckpointError(f"checkpoint {str(path)!r}: truncated or not a checkpoint ({reason})") from e
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {str(path)!r}: holds a {type(state).__name__}, allowed: a state dict")
    return state
