"""Weights on disk: safetensors with a JSON manifest, and official `.pt` files.

`NAME.safetensors` holds the tensors, `NAME.json` what they are: config, checksum, version.
Both are written to a temporary file, flushed to disk and renamed, the manifest last, so an
interrupted save leaves the previous checkpoint usable. Pickles are read with
`weights_only=True` only: a file that would run code is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from .compat.state_dict import tensors_only
from .config import Config
from .errors import CheckpointError
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
        with _replacing(path) as tmp:
            torch.save({"model": state}, tmp)
        return path
    path = path.with_name(path.name.removesuffix(".safetensors") + ".safetensors")
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors_only(state).items()}
    blob = save_safetensors(tensors)
    digest = hashlib.sha256(blob).hexdigest()
    manifest = dict(format=FORMAT, weights=path.name, sha256=digest, config=model.cfg.to_dict())
    # The weights carry their checksum in the name of the manifest's promise: weights first,
    # manifest last, and a reader that finds them apart says so.
    with _replacing(path) as tmp:
        tmp.write_bytes(blob)
    with _replacing(path.with_suffix(".json")) as tmp:
        tmp.write_text(json.dumps(manifest, indent=1) + "\n")
    return path


def read(path: str | Path, map_location: torch.device | str = "cpu") -> tuple[dict[str, Any], Config | None]:
    """State dict of a checkpoint file and, if it has a manifest, its config.

    Raises:
        CheckpointError: no such file, or one that is truncated, altered or unsafe.
    """
    path = Path(path)
    if not path.is_file() and path.with_name(path.name + ".safetensors").is_file():
        path = path.with_name(path.name + ".safetensors")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r}: no such file")
    if path.suffix == ".json":
        path = path.with_suffix(".safetensors")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, map_location)
    return _read_pickle(path, map_location), None


def load_into(model: WorldModel, state: dict[str, Any], name: str = "state dict") -> None:
    """Load any generation of state dict; a mismatch names the first tensors that differ."""
    state = dict(state["model"]) if "model" in state and isinstance(state["model"], dict) else dict(state)
    probe = dict(state)
    own = dict(model.named_buffers(recurse=False))
    from .compat.state_dict import from_official_entries

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
    model.load_state_dict(state)


def _read_safetensors(path: Path, map_location: torch.device | str) -> tuple[dict[str, Any], Config]:
    manifest_path = path.with_suffix(".json")
    try:
        manifest = json.loads(manifest_path.read_text())
        config = Config.from_dict(manifest["config"])
        digest = manifest["sha256"]
    except FileNotFoundError as e:
        raise CheckpointError(f"checkpoint {str(path)!r}: its manifest {manifest_path.name} is missing") from e
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise CheckpointError(f"checkpoint {str(path)!r}: its manifest {manifest_path.name} is damaged ({e})") from e
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {str(path)!r}: format {manifest.get('format')!r}, allowed: {FORMAT!r}")
    blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != digest:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: checksum differs from its manifest; the file is truncated or altered"
        )
    try:
        tensors = load_safetensors(blob)
    except SafetensorError as e:
        raise CheckpointError(f"checkpoint {str(path)!r}: not a safetensors file ({e})") from e
    return {k: v.to(map_location) for k, v in tensors.items()}, config


def _read_pickle(path: Path, map_location: torch.device | str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as e:
        reason = str(e).splitlines()[0]
        raise CheckpointError(
            f"checkpoint {str(path)!r}: refused, it holds more than weights or is damaged ({reason})"
        ) from e
    except (RuntimeError, EOFError, OSError, ValueError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise CheckpointError(f"checkpoint {str(path)!r}: truncated or not a checkpoint ({reason})") from e
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {str(path)!r}: holds a {type(state).__name__}, allowed: a state dict")
    return state


class _replacing:
    """`with _replacing(path) as tmp`: write `tmp`, which takes the place of `path` when all went well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.tmp

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.tmp.unlink(missing_ok=True)
            return
        with open(self.tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(self.tmp, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
