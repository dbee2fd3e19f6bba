"""Seeds of the random streams of a run, without torch: environments draw from such streams, too."""

from __future__ import annotations

from zlib import crc32

import numpy as np


def stream_seed(seed: int, name: str) -> int:
    """Return the seed of the random stream `name` of a run: streams of one run never share a sequence."""
    state = np.random.SeedSequence([seed, crc32(name.encode())]).generate_state(2, np.uint32)
    return int(state[0]) << 31 ^ int(state[1])
