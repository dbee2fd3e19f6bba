"""The folder of torch's compiler, which it makes whether anything is compiled or not."""

from __future__ import annotations

import os
import tempfile

from ..errors import warn

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def have_a_cache() -> None:
    """Give torch another folder for its compiler's cache where it cannot make the configured one, and warn of it.

    torch makes that folder when the first optimiser is built, whether anything is compiled or not.
    """
    try:
        os.makedirs(os.environ.get(_CACHE, os.curdir), exist_ok=True)
    except OSError as e:
        os.environ[_CACHE] = folder = tempfile.mkdtemp(prefix="torchinductor-")
        warn(f"{_CACHE}: torch cannot make this folder ({in_one_line(e)}), which every optimiser needs; used: {folder}")


def in_one_line(e: Exception) -> str:
    """Return the kind of an error and the first paragraph of what it says."""
    return " ".join(f"{type(e).__name__}: {e}".split("\n\n")[0].split())
