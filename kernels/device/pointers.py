"""How kernels find rows: (group, environment, row of that environment), each with its own stride.

A stride of 0 shares one row among all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from .launch import jit, native, tl


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


def flattened(e: int, n: int, *given: Any) -> tuple[int, tuple[Any, ...]]:
    """Return rows of an environment, and what has `Strided` in it, as a kernel takes them.

    Where one stride reaches all E n rows, and where there is one environment, each row may as well be an
    environment of its own. To the compiler a number of 1 is a constant: nothing is divided to find a row.
    """
    if n == 1 or native() or (e > 1 and any(x.e != n * x.r for x in _strided_in(given))):
        return n, given
    flat: tuple[Any, ...] = _flat(given)
    return 1, flat


def _strided_in(x: Any) -> Iterator[Strided]:
    if isinstance(x, Strided):
        yield x
    elif isinstance(x, tuple):
        for y in x:
            yield from _strided_in(y)


def _flat(x: Any) -> Any:
    if isinstance(x, Strided):
        return x._replace(e=x.r, r=0)
    return getattr(x, "_make", tuple)(map(_flat, x)) if isinstance(x, tuple) else x


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
    return slab_at(slab.members_ptr, slab.base, slab.step, g, HAS_MEMBERS)


@jit
def slab_at(members_ptr, base, step, g, HAS_MEMBERS: tl.constexpr):
    """Return the slab of group g by the fields of a `Slab`, int64."""
    if HAS_MEMBERS:
        return base + tl.load(members_ptr + step * g)
    return tl.full((), base, tl.int64) + step * g
