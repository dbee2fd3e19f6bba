"""Whether torch.compile gives a fair baseline here."""

from __future__ import annotations

import torch
from torch.utils._triton import has_triton

from tdmpc2_fast.runtime.torch_cache import in_one_line


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
