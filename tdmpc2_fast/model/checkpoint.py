"""Weights on disk: safetensors with a JSON manifest, and official `.pt` files.

`NAME.safetensors` holds the tensors and, in its header, the manifest: format, config and a
checksum of the tensors. `NAME.json` is a copy of the manifest for people and scripts; loading
does not need it. A small file holds what acting takes, in half the bytes. Files are written
under a temporary name, flushed to disk and renamed, so an interrupted save leaves the previous
checkpoint whole. Pickles are read with `weights_only=True` only: a file that would run code is
refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compat import foreign
from ..compat.hub_files import fetch, is_address
from ..compat.state_dict import CRITICS, TARGETS, dims, from_official_entries, tensors_only, unwrapped
from ..config import DEFAULT_DIMS, MODEL_SIZES, Config
from ..errors import CheckpointError, ConfigError, InputError, kind_of, warn
from ..runtime.access import access_to
from ..runtime.backend import on_this_machine
from .files import as_bytes, read_metadata, read_tensors, replacing, write_tensors
from .official import OfficialModel, model_size_of
from .world_model import WorldModel

FORMAT = "tdmpc2-fast/1"


def save(model: WorldModel, path: str | Path, cfg: Config | None = None) -> Path:
    """Write the weights of `model` and return the file written.

    A path ending in `.pt` writes the official format, anything else safetensors + JSON, with the config `cfg`, by
    default the model's.
    """
    path = _path(path)
    if path.suffix == ".pt":
        return save_official(model, path)
    path = path.with_name(path.name.removesuffix(".safetensors") + ".safetensors")
    tensors = {k: v.detach().cpu() for k, v in tensors_only(model.state_dict()).items()}
    return _save(tensors, path, dict(config=(cfg or model.cfg).to_dict()))


def save_small(model: WorldModel, path: Path, cfg: Config | None = None) -> Path:
    """Write the weights in float16 and without target critics, which no plan reads, and return the file.

    It loads as any other; what learns on from it begins with target critics equal to its critics.

    Raises:
        CheckpointError: a weight that float16 cannot hold.
    """
    state = {k: v.detach().cpu() for k, v in tensors_only(model.state_dict()).items() if not k.startswith(TARGETS)}
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    large = [k for k, v in tensors.items() if not bool(v.isfinite().all())]
    if large:
        raise CheckpointError(f"{large[0]}: got weights up to {float(state[large[0]].abs().max()):g}, allowed: 65504")
    return _save(tensors, path, dict(config=(cfg or model.cfg).to_dict(), small=True))


def is_small(path: Path) -> bool:
    """Tell whether a file of ours is one of `save_small`."""
    return bool(json.loads(read_metadata(path)["manifest"]).get("small"))


def _save(tensors: dict[str, Tensor], path: Path, more: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = dict(format=FORMAT, sha256=_digest(tensors), **more)
    write_tensors(path, tensors, {"manifest": json.dumps(manifest)})
    with replacing(path.with_suffix(".json")) as tmp:
        tmp.write_text(json.dumps(manifest, indent=1) + "\n")
    return path


def save_official(model: WorldModel, path: str | Path) -> Path:
    """Write the weights of `model` in the official format, and return the file."""
    path = _path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as tmp:
        torch.save({"model": _of_their_own(model.state_dict())}, tmp)
    return path


def _of_their_own(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict whose tensors are no views into a buffer, all of which a pickle would take along."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def own(x: Any) -> Any:
        if not isinstance(x, Tensor) or (x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes):
            return x
        place = (x.data_ptr(), x.shape, x.stride())
        if place not in copies:  # an alias, as `_detach_Qs_params` of the critics, stays one
            copies[place] = x.detach().clone(memory_format=torch.contiguous_format)
        return copies[place]

    return {k: own(v) for k, v in state.items()}


def _path(fp: object) -> Path:
    if not isinstance(fp, (str, os.PathLike)):
        hint = "; a state dict goes to TDMPC2(cfg).load()" if isinstance(fp, Mapping) else ""
        raise InputError(f"fp: got {kind_of(fp)}, allowed: a path{hint}")
    if is_address(fp):
        raise InputError(
            f"fp: got {str(fp)!r}, allowed: a path; tdmpc2_fast.push(agent, 'OWNER/NAME') writes to the Hub"
        )
    return Path(fp)


def find_checkpoint(path: str | Path) -> Path:
    """Return the file that is meant: a checkpoint, with or without its ending, or a run folder's best or latest.

    The latest is meant where the best is of the evaluation before the first update, and more was learned since.

    Of an address on the Hub (`hf://OWNER/NAME/FILE`) it is the file downloaded from there.

    Raises:
        CheckpointError: a folder without checkpoints, or a file of the Hub that cannot be had.
    """
    if is_address(path):
        return fetch(path)
    given = _path(path).expanduser()
    if not given.is_dir():
        with_ending = given.with_name(given.name + ".safetensors")
        return with_ending if not given.exists() and with_ending.is_file() else given
    for folder in (given / "checkpoints", given):
        names = ["best", "latest", "agent", "model"]
        if _updates(folder / "best.json") == 0 < _updates(folder / "latest.json"):
            names.remove("best")
        for name in names:
            if (folder / f"{name}.safetensors").is_file():
                return folder / f"{name}.safetensors"
    if (what := foreign.folder(given)) is not None:
        raise CheckpointError(f"checkpoint {str(path)!r}: {what}, allowed: a run folder, or a file with weights")
    raise CheckpointError(f"checkpoint {str(path)!r}: a folder without checkpoints/best or checkpoints/latest in it")


def _updates(told: Path) -> int:
    """Return how many updates made weights, as the JSON beside them tells; -1 where it does not."""
    try:
        return int(json.loads(told.read_text())["trained"]["updates"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def read(path: str | Path, map_location: torch.device | str = "cpu") -> tuple[dict[str, Any], Config | None]:
    """Return the state dict of a checkpoint, as it is in the file, and, for one of ours, its config.

    Raises:
        CheckpointError: no such file, or one that is truncated, altered or unsafe.
    """
    path = find_checkpoint(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r}: no such file")
    if path.suffix == ".json":
        beside = path.with_suffix(".safetensors")
        beside = beside if beside.is_file() else find_checkpoint(path.parent)
        raise CheckpointError(f"checkpoint {str(path)!r}: holds no weights, allowed: {str(beside)!r}, which has them")
    try:
        safetensors = foreign.check(path)
    except OSError as e:
        raise CheckpointError(f"checkpoint {str(path)!r}: cannot be read: {e.strerror or e}") from e
    if safetensors:
        return _read_safetensors(path, map_location)
    return _read_pickle(path, map_location), None


def read_with_config(path: str | Path, changes: Mapping[str, Any]) -> tuple[dict[str, Any], Config | None, Config]:
    """Return state dict and config of a checkpoint, and that config with `changes` for this machine.

    The config of a file that has none, as official ones, is what its tensors and `changes` say; it is not returned
    as the file's.

    Raises:
        CheckpointError: as `read`, or the file has no config and `changes` lack what its tensors do not tell.
    """
    state, cfg = read(path)
    whole = OfficialModel(state, repr(str(path))).config(changes) if cfg is None else cfg
    return state, cfg, on_this_machine(whole.replace(**changes), changes)


def load(model: WorldModel, fp: str | Path | Mapping[str, Any]) -> None:
    """Load a file, or a state dict, as `load_into` does.

    Raises:
        CheckpointError: as `read` and `load_into`.
        InputError: neither a path nor a state dict.
    """
    if isinstance(fp, Mapping):
        load_into(model, fp)
    elif isinstance(fp, (str, os.PathLike)):
        state, saved = read(fp, model.device)
        load_into(model, state, repr(str(fp)), saved=saved)
    else:
        raise InputError(f"fp: got {kind_of(fp)}, allowed: a path or a state dict")


def load_into(
    model: WorldModel,
    state: Mapping[str, Any],
    name: str = "state dict",
    note: Callable[[str], object] = warn,
    saved: Config | None = None,
) -> None:
    """Load any generation of state dict, whatever it is wrapped in; `note` is told what was taken off.

    saved: the config it was saved with, where that is known.

    Raises:
        CheckpointError: it holds no model, several, another one or one saved with settings that give its weights
            another meaning (what differs is named), or weights that are not finite in the dtype of `model`,
            which stays as it was.
    """
    probe, taken_off = unwrapped(state, name)
    from_official_entries(probe, "", dict(model.named_buffers(recurse=False)))
    mine = tensors_only(model.state_dict())
    _check_fit(probe, mine, name, model.cfg, saved)
    cast = {k: probe[k].to(mine[k].dtype) for k in mine}
    bad = [k for k in mine if not bool(torch.isfinite(cast[k]).all())]
    if bad:
        raise CheckpointError(
            f"checkpoint {name}: {len(bad)} of {len(mine)} tensors hold NaN or infinity as {model.dtype}: "
            f"{', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}; take an earlier checkpoint"
        )
    for key in ("log_std_min", "log_std_dif"):
        theirs, own = probe[key].double(), mine[key].to(probe[key]).double()  # rounded as the file is
        if theirs != own:
            raise CheckpointError(
                f"checkpoint {name}: {key} is {float(theirs)}, this config has {float(own)}; "
                "set log_std_min and log_std_max to the checkpoint's"
            )
    with access_to(model).writing():
        model.load_state_dict(cast)
    if taken_off:
        note(f"checkpoint {name}: taken off to find the model: {taken_off}")


def _check_fit(
    theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor], name: str, cfg: Config, saved: Config | None
) -> None:
    """Raise `CheckpointError` where names, shapes, kinds or meanings of numbers differ, with the keys that mend it."""
    wrong = [
        f"{k} is {tuple(theirs[k].shape)}, this model has {tuple(mine[k].shape)}"
        for k in mine
        if k in theirs and theirs[k].shape != mine[k].shape
    ]
    wrong += [
        f"{k} is {theirs[k].dtype}, allowed: floating point"
        for k in mine
        if k in theirs and mine[k].is_floating_point() and not theirs[k].is_floating_point()
    ]
    missing, extra = [k for k in mine if k not in theirs], [k for k in theirs if k not in mine]
    if not (wrong or missing or extra):
        _check_meaning(name, cfg, saved)
        return
    try:
        found = dims(theirs)
        if saved is not None:
            found["num_bins"] = saved.num_bins
        elif found["num_bins"] == 1:  # or 0, which no tensor tells
            found["num_bins"] = cfg.num_bins if cfg.num_bins <= 1 else "1 or 0"
        why = _difference(found, dims(mine) | dict(num_bins=cfg.num_bins), cfg)
    except CheckpointError:  # no whole model: only its tensors can be named
        why = ""
    facts = wrong[:2] + [f"no {k}" for k in missing[:2]] + [f"unknown {k}" for k in extra[:2]]
    raise CheckpointError(
        f"checkpoint {name}: made for another model ({len(wrong)} tensors differ, {len(missing)} missing, "
        f"{len(extra)} unknown): {why or '; '.join(facts)}"
    )


def _check_meaning(name: str, cfg: Config, saved: Config | None) -> None:
    """Raise `CheckpointError` where the same weights would mean something else than with the config they have."""
    bins = ["vmin", "vmax"] if cfg.num_bins > 1 else []
    keys = ["num_bins", *bins, "simnorm_dim", "log_std_min", "log_std_max"]
    other = [k for k in keys if saved is not None and getattr(saved, k) != getattr(cfg, k)]
    if other:
        facts = ", ".join(f"{k} is {getattr(saved, k)} in it and {getattr(cfg, k)} here" for k in other)
        set_ = " ".join(f"{k}={getattr(saved, k)}" for k in other)
        raise CheckpointError(f"checkpoint {name}: its weights would mean something else: {facts}; set {set_}")


def _difference(theirs: dict[str, Any], mine: dict[str, Any], cfg: Config) -> str:
    """Say what differs between two models by their `dims`, and how to make `cfg`, of the second, fit."""
    keys = [k for k in theirs if theirs[k] != mine.get(k)]
    if not keys:
        return ""
    facts = ", ".join(f"{k} is {theirs[k]} in it and {mine.get(k, 'none')} here" for k in keys)
    sized = [k for k in keys if k in DEFAULT_DIMS]
    size = model_size_of(theirs)
    if sized and size not in (None, cfg.model_size):  # which leaves dims that were given as they are
        usual = DEFAULT_DIMS | MODEL_SIZES.get(cfg.model_size or 0, {})
        set_ = [f"model_size={size}", *(f"{k}={theirs[k]}" for k in sized if mine.get(k) != usual[k])]
    else:
        set_ = [f"{k}={theirs[k]}" for k in sized]
    set_ += [f"{k}={str(theirs[k]).lower()}" for k in ("obs", "episodic", "num_bins") if k in keys]
    advice = [f"set {' '.join(set_)}"] if set_ else []
    if {"observation", "action_dim", "tasks", "task_dim"} & {*keys} and "obs" not in keys:
        advice.append("give the task it was trained on")
    return f"{facts}; {' and '.join(advice)}"


def _read_safetensors(path: Path, map_location: torch.device | str) -> tuple[dict[str, Any], Config | None]:
    tensors, metadata = read_tensors(path)
    if "manifest" not in metadata and any("_dynamics." in k for k in tensors):  # weights that others wrote
        return {k: v.to(map_location) for k, v in tensors.items()}, None
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
    if manifest.get("small"):
        tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
        tensors |= {TARGETS + k.removeprefix(CRITICS): v.clone() for k, v in tensors.items() if k.startswith(CRITICS)}
    return {k: v.to(map_location) for k, v in tensors.items()}, config


def _digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, shapes and bytes of all tensors."""
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
        # Torch's message says how to run the file all the same; pass on only what was found.
        found = re.search(r"Unsupported \w+: GLOBAL (\S+)", str(e))
        raise CheckpointError(
            f"checkpoint {str(path)!r}: refused, it holds more than weights{f' ({found[1]})' if found else ''} or is "
            "damaged; allowed: what torch.save(model.state_dict(), path) writes"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise CheckpointError(f"checkpoint {str(path)!r}: truncated or not a checkpoint ({reason})") from e
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {str(path)!r}: holds {kind_of(state)}, allowed: a state dict")
    return state
