"""Replay: the official sampling law, the ring, memory, bad input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_episode, tiny_config, tiny_multitask

from tdmpc2_fast import TDMPC2, Config, ReplayBuffer
from tdmpc2_fast.errors import ConfigError, InputError
from tdmpc2_fast.learn.ring import storage_device


def numbered(cfg: Config, length: int, first: int) -> dict[str, torch.Tensor]:
    """An episode whose observation, action and reward at a step are that step's running number."""
    n = torch.arange(first, first + length, dtype=torch.float32)
    obs = n.unsqueeze(1).expand(-1, 5).clone()
    episode = dict(obs=obs, action=n.unsqueeze(1).expand(-1, 2).clone(), reward=n.clone())
    episode["action"][0] = episode["reward"][0] = torch.nan
    return episode


def starts(buffer: ReplayBuffer, rounds: int) -> torch.Tensor:
    return torch.cat([buffer.sample().obs[0, :, 0] for _ in range(rounds)])


def test_slices_are_consecutive_and_inside_one_episode() -> None:
    cfg = tiny_config(batch_size=256)
    buffer = ReplayBuffer(cfg)
    for i, length in enumerate([4, 9, 30]):
        buffer.add(numbered(cfg, length, 100 * i))
    for _ in range(20):
        batch = buffer.sample()
        obs = batch.obs[..., 0]
        assert torch.equal(obs[1:] - obs[:-1], torch.ones(3, 256))
        assert torch.equal(batch.reward[..., 0], obs[1:])
        assert torch.equal(batch.action[..., 0], obs[1:])
        assert batch.reward.isfinite().all()
        assert torch.equal(obs[0] // 100, obs[-1] // 100)


def test_law_trajectory_first_then_start() -> None:
    cfg = tiny_config(batch_size=2000)
    buffer = ReplayBuffer(cfg)
    lengths = [4, 9, 40]
    for i, length in enumerate(lengths):
        buffer.add(numbered(cfg, length, 100 * i))
    drawn = starts(buffer, 30)
    n = len(drawn)
    for i, length in enumerate(lengths):
        mine = drawn[drawn // 100 == i] - 100 * i
        share = len(mine) / n
        assert abs(share - 1 / 3) < 5 * (2 / 9 / n) ** 0.5
        places = length - cfg.horizon
        counts = torch.bincount(mine.long(), minlength=places).float()
        assert len(counts) == places
        expected = len(mine) / places
        assert float(((counts - expected) ** 2 / expected).sum()) < places + 6 * (2 * places) ** 0.5


def test_ring_overwrites_the_oldest_and_keeps_what_is_left() -> None:
    cfg = tiny_config(buffer_size=50, batch_size=500)
    buffer = ReplayBuffer(cfg)
    for i in range(4):
        buffer.add(numbered(cfg, 20, 100 * i))
    # 80 steps into 50: episode 0 is gone, the first 10 steps of episode 1 too
    assert len(buffer) == 50
    assert buffer.num_eps == 4
    assert buffer.num_sampleable == 3
    drawn = starts(buffer, 20)
    assert drawn.min() == 110
    assert set((drawn // 100).tolist()) == {1.0, 2.0, 3.0}
    buffer.add(numbered(cfg, 8, 400))  # 2 steps of episode 1 are left: no slice
    assert buffer.num_sampleable == 3
    assert set((starts(buffer, 20) // 100).tolist()) == {2.0, 3.0, 4.0}


def test_many_wraps_equal_a_plain_model() -> None:
    cfg = tiny_config(buffer_size=97, batch_size=64)
    buffer, rng = ReplayBuffer(cfg), np.random.default_rng(0)
    steps: list[tuple[int, int]] = []  # (episode, number) of every step ever
    number = 0
    for i in range(120):
        length = int(rng.integers(1, 60))
        buffer.add(numbered(cfg, length, number))
        steps += [(i, number + k) for k in range(length)]
        number += length
        held = steps[-97:]
        episodes: dict[int, list[int]] = {}
        for episode, n in held:
            episodes.setdefault(episode, []).append(n)
        usable = {e: ns for e, ns in episodes.items() if len(ns) > cfg.horizon}
        assert buffer.num_sampleable == len(usable)
        if usable:
            allowed = {n for ns in usable.values() for n in ns[: -cfg.horizon]}
            assert set(starts(buffer, 2).long().tolist()) <= allowed


def test_an_episode_longer_than_the_buffer_keeps_its_end() -> None:
    cfg = tiny_config(buffer_size=10, batch_size=100)
    buffer = ReplayBuffer(cfg)
    buffer.add(numbered(cfg, 25, 0))
    drawn = starts(buffer, 10)
    assert drawn.min() == 15
    assert drawn.max() == 21


def test_short_episodes_are_held_but_never_sampled() -> None:
    cfg = tiny_config()
    buffer = ReplayBuffer(cfg)
    buffer.add(numbered(cfg, 3, 0))
    with pytest.raises(InputError, match="none of 4 or more steps"):
        buffer.sample()
    buffer.add(numbered(cfg, 4, 100))
    assert set(starts(buffer, 5).tolist()) == {100.0}


def test_a_million_steps_cost_no_more_than_their_bytes() -> None:
    cfg = tiny_config(obs_dim=24, action_dim=6, buffer_size=1_000_000, episode_length=500)
    buffer = ReplayBuffer(cfg)
    episode = random_episode(cfg, 501)
    for _ in range(2100):
        buffer.add(episode)
    raw = 1_000_000 * 4 * (24 + 6 + 1 + 1)
    assert len(buffer) == 1_000_000
    assert buffer.nbytes <= 1.1 * raw


def test_tasks_and_terminations_come_through() -> None:
    cfg = tiny_multitask(batch_size=64)
    buffer = ReplayBuffer(cfg)
    for task in range(3):
        buffer.add(random_episode(cfg, 12, seed=task, task=task))
    batch = buffer.sample()
    assert batch.task is not None
    assert batch.task.dtype == torch.int64
    assert set(batch.task.tolist()) == {0, 1, 2}
    cfg = tiny_config(episodic=True, batch_size=400)
    buffer, episode = ReplayBuffer(cfg), random_episode(tiny_config(), 8)
    episode["terminated"][0], episode["terminated"][-1] = np.nan, 1.0
    buffer.add(episode)
    batch = buffer.sample()
    assert batch.terminated.shape == (3, 400, 1)
    assert batch.terminated[:2].max() == 0
    assert 0 < batch.terminated[2].mean() < 1


def test_sampling_is_reproducible() -> None:
    cfg = tiny_config()
    buffers = [ReplayBuffer(cfg) for _ in range(2)]
    for b in buffers:
        b.add(random_episode(cfg, 30))
    assert all(torch.equal(x, y) for x, y in zip(buffers[0].sample()[:4], buffers[1].sample()[:4], strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(obs=np.zeros((20, 4), np.float32)), [r"episode\['obs'\]", r"\(20, 4\)", r"\(20, 5\)"]),
        (dict(action=np.zeros((20, 3), np.float32)), [r"episode\['action'\]", r"\(20, 2\)"]),
        (dict(reward=np.full(20, np.nan, np.float32)), [r"episode\['reward'\]", "NaN"]),
        (dict(obs=np.full((20, 5), np.inf, np.float32)), [r"episode\['obs'\]", "infinity"]),
        (dict(obs={"rgb": 1}), [r"episode\['obs'\]", r"a dict with \['rgb'\], allowed: 'state'"]),
        (dict(reward=np.zeros(19)), [r"episode\['reward'\]: got shape \(19,\), allowed: \(20,\)"]),
        (dict(obs=np.zeros((19, 5))), [r"episode\['obs'\]: got shape \(19, 5\), allowed: \(20, 5\)"]),
        (dict(obs=[], action=[], reward=[], terminated=[]), ["episode: got no steps, allowed: at least one"]),
        (dict(reward=None), ["episode: got keys", "'reward'"]),
        (dict(reward=np.zeros(20, complex)), [r"episode\['reward'\]", "complex128"]),
        (dict(reward=[[1], [1, 2]]), [r"episode\['reward'\]", "got list"]),
        (dict(reward=np.full(20, 1e300)), [r"episode\['reward'\]", "infinity"]),
        (dict(obs="abc"), [r"episode\['obs'\]", "got str"]),
    ],
)
def test_bad_episodes_are_named(change: dict[str, Any], words: list[str]) -> None:
    cfg = tiny_config()
    episode = {k: v for k, v in {**random_episode(cfg, 20), **change}.items() if v is not None}
    for word in words:
        with pytest.raises(InputError, match=word):
            ReplayBuffer(cfg).add(episode)


def arrays(change: Callable[[np.ndarray[Any, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda episode: {k: change(v) for k, v in episode.items()}


def frozen(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    "change",
    [
        arrays(lambda x: x.astype(float)),
        arrays(lambda x: x[::-1].copy()[::-1]),
        arrays(frozen),
        arrays(lambda x: x.astype(x.dtype.newbyteorder(">"))),
        arrays(lambda x: x.tolist()),
        arrays(lambda x: torch.tensor(x, requires_grad=True)),
        lambda e: {**e, "obs": {"state": e["obs"]}, "terminated": e["terminated"] > 0},
        lambda e: {**e, "obs": list(torch.tensor(e["obs"]))},
    ],
)
def test_episodes_come_as_people_have_them(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    cfg, found = tiny_config(), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for episode in (random_episode(cfg, 20), change(random_episode(cfg, 20))):
            buffer = ReplayBuffer(cfg)
            buffer.add(episode)
            found.append(buffer.sample())
    assert all(torch.equal(x, y) for x, y in zip(*(batch[:4] for batch in found), strict=True))
    assert not any(x.requires_grad for x in found[1][:4])


def test_pixels_are_kept_as_they_are_or_refused() -> None:
    cfg = Config(obs="rgb", latent_dim=32, device="cpu", buffer_size=50, batch_size=4)
    cfg = cfg.with_env({"rgb": (1, 64, 64)}, 2, 50)
    pictures = np.random.default_rng(0).integers(0, 256, (20, 1, 64, 64), dtype=np.uint8)
    rest = dict(action=np.zeros((20, 2)), reward=np.zeros(20))
    for obs in (pictures, pictures.astype(float), {"rgb": pictures.astype(int)}):
        buffer = ReplayBuffer(cfg)
        buffer.add(dict(rest, obs=obs))
        assert np.array_equal(buffer.steps(0, 20)["obs"].numpy(), pictures)
    for obs, words in ((pictures / 255, "multiply by 255"), (pictures / 2, "whole"), (pictures - 9.0, "from -9")):
        with pytest.raises(InputError, match=rf"episode\['obs'\].*{words}"):
            ReplayBuffer(cfg).add(dict(rest, obs=obs))


def test_a_buffer_too_small_or_too_large_is_named() -> None:
    with pytest.raises(InputError, match="at least horizon"):
        ReplayBuffer(tiny_config(buffer_size=3))
    huge = ReplayBuffer(tiny_config(buffer_size=10**12, steps=10**12))
    # Of a step five numbers are observed and two done; there is a reward and, in a byte, whether it was the last.
    with pytest.raises(InputError, match=r"a replay of 33000\.0 GB for .* steps.*make buffer_size smaller"):
        huge.add(random_episode(tiny_config(), 20))


@pytest.mark.parametrize(("free", "where", "pinned"), [(10**9, "cuda", False), (10**8, "cpu", True)])
def test_storage_follows_the_memory_that_is_free(
    free: int, where: str, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 8 * 10**10))
    device, pin = storage_device(torch.device("cuda"), 10**8, 1)
    assert (device.type, pin) == (where, pinned)
    assert storage_device(torch.device("cpu"), 10**8, 1) == (torch.device("cpu"), False)


def test_memory_is_told_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> Any:
        raise FileNotFoundError(args[0])

    monkeypatch.setattr("builtins.open", none)
    with pytest.raises(InputError, match="memory free now"):
        storage_device(torch.device("cpu"), 10**9, 10**9)


def test_terminated_may_be_none(cfg: Config) -> None:
    buffer = ReplayBuffer(cfg)
    assert buffer.add({**random_episode(cfg, 20), "terminated": None}) == 1
    assert not buffer.steps(0, 20)["terminated"].any()


def test_what_is_no_config_or_no_device_is_named(cfg: Config) -> None:
    for wrong, words in ((None, "cfg: got None"), ({"horizn": 2}, "horizn"), ("x", "cfg: got str")):
        with pytest.raises(ConfigError, match=words):
            ReplayBuffer(wrong)
    for device in (None, 3, "xyz", "mps"):
        with pytest.raises((InputError, ConfigError), match=f"device.*: got .*{device}.*allowed|device: got int"):
            ReplayBuffer(cfg, device)  # type: ignore[arg-type]
    assert ReplayBuffer(cfg.to_dict()).cfg == cfg


def test_what_is_no_episode_or_no_buffer_is_named(agent: TDMPC2) -> None:
    for wrong in (None, [1], "abc"):
        with pytest.raises(InputError, match=r"episode: got .*, allowed: a dict of arrays"):
            ReplayBuffer(agent.cfg).add(wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"buffer: got .*, allowed: a ReplayBuffer"):
            agent.update(wrong)  # type: ignore[arg-type]


def test_what_kernels_draw_from_follows_the_buffer(cfg: Config) -> None:
    buffer = ReplayBuffer(cfg.replace(buffer_size=50))
    seen = []
    for i, length in enumerate((20, 3, 15, 20)):  # the second is too short, and the last overwrites some of the first
        buffer.add(random_episode(cfg, length, seed=i))
        found = buffer.on_device()
        assert found is not None
        rows = found.table[: int(found.count)].tolist()
        assert (len(rows), int(found.first)) == (buffer.num_sampleable, 0)
        seen.append((found.table.data_ptr(), found.count.data_ptr(), rows))
    assert [rows for *_, rows in seen] == [
        [[0, 20]],
        [[0, 20]],
        [[0, 20], [23, 15]],
        [[8, 12], [23, 15], [38, 20]],
    ]
    assert len({addresses[:2] for addresses in seen}) == 1
