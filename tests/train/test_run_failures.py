"""What a run has saved stays, whatever fails: the process is killed, the disk is full, a file is damaged."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, random_episode, tiny_config

from tdmpc2_fast import Config, ReplayBuffer
from tdmpc2_fast.errors import CheckpointError, ConfigError
from tdmpc2_fast.model import checkpoint
from tdmpc2_fast.model.world_model import WorldModel
from tdmpc2_fast.train.envs.pixels import Stack
from tdmpc2_fast.train.run import checkpoints, replay_files
from tdmpc2_fast.train.run import lifecycle as runs
from tdmpc2_fast.train.run.checkpoints import Checkpoints, Saved
from tdmpc2_fast.train.run.replay_files import ReplayFiles

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


SMALL: dict[str, Any] = dict(obs_dim=2, latent_dim=8, enc_dim=8, mlp_dim=8, steps=1000)


@functools.cache
def the_model() -> WorldModel:
    """One for all runs: each fills it with its age, or loads it."""
    return WorldModel(tiny_config(**SMALL))


class Run:
    """A model and a replay that grow older together, and their checkpoints."""

    def __init__(self, folder: Path, keep: int = 2, **changes: Any) -> None:
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        self.cfg = tiny_config(**SMALL, **changes)
        self.model = the_model()
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
        assert run.save() == run.checkpoints.last()
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


@pytest.mark.parametrize("name", ["agent.safetensors", "training.safetensors", "manifest.json", "replay"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_of_a_damaged_checkpoint_the_one_before_is_taken(
    name: str, damage: str, tmp_path: Path, quick_disk: None
) -> None:
    run = begun(tmp_path / "run")
    notes: list[str] = []
    for _ in range(2):  # the second time, too, though the place of the first is taken
        newest = run.checkpoints.last()
        assert newest is not None
        path = max((run.folder / "replay").iterdir()) if name == "replay" else newest / name
        spoil(path, damage)
        run, saved = Run(run.folder).again(notes.append)
        holds(run, saved, 2)
        run.grow()
        run.save()
    run, saved = Run(run.folder).again()
    holds(run, saved, 3)
    if (name, damage) == ("manifest.json", "gone"):
        assert notes == []  # without one it is none
        return
    assert [n.split(" is damaged")[0].rpartition("/")[2] for n in notes] == ["0003-at-30"] * 2
    assert len(list((run.folder / "checkpoints").glob("damaged-*"))) == 2


def spoil(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-9])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


def test_where_all_are_damaged_nothing_is_touched_and_each_is_named(tmp_path: Path, quick_disk: None) -> None:
    run = begun(tmp_path / "run")
    spoil(min((run.folder / "replay").iterdir()), "flipped")  # all of them need it
    before = sorted(run.folder.rglob("*"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint .* is whole.*0003-at-30.*checksum.*0002-at-20"):
            Checkpoints(run.folder, 2).newest(print)
    assert sorted(run.folder.rglob("*")) == before


def test_the_best_outlives_its_checkpoint_and_needless_steps_are_deleted(tmp_path: Path, quick_disk: None) -> None:
    run = begun(tmp_path / "run", keep=1, buffer_size=20)
    for _ in range(5):
        run.grow()
        run.save()
    best, _ = checkpoint.read(run.folder / "checkpoints" / "best.safetensors")
    assert float(best["_pi.0.bias"][0]) == 3
    again, saved = Run(run.folder, keep=1, buffer_size=20).again()
    assert saved is not None
    assert {p.name for p in (run.folder / "replay").iterdir()} == {c.file for c in saved.chunks}
    assert saved.chunks[0].start > 20
    same_replay(again.buffer, run.buffer)


@pytest.mark.parametrize("obs", ["state", "rgb", "stacked rgb"])
def test_a_ring_that_has_wrapped_is_restored_from_many_files(
    obs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_disk: None
) -> None:
    cfg = tiny_config(buffer_size=50)
    if obs != "state":
        cfg = Config(obs="rgb", buffer_size=50, batch_size=8, device="cpu").with_env({"rgb": (9, 64, 64)}, 2, 50)
    monkeypatch.setattr(replay_files, "_MOST_BYTES", {"state": 1000, "rgb": 10**6, "stacked rgb": 300_000}[obs])
    buffer, files = ReplayBuffer(cfg), ReplayFiles(tmp_path / "replay")
    most = 0
    for n in range(9):
        buffer.add(episode_of(cfg, 11 + n, n, obs == "stacked rgb"))
        if n % 2:
            continue
        chunks = files.save(buffer)
        most = max(most, len(chunks))
        assert [c.stop for c in chunks[:-1]] == [c.start for c in chunks[1:]]
        other, later = ReplayBuffer(cfg), ReplayFiles(tmp_path / "replay")
        other.restore(buffer.state(), later.read(chunks))
        same_replay(other, buffer)
        for _ in range(3):
            a, b = buffer.sample(), other.sample()
            assert torch.equal(a.obs, b.obs)
            assert torch.equal(a.reward, b.reward)
        other.add(episode_of(cfg, 13, 77, obs == "stacked rgb"))
        assert later.save(other)[-1].start == buffer.written
        files.prune({c.file for c in chunks})
        assert len(list(files.folder.iterdir())) == len(chunks)
    assert buffer.frames == (3 if obs == "stacked rgb" else 1)
    assert buffer.written > 2 * 50
    assert most > 2


def episode_of(cfg: Config, length: int, seed: int, stacked: bool) -> dict[str, Any]:
    if cfg.obs == "state":
        return random_episode(cfg, length, seed)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (length, 9, 64, 64), dtype=torch.uint8, generator=generator)
    if stacked:
        stack = Stack(3)
        pixels = torch.stack([torch.from_numpy(stack(x[:3].numpy(), first=i == 0)) for i, x in enumerate(pixels)])
    return random_episode(tiny_config(), length, seed) | dict(obs=pixels)


QUICK = dict(
    TINY,
    task="Pendulum-v1",
    episode_length=10,
    seed_steps=20,
    steps=30,
    eval_freq=100,
    eval_episodes=1,
    mpc=False,
    device="cpu",
    num_threads=1,
    tensorboard=False,
    display="none",
)


def test_weights_of_the_end_that_cannot_be_written_are_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gymnasium")
    folder = tmp_path / "run"
    save = checkpoint.save
    full = True

    def on_a_full_disk(model: WorldModel, path: Path) -> Path:
        if full and "-at-0" not in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return save(model, path)

    monkeypatch.setattr(checkpoint, "save", on_a_full_disk)
    assert runs.start(dict(QUICK, work_dir=str(folder))).status == 1
    shown = capsys.readouterr()
    assert "No space left on device" in shown.err
    assert "weights of the end could not be written" in shown.out
    assert checkpoints.trained(folder / "checkpoints" / "best.safetensors").startswith("step 0 ")  # as they are
    assert f"to go on: tdmpc2-fast resume {folder}" in shown.out
    full = False
    assert runs.resume(folder, {}).status == 0
    last = Checkpoints(folder, 1).last()
    assert last is not None
    assert last.name.endswith("-at-30")


def test_a_checkpoint_that_fails_but_for_the_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium")
    monkeypatch.setattr(checkpoint, "save", lambda *_: raise_(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        runs.start(dict(QUICK, work_dir=str(tmp_path / "run")))


def test_resume_auto_begins_where_a_run_was_killed_in_its_first_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    folder = tmp_path / "run"
    values = dict(QUICK, work_dir=str(folder), resume="auto")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(checkpoint, "save", lambda *_: raise_(Killed()))
        m.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            runs.start(values)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [".0001-at-0.tmp"]
    assert runs.start(values).status == 0
    assert len((folder / "eval.csv").read_text().splitlines()) == 3


def raise_(error: BaseException) -> None:
    raise error


def test_resume_auto_takes_the_words_the_run_was_begun_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the task fixed another value: here it is no choice, and not of `resume`."""
    pytest.importorskip("mujoco")
    values = dict(QUICK, task="mujoco-halfcheetah", work_dir=str(tmp_path / "run"), resume="auto")
    values |= dict(seed_steps=510, steps=10, rho=0.6)
    del values["episode_length"]
    assert runs.start(values).status == 1  # nothing was learned
    assert "rho=0.7, fixed by the task mujoco-halfcheetah: the 0.6 asked for has no effect" in capsys.readouterr().err
    assert runs.start(values).status == 1
    assert "finished, and nothing was learned, at 10 decisions" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"'horizon': got 2, but the run"):
        runs.start(dict(values, horizon=2))


def test_a_run_of_another_machine_goes_on_with_one_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gymnasium")
    values = dict(QUICK, work_dir=str(tmp_path / "run"), display="lines")
    runs.start(values)
    path = max((tmp_path / "run/checkpoints").glob("0*"))
    elsewhere = dict(device="cuda:0", num_threads=10_000)  # kernels are interpreted here, and would run
    moved = Config.from_dict({**Checkpoints(tmp_path / "run", 1).newest(print).cfg.to_dict(), **elsewhere})  # type: ignore[union-attr]
    model = WorldModel(moved.replace(device="cpu"))
    checkpoint.load_into(model, checkpoint.read(path / "agent.safetensors")[0])
    model.cfg = moved
    checkpoint.save(model, path / "agent.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {p.name: replay_files.sha256(p) for p in path.iterdir() if p.name in manifest["files"]}
    manifest["sha256"] = checkpoints._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    if torch.cuda.is_available():
        pytest.skip("this machine has what the other one had")
    capsys.readouterr()
    with pytest.raises(ConfigError, match="device"):  # what is asked for is not replaced
        runs.resume(tmp_path / "run", dict(steps=80, device="cuda:0"))
    assert runs.resume(tmp_path / "run", dict(steps=80)).status == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot be had here" in line]
    assert len(said) == 1
    for word in ("device=cuda:0", "num_threads=10000", "this machine has 0 CUDA devices", "used: device=cpu"):
        assert word in said[0]
