"""Fills many tensors with random numbers in one launch, from a stream that lives on the device.

Philox (philox.py) needs no state but a counter in memory, so a captured graph draws anew at every
replay. One call of it serves four consecutive elements of a tensor:

    NORMAL       float32   standard normals, Box-Muller pairs
    EXPONENTIAL  float32   Exp(1), -log u
    PAIRS        int64     ordered pairs of distinct numbers below `limit`
    KEEP         uint8     0 where the word is below `limit`, else 1: a dropout mask of rate limit / 2^32
    INTEGER      int64     numbers below `limit`

What a tensor gets depends on its stream and on the seed and counter alone, not on the other tensors.
Cost: about 70 integer and, for floats, as many float instructions for four elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import await_producers, cdiv, interpreting, jit, launch, pow2, tl
from .philox import (
    check_state,
    distinct_pair,
    distinct_pairs_reference,
    fill_normal,
    four,
    four_words,
    in_range,
    normal_pair,
    stream_words,
    uniform,
    uniform_reference,
)

NORMAL, EXPONENTIAL, PAIRS, KEEP, INTEGER = range(5)
_TYPES = (torch.float32, torch.float32, torch.int64, torch.uint8, torch.int64)

# Groups of four a program. The interpreter pays by the number of operations, not by their size.
_GROUPS = 256
_INTERPRETED_GROUPS = 16384

# The largest uniform is below 1, but an approximate logarithm of it may be 0.
_LEAST_EXPONENTIAL = 2**-24

LEAST_EXPONENTIAL = tl.constexpr(_LEAST_EXPONENTIAL)
IS_NORMAL, IS_EXPONENTIAL, ARE_PAIRS, IS_KEEP = (tl.constexpr(law) for law in (NORMAL, EXPONENTIAL, PAIRS, KEEP))


class Run(NamedTuple):
    """One tensor to fill."""

    name: str
    law: int
    stream: int  # of Philox; never renumber one, for a seed means these draws
    out: Tensor  # contiguous; of PAIRS (n, 2), rows of any stride
    limit: int = 0


class Place(NamedTuple):
    """Where a run goes, as the kernel takes it."""

    ptr: Tensor
    size: int
    pitch: int  # from one pair to the next
    first: int  # program
    end: int  # the first program of the next run


@jit
def _fill(place, group, element, words, LAW: tl.constexpr, LIMIT: tl.constexpr):
    """Store what four words [BG] of each group give as consecutive elements [4 BG]."""
    w0, w1, w2, w3 = words
    ok = element < place.size
    if LAW == IS_NORMAL:
        x0, x1 = normal_pair(w0, w1)
        x2, x3 = normal_pair(w2, w3)
        tl.store(place.ptr + element, four(x0, x1, x2, x3), mask=ok)
    elif LAW == IS_EXPONENTIAL:
        x = -tl.log(uniform(four(w0, w1, w2, w3)))
        tl.store(place.ptr + element, tl.maximum(x, LEAST_EXPONENTIAL), mask=ok)
    elif LAW == ARE_PAIRS:
        i0, j1 = distinct_pair(w0, w1, LIMIT)
        i2, j3 = distinct_pair(w2, w3, LIMIT)
        tl.store(place.ptr + (element >> 1) * place.pitch + (element & 1), four(i0, j1, i2, j3), mask=ok)
    elif LAW == IS_KEEP:
        # Compared before they are put in order: bytes are cheaper to move than words.
        k0, k1 = (w0 >= LIMIT).to(tl.uint8), (w1 >= LIMIT).to(tl.uint8)
        k2, k3 = (w2 >= LIMIT).to(tl.uint8), (w3 >= LIMIT).to(tl.uint8)
        tl.store(place.ptr + element, four(k0, k1, k2, k3), mask=ok)
    else:
        tl.store(place.ptr + element, in_range(four(w0, w1, w2, w3), LIMIT), mask=ok)


@jit
def draw_kernel(state_ptr, places, RUNS: tl.constexpr, BG: tl.constexpr, PDL: tl.constexpr):
    """Fill BG groups of four elements of one run; grid (programs of all runs in turn,).

    RUNS: law, stream and limit of each.
    """
    await_producers(PDL)
    program = tl.program_id(0)
    for i in tl.static_range(len(RUNS)):
        if (program >= places[i].first) & (program < places[i].end):
            part = program - places[i].first
            group = part * BG + tl.arange(0, BG)  # [BG]
            element = part.to(tl.int64) * (4 * BG) + tl.arange(0, 4 * BG)
            words = four_words(state_ptr, group, RUNS[i][1])
            _fill(places[i], group, element, words, RUNS[i][0], RUNS[i][2])


def check_critics(num_q: int) -> None:
    """Refuse fewer critics than a pair."""
    if num_q < 2:
        raise ValueError(f"num_q: got {num_q}, allowed: at least 2, a pair of critics is drawn")


def _check(state: Tensor, runs: Sequence[Run]) -> None:
    """Refuse what would be filled wrongly."""
    check_state(state)
    for run in runs:
        out, dtype, rows = run.out, _TYPES[run.law], run.out
        if run.law == PAIRS:
            check_critics(run.limit)
            if out.ndim != 2 or out.shape[1] != 2 or out.stride(1) != 1:
                got = f"shape {tuple(out.shape)}, strides {out.stride()}"
                raise ValueError(f"{run.name}: got {got}, allowed: (I, 2), each pair contiguous")
            rows = out[:0]
        if out.dtype != dtype or out.device != state.device or not rows.is_contiguous() or out.numel() >= 2**31:
            layout = "contiguous" if rows.is_contiguous() else f"strides {out.stride()}"
            got = f"{tuple(out.shape)} {out.dtype} on {out.device}, {layout}"
            allowed = f"{dtype} on {state.device}, contiguous, fewer than 2**31 elements"
            raise ValueError(f"{run.name}: got {got}, allowed: {allowed}")


def draw(state: Tensor, runs: Sequence[Run], *, pdl: bool = False) -> None:
    """Fill the tensors of all runs, in place and in one launch.

    Args:
        state: (2,) int64 seed and counter; another kernel counts.
        runs: what is drawn; the tensors are on one device, and may be empty.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: a tensor of another shape, type, device or layout.
    """
    _check(state, runs)
    sizes = [run.out.numel() for run in runs]
    groups = min(_INTERPRETED_GROUPS, pow2(cdiv(max(sizes), 4))) if interpreting() else _GROUPS
    ends = list(accumulate(cdiv(size, 4 * groups) for size in sizes))
    places = zip((run.out for run in runs), sizes, (run.out.stride(0) for run in runs), [0, *ends], ends, strict=False)
    launch(
        draw_kernel,
        (ends[-1],),
        state,
        tuple(Place(*place) for place in places),
        RUNS=tuple((run.law, run.stream, run.limit) for run in runs),
        BG=groups,
        pdl=pdl,
        num_warps=4,
    )


def draw_reference(state: Tensor, runs: Sequence[Run], *, pdl: bool = False) -> None:
    """Do as `draw` in plain torch: the same integers, the same floats to rounding."""
    _check(state, runs)
    for run in runs:
        out, words = run.out, stream_words(state, run.stream, run.out.numel())
        word = words.flatten()[: out.numel()]
        if run.law == NORMAL:
            fill_normal(out, words)
        elif run.law == EXPONENTIAL:
            out.copy_(uniform_reference(word).log().neg().clamp(min=_LEAST_EXPONENTIAL).view(out.shape))
        elif run.law == PAIRS:
            out.copy_(distinct_pairs_reference(words, run.limit)[: len(out)])
        elif run.law == KEEP:
            out.copy_((word >= run.limit).view(out.shape))
        else:
            out.copy_((word * run.limit >> 32).view(out.shape))
