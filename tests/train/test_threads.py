"""How many threads torch is given where nobody says: as many as cores are idle."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tdmpc2_fast import Config
from tdmpc2_fast.train.run import threads

CORES = 4


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def reading(busy: float, idle: float) -> str:
    """Ticks of all cores since the machine began: half of the idle ones waited for the disk; guests are busy, too."""
    cores = "".join(f"cpu{i} 9 9 9 9 9 9 9 9 9 9\n" for i in range(CORES))
    return f"cpu  {busy:.0f} 0 0 {idle / 2:.0f} {idle / 2:.0f} 0 0 0 {busy / 3:.0f} 88\n{cores}intr 5"


@pytest.mark.parametrize(
    ("idle", "torchs", "allowed", "expected"),
    [(4, 4, 4, 4), (2.6, 4, 4, 3), (2.4, 4, 4, 2), (0, 4, 4, 1), (4, 3, 4, 3), (4, 4, 2, 2)],
)
def test_threads_follow_idle_cores(
    idle: float, torchs: int, allowed: int, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stat = tmp_path / "stat"
    stat.write_text(reading(1000, 2000))
    monkeypatch.setattr(threads, "_STAT", stat)
    monkeypatch.setattr(
        time, "sleep", lambda _: stat.write_text(reading(1000 + 100 * (CORES - idle), 2000 + 100 * idle))
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(torchs)
    assert threads.choose_threads(Config()) == torch.get_num_threads() == expected


def test_nothing_is_guessed_where_something_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it is measured"))
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.choose_threads(Config()) == 3
    assert threads.choose_threads(Config(num_threads=2)) == torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "_STAT", tmp_path / "nothing")
    assert threads.choose_threads(Config()) == 2
