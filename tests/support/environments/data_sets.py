"""Small data sets of random episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tdmpc2_fast.train.data.rows import kept
from tdmpc2_fast.train.data.writer import write

SIZES = {"Pendulum-v1": (3, 1), "cup-catch": (8, 2), "reacher-easy": (6, 2), "cartpole-balance": (5, 1)}


def make_data(folder: Path, *tasks: str, episodes: int = 6, length: int = 9, **sizes: tuple[int, int]) -> Path:
    """Write a data set with episodes of `length` decisions of these tasks; sizes: observation and action, by task."""
    parts = []
    for number, task in enumerate(tasks):
        rng = np.random.default_rng(number)
        obs_dim, action_dim = sizes.get(task, SIZES.get(task, (3, 1)))
        found: list[dict[str, Any]] = []
        for _ in range(episodes):
            rows = length + 1
            action = rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32)
            reward = rng.uniform(0, 1, rows).astype(np.float32)
            action[0], reward[0] = np.nan, np.nan
            obs = rng.standard_normal((rows, obs_dim)).astype(np.float32)
            found.append(dict(obs=obs, action=action, reward=reward, terminated=np.zeros(rows, np.float32)))
        parts.append(kept(task, found, "a test"))
    write(folder, parts)
    return folder
