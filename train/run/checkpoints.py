"""Checkpoints of a run: all it takes to go on bit for bit, each of them whole or absent.

    checkpoints/0007-at-12000/   agent.safetensors + agent.json   the weights, as `tdmpc2_fast.load` takes them
                                 training.safetensors             optimisers, scale, random streams, episodes under way
                                 training-1.safetensors           of rank 1, where several shared the run
                                 manifest.json                    counters, checksums, the files of the replay
    checkpoints/latest.*, best.*                                  weights of the newest, and of the best evaluation
    replay/0000000000-0000011500.safetensors                      steps, shared by all checkpoints

A checkpoint is written in a folder of another name, flushed to disk and renamed: a run that is
killed while it writes one leaves earlier ones as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import CheckpointError
from tdmpc2_fast.learn.replay import ReplayBuffer
from tdmpc2_fast.model import checkpoint
from tdmpc2_fast.model.files import flush, read_metadata, read_tensors, replacing, write_tensors
from tdmpc2_fast.model.world_model import WorldModel
from tdmpc2_fast.runtime.ranks import ALONE, Ranks

from ..log.status import returned
from .replay_files import Chunk, ReplayFiles, sha256

FORMAT, OF_RANKS = "tdmpc2-fast-run/1", "tdmpc2-fast-run/2"
_NAME = re.compile(r"(\d+)-at-\d+")
_WEIGHTS = "agent.safetensors"


class Part(NamedTuple):
    """What a rank kept of a run: what was given to `Checkpoints.save`, and the files of its replay."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    chunks: list[Chunk]


@dataclass(frozen=True)
class Saved:
    """A checkpoint, read and found whole.

    weights: state dict of the world model; tensors, values, chunks: as of `Part`; others: those of the other ranks
    that shared the run; dealt: the parts of all, where another number of ranks goes on and replays are dealt out anew.
    """

    folder: Path
    cfg: Config
    weights: dict[str, Any]
    tensors: dict[str, Tensor]
    values: dict[str, Any]
    chunks: list[Chunk]
    others: tuple[Part, ...] = ()
    dealt: tuple[Part, ...] = ()

    @property
    def parts(self) -> list[Part]:
        """What each rank kept, in their order."""
        return [Part(self.tensors, self.values, self.chunks), *self.others]


class Checkpoints:
    """Writes and reads the checkpoints in a run's folder, of which the newest `keep` stay.

    Ranks that share a run share its folder, and write and read together: each its own part of the training state and
    its own replay, the first one all else.
    """

    def __init__(self, run: Path, keep: int, ranks: Ranks = ALONE) -> None:
        self.folder, self.keep, self._ranks = run / "checkpoints", keep, ranks
        self.replay = ReplayFiles(run / "replay", "" if ranks.count == 1 else f"{ranks.rank}-of-{ranks.count}-")

    def save(
        self,
        model: WorldModel,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        buffer: ReplayBuffer | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint; return its folder. Where ranks share it, what one cannot write fails on all.

        values: JSON-ready, `decisions` among them; buffer: the replay, where there is one; about: what `trained` is to
            tell of the weights.

        Raises:
            OSError: it cannot be written; earlier ones are as they were.
        """
        ranks = self._ranks
        folder = self.folder / str(ranks.done(lambda: self._next(values["decisions"]))[0])
        tmp = self.folder / f".{folder.name}.tmp"

        def write() -> dict[str, Any]:
            chunks = [] if buffer is None else self.replay.save(buffer)
            if ranks.first:
                _tell(checkpoint.save(model, tmp / _WEIGHTS).with_suffix(".json"), about)
            write_tensors(tmp / _training(ranks.rank), tensors)
            return dict(values=dict(values), replay=[c._asdict() for c in chunks])

        def finish(own: dict[str, Any], others: list[dict[str, Any]]) -> None:
            manifest = dict(
                format=OF_RANKS if others else FORMAT,
                values=own["values"],
                files={p.name: sha256(p) for p in sorted(tmp.iterdir())},
                replay=own["replay"],
                **(dict(others=others) if others else {}),
            )
            manifest["sha256"] = _digest(manifest)
            with replacing(tmp / "manifest.json") as path:
                path.write_text(json.dumps(manifest, indent=1) + "\n")
            tmp.rename(folder)
            for changed in (self.folder, self.folder.parent):  # the latter by the first checkpoint
                flush(changed)

        try:
            own, *others = ranks.done(write)
            ranks.done(lambda: finish(own, others) if ranks.first else None)
        except BaseException:
            if ranks.first:
                shutil.rmtree(tmp, ignore_errors=True)
            raise
        if ranks.first:
            self._point("latest", folder)
            self._prune()
        return folder

    def _next(self, decisions: int) -> str | None:
        """Return the name of the next checkpoint, whose folder is made under its other name; the first rank does."""
        if not self._ranks.first:
            return None
        self.folder.mkdir(exist_ok=True)
        taken = (_NAME.fullmatch(p.name) for p in self.folder.iterdir())  # also by one that lost its manifest
        number = max((int(match[1]) for match in taken if match), default=0) + 1
        name = f"{number:04d}-at-{decisions}"
        tmp = self.folder / f".{name}.tmp"
        if tmp.exists():  # of a run that was killed while it wrote the same one
            shutil.rmtree(tmp)
        tmp.mkdir()
        return name

    def mark_best(self, about: Mapping[str, Any] | None = None) -> None:
        """Make `best` the weights of the newest checkpoint; `about` is as for `save`. The first rank does."""
        if not self._ranks.first:
            return
        self._point("best", max(self._present())[1])
        _tell(self.folder / "best.json", about)

    def newest(self, note: Callable[[str], None]) -> Saved | None:
        """Return the newest checkpoint that is whole; None where there is none at all.

        Damaged ones after it are set aside, and `note` is told. The first rank looks, and all others take what it
        found.

        Raises:
            CheckpointError: all are damaged, or one is of another version.
            PermissionError: one may not be read.
        """
        found: list[Saved | None] = []

        def look() -> str | None:
            found.append(self._newest(note) if self._ranks.first else None)
            return None if found[0] is None else found[0].folder.name

        name = self._ranks.done(look)[0]
        if name is None or found[0] is not None:
            return found[0]
        manifest = json.loads((self.folder / name / "manifest.json").read_text())
        return self._read(self.folder / name, manifest, check=False)

    def _newest(self, note: Callable[[str], None]) -> Saved | None:
        damaged: list[tuple[Path, Exception]] = []
        for _, folder in sorted(self._present(), reverse=True):
            try:
                manifest = json.loads((folder / "manifest.json").read_text())
                if manifest["format"] in (FORMAT, OF_RANKS):
                    saved = self._read(folder, manifest)
                    break
            except PermissionError:
                raise
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                damaged.append((folder, e))
                continue
            allowed = f"{FORMAT!r}, {OF_RANKS!r}"
            raise CheckpointError(f"checkpoint {folder}: format {manifest['format']!r}, allowed: {allowed}")
        else:
            if damaged:
                each = "; ".join(f"{p}: {e}" for p, e in damaged)
                raise CheckpointError(f"no checkpoint of this run is whole: {each}")
            return None
        for folder, why in damaged:
            names = (folder.with_name(f"damaged-{'again-' * n}{folder.name}") for n in itertools.count())
            aside = next(p for p in names if not p.exists())
            note(f"checkpoint {folder} is damaged ({why}); it is kept as {aside.name}, the one before is taken")
            folder.rename(aside)
        return saved

    def last(self) -> Path | None:
        """Return the folder of the newest, which need not be whole; None where there is none."""
        return max(self._present(), default=(0, None))[1]

    def _read(self, folder: Path, manifest: dict[str, Any], check: bool = True) -> Saved:
        if _digest(manifest) != manifest["sha256"]:
            raise CheckpointError("the checksum of manifest.json differs from what it holds")
        parts = [manifest, *manifest.get("others", [])]
        chunks = [[Chunk(**entry) for entry in part["replay"]] for part in parts]
        sums = [(folder / name, expected) for name, expected in manifest["files"].items()]
        sums += [(self.replay.folder / c.file, c.sha256) for own in chunks for c in own]
        for path, expected in sums if check else []:
            if sha256(path) != expected:
                raise CheckpointError(f"checksum of {path.name} differs from its manifest")
        weights, cfg = checkpoint.read(folder / _WEIGHTS)
        assert cfg is not None
        tensors = [read_tensors(folder / _training(rank))[0] for rank in range(len(parts))]
        each = [Part(x, part["values"], own) for x, part, own in zip(tensors, parts, chunks, strict=True)]
        return Saved(folder, cfg, weights, *each[0], others=tuple(each[1:]))

    def _present(self) -> list[tuple[int, Path]]:
        """Return number and folder of every checkpoint, in no order."""
        names = ((_NAME.fullmatch(p.name), p) for p in self.folder.glob("*-at-*") if (p / "manifest.json").exists())
        return [(int(match[1]), p) for match, p in names if match]

    def _point(self, name: str, folder: Path) -> None:
        """Make `name` the weights of this checkpoint: the same file, where the file system has links."""
        for source in (folder / _WEIGHTS, (folder / _WEIGHTS).with_suffix(".json")):
            with replacing(self.folder / f"{name}{source.suffix}") as tmp:
                tmp.unlink()
                try:
                    os.link(source, tmp)
                except OSError:
                    shutil.copyfile(source, tmp)

    def _prune(self) -> None:
        """Delete what is older than the newest `keep`, and what runs that were killed left behind."""
        kept = [p for _, p in sorted(self._present())[-self.keep :]]
        for path in self.folder.iterdir():
            whole = _NAME.fullmatch(path.name) and path not in kept
            if path.suffix == ".tmp" and not path.is_dir():
                path.unlink()
            elif whole or path.suffix == ".tmp":
                (path / "manifest.json").unlink(missing_ok=True)  # first: without it, it is none
                shutil.rmtree(path)
        manifests = [json.loads((p / "manifest.json").read_text()) for p in kept]
        parts = [part for m in manifests for part in (m, *m.get("others", []))]
        needed = {c["file"] for part in parts for c in part["replay"]}
        if self.replay.folder.exists():
            self.replay.prune(needed)


def _training(rank: int) -> str:
    return f"training-{rank}.safetensors" if rank else "training.safetensors"


def trained(path: Path) -> str:
    """Say how far the weights in a file were trained and what they returned then, as the JSON beside it tells."""
    try:
        told = json.loads(path.with_suffix(".json").read_text())
        facts, of_these = told["trained"], json.loads(read_metadata(path)["manifest"])["sha256"] == told["sha256"]
    except (OSError, ValueError, KeyError, TypeError):  # an official file, an older one, one without its JSON
        of_these = False
    if not of_these:
        return "step and return unknown"
    updates = f"{facts['updates']:,} updates" if facts["updates"] else "no update yet"
    played = f"{facts['decisions']:,} decisions, " if "decisions" in facts else ""
    text = f"step {facts['step']:,} ({played}{updates})"
    if "return" not in facts:
        return f"{text}, not evaluated"
    return f"{text}, {returned(facts['return'], facts['return_std'], facts['episodes'])}"


def tell_as(path: Path, copy: Path) -> None:
    """Have `trained` tell of a copy of weights what it tells of them; they may be rounded in it."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        _tell(copy.with_suffix(".json"), json.loads(path.with_suffix(".json").read_text())["trained"])


def _tell(manifest: Path, about: Mapping[str, Any] | None) -> None:
    """Put what `trained` reads into the JSON beside weights; their own file stays as it is."""
    if about:
        told = json.loads(manifest.read_text()) | dict(trained=dict(about))
        with replacing(manifest) as tmp:
            tmp.write_text(json.dumps(told, indent=1) + "\n")


def _digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all of a manifest but its own."""
    held = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
