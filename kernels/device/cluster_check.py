"""Whether clusters work on a GPU: one small launch whose programs read what their neighbours wrote."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch

from .cluster import LARGEST, can_cluster
from .launch import await_neighbours, interpreting, jit, launch, tl

_CLUSTERS, _ROUNDS = 64, 4


@jit
def neighbours_kernel(scratch_ptr, out_ptr, ROUNDS: tl.constexpr, CLUSTER: tl.constexpr):
    """Hand numbers on to the next program of the cluster, ROUNDS times; grid (clusters x CLUSTER,)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    first = program // CLUSTER * CLUSTER
    lane = tl.arange(0, 32)
    x = program * 32 + lane
    for i in tl.static_range(ROUNDS):
        at = scratch_ptr + i * programs * 32
        tl.store(at + program * 32 + lane, x)
        await_neighbours(CLUSTER, False)
        x = tl.load(at + (first + (program + 1) % CLUSTER) * 32 + lane, cache_modifier=".cg")
    tl.store(out_ptr + program * 32 + lane, x)


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
    scratch, out = torch.full((_ROUNDS + 1, programs, 32), -1, dtype=torch.int32, device=device).split([_ROUNDS, 1])
    try:
        with torch.cuda.device(device):
            launch(neighbours_kernel, (programs,), scratch, out, ROUNDS=_ROUNDS, CLUSTER=LARGEST, num_warps=1)
    except Exception as e:  # whatever it is, it is a reason
        return f"{type(e).__name__}: {' '.join(str(e).split())[-300:]}"
    home = torch.arange(programs, device=device, dtype=torch.int32).view(-1, LARGEST)
    expected = home.roll(-_ROUNDS, 1).flatten()[:, None] * 32 + torch.arange(32, device=device, dtype=torch.int32)
    wrong = int((out[0] != expected).any(1).sum())
    return f"{wrong} of {programs} programs read something else than their neighbours wrote" if wrong else None
