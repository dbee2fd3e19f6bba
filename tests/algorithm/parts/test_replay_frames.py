"""Frames of stacked pixels that are kept once: every batch is that of whole observations, bit for bit."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tdmpc2_fast import TDMPC2, Config, ReplayBuffer
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.errors import InputError
from tdmpc2_fast.kernels.cpu.build import why_not as why_not_built
from tdmpc2_fast.kernels.device import launch
from tdmpc2_fast.kernels.update.replay_gather import (
    DeviceReplay,
    Slices,
    Steps,
    draw_slices,
    draw_slices_reference,
)
from tdmpc2_fast.learn import ring
from tdmpc2_fast.rng import generator
from tdmpc2_fast.train.envs.pixels import Stack

Episode = dict[str, np.ndarray[Any, Any]]


def pixel_config(channels: int, **changes: Any) -> Config:
    keys = dict(obs="rgb", num_channels=1, latent_dim=16, device="cpu", buffer_size=40, batch_size=6) | changes
    return Config.from_dict(keys).with_env({"rgb": (channels, 64, 64)}, 2, 50)


def frames_of(length: int, channels: int, rng: np.random.Generator, colours: int = 256) -> np.ndarray[Any, Any]:
    """Pictures of one colour each where there are few, so that by chance they are often equal."""
    side = 64 if colours == 256 else 1
    drawn = rng.integers(0, colours, (length, channels, side, side), dtype=np.uint8)
    return np.broadcast_to(drawn, (length, channels, 64, 64))


def episode_of(frames: np.ndarray[Any, Any], stack: Callable[..., Any], rng: np.random.Generator) -> Episode:
    n = len(frames)
    episode = dict(
        obs=np.stack([stack(x, first=t == 0) for t, x in enumerate(frames)]),
        action=rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        reward=rng.standard_normal(n).astype(np.float32),
        terminated=rng.random(n) < 0.3,
    )
    episode["action"][0] = episode["reward"][0] = np.nan
    return episode


def episodes_of(cfg: Config, k: int, lengths: list[int], seed: int = 0, colours: int = 256) -> list[Episode]:
    """Episodes that stack k frames as environments do."""
    rng = np.random.default_rng(seed)
    channels = cfg.observation_shape[0] // k
    return [episode_of(frames_of(n, channels, rng, colours), Stack(k), rng) for n in lengths]


def strange(cfg: Config, length: int, k: int = 3) -> Episode:
    """An episode whose stacks begin with black frames, as some wrappers have it."""
    rng = np.random.default_rng(length)
    (found,) = episodes_of(cfg, k, [length], seed=length)
    found["obs"] = found["obs"].copy()
    c = cfg.observation_shape[0] // k
    for t in range(min(k - 1, length)):
        found["obs"][t, : (k - 1 - t) * c] = 0
    assert found["obs"][0].any()
    return found | dict(reward=rng.standard_normal(length).astype(np.float32))


class Whole:
    """The plain way: every observation as it came, found by its number; the same law and the same draws."""

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.capacity = cfg, min(cfg.buffer_size, cfg.steps)
        self.rows: dict[str, list[Any]] = {}
        self.episodes: list[tuple[int, int]] = []
        self.written = 0
        self.generator = generator(cfg.seed, "replay", torch.device("cpu"))

    def add(self, episode: Episode) -> None:
        kept = min(len(episode["reward"]), self.capacity)
        for name, x in episode.items():
            self.rows.setdefault(name, []).extend(torch.as_tensor(x)[-kept:])
        self.episodes.append((self.written, kept))
        self.written += kept

    @property
    def usable(self) -> list[tuple[int, int]]:
        held = [(max(s, self.written - self.capacity), s + n) for s, n in self.episodes]
        return [(start, stop - start) for start, stop in held if stop - start > self.cfg.horizon]

    def at(self, name: str, numbers: Tensor) -> Tensor:
        found = torch.stack([self.rows[name][n] for n in numbers.flatten().tolist()])
        return found.view(*numbers.shape, *found.shape[1:])

    def sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        b, h, usable = self.cfg.batch_size, self.cfg.horizon, self.usable
        u = torch.rand(2, b, dtype=torch.float64, generator=self.generator)
        drawn = [usable[int(x * len(usable))] for x in u[0]]
        first = torch.tensor([s + int(x * (n - h)) for (s, n), x in zip(drawn, u[1], strict=True)])
        numbers = first + torch.arange(h + 1).unsqueeze(1)
        reward, terminated = (self.at(k, numbers[1:]).float().unsqueeze(-1) for k in ("reward", "terminated"))
        return self.at("obs", numbers), self.at("action", numbers[1:]), reward, terminated

    def on_device(self) -> DeviceReplay:
        numbers = torch.arange(max(0, self.written - self.capacity), self.written)
        rows = {}
        for name in self.rows:
            x = self.at(name, numbers)
            rows[name] = torch.zeros(self.capacity, *x.shape[1:], dtype=x.dtype)
            rows[name][numbers % self.capacity] = x
        table = torch.tensor(self.usable)
        one = torch.tensor([0])
        return DeviceReplay(Steps(**rows | dict(obs=rows["obs"].flatten(1))), table, one, torch.tensor([len(table)]))


def drawn(cfg: Config, replay: DeviceReplay, counter: int, op: Any = draw_slices) -> Slices:
    h, b, shape = cfg.horizon, cfg.batch_size, cfg.observation_shape
    out = Slices(
        None,
        torch.full((h + 1, b, torch.Size(shape).numel()), 171, dtype=torch.uint8),
        torch.zeros(h, b, 2),
        torch.zeros(h, b),
        torch.zeros(h, b),
    )
    op(torch.tensor([5, counter]), replay, out)
    return out


def same(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        assert x is y is None or torch.equal(x, y)


def check_same(buffer: ReplayBuffer, whole: Whole, counter: int = 0, kernels: bool = True) -> None:
    """What both hold, and the next batch by torch and by kernels, are the same."""
    oldest = max(0, whole.written - whole.capacity)
    assert (buffer.written, len(buffer)) == (whole.written, whole.written - oldest)
    for name, x in buffer.steps(oldest, whole.written).items():
        want = whole.at(name, torch.arange(oldest, whole.written))
        assert x.numpy().tobytes() == want.numpy().tobytes()
    assert buffer.num_sampleable == len(whole.usable)
    if not whole.usable:
        return
    same(buffer.sample()[:4], whole.sample())
    found = buffer.on_device()
    assert found is not None
    if kernels:
        want = drawn(buffer.cfg, whole.on_device(), counter, draw_slices_reference)
        same(drawn(buffer.cfg, found, counter), want)
        same(drawn(buffer.cfg, found, counter, draw_slices_reference), want)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of the CPU instead of interpreted ones."""
    if why := why_not_built():
        pytest.skip(why)
    monkeypatch.setattr(launch._open, "native", True)


LENGTHS = [7, 1, 2, 23, 4, 3, 60, 1, 1, 5, 18, 30, 2, 40, 41, 9, 9, 1, 39, 12]


@pytest.mark.parametrize(
    ("channels", "k", "colours"), [(9, 3, 256), (9, 3, 2), (4, 4, 256), (4, 4, 2), (4, 2, 2), (5, 5, 256), (3, 1, 256)]
)
def test_batches_are_those_of_whole_observations(channels: int, k: int, colours: int) -> None:
    """In a ring that wraps many times, with episodes shorter than a slice or a stack, and longer than the ring."""
    cfg = pixel_config(channels)
    buffer, whole = ReplayBuffer(cfg), Whole(cfg)
    with warnings.catch_warnings():
        if colours == 2:  # the first episode may look as if its frames had fewer channels
            warnings.simplefilter("ignore")
        for i, episode in enumerate(episodes_of(cfg, k, LENGTHS, colours=colours)):
            buffer.add(episode)
            whole.add(episode)
            check_same(buffer, whole, i, kernels=i % 7 == 6)
    assert buffer.frames == k
    if k > 1:
        assert buffer.nbytes < (1.3 / k) * 40 * channels * 64 * 64


def test_the_kernels_of_a_cpu_draw_the_same(native: None) -> None:
    cfg = pixel_config(9)
    buffer, whole = ReplayBuffer(cfg), Whole(cfg)
    for i, episode in enumerate(episodes_of(cfg, 3, LENGTHS)):
        buffer.add(episode)
        whole.add(episode)
        check_same(buffer, whole, i)
    assert buffer.frames == 3


@pytest.mark.parametrize("backend", ["torch", "triton", "cpu"])
def test_an_agent_learns_the_same_and_goes_on_where_the_form_changes(backend: str) -> None:
    """Updates that were captured read the frames' new places, too."""
    small = dict(mlp_dim=16, num_q=2, num_bins=11, horizon=2, batch_size=3, backend=backend)
    if backend == "cpu" and why_not_built():
        pytest.skip(str(why_not_built()))
    cfg = pixel_config(9, **small)
    once, whole = ReplayBuffer(cfg), ReplayBuffer(cfg)
    whole._ring = ring.Ring(cfg, whole.device, whole.capacity, channels=9)
    agents = TDMPC2(cfg), TDMPC2(cfg)
    (stacked,) = episodes_of(cfg, 3, [30])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "replay: .* do not stack 3 frames")
        for episode in (stacked, strange(cfg, 20)):
            for buffer in (once, whole):
                buffer.add(episode)
            assert (once.frames, whole.frames) == (3 if episode is stacked else 1, 1)
            for _ in range(2):
                a, b = (agent.update(buffer) for agent, buffer in zip(agents, (once, whole), strict=True))
                assert {k: float(v) for k, v in a.items()} == {k: float(v) for k, v in b.items()}
    a, b = (tensors_only(agent.model.state_dict()) for agent in agents)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_no_stack_is_kept_whole() -> None:
    cfg, rng = pixel_config(6), np.random.default_rng(0)
    buffer, whole = ReplayBuffer(cfg), Whole(cfg)
    for n in (20, 3, 30):
        episode = episode_of(frames_of(n, 6, rng), lambda x, first: x, rng)
        buffer.add(episode)
        whole.add(episode)
        check_same(buffer, whole, n)
    assert buffer.frames == 1


@pytest.mark.parametrize("before", [[], [7], [30, 25], [70]], ids=str)
def test_one_that_is_stacked_otherwise_changes_the_form_and_no_batch(before: list[int]) -> None:
    cfg = pixel_config(9)
    buffer, whole = ReplayBuffer(cfg), Whole(cfg)

    def add(episode: Episode) -> None:
        buffer.add(episode)
        whole.add(episode)
        check_same(buffer, whole, whole.written)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for episode in episodes_of(cfg, 3, before):
            add(episode)
        held = buffer.on_device() if before else None
        if not before:
            add(strange(cfg, 12))
    if before:
        with pytest.warns(
            UserWarning, match=r"do not stack 3 frames.*from here on it takes 0\.00\d* GB of memory, before 0\.000\d*$"
        ):
            add(strange(cfg, 12))
    assert buffer.frames == 1
    assert buffer.on_device() is not held
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for episode in [*episodes_of(cfg, 3, [9, 45, 20]), strange(cfg, 8)]:
            add(episode)


def test_a_first_episode_in_which_nothing_moves_says_nothing_for_good() -> None:
    cfg, rng = pixel_config(9), np.random.default_rng(3)
    grey = np.full((8, 3, 64, 64), 7, np.uint8)
    still = episode_of(grey, Stack(3), rng)
    for k, frames in ((3, 3), (9, 9), (1, 1)):
        buffer, whole = ReplayBuffer(cfg), Whole(cfg)
        buffer.add(still)
        whole.add(still)
        assert buffer.frames == 3
        (moving,) = episodes_of(cfg, k, [30])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            buffer.add(moving)
        whole.add(moving)
        assert [("do not stack 3 frames" in str(w.message)) for w in said] == [True] * (k != 3)
        assert buffer.frames == frames
        check_same(buffer, whole)


def test_a_ring_that_begins_within_an_episode_changes_to_another_number_of_frames() -> None:
    cfg, rng = pixel_config(4), np.random.default_rng(4)
    frames = np.zeros((43, 1, 64, 64), np.uint8)
    frames[1:] = 1  # so the oldest step that stays is 0111: frames of one channel, but also of two
    buffer, whole = ReplayBuffer(cfg), Whole(cfg)
    for episode, k in ((episode_of(frames, Stack(4), rng), 4), (episodes_of(cfg, 2, [20])[0], 2)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "replay: .* do not stack 4 frames")
            buffer.add(episode)
        whole.add(episode)
        assert buffer.frames == k
        check_same(buffer, whole)


def test_a_form_that_does_not_fit_is_refused_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = pixel_config(9)
    buffer, whole = ReplayBuffer(cfg), Whole(cfg)
    for episode in episodes_of(cfg, 3, [30, 20]):
        buffer.add(episode)
        whole.add(episode)
    monkeypatch.setattr(ring, "_host_memory", lambda: 10**6)
    with (
        pytest.raises(InputError, match=r"do not stack 3 frames.*buffer_size: got a replay of .* 40 steps"),
    ):
        buffer.add(strange(cfg, 12))
    check_same(buffer, whole)
    assert (buffer.frames, buffer.num_eps) == (3, 2)
    (episode,) = episodes_of(cfg, 3, [25], seed=5)
    buffer.add(episode)
    whole.add(episode)
    check_same(buffer, whole)


def cut(buffer: ReplayBuffer, ends: list[int], name: str) -> list[tuple[int, dict[str, Tensor]]]:
    """Files of steps that end at these numbers: `steps`, as versions before this one wrote them, or `kept`."""
    oldest = buffer.written - len(buffer)
    edges = sorted({oldest, *(e for e in ends if oldest < e < buffer.written), buffer.written})
    return [(a, getattr(buffer, name)(a, b)) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("capacity", [40, 17, 4], ids=["as large", "smaller", "the smallest"])
@pytest.mark.parametrize("form", ["steps", "kept"])
@pytest.mark.parametrize("count", [3, 12], ids=["not full", "wrapped"])
def test_files_of_both_forms_go_on(count: int, form: str, capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_PIECE", 5 * 9 * 64 * 64)
    cfg = pixel_config(9)
    buffer, whole = ReplayBuffer(cfg), Whole(cfg.replace(buffer_size=capacity))
    for episode in episodes_of(cfg, 3, LENGTHS[:count]):
        buffer.add(episode)
        whole.add(episode)
    chunks = cut(buffer, [3, 8, 9, buffer.written - 30, buffer.written - 9, buffer.written - 8], form)
    other = ReplayBuffer(cfg.replace(buffer_size=capacity))
    if capacity == 40:
        buffer.sample()
        whole.sample()
    other.restore({k: x.clone() for k, x in buffer.state().items()}, chunks)
    if capacity == 40:
        check_same(other, whole)
    assert other.frames == 3
    oldest = other.written - len(other)
    want = buffer.steps(oldest, buffer.written)
    assert torch.equal(other.steps(oldest, buffer.written)["obs"], want["obs"])
    for episode in episodes_of(cfg, 3, [11, 2, 30], seed=9):
        for b in (buffer, other):
            b.add(episode)
        got, want = (b.steps(b.written - len(other), b.written)["obs"] for b in (other, buffer))
        assert torch.equal(got, want)


def test_a_file_tells_its_form_where_one_step_of_it_would_not() -> None:
    cfg = pixel_config(4)
    buffer, small = ReplayBuffer(cfg), ReplayBuffer(cfg.replace(buffer_size=4))
    for episode in episodes_of(cfg, 2, [20]):
        buffer.add(episode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.restore(buffer.state(), cut(buffer, [17], "kept"))
    assert small.frames == 2
    assert torch.equal(small.steps(16, 20)["obs"], buffer.steps(16, 20)["obs"])


def test_what_no_step_was_written_to_is_no_chance_in_a_file(poisoned_memory: None) -> None:
    cfg = pixel_config(9)
    buffer = ReplayBuffer(cfg)
    for episode in episodes_of(cfg, 3, [20]):
        buffer.add(episode)
    assert not buffer.kept(0, 9)["frames"][:2].any()


def test_files_hold_each_frame_once() -> None:
    cfg = pixel_config(9, buffer_size=100)
    buffer = ReplayBuffer(cfg)
    for episode in episodes_of(cfg, 3, [60, 50]):
        buffer.add(episode)
    sizes = [sum(x.nbytes for x in getattr(buffer, form)(10, 110).values()) for form in ("kept", "steps")]
    assert 2.8 < sizes[1] / sizes[0] < 3


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies_and_pickles_go_on(way: Callable[[ReplayBuffer], ReplayBuffer]) -> None:
    cfg = pixel_config(9)
    buffer, whole = ReplayBuffer(cfg), Whole(cfg)
    for episode in episodes_of(cfg, 3, LENGTHS[:8]):
        buffer.add(episode)
        whole.add(episode)
    check_same(buffer, whole)
    other = way(buffer)
    assert other.nbytes == buffer.nbytes
    check_same(other, whole)


def test_memory_is_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = pixel_config(9, buffer_size=1_000_000, steps=2_000_000)
    monkeypatch.setattr(ring, "_host_memory", lambda: 20 * 10**9)
    buffer = ReplayBuffer(cfg)
    assert buffer.check_memory(frames=3) == pytest.approx(12.3e9, rel=0.01)
    with pytest.raises(InputError, match=r"a replay of 36\.9 GB for 1,000,000 steps"):
        buffer.check_memory()
