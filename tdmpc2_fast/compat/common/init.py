"""The official `common.init`: how weights begin."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ...model.layers import init_weights


def weight_init(m: nn.Module) -> None:
    """Initialise a linear layer (weights of std 0.02, no bias) or an embedding; leave any other module."""
    if isinstance(m, nn.Linear) and m.bias is None:
        nn.init.trunc_normal_(m.weight, std=0.02)
    else:
        init_weights(m)


def zero_(params: Iterable[Tensor]) -> None:
    """Set parameters to zero."""
    for p in params:
        p.data.fill_(0)
