"""Files that are whole or absent: tensors as safetensors, written aside, flushed to disk and renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError


class replacing:
    """Files written aside: in `with replacing(path) as tmp`, `tmp` takes the place of `path` when all went well.

    Until then, and where writing fails, what is at `path` stays as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        self.tmp.touch()
        self.mode = self.tmp.stat().st_mode
        return self.tmp

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(self.path)  # a full disk does not say which
        try:
            if kind is None:
                os.chmod(self.tmp, self.mode)  # safetensors makes files private; the umask is the user's word on that
                flush(self.tmp)
                os.replace(self.tmp, self.path)
                flush(self.path.parent)
        finally:
            self.tmp.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the list of what is in a folder, is on the disk."""
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written; nothing at `path` has changed.
    """
    package = safetensors()
    on_cpu = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with replacing(path) as tmp:
        try:
            package.torch.save_file(on_cpu, tmp, metadata=metadata)
        except package.SafetensorError as e:  # its word for what the operating system refused
            raise OSError(f"{path}: {e}") from e


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors, on the CPU, and metadata of a safetensors file.

    Raises:
        CheckpointError: it is truncated, or none.
    """
    with _opened(path) as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118 (not a mapping)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; errors are those of `read_tensors`."""
    with _opened(path) as f:
        return f.metadata() or {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    package = safetensors()
    try:
        with package.safe_open(path, framework="pt", device="cpu") as f:
            yield f
    except (package.SafetensorError, OSError) as e:
        raise CheckpointError(f"checkpoint {str(path)!r}: truncated or not a safetensors file ({e})") from e


def safetensors() -> Any:
    """Import the package, when the first file is read or written: planning, learning and measuring do without it."""
    try:
        import safetensors.torch
    except ImportError as e:
        raise CheckpointError("checkpoint: needs the package safetensors, which is not installed") from e
    return safetensors


def as_bytes(x: Tensor) -> Any:
    """Return the bytes of a tensor on the CPU, to be hashed."""
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().data
