"""What a device can; whether clusters work on it is tried, by a launch whose programs read what neighbours wrote."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch

from .cluster import LARGEST, can_cluster
from .launch import How, Precision, await_neighbours, interpreting, jit, launch, reason_of, tl

_CLUSTERS, _ROUNDS, _LANES = 64, 4, 128


@jit
def neighbours_kernel(scratch_ptr, out_ptr, ROUNDS: tl.constexpr, LANES: tl.constexpr, CLUSTER: tl.constexpr):
    """Hand numbers on to the next program of the cluster, ROUNDS times; grid (clusters x CLUSTER,)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    first = program // CLUSTER * CLUSTER
    lane = tl.arange(0, LANES)
    x = program * LANES + lane
    for i in tl.static_range(ROUNDS):
        at = scratch_ptr + i * programs * LANES
        tl.store(at + program * LANES + lane, x)
        await_neighbours(CLUSTER, False)
        x = tl.load(at + (first + (program + 1) % CLUSTER) * LANES + lane, cache_modifier=".cg")
    tl.store(out_ptr + program * LANES + lane, x)


def how_on(device: torch.device, precision: Precision) -> How:
    """Return what a device can."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return How(precision, hopper, hopper and clusters_work(device))


@lru_cache
def clusters_work(device: torch.device) -> bool:
    """Tell whether neighbours on this GPU wait for each other and see what they wrote; warns where they do not."""
    if not can_cluster() or interpreting():
        return False
    reason = why_not(device)
    if reason is not None:
        warnings.warn(f"clusters do not work on {device}, layers take a second launch: {reason}", stacklevel=3)
    return reason is None


def why_not(device: torch.device) -> str | None:
    """Launch once, and say what was wrong; None where all was right."""
    programs = _CLUSTERS * LARGEST
    given: dict[str, Any] = dict(ROUNDS=_ROUNDS, LANES=_LANES, CLUSTER=LARGEST)
    try:
        room = torch.full((_ROUNDS + 1, programs, _LANES), -1, dtype=torch.int32, device=device)
        with torch.cuda.device(device):
            launch(neighbours_kernel, (programs,), room[:-1], room[-1], **given, num_warps=4)
        home = torch.arange(programs * _LANES, dtype=torch.int32, device=device).view(-1, LARGEST, _LANES)
        wrong = int((room[-1] != home.roll(-_ROUNDS, 1).view(programs, _LANES)).any(1).sum())
    except Exception as e:  # whatever it is, it is a reason
        return reason_of(e)
    return f"{wrong} of {programs} programs read something else than their neighbours wrote" if wrong else None
