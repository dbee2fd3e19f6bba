"""Whether `compile=true` can be served here."""

from __future__ import annotations

import os
import tempfile
import warnings

import torch
from torch.utils._triton import has_triton

from ..errors import warn

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def can_compile(device: torch.device) -> bool:
    """Tell whether torch.compile makes code worth running for `device`; where not, warn and say why.

    A warning and no error: `compile` is true in the official `cfg`, which must train anywhere, and
    changes no number beyond rounding.
    """
    why = why_not_compiled(device)
    if why is not None:
        warnings.warn(f"config key 'compile': got True, and updates run uncompiled: {why}", stacklevel=2)
    return why is None


def have_a_cache() -> None:
    """Give torch another folder for its compiler's cache where it cannot make the configured one, and warn of it.

    torch makes that folder when the first optimiser is built, whether anything is compiled or not.
    """
    try:
        os.makedirs(os.environ.get(_CACHE, os.curdir), exist_ok=True)
    except OSError as e:
        os.environ[_CACHE] = folder = tempfile.mkdtemp(prefix="torchinductor-")
        warn(f"{_CACHE}: torch cannot make this folder ({in_one_line(e)}), which every optimiser needs; used: {folder}")


def why_not_compiled(device: torch.device) -> str | None:
    """Say why torch.compile is of no use for `device`; None where it is of use.

    On a CPU it needs a C++ compiler, and is slow where it finds no vector instructions.
    """
    if device.type != "cpu":
        return None if has_triton() else "torch.compile needs a working Triton on a GPU"
    try:
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        if not pick_vec_isa() and torch.backends.cpu.get_cpu_capability() != "DEFAULT":
            return "torch.compile finds no vector instructions, and would be slow without them"
    except Exception as e:  # whatever a missing compiler raises
        return f"torch.compile needs a C++ compiler: {in_one_line(e)}"
    return None


def in_one_line(e: Exception) -> str:
    """Return the kind of an error and the first paragraph of what it says."""
    return " ".join(f"{type(e).__name__}: {e}".split("\n\n")[0].split())
