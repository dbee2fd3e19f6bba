"""What the machine reaches on work that asks for nothing else: a large copy, and large products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from ..harness.agents import within
from ..harness.measure import Case, Ceilings, Row, Variant
from ..options import Options


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """A copy, and a product at each precision."""
    yield partial(copy, options)
    for precision in dict.fromkeys(["float32", *options.precisions]):
        if precision == "float32" or options.torch_device.type == "cuda":
            yield partial(product, options, precision)


def copy(options: Options) -> Case:
    """A buffer that no cache holds, read and written."""
    device = options.torch_device
    count = 2**28 if device.type == "cuda" else 2**25
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    variants = {"torch": Variant(lambda: target.copy_(source))}
    return Case("ceilings", "copy", variants, shape=f"{count} floats", mbyte=8 * count / 1e6)


def product(options: Options, precision: str) -> Case:
    """Square matrices."""
    device = options.torch_device
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    run = within(options.config(1, 1, precision=precision), device, lambda: a @ b)
    variants = {"torch": Variant(run)}
    return Case("ceilings", "product", variants, precision=precision, shape=f"{n} x {n} x {n}", gflop=2 * n**3 / 1e9)


def reached(rows: Sequence[Row]) -> Ceilings:
    """The fastest rounds of these rows."""
    found = [(r, min(r.samples)) for r in rows if r.suite == "ceilings"]
    rates = {r.precision: r.gflop / ms for r, ms in found if r.gflop}
    return Ceilings(rates, next((r.mbyte / ms for r, ms in found if r.mbyte), None))
