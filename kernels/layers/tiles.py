"""Which tile a layer is cut into: a table that works unmeasured, and what a measurement may change.

Of few rows a layer is a dependent step, so tiles are small enough for every multiprocessor to have
one; but the smaller they are, the more often the L2 cache hands out the same weights and rows, and that
takes longer than the products do. Of many rows, tiles are the largest that registers hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..device.cluster import LARGEST
from ..device.launch import PROCESSORS, How, Precision, cdiv, interpreting, native, on_cpu, pow2
from .rows import Rows

THROUGHPUT_ROWS = 8192
"""Rows (environments x samples) from which tiles are the largest."""


class Product(NamedTuple):
    """Tells how a program computes its product: constants of a kernel."""

    BM: int
    BN: int
    BK: int
    EVEN_K: bool  # whether BK divides the depth
    DOT: str  # Triton's `input_precision`
    INTERPRETED: bool


@dataclass(frozen=True)
class Tile:
    """BM rows, BN columns and BK of the depth per step; warps and pipeline stages of a program."""

    BM: int
    BN: int
    BK: int
    warps: int = 4
    stages: int = 3

    def product(self, even: bool, precision: Precision) -> Product:
        """Return constants of a product; even: whether BK divides its depth."""
        return Product(self.BM, self.BN, self.BK, even, precision.dot, interpreting())

    def options(self, depth: int, how: How) -> dict[str, Any]:
        """Return constants and options of the launch of a kernel whose product is over `depth`."""
        product = self.product(depth % self.BK == 0, how.precision)
        return dict(TILE=product, pdl=how.pdl, num_warps=self.warps, num_stages=self.stages)

    def check(self, columns: int, x: Rows | None) -> None:
        """Refuse a tile narrower than `columns`, or one that cuts a SimNorm group of the input."""
        group = 1 if x is None or x.layer is None else max(x.layer.simnorm_dim, 1)
        if columns > self.BN:
            raise ValueError(f"tile: got BN={self.BN}, allowed: at least {columns}")
        if self.BK % group:
            raise ValueError(f"tile: got BK={self.BK}, allowed: multiples of simnorm_dim ({group})")


# A100-and-newer shapes by precision, widest first; registers and shared memory of each are in the
# compile report (inspect/report.py). Narrower than 64 x 64, eight warps are there because four spill on an
# A100; so does a 128 x 128 tile of bfloat16 that adds nothing but an action to a bias.
_LATENCY = {
    "bfloat16": (Tile(64, 64, 64, 8), Tile(32, 64, 64, 8), Tile(32, 32, 128), Tile(16, 32, 128)),
    "tf32": (Tile(64, 64, 32, 8), Tile(32, 64, 32, 8), Tile(32, 32, 64, 8), Tile(16, 32, 64)),
    "float32": (Tile(32, 32, 32, 8), Tile(16, 32, 32)),
}
_THROUGHPUT = {
    "bfloat16": Tile(128, 64, 64, 8),
    "tf32": Tile(128, 64, 32, 8),
    "float32": Tile(32, 32, 32, 8),
}
# Of products whose operands are ready, nothing but loads and tensor cores: the first that fills a share of the chip.
_READY: dict[str, tuple[tuple[Tile, float], ...]] = {
    "bfloat16": (
        (Tile(128, 256, 64, 8), 0.9),
        (Tile(128, 128, 64, 8), 0.9),
        (Tile(128, 64, 64, 8), 0.9),
        (Tile(64, 64, 64), 0.35),
    ),
    "tf32": (
        (Tile(128, 256, 32, 8), 0.9),
        (Tile(128, 128, 32, 8), 0.9),
        (Tile(128, 64, 32, 8), 0.9),
        (Tile(64, 64, 32), 0.35),
    ),
    "float32": (),
}
_HEAD_ROWS = {"bfloat16": (64, 64), "tf32": (64, 32), "float32": (32, 16)}
_ALIGNED = 8  # entries; rows of other widths are loaded an entry at a time, through registers
_HEAD_FILLS = 0.6  # of the chip: with smaller tiles the same weights are read more often

# The interpreter pays by the number of operations, not by their size, and compiled code has a row at once.
_ON_CPU = 512


def layer_tile(rows: int, groups: int, columns: int, depth: int, precision: str) -> Tile:
    """Return the tile of a layer: `rows` (of all environments) x `columns`, times `groups`, over `depth`."""
    if on_cpu():
        side = [min(_ON_CPU, pow2(n, least)) for n, least in ((rows, 16), (columns, 32), (depth, 16))]
        return Tile(*side)
    if rows >= THROUGHPUT_ROWS:
        return _shallow(_THROUGHPUT[precision], depth)
    fitting = [t for t in _LATENCY[precision] if pow2(rows, 16) >= t.BM]
    for tile in fitting:
        if cdiv(rows, tile.BM) * cdiv(columns, tile.BN) * groups >= 0.75 * PROCESSORS:
            return _shallow(tile, depth)
    return _shallow(fitting[-1], depth)


class _Finishing(NamedTuple):
    """A tile of a layer that finishes, and the share of the chip that its programs must fill."""

    BM: int
    BN: int
    fills: float


# Largest first; the last is taken whatever it fills. The widest is for rows of more than 1024 columns.
_FINISHING = (_Finishing(128, 128, 0.9), _Finishing(64, 128, 0.45), _Finishing(64, 64, 0.0))
_WIDEST = 256
_FINISHING_DEPTH = {"bfloat16": 64, "tf32": 32, "float32": 32}


def finishes(tile: Tile, columns: int, how: How) -> Tile | None:
    """Return the tile if the programs that have a row of `columns` between them can wait for each other, or None."""
    across = cdiv(columns, tile.BN)
    return tile if not native() and (across == 1 or (how.clusters and across <= LARGEST)) else None


def finishing_tile(rows: int, groups: int, columns: int, depth: int, how: How) -> Tile | None:
    """Return the tile of a layer that finishes its rows, or None where none can; arguments as of `layer_tile`."""
    precision = how.precision.name
    if on_cpu():
        return finishes(layer_tile(rows, groups, columns, depth, precision), columns, how)
    narrowest = max(pow2(cdiv(columns, LARGEST)), 64)
    if narrowest > _WIDEST:
        return None
    aligned, bk = depth % _ALIGNED == columns % _ALIGNED == 0, _FINISHING_DEPTH[precision]
    for chosen in _FINISHING if aligned else _FINISHING[1:]:
        bm, bn = min(chosen.BM, pow2(rows, 16)), max(chosen.BN, narrowest)
        # Without tensor cores, products take registers for their operands, too.
        bm = min(bm, 32 if bn == 64 else 16) if precision == "float32" else min(bm, 64) if bn == _WIDEST else bm
        if cdiv(rows, bm) * cdiv(columns, bn) * groups >= chosen.fills * PROCESSORS:
            break
    warps = 8 if bm * bn >= 8192 or bn == _WIDEST or precision == "float32" or not aligned else 4
    bk = 16 if precision == "float32" and bn > 64 else bk if aligned else 32
    return finishes(_shallow(Tile(bm, bn, bk, warps), depth), columns, how)


# A step of a backward product reads the gradient and what it is the gradient of: narrower steps, and
# fewer of them in flight, where registers would not do.
_INPUT_DEPTH = {"bfloat16": 64, "tf32": 32, "float32": 16}
_WEIGHT_DEPTH = {"bfloat16": 32, "tf32": 32, "float32": 16}


def input_gradient_tile(rows: int, groups: int, columns: int, depth: int, precision: str, summed: bool = False) -> Tile:
    """Return the tile of a dL/dx: `rows` x `columns`, times `groups` or `summed` over them, over the layer's width."""
    tile = layer_tile(rows, groups, columns, depth, precision)
    if summed and tile.BM == 16 and rows > 16:
        tile = next(t for t in reversed(_LATENCY[precision]) if t.BM == 32)
    fewer = summed and tile.BM > 16
    return _narrower(tile, _INPUT_DEPTH[precision], 2 if fewer else tile.stages)


def weight_gradient_tile(width: int, groups: int, columns: int, rows: int, precision: str) -> Tile:
    """Return the tile of a layer's dL/dW: `width` x `columns`, times `groups`, over all `rows`."""
    tile = layer_tile(width, groups, columns, rows, precision)
    return _narrower(tile, _WEIGHT_DEPTH[precision], 2 if precision == "bfloat16" else tile.stages)


# The widest tile where what is done with the result takes registers: its statistics, an activation's gradient.
BARE, STATISTICS, GRADIENT = 256, 128, 64


def ready_tile(rows: int, groups: int, columns: int, depth: int, how: How, widest: int = BARE) -> Tile:
    """Return the tile of a product of ready operands: `rows` x `columns`, times `groups`, over `depth`.

    widest: `BARE`, `STATISTICS` or `GRADIENT`. Chips without clusters hold the operands in registers, too.
    """
    precision = how.precision.name
    for tile, fills in () if on_cpu() or depth % _ALIGNED else _READY[precision]:
        fits = (widest if how.clusters else min(widest, STATISTICS)) >= tile.BN
        if fits and cdiv(rows, tile.BM) * cdiv(columns, tile.BN) * groups >= fills * PROCESSORS:
            return _shallow(tile, depth)
    return layer_tile(rows, groups, columns, depth, precision)


WIDE = 2048
"""Columns from which a gradient goes through its activation in a launch of its own, for its product's tile's sake."""


def _narrower(tile: Tile, depth: int, stages: int) -> Tile:
    return tile if on_cpu() else replace(tile, BK=min(tile.BK, depth), stages=stages)


def _shallow(tile: Tile, depth: int) -> Tile:
    """Return the tile, no deeper than the layer; an observation is shallow."""
    return replace(tile, BK=min(tile.BK, pow2(depth, 16)))


def head_tile(rows: int, groups: int, columns: int, depth: int, precision: str) -> Tile:
    """Return the tile of a last layer: all its `columns` in one program, which reduces over them."""
    if on_cpu():
        return Tile(min(_ON_CPU, pow2(rows, 16)), pow2(columns, 16), min(_ON_CPU, pow2(depth, 16)))
    most, bk = _HEAD_ROWS[precision]
    bm = min(most, pow2(rows, 16))
    while bm > 16 and cdiv(rows, bm) * groups < _HEAD_FILLS * PROCESSORS:
        bm //= 2
    bn = pow2(columns, 16)
    return Tile(bm, bn, bk, 8 if bm * bn >= 8192 or depth % _ALIGNED else 4, 3)
