"""NVTX ranges for profilers, or nothing where nvtx is missing."""

from __future__ import annotations

import contextlib

try:
    import nvtx
except ImportError:  # a profiler's convenience, never needed to run
    nvtx = None


def annotate(name: str) -> contextlib.AbstractContextManager[object]:
    """Return a range called `name` on the profiler's time line."""
    if nvtx is None:
        return contextlib.nullcontext()
    return nvtx.annotate(name, domain="tdmpc2_fast")  # type: ignore[no-any-return]
