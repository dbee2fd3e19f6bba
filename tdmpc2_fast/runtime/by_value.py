"""Tensors in pickles by their values: the original may be gone before the other process opens the pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Values: TypeAlias = dict[str, tuple[torch.dtype, Any]]
"""Dtype and numpy array by name."""


def by_value(tensors: Mapping[str, Tensor]) -> Values:
    """Return the values of tensors. torch itself would hand a process their memory, which nobody keeps alive."""
    on_cpu = {k: x.detach().cpu() for k, x in tensors.items()}
    # numpy has no bfloat16: its bits go as integers.
    return {k: (x.dtype, (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()) for k, x in on_cpu.items()}


def from_values(values: Values) -> dict[str, Tensor]:
    """Return the tensors that `by_value` was given, on the CPU."""
    return {k: torch.from_numpy(data).view(dtype) for k, (dtype, data) in values.items()}
