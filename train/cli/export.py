"""The command `export`: a checkpoint's plan and policy prior as files for programs without this package."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from tdmpc2_fast.errors import CheckpointError, ConfigError, did_you_mean

from . import keys, tables

_ENDINGS = dict(onnx=".onnx", torch=".pt2", official=".pt", small=".safetensors")
_OF_MACHINE = (
    *("device", "backend", "precision", "num_threads", "env_workers", "work_dir", "data_dir", "init", "checkpoint"),
    *("enable_wandb", "wandb_project", "wandb_entity"),
)
_PARTS = dict(official=[""], small=["-small"])  # of weights; a plan has its prior beside it


def export(words: Sequence[str]) -> int:
    """Write a checkpoint's plan for other programs.

    RUN is a checkpoint or a run folder. format=onnx and format=torch write two files: the whole plan, with
    everything random as an input, and the policy prior alone; docs/export.md says what they take. format=official
    writes weights that the official code loads; format=small those that acting takes, in float16, without settings of
    the machine they were made on.
    """
    options, words = keys.options(words, keys.ExportOptions)
    given = _only(words)
    if options.opset is not None and options.format != "onnx":
        raise ConfigError(f"config key 'opset': got {options.opset}, allowed: none with format={options.format}")
    if options.compiled and options.format != "torch":
        raise ConfigError(f"config key 'compiled': got True, allowed: false with format={options.format}")
    out = None if options.out is None else _checked(Path(options.out).expanduser(), _ENDINGS[options.format])

    from tdmpc2_fast.config import Config
    from tdmpc2_fast.export import DEFAULT_OPSET, onnx_file, torch_package
    from tdmpc2_fast.export.graphs import PlanGraph, PriorGraph
    from tdmpc2_fast.model import checkpoint
    from tdmpc2_fast.model.world_model import WorldModel

    from ..run.checkpoints import tell_as, trained

    opset = DEFAULT_OPSET if options.opset is None else options.opset
    if options.format == "onnx":
        onnx_file.check_onnx(opset)
    elif options.compiled:
        torch_package.check_compiler()
    path = checkpoint.find_checkpoint(given)
    files = _files(path, out, options.format)
    state, saved = checkpoint.read(path)
    if saved is None:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: official files carry no config; agent = TDMPC2(cfg), agent.load({path.name!r}) "
            f"and agent.save({path.stem!r}) make a file that has one, with the cfg it was trained with"
        )
    model = WorldModel(saved.replace(device="cpu", backend="torch", precision="float32"))
    checkpoint.load_into(model, state, repr(str(path)), keys.to_stderr, saved)
    print(f"{path}: {trained(path)}")
    if options.format == "official":
        print(checkpoint.save(model, files[0]))
        return 0
    if options.format == "small":
        small = checkpoint.save_small(model, files[0], saved.replace(**{k: getattr(Config(), k) for k in _OF_MACHINE}))
        tell_as(path, small)
        print(f"{small}: {small.stat().st_size / 1e6:.2f} MB, of {path.stat().st_size / 1e6:.2f}")
        return 0
    for make, file in zip((PlanGraph, PriorGraph), files, strict=True):
        graph = make(model)
        if options.format == "onnx":
            written = onnx_file.write_onnx(graph, file, opset)
        else:
            written = torch_package.write_package(graph, file, options.compiled)
        print(*written, sep="\n", flush=True)
        rows = [("in", *p) for p in graph.inputs] + [("out", *p) for p in graph.outputs]
        shown = [(way, name, str(shape), dtype, law) for way, name, shape, dtype, law in rows]
        print(tables.rendered(tables.grid(shown, ("", "name", "shape", "dtype", "drawn"), fixed=5)), flush=True)
    return 0


def _only(words: Sequence[str]) -> str:
    """Return the one argument, and refuse keys that the command has not."""
    paths, others = keys.arguments(words)
    known = [f.name for f in dataclasses.fields(keys.ExportOptions)]
    if others or len(paths) != 1:
        close = did_you_mean(others[0].partition("=")[0], known) if others else ""
        got = f"got {others[0]!r}" if others else f"got {len(paths)} arguments ({' '.join(paths)})"
        raise ConfigError(f"{got}, allowed: tdmpc2-fast export RUN [{'=] ['.join(known)}=].{close}")
    return paths[0]


def _checked(out: Path, ending: str) -> Path:
    """Return what `out=` names, if it can be made: a folder, or a file with this ending that is not there yet."""
    other = out.suffix in _ENDINGS.values() and out.suffix != ending
    if (other or out.is_file()) and not out.is_dir():
        what = "which exists" if out.exists() else f"which ends in {out.suffix}"
        raise ConfigError(f"config key 'out': got {str(out)!r}, {what}, allowed: a folder, or a new file in {ending}")
    return out


def _files(checkpoint: Path, out: Path | None, kind: str) -> list[Path]:
    """Return the files to write, with a number in their names where one of these is taken."""
    ending, parts = _ENDINGS[kind], _PARTS.get(kind, ["-plan", "-prior"])
    if out is None:
        stem = checkpoint.with_suffix("")
    elif out.suffix == ending and not out.is_dir():
        stem, parts = out.with_suffix(""), ["", "-prior"][: len(parts)]
    else:
        stem = out / checkpoint.stem
    for n in itertools.count(1):
        number = "" if n == 1 else f"-{n}"
        files = [stem.with_name(f"{stem.name}{part}{number}{ending}") for part in parts]
        if not any(f.exists() or f.with_name(f"{f.name}.data").exists() for f in files):
            break
    return files
