"""Writes this folder's files with the tensordict that can be imported: python make_files.py FILE [stacked]."""

# mypy: ignore-errors
from __future__ import annotations

import multiprocessing.reduction
import sys
from pathlib import Path

import torch
import torch.multiprocessing.reductions

# tensordict 0.3 to 0.5 import this name from where newer versions of torch have it no more
torch.multiprocessing.reductions.ForkingPickler = multiprocessing.reduction.ForkingPickler
from tensordict import TensorDict  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[3] / "support" / "data"))
from data_episodes import official_numbers  # noqa: E402

numbers = {k: torch.from_numpy(x) for k, x in official_numbers().items()}
count, steps = numbers["reward"].shape
rows = [
    [TensorDict({k: x[e, t : t + 1] for k, x in numbers.items()}, (1,)) for t in range(steps)] for e in range(count)
]
episodes = torch.stack([torch.cat(row) for row in rows])
torch.save(episodes if "stacked" in sys.argv else episodes.contiguous(), sys.argv[1])
