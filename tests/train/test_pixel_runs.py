"""Runs from pixels: what is said of their replay, and files of replays in which observations are whole."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_runs import train_here  # noqa: F401
from loop_oracle import csvs

from tdmpc2_fast import load
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.errors import InputError
from tdmpc2_fast.learn import ring
from tdmpc2_fast.model.files import read_tensors, write_tensors
from tdmpc2_fast.train.run import checkpoints, replay_files
from tdmpc2_fast.train.run import lifecycle as runs

PIXELS: dict[str, Any] = dict(obs="rgb", num_channels=1, latent_dim=16, steps=60, seed_steps=40, buffer_size=50)


def test_a_run_says_what_its_replay_takes(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, said = train("OnePart", **PIXELS)
    assert status == 0
    kept = "of the 3 frames in an observation, one a step is kept"
    assert re.search(rf"replay: 0\.0006\d* GB of memory for 50 steps; {kept}", said)
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(ring, "_host_memory", lambda: 20 * 10**9)
    large = PIXELS | dict(buffer_size=1_000_000, steps=1_000_000)
    with pytest.raises(InputError, match=r"a replay of 65\.5 GB for 1,000,000 steps"):
        train("SixteenFrames", **large)  # of which nobody says that they are frames
    assert not (tmp_path / "run").exists()


def as_before(run: Path) -> None:
    """Write the replay as versions did that kept whole observations."""
    sums = {}
    for path in (run / "replay").iterdir():
        rows, _ = read_tensors(path)
        parts = [piece for _, piece in ring.pieces(0, rows, (9, 64, 64))]
        assert {"frames", "repeats"} <= rows.keys()
        write_tensors(path, {k: torch.cat([piece[k] for piece in parts]) for k in parts[0]})
        sums[path.name] = replay_files.sha256(path)
    for path in (run / "checkpoints").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["replay"] = [chunk | dict(sha256=sums[chunk["file"]]) for chunk in manifest["replay"]]
        manifest["sha256"] = checkpoints._digest(manifest)
        path.write_text(json.dumps(manifest))


def test_a_run_with_whole_observations_on_disk_goes_on_bit_for_bit(train: Any, tmp_path: Path) -> None:
    train("OnePart", **PIXELS)
    found = []
    for form in ("once", "whole"):
        run = tmp_path / form
        shutil.copytree(tmp_path / "run", run)
        before = {path.name for path in (run / "replay").iterdir()}
        if form == "whole":
            as_before(run)
        assert runs.resume(run, dict(steps=110)).status == 0
        later = [read_tensors(path)[0].keys() for path in (run / "replay").iterdir() if path.name not in before]
        assert later
        assert all({"frames", "repeats"} <= keys and "obs" not in keys for keys in later)
        weights = tensors_only(load(run / "checkpoints" / "latest", device="cpu").model.state_dict())
        found.append((weights, csvs(run)))
    (weights, numbers), (others, other_numbers) = found
    assert numbers == other_numbers
    assert all(torch.equal(x, others[k]) for k, x in weights.items())
