"""Tensors in pickles by their values: what is pickled for another process may be gone before that one looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Values: TypeAlias = dict[str, tuple[torch.dtype, Any]]
"""By name: dtype and numpy array."""


def by_value(tensors: Mapping[str, Tensor]) -> Values:
    """Values of tensors of any device. torch hands tensors themselves to a process by their memory, not kept alive."""
    on_cpu = {k: x.detach().cpu() for k, x in tensors.items()}
    # numpy has no bfloat16: its bits go as integers.
    return {k: (x.dtype, (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()) for k, x in on_cpu.items()}


def from_values(values: Values) -> dict[str, Tensor]:
    """The tensors that `by_value` was given, on the CPU."""
    return {k: torch.from_numpy(data).view(dtype) for k, (dtype, data) in values.items()}
