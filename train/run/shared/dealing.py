"""A checkpoint as one rank goes on from it: from its own part, or from all of them where their number is another.

Where it is the same, a rank goes on with what it kept, bit for bit. Else what all had alike stays (weights, optimisers,
the scale, how far the run is), replays are dealt out anew, an episode to each rank in turn, and what was a rank's own
begins anew: environments with the episodes under way in them, random streams, warm starts of plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from tdmpc2_fast.config import Config
from tdmpc2_fast.learn.replay import ReplayBuffer
from tdmpc2_fast.learn.ring import pieces
from tdmpc2_fast.runtime.ranks import Ranks

from ..checkpoints import Part, Saved
from ..replay_files import ReplayFiles

_ALIKE = ("updater/", "metrics/", "data/")
_OWN = "updater/rng.own"
_LEFT = "updater/task_gradient"  # each rank's share of a sum


def of_rank(saved: Saved, ranks: Ranks) -> Saved:
    """Return what this rank goes on from, of a checkpoint of as many ranks or of others."""
    parts = saved.parts
    if len(parts) == ranks.count:
        tensors, values, chunks = parts[ranks.rank]
        return replace(saved, tensors=tensors, values=values, chunks=chunks, others=())
    first = parts[0]
    tensors = {k: x for k, x in first.tensors.items() if k.startswith(_ALIKE) and not k.startswith(_OWN)}
    if _LEFT in tensors:
        whole = torch.stack([part.tensors[_LEFT] for part in parts]).sum(0)
        tensors[_LEFT] = whole if ranks.first else torch.zeros_like(whole)
    restarts = {k: max(part.values[k] for part in parts) for k in ("restarts", "dropped") if k in first.values}
    values = first.values | dict(envs=None, evaluation=None, random=None) | restarts
    return replace(saved, tensors=tensors, values=values, chunks=[], others=(), dealt=tuple(parts))


def deal(saved: Saved, buffer: ReplayBuffer, files: ReplayFiles, ranks: Ranks) -> None:
    """Fill an empty replay with this rank's share of the episodes that all ranks had, the oldest first."""
    each = [_episodes(part, files, buffer.cfg) for part in saved.dealt]
    rounds = (episode for together in zip_longest(*each) for episode in together if episode is not None)
    for i, episode in enumerate(rounds):
        if i % ranks.count == ranks.rank:
            buffer.add(episode)
    # Episodes are counted over the whole run, those that are gone included.
    played, held = sum(int(part.tensors["replay/num_eps"]) for part in saved.dealt), buffer.num_eps
    if ranks.first:
        buffer.num_eps += played - sum(ranks.told(held))
    else:
        ranks.told(held)
    # What is written from here on must not have the name of a file that an older checkpoint needs.
    files.prefix = f"from-{saved.folder.name.partition('-')[0]}-{files.prefix}"


def _episodes(part: Part, files: ReplayFiles, cfg: Config) -> Iterator[dict[str, Any]]:
    """Yield the episodes of a rank's replay that a slice can come from, as `ReplayBuffer.add` takes them."""
    waiting = part.tensors["replay/episodes"].tolist()
    waiting.reverse()
    held: dict[str, Tensor] = {}
    at = 0  # number of the first step held
    for first, chunk in ReplayFiles(files.folder).read(part.chunks):
        for start, rows in pieces(first, chunk, cfg.observation_shape):
            at = at if held else start
            held = {k: torch.cat([held[k], x]) if held else x for k, x in rows.items()}
            end = at + len(held["reward"])
            while waiting and sum(waiting[-1]) <= end:
                begin, length = waiting.pop()
                yield {k: x[begin - at : begin - at + length] for k, x in held.items()}
                held, at = {k: x[begin - at + length :] for k, x in held.items()}, begin + length
