"""Every number of a data set looked at: what is wrong with it, in lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tdmpc2_fast.errors import DataError

from ..run.replay_files import sha256
from .dataset import DataSet, ShardEpisodes
from .rows import firsts, judged, pieces, returns

_PIECE_ROWS = 1 << 16


def problems(folder: Path) -> Iterator[str]:
    """Yield what is wrong with a data set, a line each: checksums, sizes, numbers that are not finite, false totals."""
    try:
        data = DataSet.open(folder)
    except (DataError, OSError) as e:
        yield str(e)
        return
    try:
        for i, file in enumerate(data.files):
            if sha256(file.path) != file.shard.sha256:
                yield f"data {str(file.path)!r}: its checksum differs from the one in the index: it is damaged"
                continue
            try:
                yield from _wrong(ShardEpisodes(data.maps, i, file.shard, file.task), str(file.path), data, i)
            except DataError as e:
                yield str(e)
    finally:
        data.close()


def _wrong(episodes: ShardEpisodes, name: str, data: DataSet, number: int) -> Iterator[str]:
    shard, each, ends = data.index.shards[number], [np.zeros(0)], 0
    for first, stop in pieces(episodes.lengths, _PIECE_ROWS):
        lengths, rows = episodes.lengths[first:stop], episodes.rows(first, stop)
        begin = firsts(lengths)[:-1]
        judged(rows, lengths, f"data {name!r}", first)
        if not (np.isnan(rows.action[begin]).all() and np.isnan(rows.reward[begin]).all()):
            yield f"data {name!r}: has an action or reward before the first decision of an episode, allowed: NaN"
            return
        each.append(returns(rows, lengths))
        ends += int(rows.terminated.sum())
    found = np.concatenate(each)
    told, real = shard.returns, (found.min(), found.mean(), found.max())
    if not np.allclose(told, real, rtol=1e-6, atol=1e-9):
        yield f"data {name!r}: its returns are {[float(x) for x in real]}, the index says {list(told)}"
    if ends != shard.terminated:
        yield f"data {name!r}: {ends:,} of its episodes terminate, the index says {shard.terminated:,}"
