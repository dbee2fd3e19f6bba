"""Clusters: a layer's column tiles that run at once and wait for each other (Hopper and newer).

Triton compiles a grid without clusters, or splits the tensors of one program over one, which its
versions do differently and some not at all. Here programs stay what they are. A kernel says in a comment
of its assembly how many neighbours along the first axis of its grid are a cluster; before Triton has that
assembled, the directive that asks for it is put beside the kernel's name. The chip then starts all of a cluster
at once or none, so that waiting cannot hang.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    from triton import knobs as _knobs
except ImportError:
    _knobs = None

LARGEST = 8
"""Programs of a cluster that every chip which has clusters can run."""

_COMMENT = re.compile(r"// cluster of (\d+)")
_THREADS = re.compile(r"^\.reqntid .*$", re.MULTILINE)
_KEY = "clusters by directive 1"
_lock = threading.RLock()  # Triton has one hook for all threads


def can_cluster() -> bool:
    """Tell whether this Triton lets its assembly be added to."""
    return _knobs is not None and hasattr(_knobs.runtime, "add_stages_inspection_hook")


def with_directive(assembly: str) -> str:
    """Return PTX in which the cluster that a comment asks for is required; without such a comment, as it is."""
    wanted = _COMMENT.search(assembly)
    if wanted is None:
        return assembly
    added, count = _THREADS.subn(rf"\g<0>\n.explicitcluster\n.reqnctapercluster {wanted[1]}, 1, 1", assembly)
    if count != 1:
        raise RuntimeError(f"assembly: got {count} entries with a number of threads, allowed: 1")
    return added


@contextmanager
def clusters_compiled(size: int) -> Iterator[None]:
    """Have kernels of clusters of more than one program that Triton compiles within get their directive."""
    if size == 1:
        yield
        return
    with _lock:
        before = _knobs.runtime.add_stages_inspection_hook

        def stages(*compiling: Any) -> Any:
            """Say what changes kernels, for Triton's cache; or, given a compiler and its stages, change these."""
            others = before(*compiling) if before is not None else None
            if not compiling:
                key = _KEY + (others[0] if others else "")
                return key, hashlib.sha256(key.encode()).hexdigest()
            found = compiling[1]
            assemble = found["ptx"]
            found["ptx"] = lambda *args: with_directive(assemble(*args))
            return None

        _knobs.runtime.add_stages_inspection_hook = stages
        try:
            yield
        finally:
            _knobs.runtime.add_stages_inspection_hook = before


def check_clustered(compiled: Any) -> None:
    """Refuse a kernel that was compiled, or cached, without its directive: its programs would not wait."""
    if ".reqnctapercluster" not in compiled.asm["ptx"]:
        raise RuntimeError(
            "cluster: Triton compiled the kernel without it, allowed: versions whose stages can be added to"
        )
