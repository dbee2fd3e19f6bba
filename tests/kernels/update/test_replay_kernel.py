"""Slices drawn and gathered in one launch: against plain torch, the ring, and the law of sampling.

Statistics use fixed seeds.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import DEVICE, MARKS, reseed
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import log_launches
from tdmpc2_fast.kernels.update import replay_gather
from tdmpc2_fast.kernels.update.replay_gather import DeviceReplay, Slices, Steps, draw_slices, draw_slices_reference

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    reseed(request.node.name, request.node.path.name)


def ring(c: int, o: int = 5, a: int = 3, pixels: bool = False, tasks: bool = False, k: int = 1) -> Steps:
    """A full ring of random steps, of k frames each."""
    frames = c + k - 1, o // k
    obs = torch.randn(frames, device=DEVICE)
    return Steps(
        obs=torch.randint(0, 256, frames, dtype=torch.uint8, device=DEVICE) if pixels else obs,
        action=torch.randn(c, a, device=DEVICE),
        reward=torch.randn(c, device=DEVICE),
        terminated=torch.rand(c, device=DEVICE) < 0.3,
        task=torch.randint(0, 80, (c,), device=DEVICE) if tasks else None,
        repeats=torch.randint(0, k, (c,), device=DEVICE) if k > 1 else None,
    )


def numbered(c: int, written: int) -> Steps:
    """A ring after `written` steps; each number of a step is that of the step."""
    step = torch.arange(c)
    step += (written - 1 - step) // c * c
    x = step.float().to(DEVICE)
    return Steps(x.unsqueeze(1).clone(), x.unsqueeze(1).clone(), x.clone(), torch.zeros(c, dtype=torch.bool).to(DEVICE))


def frames_of(steps: Steps) -> int:
    return len(steps.obs) - len(steps.reward) + 1


def batch(steps: Steps, h: int, b: int, dtype: torch.dtype = torch.float32, wide: bool = False) -> Slices:
    """Poisoned outputs; wide: each row within a wider one, with rows between."""
    o, a = frames_of(steps) * steps.obs.shape[1], steps.action.shape[1]
    gap = 3 if wide else 0

    def rows(t: int, width: int, kind: torch.dtype) -> Tensor:
        value = 171 if kind == torch.uint8 else torch.nan
        room = torch.full((t, b + gap, width + gap), value, dtype=kind, device=DEVICE)
        return room[:, gap : gap + b, gap : gap + width]

    return Slices(
        obs=rows(h + 1, o, torch.uint8 if steps.obs.dtype == torch.uint8 else dtype),
        action=rows(h, a, dtype),
        reward=rows(h, 1, torch.float32).squeeze(2),
        terminated=rows(h, 1, torch.float32).squeeze(2),
        task=torch.full((b,), -1, device=DEVICE) if steps.task is not None else None,
    )


def words(*x: int) -> Tensor:
    return torch.tensor(x, device=DEVICE)


def replay_of(steps: Steps, rows: list[tuple[int, int]], first: int = 0, size: int = 0) -> DeviceReplay:
    """Table, first and count; what is not valid would be far outside of the ring's steps."""
    size = size or len(rows)
    table = torch.full((size, 2), 10**15, device=DEVICE)
    for i, row in enumerate(rows):
        table[(first + i) % size] = words(*row)
    return DeviceReplay(steps, table, words(first), words(len(rows)))


def assert_same(got: Slices, want: Slices) -> None:
    for name, x in got._asdict().items():
        if x is not None:
            assert torch.equal(x, getattr(want, name)), name


SIZES: list[dict[str, Any]] = [
    dict(),
    dict(o=1, a=1, b=1, h=1),
    dict(o=67, a=38, b=33, h=5, wide=True),
    dict(o=24, a=6, b=40, dtype=torch.bfloat16, wide=True, tasks=True),
    dict(o=5000, a=2, b=3, pixels=True),
    dict(o=147, a=2, b=19, pixels=True, wide=True, dtype=torch.bfloat16),
    dict(o=147, a=2, b=19, pixels=True, k=3, tasks=True),
    dict(o=4 * 4096, a=1, b=2, pixels=True, k=4, wide=True),
    dict(o=10, a=1, b=33, k=2, dtype=torch.bfloat16, wide=True),
    dict(o=7, a=6, b=5, h=1, pixels=True, k=7),
]


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "given"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()) or "plain")
def test_kernel_gathers_what_the_reference_gathers(sizes: dict[str, Any], drawn: bool) -> None:
    options = dict(o=5, a=3, b=17, h=3, dtype=torch.float32, pixels=False, wide=False, tasks=False, k=1) | sizes
    o, a, b, h, dtype, pixels, wide, tasks, k = options.values()
    c = 61
    steps = ring(c, o, a, pixels, tasks, k)
    # 5 * 61 steps of all time and 20 more: the ring wraps within an episode.
    begin = 5 * c - 11
    replay = replay_of(steps, [(begin, h + 1), (begin + 10, 23), (begin + 33, 15)], first=3, size=7)
    starts = None if drawn else torch.randint(begin, begin + c - h, (b,), device=DEVICE)
    for seed, counter in ((1, 0), (-5, 2**40 + 1)):
        got, want = (batch(steps, h, b, dtype, wide) for _ in range(2))
        state = words(seed, counter)
        draw_slices(state, replay, got, starts=starts)
        draw_slices_reference(state, replay, want, starts=starts)
        assert state.tolist() == [seed, counter]
        assert_same(got, want)
        if wide:
            for x in (got.obs, got.action, got.reward):
                base = x._base
                assert base is not None
                rest = (
                    int((base == 171).sum() - (x == 171).sum()) if pixels and x is got.obs else int(base.isnan().sum())
                )
                assert rest == base.numel() - x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_starts_are_taken_and_numbers_rounded_to_nearest(dtype: torch.dtype) -> None:
    c, h, b = 50, 3, 29
    steps = ring(c, tasks=True)
    steps.obs[:, 0] = (torch.arange(c, device=DEVICE) % 2).float() * 2**-7 + 1 + 2**-8  # halfway, to both sides
    out = batch(steps, h, b, dtype)
    starts = torch.randint(10**10, 10**10 + 1000, (b,), device=DEVICE)
    draw_slices(words(1, 0), replay_of(steps, [(0, 9)]), out, starts=starts)
    for i, start in enumerate(starts.tolist()):
        where = torch.arange(start, start + h + 1, device=DEVICE) % c
        assert torch.equal(out.obs[:, i], steps.obs[where].to(dtype))
        assert torch.equal(out.action[:, i], steps.action[where[1:]].to(dtype))
        assert torch.equal(out.reward[:, i], steps.reward[where[1:]])
        assert torch.equal(out.terminated[:, i], steps.terminated[where[1:]].float())
        assert out.task is not None
        assert steps.task is not None
        assert out.task[i] == steps.task[where[0]]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_stacks_are_built_of_frames_that_were_kept_once(k: int) -> None:
    """Observations of episodes of all lengths, in a ring that has wrapped, against those never taken apart."""
    c, h, width = 41, 3, 6
    frames = torch.zeros(c + k - 1, width, dtype=torch.uint8)
    repeats = torch.zeros(c, dtype=torch.int64)
    whole, episodes, written = [], [], 0
    for length in (30, 2, 1, 17, 4, 1, 1, 22, 9):
        seen = torch.randint(0, 256, (length, width), dtype=torch.uint8)
        for t in range(length):
            whole.append(torch.cat([seen[max(t - back, 0)] for back in range(k - 1, -1, -1)]))
            frames[(written + k - 1) % len(frames)] = seen[t]
            repeats[written % c] = max(k - 1 - t, 0)
            written += 1
        episodes.append((written - length, length))
    held = [(max(start, written - c), start + length) for start, length in episodes]
    rows = [(start, stop - start) for start, stop in held if stop - start > h]
    assert rows[0][0] == written - c  # of which frames are wanted that came before
    rest = ring(c, pixels=True)
    steps = rest._replace(obs=frames.to(DEVICE), repeats=repeats.to(DEVICE))
    starts = [start + i for start, length in rows for i in range(length - h)]
    out = batch(steps, h, len(starts))
    draw_slices(words(1, 0), replay_of(steps, rows), out, starts=words(*starts))
    want = torch.stack([torch.stack([whole[start + t] for start in starts]) for t in range(h + 1)])
    assert torch.equal(out.obs.cpu(), want)


def drawn_starts(replay: DeviceReplay, h: int, b: int, seed: int, counter: int = 0) -> Tensor:
    """First steps of a batch from a numbered ring, after a look at the rest of it."""
    out = batch(replay.steps, h, b)
    draw_slices(words(seed, counter), replay, out)
    obs = out.obs[..., 0]
    assert torch.equal(obs[1:] - obs[:-1], torch.ones_like(obs[1:]))
    assert torch.equal(out.action[..., 0], obs[1:])
    assert torch.equal(out.reward, obs[1:])
    return obs[0].long().cpu()


@pytest.mark.parametrize("seed", [1, 2])
def test_law_episode_first_then_start(seed: int) -> None:
    h, n, lengths = 3, 60_000, [4, 9, 5, 40]
    begins = [1000, 1004, 1013, 1018]
    steps = numbered(70, 1058)
    starts = drawn_starts(replay_of(steps, list(zip(begins, lengths, strict=True))), h, n, seed)
    for begin, length in zip(begins, lengths, strict=True):
        mine = starts[(starts >= begin) & (starts < begin + length)] - begin
        assert abs(len(mine) / n - 1 / 4) < 5 * (3 / 16 / n) ** 0.5
        places = length - h
        counts = torch.bincount(mine, minlength=places).double()
        assert len(counts) == places
        expected = len(mine) / places
        chi = float(((counts - expected) ** 2 / expected).sum())
        assert chi < places + 6 * (2 * places) ** 0.5
    # One slice says nothing about the next.
    inside = (starts >= 1018).double()
    pairs = (inside[1:] * inside[:-1]).mean()
    assert abs(pairs - 1 / 16) < 5 * (1 / 16 / n) ** 0.5


def test_only_valid_rows_are_drawn_and_later_ones_are_seen() -> None:
    h, c = 2, 40
    steps = numbered(c, 200)
    replay = replay_of(steps, [(165, 5), (170, 5)], first=4, size=6)
    assert set(drawn_starts(replay, h, 500, 1).tolist()) == {*range(165, 168), *range(170, 173)}
    # The next episode takes the row after, which is the table's first again; the oldest one goes.
    replay.table[0] = words(180, 4)
    replay.first.add_(1)
    starts = drawn_starts(replay, h, 500, 1)
    assert set(starts.tolist()) == {*range(170, 173), 180, 181}
    replay.count.add_(1)
    replay.table[1] = words(190, 3)
    assert set(drawn_starts(replay, h, 500, 1).tolist()) == {*range(170, 173), 180, 181, 190}


def test_many_episodes_and_long_ones() -> None:
    """The whole range of both choices is used, beyond what 32 bits or a float32 resolve."""
    c, h, b, r = 8, 3, 4000, 2**20
    steps = ring(c)
    out = batch(steps, h, b)
    table = torch.stack([torch.arange(r) * 2**31, torch.full((r,), 2**31 - 1)], 1).to(DEVICE)
    draw_slices(words(3, 9), DeviceReplay(steps, table, words(0), words(r)), out)
    want = batch(steps, h, b)
    draw_slices_reference(words(3, 9), DeviceReplay(steps, table, words(0), words(r)), want)
    assert_same(out, want)

    def share(high: int, low: int, count: int) -> int:
        return ((high << 32 | low) * count) >> 64

    word = replay_gather.stream_words(words(3, 9), replay_gather._STREAM, 4 * b)
    episodes = [share(w[0], w[1], r) for w in word.tolist()]
    starts = [e * 2**31 + share(w[2], w[3], 2**31 - 1 - h) for e, w in zip(episodes, word.tolist(), strict=True)]
    given = batch(steps, h, b)
    draw_slices(words(0, 0), DeviceReplay(steps, table, words(0), words(r)), given, starts=words(*starts))
    assert_same(out, given)
    assert min(episodes) < r / 500
    assert max(episodes) > r - r / 500


def test_same_state_same_slices_another_state_others() -> None:
    steps = numbered(2000, 2000)
    replay = replay_of(steps, [(0, 2000)])
    base = drawn_starts(replay, 3, 300, 5, 6)
    assert torch.equal(base, drawn_starts(replay, 3, 300, 5, 6))
    assert torch.equal(base[:7], drawn_starts(replay, 3, 7, 5, 6))
    for seed, counter in ((5, 7), (6, 6), (5 + 2**32, 6), (5, 6 + 2**32)):
        assert (drawn_starts(replay, 3, 300, seed, counter) == base).float().mean() < 0.05


def test_one_launch_and_the_same_signature() -> None:
    steps = ring(30)
    with log_launches() as log:
        draw_slices(words(1, 0), replay_of(steps, [(0, 30)]), batch(steps, 3, 8))
    assert len(log) == 1
    assert inspect.signature(draw_slices) == inspect.signature(draw_slices_reference)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("state", lambda x: x[:1]),
        ("table", lambda x: x.flatten()),
        ("table", lambda x: x.int()),
        ("first", lambda x: x.float()),
        ("count", lambda x: x[:0]),
        ("steps.action", lambda x: x.double()),
        ("steps.reward", lambda x: x[1:]),
        ("steps.terminated", lambda x: x.float()),
        ("steps.task", lambda x: x.int()),
        ("steps.repeats", lambda x: x.int()),
        ("steps.repeats", lambda x: x[1:]),
        ("steps.repeats", lambda x: None),
        ("out.obs", lambda x: x.double()),
        ("out.obs", lambda x: x[:1]),
        ("out.obs", lambda x: x[..., 1:]),
        ("out.obs", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        ("out.action", lambda x: x[1:]),
        ("out.reward", lambda x: x.bfloat16()),
        ("out.terminated", lambda x: x.bool()),
        ("out.task", lambda x: None),
        ("starts", lambda x: x[1:]),
    ],
)
def test_bad_arguments_are_named(name: str, change: Any) -> None:
    steps = ring(30, o=6, tasks=True, k=2)
    args: dict[str, Any] = dict(state=words(1, 0), starts=torch.arange(8, device=DEVICE), out=batch(steps, 3, 8))
    args["replay"] = replay_of(steps, [(0, 30)])
    whole, _, part = name.partition(".")
    if whole == "steps":
        args["replay"] = replace(args["replay"], steps=steps._replace(**{part: change(getattr(steps, part))}))
    elif whole == "out":
        args["out"] = args["out"]._replace(**{part: change(getattr(args["out"], part))})
    elif name in ("state", "starts"):
        args[name] = change(args[name])
    else:
        args["replay"] = replace(args["replay"], **{name: change(getattr(args["replay"], name))})
    for op in (draw_slices, draw_slices_reference):
        with pytest.raises(ValueError, match=rf"^{name}: got .*allowed: "):
            op(**args)


def test_repeats_without_stacks_are_named() -> None:
    steps = ring(30)._replace(repeats=words(*[0] * 30))
    for op in (draw_slices, draw_slices_reference):
        with pytest.raises(ValueError, match=r"^steps.repeats: got a tensor with observations of 1 frames, allowed: "):
            op(words(1, 0), replay_of(steps, [(0, 30)]), batch(steps, 3, 8))


def test_a_ring_shorter_than_a_slice_is_named() -> None:
    steps = ring(4)
    with pytest.raises(ValueError, match=r"^out.obs: got 5 steps a slice, allowed: 2 to 4"):
        draw_slices(words(1, 0), replay_of(steps, [(0, 4)]), batch(steps, 4, 2))
