"""A run that is stopped goes on as if it had not been: every number, file and row of it, in another process."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SUPPORT, TINY
from loop_oracle import csvs

from tdmpc2_fast.model.files import read_tensors
from tdmpc2_fast.train.log.run_log import WALL_CLOCK

pytest.importorskip("gymnasium")

QUICK = dict(
    TINY,
    task="Pendulum-v1",
    episode_length=15,
    seed_steps=34,
    steps=66,
    eval_freq=30,
    eval_episodes=1,
    iterations=1,
    num_samples=16,
    device="cpu",
    num_threads=1,
)


# Interpreted, an update takes seconds.
SMALLER = dict(
    latent_dim=8,
    mlp_dim=8,
    enc_dim=8,
    num_q=2,
    num_bins=11,
    horizon=1,
    num_samples=8,
    num_elites=2,
    num_pi_trajs=2,
    batch_size=4,
    episode_length=3,
    eval_freq=100,
    utd=0.35,
)


def keys_of(backend: str, num_envs: int) -> dict[str, Any]:
    keys = QUICK | dict(backend=backend)
    if backend == "triton":
        keys |= SMALLER | dict(seed_steps=3, steps=6 * num_envs)
    return keys | dict(num_envs=num_envs, env_workers=2 if num_envs > 2 else 0)


def words(**values: Any) -> list[str]:
    return [f"{k}={v}" for k, v in values.items()]


class Commands:
    """The command line in processes of their own, all forks of one; `stopping_run.py` is the other end."""

    def __init__(self) -> None:
        self._forks = subprocess.Popen(
            [sys.executable, str(SUPPORT / "stopping_run.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(
        self, args: list[str], out: Path, number: int = signal.SIGTERM, where: str = "step", nth: int = 0
    ) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of a command, which gets a signal at the n-th of something (0: never)."""
        out.mkdir()
        asked = dict(words=args, out=str(out), signal=int(number), where=where, nth=nth)
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        self._forks.stdin.write(json.dumps(asked) + "\n")
        self._forks.stdin.flush()
        return int(self._forks.stdout.readline()), (out / "stdout").read_text(), (out / "stderr").read_text()

    def close(self) -> None:
        self._forks.communicate()


@pytest.fixture(scope="module")
def commands() -> Iterator[tuple[Commands, Commands]]:
    """Of two processes: what depends on one, such as the order of a set, shows between a run and its resumption."""
    found = Commands(), Commands()
    yield found
    for each in found:
        each.close()


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a finished run leaves, by name; of its log, what does not tell the time."""
    newest = max((p for p in (folder / "checkpoints").iterdir() if p.is_dir()), key=lambda p: int(p.name[:4]))
    manifest = json.loads((newest / "manifest.json").read_text())
    values = manifest["values"]
    del values["log"]
    steps: dict[str, Any] = {}
    for entry in manifest["replay"]:
        for name, x in read_tensors(folder / "replay" / entry["file"])[0].items():
            steps.setdefault(name, []).append(x)
    cfg = json.loads((folder / "config.json").read_text())
    held = min(cfg["buffer_size"], cfg["steps"])  # the oldest file may begin with steps the ring has overwritten
    tensors = {f"replay {k}": torch.cat(v)[-held:] for k, v in steps.items()}
    for part in ("agent", "training"):
        tensors |= {f"{part} {k}": v for k, v in read_tensors(newest / f"{part}.safetensors")[0].items()}
    found: dict[str, Any] = {k: v.flatten().view(torch.uint8).numpy().tobytes() for k, v in tensors.items()}
    found |= {f"value {k}": v for k, v in values.items()}
    found |= csvs(folder)
    return found | {"tensorboard": scalars(folder / "tensorboard")}


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """All there is in the event files but the time, in their order."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = []
    for path in sorted(folder.iterdir()):
        for event in EventFileLoader(str(path)).Load():
            values = [v for v in event.summary.value if v.tag.removeprefix("train/") not in WALL_CLOCK]
            found += [(v.tag, event.step, v.tensor.float_val[0]) for v in values]
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if a[k] != b[k]] == []


@pytest.fixture(scope="module")
def uninterrupted(commands: tuple[Commands, Commands], tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[str, int], dict[str, Any]] = {}

    def get(backend: str, num_envs: int) -> dict[str, Any]:
        if (backend, num_envs) not in made:
            folder = tmp_path_factory.mktemp("uninterrupted") / "run"
            status, _, err = commands[0](
                ["train", *words(**keys_of(backend, num_envs), work_dir=folder)], folder.with_name("out")
            )
            assert status == 0, err
            made[backend, num_envs] = outcome(folder)
        return made[backend, num_envs]

    return get


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(("backend", "num_envs"), [("torch", 1), ("torch", 3), ("triton", 1), ("triton", 2)])
def test_stopped_and_gone_on_with_is_as_never_stopped(
    backend: str,
    num_envs: int,
    number: signal.Signals,
    commands: tuple[Commands, Commands],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    folder, keys = tmp_path / "run", keys_of(backend, num_envs)
    expected = uninterrupted(backend, num_envs)
    if number == signal.SIGKILL:  # somewhere in the writing of a checkpoint, not the first
        where, nth = "flush", random.randint(25, 50)
        keys = keys | dict(checkpoint_minutes=0)
    else:
        most = dict(step=keys["steps"] // num_envs, update=keys["seed_steps"], plan=keys["episode_length"])
        where = random.choice(list(most))
        nth = random.randint(1, most[where])
    print(f"{number.name} at {where} {nth}")
    status, out, err = commands[0](["train", *words(**keys, work_dir=folder)], tmp_path / "first", number, where, nth)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL, out + err
    else:
        assert status == 128 + number, out + err
        assert f"to go on: tdmpc2-fast resume {folder}" in out
    status, out, err = commands[1](["resume", str(folder), "checkpoint_minutes=10"], tmp_path / "again")
    assert status == 0, out + err
    same(outcome(folder), expected)
