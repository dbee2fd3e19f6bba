"""Runs and published curves as files, for tests of what is read and drawn of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tdmpc2_fast.train.pictures.curves import (
    Curve,
)

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")


def csv_file(path: Path, *rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in (("step", "reward", "seed"), *rows)))
    return path


def run(root: Path, task: str, exp_name: str, seed: int, *points: tuple[int, float]) -> Path:
    """A run folder as the trainer leaves it; `points` are step and reward."""
    folder = root / task / exp_name / str(seed)
    csv_file(folder / "eval.csv", *((*p, seed) for p in points))
    (folder / "config.json").write_text(json.dumps(dict(task=task, exp_name=exp_name, seed=seed)))
    return folder


def curve(steps: Sequence[float], returns: Sequence[float], task: str = "cheetah-run", seed: int = 1) -> Curve:
    return Curve("default", task, seed, np.array(steps, float), np.array(returns, float))
