"""Runs on several ranks: one log, one checkpoint that any number of them can go on from, an end where one is killed."""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, random_episode
from data_sets import make_data
from rank_updates import torchrun
from safetensors.torch import load_file
from small_configs import tiny_config
from typing_extensions import override

from tdmpc2_fast.learn.replay import ReplayBuffer
from tdmpc2_fast.runtime.ranks import Ranks
from tdmpc2_fast.train.cli.keys import parse
from tdmpc2_fast.train.run import lifecycle
from tdmpc2_fast.train.run.checkpoints import Part, Saved
from tdmpc2_fast.train.run.replay_files import ReplayFiles
from tdmpc2_fast.train.run.shared.dealing import deal, of_rank

pytest.importorskip("gymnasium")

EPISODE = 20
KEYS = dict(
    task="Pendulum-v1", episode_length=EPISODE, latent_dim=16, mlp_dim=24,
    enc_dim=16, num_q=2, num_samples=16, num_elites=4, num_pi_trajs=2,
    iterations=1, horizon=2, num_envs=4, env_workers=0, batch_size=8, seed_steps=60, utd=0.2, eval_freq=160,
    eval_episodes=3, buffer_size=160, display="lines", tensorboard="false", backend="torch",
)  # fmt: skip
STEPS = 160
MINUTES = 3  # for seconds of a machine without other work, and less than `rank_timeout`


def words(folder: Path, **changes: Any) -> list[str]:
    return [f"{k}={v}" for k, v in (KEYS | dict(work_dir=folder, steps=STEPS) | changes).items()]


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / name, newline="") as f:
        found = list(csv.DictReader(f))
    clocks = ("elapsed_time", "decisions_per_second")
    return [{k: v for k, v in row.items() if k not in clocks} for row in found]


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("*-at-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of 2 ranks, twice as long as `STEPS`."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = torchrun(2, "-m", "tdmpc2_fast.train", *words(folder, steps=2 * STEPS))
    assert done.returncode == 0, done.stderr
    assert "ranks 2" in done.stdout
    assert done.stdout.count("run folder") == 1
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the first half of it."""
    folder = tmp_path_factory.mktemp("half") / "run"
    done = torchrun(2, "-m", "tdmpc2_fast.train", *words(folder))
    assert done.returncode == 0, done.stderr
    return folder


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_the_log_has_the_episodes_of_all_ranks_and_of_all_evaluations(whole: Path) -> None:
    episodes = rows(whole, "train.csv")
    assert [int(row["episode"]) for row in episodes] == list(range(1, 2 * STEPS // EPISODE + 1))
    assert len({row["episode_reward"] for row in episodes}) == len(episodes)
    assert [int(row["step"]) for row in rows(whole, "eval.csv")] == [0, STEPS, 2 * STEPS]
    manifest = json.loads((newest(whole) / "manifest.json").read_text())
    assert len(manifest["others"]) == 1
    assert "training-1.safetensors" in manifest["files"]


def test_two_ranks_go_on_bit_for_bit(whole: Path, half: Path, tmp_path: Path) -> None:
    folder = copy(half, tmp_path)
    done = torchrun(2, "-m", "tdmpc2_fast.train", "resume", folder, f"steps={2 * STEPS}")
    assert done.returncode == 0, done.stderr
    for name in ("train.csv", "eval.csv"):
        assert rows(folder, name) == rows(whole, name)
    for name in ("agent", "training", "training-1"):
        ours, theirs = (load_file(newest(x) / f"{name}.safetensors") for x in (folder, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(x, theirs[k]) for k, x in ours.items()), name


def test_another_number_of_ranks_goes_on_with_all_episodes(half: Path, tmp_path: Path) -> None:
    for count in (1, 4):
        folder = copy(half, tmp_path / str(count))
        if count == 1:
            assert lifecycle.resume(folder, dict(steps=2 * STEPS)).status == 0
        else:
            done = torchrun(count, "-m", "tdmpc2_fast.train", "resume", folder, f"steps={2 * STEPS}")
            assert done.returncode == 0, done.stderr
        episodes = rows(folder, "train.csv")
        assert episodes[: STEPS // EPISODE] == rows(half, "train.csv")
        assert [int(row["episode"]) for row in episodes] == list(range(1, 2 * STEPS // EPISODE + 1))
        assert [int(row["step"]) for row in rows(folder, "eval.csv")] == [0, STEPS, 2 * STEPS]
        manifest = json.loads((newest(folder) / "manifest.json").read_text())
        parts = [manifest, *manifest.get("others", [])]
        assert len(parts) == count


def test_a_killed_rank_ends_the_run_and_a_restart_goes_on(tmp_path: Path) -> None:
    program, kill = ROOT / "tests/ranks/rank_run.py", STEPS
    begun = time.monotonic()
    died = torchrun(2, program, kill, *words(tmp_path / "run", steps=2 * STEPS, eval_freq=80, resume="none"))
    assert died.returncode != 0
    assert time.monotonic() - begun < 60 * MINUTES
    assert "rank 1 of 2: the others cannot be reached any more: one of them ended" in died.stderr
    assert "resume=auto goes on from there" in died.stderr
    assert lifecycle.resume(tmp_path / "run", dict(steps=2 * STEPS)).status == 0

    again = words(tmp_path / "again", steps=2 * STEPS, eval_freq=80, resume="auto")
    done = torchrun(2, program, kill, *again, options=["--max-restarts", "1"])
    assert done.returncode == 0, done.stderr
    assert "going on at 80 decisions" in done.stdout
    assert int(rows(tmp_path / "again", "eval.csv")[-1]["step"]) == 2 * STEPS


def test_what_cannot_be_is_said_before_it_begins(tmp_path: Path) -> None:
    for changes, options, said in (
        (dict(num_envs=3), [], "config key 'num_envs': got 3, of the whole run on 2 ranks, allowed: a multiple of 2"),
        ({}, ["--max-restarts", "1"], "config key 'resume': got None under torchrun --max-restarts, allowed: auto"),
    ):
        done = torchrun(2, "-m", "tdmpc2_fast.train", *words(tmp_path / "run", **changes), options=options)
        assert done.returncode != 0
        assert said in done.stderr
        assert not (tmp_path / "run").exists()


def test_ranks_share_a_data_set_and_one_process_goes_on(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", "Pendulum-v1", length=EPISODE)
    keys = dict(data_dir=data, eval_episodes=1, eval_freq=1, num_envs=1)
    one, two = tmp_path / "one", tmp_path / "two"
    assert lifecycle.start(parse(words(one, steps=1, **keys))).status == 0
    done = torchrun(2, "-m", "tdmpc2_fast.train", *words(two, steps=1, **keys))
    assert done.returncode == 0, done.stderr
    # What no noise of the ranks' own is in: these losses are of the same batch.
    for key in ("consistency_loss", "reward_loss"):
        ours, theirs = (float(rows(x, "train.csv")[0][key]) for x in (two, one))
        assert ours == pytest.approx(theirs, rel=1e-5)
    done = torchrun(2, "-m", "tdmpc2_fast.train", "resume", two, "steps=40", "eval_freq=40")
    assert done.returncode == 0, done.stderr
    assert lifecycle.resume(two, dict(steps=50)).status == 0
    assert [int(row["step"]) for row in rows(two, "eval.csv")] == [0, 1, 40, 50]


def test_ranks_play_beside_a_data_set_and_one_process_goes_on(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", "Pendulum-v1", length=EPISODE)
    folder, keys = tmp_path / "run", dict(data_dir=data, mix=0.25, eval_episodes=1)
    done = torchrun(2, "-m", "tdmpc2_fast.train", *words(folder, **keys))
    assert done.returncode == 0, done.stderr
    losses = [row["consistency_loss"] for row in rows(folder, "train.csv")]
    assert losses[-1] != ""
    assert lifecycle.resume(folder, dict(steps=2 * STEPS)).status == 0
    assert rows(folder, "train.csv")[-1]["consistency_loss"] not in losses


class _Told(Ranks):
    """A rank whose others are elsewhere: it hears itself alone."""

    @override
    def told(self, value: Any) -> list[Any]:
        return [value]


@pytest.mark.parametrize("counts", [(2, 1), (2, 4), (3, 2), (1, 3)])
def test_replays_are_dealt_out_whole(counts: tuple[int, int], tmp_path: Path) -> None:
    before, after = counts
    cfg, parts, lengths = tiny_config(buffer_size=500), [], [7, 20, 3, 12, 9, 15]
    for rank in range(before):
        buffer, files = ReplayBuffer(cfg), ReplayFiles(tmp_path / "replay", f"{rank}-of-{before}-")
        for i, length in enumerate(lengths):
            buffer.add(random_episode(cfg, length, seed=10 * rank + i))
            if i % 2:
                files.save(buffer)  # files end between and within what one rank reads at a time
        state = {f"replay/{k}": x for k, x in buffer.state().items()}
        parts.append(Part(state | {"planner/prev_mean": torch.zeros(1)}, dict(restarts=rank, envs=[1]), files.chunks))
    saved = Saved(tmp_path / "0007-at-9", cfg, {}, *parts[0], others=tuple(parts[1:]))
    found: list[float] = []
    for rank in range(after):
        ranks = _Told(rank, after)
        mine = of_rank(saved, ranks)
        assert "planner/prev_mean" not in mine.tensors
        assert mine.values["envs"] is None
        buffer, files = ReplayBuffer(cfg), ReplayFiles(tmp_path / "replay")
        deal(mine, buffer, files, ranks)
        assert files.prefix == "from-0007-"
        table = buffer.state()["episodes"].tolist()
        assert abs(len(table) - before * 5 / after) < 1  # all but those too short for a slice
        found += [float(buffer.steps(start + 1, start + n)["reward"].sum()) for start, n in table]
    wanted = [
        float(torch.as_tensor(random_episode(cfg, length, seed=10 * rank + i)["reward"])[1:].sum())
        for rank in range(before)
        for i, length in enumerate(lengths)
        if length > cfg.horizon
    ]
    assert sorted(found) == pytest.approx(sorted(wanted))
