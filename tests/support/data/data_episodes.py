"""Episodes of numbers, in the forms that sources give, and data sets of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast import Config
from tdmpc2_fast.train.data.index import INDEX, Index
from tdmpc2_fast.train.data.rows import Kept, kept
from tdmpc2_fast.train.data.writer import write

TASKS = {"walker-walk": (24, 6), "cup-catch": (8, 2), "pendulum-swingup": (3, 1)}


def official_numbers(episodes: int = 6, rows: int = 11, obs: int = 7, action: int = 3) -> dict[str, NDArray[Any]]:
    """What the files in `official/` hold: three tasks, one behind another."""
    rng = np.random.default_rng(0)
    found: dict[str, NDArray[Any]] = dict(
        obs=rng.standard_normal((episodes, rows, obs)).astype(np.float32),
        action=rng.uniform(-1, 1, (episodes, rows, action)).astype(np.float32),
        reward=rng.random((episodes, rows)).astype(np.float32),
        task=np.repeat(np.arange(episodes)[:, None] % 3, rows, 1),
    )
    found["action"][:, 0], found["reward"][:, 0] = np.nan, np.nan
    return found


def episode(rng: np.random.Generator, decisions: int, obs: int, action: int, ends: bool = False) -> dict[str, Any]:
    """An episode as the training loop keeps it."""
    n = decisions + 1
    found: dict[str, Any] = dict(
        obs=rng.standard_normal((n, obs)).astype(np.float32),
        action=rng.uniform(-1, 1, (n, action)).astype(np.float32),
        reward=rng.random(n).astype(np.float32),
        terminated=np.zeros(n, np.float32),
    )
    found["action"][0], found["reward"][0], found["terminated"][0] = np.nan, np.nan, np.nan
    found["terminated"][-1] = ends
    return found


def parts(count: int = 5, seed: int = 0, lengths: tuple[int, ...] = (10, 7, 3), ends: bool = False) -> list[Kept]:
    """Episodes of three tasks, of several lengths."""
    rng = np.random.default_rng(seed)
    return [
        kept(
            task,
            [episode(rng, lengths[i % len(lengths)], *widths, ends and i % 2 == 0) for i in range(count)],
            f"made of seed {seed}",
        )
        for task, widths in TASKS.items()
    ]


def made(folder: Path, shard_bytes: int = 1 << 30, **keys: Any) -> Index:
    """A data set of them."""
    return write(folder, parts(**keys), shard_bytes=shard_bytes)


def multitask(**changes: Any) -> Config:
    """A config for these tasks, in another order than in the set."""
    names = ("pendulum-swingup", "walker-walk", "cup-catch")
    keys: dict[str, Any] = dict(
        multitask=True,
        tasks=names,
        action_dims=tuple(TASKS[n][1] for n in names),
        episode_lengths=(10,) * 3,
        task_dim=4,
        latent_dim=16,
        mlp_dim=24,
        enc_dim=16,
        num_q=3,
        batch_size=16,
        device="cpu",
    )
    return Config.from_dict({**keys, **changes}).with_env({"state": (24,)}, 6, 10)


def forged(folder: Path, change: Any) -> None:
    """Change a set's index as one would who knows how its checksum is made."""
    path = folder / INDEX
    found = json.loads(path.read_text())
    change(found)
    found.pop("sha256", None)
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(found | dict(sha256=hashlib.sha256(text.encode()).hexdigest())))
