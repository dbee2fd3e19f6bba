"""Writes this folder with Minari: python make_files.py FOLDER, and take the folders in FOLDER/point."""

# mypy: ignore-errors
from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["MINARI_DATASETS_PATH"] = sys.argv[1]
import gymnasium
import minari

sys.path.insert(0, str(Path(__file__).parents[3] / "support" / "environments"))

for name, keys in (("parts", dict(parts=True)), ("discrete", dict(discrete=True))):
    gymnasium.register(f"Point-{name}-v0", "point_env:Point", kwargs=keys, max_episode_steps=10)
    env = minari.DataCollector(gymnasium.make(f"Point-{name}-v0", disable_env_checker=True), data_format="hdf5")
    for seed in (0, 3):  # of the parts one is terminated, one is not
        env.reset(seed=seed)
        env.action_space.seed(seed)
        ended = False
        while not ended:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            ended = terminated or truncated
    env.create_dataset(f"point/{name}-v0", algorithm_name="random", code_permalink="", author="", author_email="")
