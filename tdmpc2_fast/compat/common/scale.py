"""The official `common.scale`: the running scale of Q values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...learn.scale import percentiles
from ...runtime.backend import resolve_device


class RunningScale(nn.Module):
    """A moving average of the 5%-95% range of Q values, at least 1.

    `value` is a (1,) buffer, updated in place.

    Args:
        cfg: the official `cfg`, of which `tau` is read, or a `Config`.
        device: of the buffers; default `cfg.device`, or the GPU where there is one.
    """

    value: Tensor
    _percentiles: Tensor

    def __init__(self, cfg: Any, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        where = resolve_device(str(device or getattr(cfg, "device", None) or "auto"))
        self.register_buffer("value", torch.ones(1, device=where))
        self.register_buffer("_percentiles", torch.tensor([5.0, 95.0], device=where))

    def state_dict(self, *args: Any, **keys: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return `value` and `percentiles`."""
        return dict(value=self.value, percentiles=self._percentiles)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **keys: Any) -> None:
        """Take what `state_dict` returned."""
        self.value.copy_(state_dict["value"])
        self._percentiles.copy_(state_dict["percentiles"])

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Move `value` one step towards the range of x (B, 1)."""
        low, high = percentiles(x.detach())
        self.value.lerp_((high - low).clamp(min=1.0), self.cfg.tau)

    def forward(self, x: Tensor, update: bool = False) -> Tensor:
        """Return x divided by the scale, which moves first where `update` says so."""
        if update:
            self.update(x)
        return x / self.value

    def __repr__(self) -> str:
        return f"RunningScale(S: {self.value})"
