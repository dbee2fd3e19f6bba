"""What all formats share: silence while exporters work, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..model.files import flush

_TALKATIVE = ("torch.onnx", "torch.export", "torch._inductor", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep remarks of exporters, which are about themselves, from a command's output."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [x.level for x in loggers]
    try:
        for x in loggers:
            x.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for x, level in zip(loggers, levels, strict=True):
            x.setLevel(level)


@contextlib.contextmanager
def moved_into(folder: Path) -> Iterator[Path]:
    """Give a folder beside, whose files are moved into `folder` when all went well.

    Files may name each other, which a temporary name of one would break.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as beside:
        yield Path(beside)
        for path in sorted(Path(beside).iterdir(), reverse=True):
            flush(path)
            os.replace(path, folder / path.name)
    flush(folder)
