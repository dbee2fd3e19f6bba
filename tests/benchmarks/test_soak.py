"""The soak of updates: short, in a process of its own, whose memory nothing else uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tdmpc2_fast.benchmarks.gpu.soak import POINTS, Point, faults, options, soak
from tdmpc2_fast.errors import ConfigError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
FIRST = Point(updates=30, resident=400_000_000, files=6, graphs=3, finite=True, ms=10.0)


@pytest.mark.slow
def test_three_hundred_updates_leak_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "tdmpc2_fast.benchmarks.gpu.soak", "updates=300", "backend=torch"]
    environ = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1 + POINTS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(resident=405_100_000), "memory grew by 5.1 MB"),
        (dict(files=7), "files grew from 6 to 7"),
        (dict(graphs=5), "2 graphs were compiled"),
        (dict(finite=False), "not finite"),
    ],
)
def test_every_fault_is_found(change: dict[str, int], words: str) -> None:
    noise = FIRST._replace(resident=404_900_000)
    assert faults([FIRST, noise]) == []
    (fault,) = faults([FIRST, noise._replace(**change)])
    assert words in fault
    assert "memory grew by 2.1 MB (2.1%)" in faults(
        [FIRST._replace(resident=100_000_000), FIRST._replace(resident=102_100_000)]
    )


def test_points_cover_all_updates() -> None:
    _, cfg = options(["episodic=true", "updates=40"])
    assert [p.updates for p in soak(cfg, 40)] == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]


@pytest.mark.parametrize(
    ("word", "error"),
    [("updates=5", "soak key 'updates': got '5', allowed"), ("obs=rgb", "'obs': got 'rgb'"), ("lrr=1", "unknown")],
)
def test_bad_keys_are_named(word: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        options([word, *(["latent_dim=512"] if word == "obs=rgb" else [])])
