"""The official `common.buffer`: the replay that the official trainers fill and sample."""

from __future__ import annotations

from typing import Any

import torch

from ...config import Config
from ...learn.replay import ReplayBuffer


class Buffer(ReplayBuffer):
    """A `ReplayBuffer` with the official constructor and methods.

    It has no need of torchrl or tensordict and takes TensorDicts as well as dicts. `capacity`, `num_eps`, `add`
    and `sample` are inherited: samples come in a `Batch`, a tuple of the official five values.

    Args:
        cfg: the official `cfg`, completed by the environment, or a `Config`.
        device: where samples are wanted; default `cfg.device`, or the GPU where there is one.
    """

    def __init__(self, cfg: Any, device: torch.device | str | None = None) -> None:
        ours = Config.from_official(cfg)
        super().__init__(ours, device or ours.device)

    def load(self, td: Any) -> int:
        """Add episodes of one length, each field (episodes, T, ...), and return the number of episodes so far."""
        count = len(td["reward"])
        for i in range(count):
            self.add({k: td[k][i] for k in td.keys() if k != "episode"})  # noqa: SIM118 (a TensorDict is no dict)
        return self.num_eps
