"""The machine's ceilings: what it reaches in a large copy and in large products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from ..harness.agents import within
from ..harness.measure import Case, Ceilings, Row, Variant
from ..options import Options

# Sizes that no cache holds, and that keep all units busy.
_FLOATS = dict(cpu=2**25, cuda=2**28)
_SIDE = dict(cpu=2048, cuda=8192)


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """Yield a copy, and a product at each precision."""
    yield partial(copy, options)
    for precision in dict.fromkeys(["float32", *options.precisions]):
        yield partial(product, options, precision)


def copy(options: Options) -> Case:
    """Return reading and writing a buffer that no cache holds."""
    device = options.torch_device
    count = _FLOATS[device.type]
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    variants = {"torch": Variant(lambda: target.copy_(source))}
    return Case("ceilings", "copy", variants, shape=f"{count} floats", mbyte=8 * count / 1e6)


def product(options: Options, precision: str) -> Case:
    """Return a product of square matrices."""
    device = options.torch_device
    n = _SIDE[device.type]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    run = within(options.config(1, 1, precision=precision), device, lambda: a @ b)
    variants = {"torch": Variant(run)}
    return Case("ceilings", "product", variants, precision=precision, shape=f"{n} x {n} x {n}", gflop=2 * n**3 / 1e9)


def reached(rows: Sequence[Row]) -> Ceilings:
    """Return the ceilings by the fastest rounds of these rows."""
    found = [(r, min(r.samples)) for r in rows if r.suite == "ceilings"]
    rates = {r.precision: r.gflop / ms for r, ms in found if r.gflop}
    return Ceilings(rates, next((r.mbyte / ms for r, ms in found if r.mbyte), None))
