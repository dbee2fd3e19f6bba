"""What a run has saved stays, whatever fails: the process is killed, the disk is full, a file is damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_episode, tiny_config

from tdmpc2_fast import ReplayBuffer, checkpoint
from tdmpc2_fast.train.checkpoints import Checkpoints, Saved
from tdmpc2_fast.world_model import WorldModel

CALLS = ("mkdir", "open", "chmod", "fsync", "rename", "replace", "link", "unlink", "rmdir")


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def killed_at(nth: int) -> Iterator[list[str]]:
    """From the nth change of the file system on, none happens any more; yields those that were asked for."""
    made: list[str] = []

    def watched(name: str, call: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) >= nth:
                raise Killed(f"{name} {args}")
            return call(*args, **kwargs)

        return instead

    with pytest.MonkeyPatch.context() as m:
        for name in CALLS:
            m.setattr(os, name, watched(name, getattr(os, name)))
        yield made


class Run:
    """A model and a replay that grow older together, and their checkpoints."""

    def __init__(self, folder: Path, keep: int = 2, **changes: Any) -> None:
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        self.cfg = tiny_config(obs_dim=2, latent_dim=8, enc_dim=8, mlp_dim=8, steps=1000, **changes)
        self.model = WorldModel(self.cfg)
        self.buffer = ReplayBuffer(self.cfg)
        self.checkpoints = Checkpoints(folder, keep)
        self.age = 0

    def grow(self) -> None:
        self.age += 1
        with torch.no_grad():
            for p in self.model.parameters():
                p.fill_(self.age)
        self.buffer.add(random_episode(self.cfg, 7 + self.age % 3, self.age))

    def save(self) -> Path:
        tensors = dict(self.buffer.state(), age=torch.tensor(self.age))
        return self.checkpoints.save(self.model, tensors, dict(decisions=10 * self.age, age=self.age), self.buffer)

    def again(self, note: Any = lambda text: None) -> tuple[Run, Saved | None]:
        """The run in a process that goes on from the newest checkpoint."""
        run = Run(self.folder, self.keep, buffer_size=self.cfg.buffer_size, seed=2)
        saved = run.checkpoints.newest(note)
        if saved is not None:
            checkpoint.load_into(run.model, saved.weights)
            run.buffer.restore(saved.tensors, run.checkpoints.replay.read(saved.chunks))
            run.age = saved.values["age"]
        return run, saved


def holds(run: Run, saved: Saved | None, age: int) -> None:
    """The checkpoint is whole, and that of a run of this age."""
    assert saved is not None
    assert (saved.values["age"], int(saved.tensors["age"])) == (age, age)
    assert all(bool((p == age).all()) for p in run.model.parameters())
    expected = ReplayBuffer(run.cfg)
    for n in range(1, age + 1):
        expected.add(random_episode(run.cfg, 7 + n % 3, n))
    same_replay(run.buffer, expected)


def same_replay(a: ReplayBuffer, b: ReplayBuffer) -> None:
    assert (a.written, a.num_eps, len(a)) == (b.written, b.num_eps, len(b))
    held = range(a.written - len(a), a.written)
    assert same_tensors(a.steps(held.start, held.stop), b.steps(held.start, held.stop))
    assert torch.equal(a.state()["episodes"], b.state()["episodes"])


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def as_bytes(x: torch.Tensor) -> bytes:
        return x.numpy().tobytes()

    return a.keys() == b.keys() and all(as_bytes(x) == as_bytes(b[k]) for k, x in a.items())


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda at: None)


def begun(folder: Path, keep: int = 2, saves: int = 3, **changes: Any) -> Run:
    run = Run(folder, keep, **changes)
    for _ in range(saves):
        run.grow()
        run.save()
    run.checkpoints.mark_best()
    return run


def save_and_mark(run: Run) -> None:
    run.save()
    run.checkpoints.mark_best()


def test_a_save_that_is_killed_anywhere_leaves_a_whole_checkpoint(tmp_path: Path, quick_disk: None) -> None:
    first = begun(tmp_path / "first")
    shutil.copytree(first.folder, tmp_path / "counted")
    run, _ = Run(tmp_path / "counted").again()
    run.grow()
    with killed_at(10**6) as made:
        save_and_mark(run)
    assert len(made) > 30
    for nth in range(1, len(made) + 1):
        folder = tmp_path / str(nth)
        shutil.copytree(first.folder, folder)
        for again in (nth, 1 + 7 * nth % len(made)):  # twice in the same checkpoint
            run, saved = Run(folder).again()
            holds(run, saved, run.age)
            assert run.age in (3, 4)
            for name in ("latest", "best"):
                weights, _ = checkpoint.read(folder / "checkpoints" / f"{name}.safetensors")
                assert float(weights["_pi.0.bias"][0]) in (3, 4)
            while run.age < 4:
                run.grow()
            with suppress(Killed), killed_at(again):
                save_and_mark(run)
        run, saved = Run(folder).again()
        while run.age < 4:
            run.grow()
        save_and_mark(run)
        run, saved = Run(folder).again()
        holds(run, saved, 4)
        names = [p.name for p in folder.rglob("*")]
        assert [n for n in names if n.endswith(".tmp")] == []
        assert len([n for n in names if "-at-" in n]) == run.keep
