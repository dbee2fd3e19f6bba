"""A batch of slices, drawn and gathered in one launch (the sampling law of the replay).

A slice is H+1 consecutive steps of one episode: an episode uniformly, then a start uniformly inside
it. Steps lie one behind another in a ring of C rows; step s of all time lies in row s % C.
An observation is K frames, the oldest first, K = 1 but for stacked pixels. Each frame is kept once:

    frame j of step s = frames[(s + max(j, repeats[s])) % (C + K - 1)]

repeats: of how many of them the next one is a copy. An episode's first frame fills all K places, so these are
K - 1, K - 2, ..., 0, 0, ... The K - 1 rows more than steps keep what the oldest steps share with those overwritten.

    episode = floor(u0 count / 2^64)            u0, u1: 64-bit words of Philox (philox.py)
    start   = floor(u1 (length - H) / 2^64)

A choice among n so has a bias of at most n / 2^64 of its probability: 2^-33 for 2^31 steps.

Programs take BB slices, one step, and BO columns of one frame; each draws its slices anew, for
that is cheaper than a launch between. Reads and writes every number of the batch once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device.arithmetic import store_rounded
from ..device.launch import await_producers, cdiv, interpreting, jit, launch, pow2, tl
from ..device.philox import check_state, four_words, stream_words
from ..device.pointers import Strided
from ..device.reference import reference_of

_STREAM = 22
# Entries of a frame a program takes.
_TILE = 1024
_INTERPRETED_TILE = 16384

STREAM = tl.constexpr(_STREAM)


class Steps(NamedTuple):
    """The replay's storage: a ring of C steps. Row 0 of an episode has NaN action and reward."""

    obs: Tensor  # (C + K - 1, O / K) frames, float32, or uint8 pixels
    action: Tensor  # (C, A) float32
    reward: Tensor  # (C,) float32
    terminated: Tensor  # (C,) bool
    task: Tensor | None = None  # (C,) int64
    repeats: Tensor | None = None  # (C,) int64, from 0 to K - 1; None where K = 1


@dataclass(frozen=True)
class DeviceReplay:
    """A replay to draw from; addresses stay while it lives, contents change.

    They are read when the kernel runs, so a captured graph sees episodes that came later.
    """

    steps: Steps
    table: Tensor  # (R, 2) int64, start (in steps of all time) and length, H+1 steps at least and all in the ring
    first: Tensor  # (1,) int64, row of the oldest episode a slice can come from
    count: Tensor  # (1,) int64, how many there are, from 1, below 2^31: rows first, first + 1, ... modulo R


class Slices(NamedTuple):
    """Where a batch goes; rows of obs and action are contiguous, all other strides are free."""

    task: Tensor | None  # (B,) int64; first, as plain entries are (layers/rows.py): the others come with strides
    obs: Tensor  # (H+1, B, O) float32 or bfloat16, uint8 pixels
    action: Tensor  # (H, B, A) float32 or bfloat16
    reward: Tensor  # (H, B) float32
    terminated: Tensor  # (H, B) float32


@jit
def share_of(high, low, count):
    """Return the 64-bit word times count / 2^64, rounded down; count below 2^31."""
    return (high.to(tl.int64) * count + ((low.to(tl.int64) * count) >> 32)) >> 32


@jit
def draw_slices_kernel(
    state_ptr,
    table_ptr,
    first_ptr,
    count_ptr,
    starts_ptr,
    steps,
    out,
    C,
    F,
    R,
    B,
    H,
    width,
    tiles,
    A,
    DRAWN: tl.constexpr,
    TASK: tl.constexpr,
    STACKED: tl.constexpr,
    BB: tl.constexpr,
    BO: tl.constexpr,
    BA: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Copy BB slices, one step, BO columns of a frame; grid (slice tiles, H+1, K * tiles).

    steps: `Steps`, F frames of `width` entries. out: `Slices`, all but the task `Strided` by step and slice.
    """
    await_producers(PDL)
    t = tl.program_id(1).to(tl.int64)
    frame, tile = (tl.program_id(2) // tiles).to(tl.int64), tl.program_id(2) % tiles
    b = tl.program_id(0) * BB + tl.arange(0, BB)  # [BB]
    live = b < B
    if DRAWN:
        w0, w1, w2, w3 = four_words(state_ptr, b, STREAM)
        row = (tl.load(first_ptr) + share_of(w0, w1, tl.load(count_ptr))) % R
        start = tl.load(table_ptr + 2 * row, mask=live, other=0)
        length = tl.load(table_ptr + 2 * row + 1, mask=live, other=0)
        start += share_of(w2, w3, length - H)
    else:
        start = tl.load(starts_ptr + b, mask=live, other=0)
    b = b.to(tl.int64)
    step = (start + t) % C  # [BB]
    row = step
    if STACKED:
        row = (start + t + tl.maximum(frame, tl.load(steps.repeats + step, mask=live, other=0))) % F

    o = tile * BO + tl.arange(0, BO)  # [BO]
    ok = live[:, None] & (o < width)[None, :]
    x = tl.load(steps.obs + row[:, None] * width + o[None, :], mask=ok, other=0)  # [BB, BO]
    to = out.obs.ptr + t * out.obs.g + frame * width
    store_rounded(to + b[:, None] * out.obs.e + o[None, :], x, ok, INTERPRETED)
    # In a branch Triton 3.6 forgets those fields of tuples that are 1, but no names.
    action_e, reward_e, terminated_e = out.action.e, out.reward.e, out.terminated.e
    action_g, reward_g, terminated_g = out.action.g, out.reward.g, out.terminated.g
    if tl.program_id(2) == 0:
        if t == 0:
            if TASK:
                tl.store(out.task + b, tl.load(steps.task + step, mask=live, other=0), mask=live)
        else:
            a = tl.arange(0, BA)  # [BA]
            a_ok = live[:, None] & (a < A)[None, :]
            action = tl.load(steps.action + step[:, None] * A + a[None, :], mask=a_ok, other=0.0)  # [BB, BA]
            place = out.action.ptr + (t - 1) * action_g + b[:, None] * action_e + a[None, :]
            store_rounded(place, action, a_ok, INTERPRETED)
            reward = tl.load(steps.reward + step, mask=live, other=0.0)
            tl.store(out.reward.ptr + (t - 1) * reward_g + b * reward_e, reward, mask=live)
            ended = tl.load(steps.terminated + step, mask=live, other=0).to(tl.float32)
            tl.store(out.terminated.ptr + (t - 1) * terminated_g + b * terminated_e, ended, mask=live)


def _check(
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    contiguous: bool = True,
) -> None:
    """Refuse another shape, type, device or layout than the kernel works on."""
    rows = x.is_contiguous() if contiguous else x.ndim < 3 or x.shape[-1] == 1 or x.stride(-1) == 1
    if tuple(x.shape) != shape or x.dtype not in dtypes or x.device != device or not rows:
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}, strides {x.stride()}"
        layout = "contiguous" if contiguous else "last stride 1"
        raise ValueError(f"{name}: got {got}, allowed: {shape} {' or '.join(map(str, dtypes))} on {device}, {layout}")


def _check_slices(state: Tensor, replay: DeviceReplay, out: Slices, starts: Tensor | None) -> tuple[int, int, int, int]:
    """Return H, B, C and K; refuse what the kernel would read or write wrongly."""
    check_state(state)
    device, words, floats = state.device, (torch.int64,), (torch.float32,)
    steps, table = replay.steps, replay.table
    if table.ndim != 2 or not 1 <= table.shape[0] < 2**31:
        raise ValueError(f"table: got shape {tuple(table.shape)}, allowed: (R, 2), R from 1")
    _check("table", table, (table.shape[0], 2), words, device)
    _check("first", replay.first, (1,), words, device)
    _check("count", replay.count, (1,), words, device)
    if steps.obs.ndim != 2 or steps.action.ndim != 2 or out.obs.ndim != 3:
        shapes = [tuple(x.shape) for x in (steps.obs, steps.action, out.obs)]
        raise ValueError(f"steps.obs, steps.action, out.obs: got shapes {shapes}, allowed: (C, O), (C, A), (H+1, B, O)")
    (f, width), a, (h, b, o) = steps.obs.shape, steps.action.shape[1], out.obs.shape
    k = o // max(width, 1)
    if k < 1 or o != k * width:
        raise ValueError(f"out.obs: got {o} columns, allowed: a multiple of the {width} of steps.obs")
    c, h = f - k + 1, h - 1
    if not 1 <= h < c:
        raise ValueError(f"out.obs: got {h + 1} steps a slice, allowed: 2 to {c}, what the ring holds")
    pixels = steps.obs.dtype == torch.uint8
    wanted = (torch.uint8,) if pixels else (torch.float32, torch.bfloat16)
    _check("steps.obs", steps.obs, (f, width), (torch.float32, torch.uint8), device)
    _check("steps.action", steps.action, (c, a), floats, device)
    _check("steps.reward", steps.reward, (c,), floats, device)
    _check("steps.terminated", steps.terminated, (c,), (torch.bool,), device)
    _check("out.obs", out.obs, (h + 1, b, o), wanted, device, contiguous=False)
    _check("out.action", out.action, (h, b, a), (torch.float32, torch.bfloat16), device, contiguous=False)
    _check("out.reward", out.reward, (h, b), floats, device, contiguous=False)
    _check("out.terminated", out.terminated, (h, b), floats, device, contiguous=False)
    if (steps.task is None) != (out.task is None):
        raise ValueError("out.task: got tasks on one side alone, allowed: steps.task and out.task, or neither")
    if steps.task is not None and out.task is not None:
        _check("steps.task", steps.task, (c,), words, device)
        _check("out.task", out.task, (b,), words, device)
    if (steps.repeats is None) != (k == 1):
        got = "None" if steps.repeats is None else "a tensor"
        raise ValueError(f"steps.repeats: got {got} with observations of {k} frames, allowed: None for one, else (C,)")
    if steps.repeats is not None:
        _check("steps.repeats", steps.repeats, (c,), words, device)
    if starts is not None:
        _check("starts", starts, (b,), words, device)
    return h, b, c, k


def frame_rows(numbers: Tensor, repeats: Tensor | None, c: int, k: int) -> Tensor:
    """Return the rows of `Steps.obs` in which the K frames of steps lie.

    Args:
        numbers: (...) int64 steps of all time.
        repeats: (C,) as in `Steps`.
        c: steps in the ring.
        k: frames of an observation.

    Returns:
        (..., K) int64.
    """
    frames = torch.arange(k, device=numbers.device)
    if repeats is not None:
        frames = torch.maximum(frames, repeats[numbers % c].unsqueeze(-1))
    return (numbers.unsqueeze(-1) + frames) % (c + k - 1)


def draw_slices(
    state: Tensor, replay: DeviceReplay, out: Slices, *, starts: Tensor | None = None, pdl: bool = False
) -> None:
    """Draw a batch of slices and copy their steps, in place and in one launch.

    Args:
        state: (2,) int64 seed and counter; another kernel counts.
        replay: what is drawn from.
        out: the batch: obs of steps 0 to H of each slice; action, reward, terminated of 1 to H; task.
        starts: (B,) int64 first steps, of all time, to take instead of drawing.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: a tensor of another shape, type, device or layout.
    """
    h, b, c, k = _check_slices(state, replay, out, starts)
    steps, table = replay.steps, replay.table
    (f, width), a = steps.obs.shape, steps.action.shape[1]
    tile = _INTERPRETED_TILE if interpreting() else _TILE * 4 // steps.obs.element_size()
    bo = min(pow2(width), tile)
    tiles = cdiv(width, bo)
    # Few slices a program: the loads of one wait for each other, programs do not.
    bb = max(1, min(pow2(b), tile // max(bo, pow2(a)), tile if interpreting() else 16))
    names = ("obs", "action", "reward", "terminated")
    strided: dict[str, Any] = {name: Strided(x := getattr(out, name), x.stride(0), x.stride(1), 1) for name in names}
    launch(
        draw_slices_kernel,
        (cdiv(b, bb), h + 1, k * tiles),
        state,
        table,
        replay.first,
        replay.count,
        starts,
        steps,
        out._replace(**strided),
        c,
        f,
        table.shape[0],
        b,
        h,
        width,
        tiles,
        a,
        DRAWN=starts is None,
        TASK=steps.task is not None,
        STACKED=steps.repeats is not None,
        BB=bb,
        BO=bo,
        BA=pow2(a),
        INTERPRETED=interpreting(),
        pdl=pdl,
        num_warps=4,
    )


@reference_of(draw_slices)
def draw_slices_reference(state: Tensor, replay: DeviceReplay, out: Slices, starts: Tensor | None) -> None:
    """Do as `draw_slices` in plain torch: the same slices, bit for bit."""
    h, b, c, k = _check_slices(state, replay, out, starts)
    steps, table = replay.steps, replay.table
    if starts is None:
        words = stream_words(state, _STREAM, 4 * b).unbind(1)

        def share(high: Tensor, low: Tensor, count: Tensor) -> Tensor:
            return high * count + (low * count >> 32) >> 32

        row = replay.first + share(words[0], words[1], replay.count)
        start, length = table[row % len(table)].unbind(1)
        starts = start + share(words[2], words[3], length - h)
    number = starts + torch.arange(h + 1, device=state.device).unsqueeze(1)  # (H+1, B)
    out.obs.copy_(steps.obs[frame_rows(number, steps.repeats, c, k)].flatten(2))
    index = number % c
    for name in ("action", "reward", "terminated"):
        getattr(out, name).copy_(getattr(steps, name)[index[1:]])
    if steps.task is not None and out.task is not None:
        out.task.copy_(steps.task[index[0]])
