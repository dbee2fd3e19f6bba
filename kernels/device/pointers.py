"""How kernels find rows: (group, environment, row of that environment), each with its own stride.

A stride of 0 shares one row among all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .launch import jit, tl


class Strided(NamedTuple):
    """A buffer's rows: element strides over group, environment and row of that environment."""

    ptr: Any
    g: Any
    e: Any
    r: Any


class Slab(NamedTuple):
    """Says which slab of a packed layer group g uses: base + step g, or base + members[step g]."""

    members_ptr: Any
    base: Any
    step: Any


def strided(t: Tensor) -> Strided:
    """Return rows (G, E, n, ...) as kernels take them; one group serves all."""
    g, e, r = t.stride()[:3]
    return Strided(t, g if t.shape[0] > 1 else 0, e, r)


@jit
def row_offsets(rows, n, e_stride, r_stride):
    """Return element offsets of rows 0..E*n: environment rows // n, its row rows % n; int64."""
    e = rows // n
    return e.to(tl.int64) * e_stride + (rows - e * n).to(tl.int64) * r_stride


@jit
def row_ptrs(buffer, g, rows, n):
    """Return pointers to rows of group g of a `Strided` buffer: [BM]."""
    return buffer.ptr + g * buffer.g + row_offsets(rows, n, buffer.e, buffer.r)


@jit
def entry_ptrs(buffer, g, rows, n, cols):
    """Return pointers to columns `cols` [BN] of rows of group g of a `Strided` buffer: [BM, BN]."""
    return row_ptrs(buffer, g, rows, n)[:, None] + cols[None, :]


@jit
def slab_of(slab, g, HAS_MEMBERS: tl.constexpr):
    """Return the slab of group g, int64."""
    if HAS_MEMBERS:
        return slab.base + tl.load(slab.members_ptr + slab.step * g)
    return tl.full((), slab.base, tl.int64) + slab.step * g
