"""What a launch costs, counted from its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from ..device.launch import Launch, cdiv
from ..device.pointers import Strided
from ..layers.ending import ACTIONS
from ..layers.rows import Source

Args = dict[str, Any]
"""Arguments and constants of a launch by name."""

Grid = tuple[int, ...]


class LaunchWork(NamedTuple):
    """What a launch costs: FLOP of its products, those with padding, and bytes its programs move.

    Kernels that only updates launch have 0 bytes: of these the products are counted alone.
    """

    flops: int
    padded_flops: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """What some launches cost together.

    Attributes:
        launches: kernels launched, ours and torch's.
        kernels: launches by name; torch's by the name of the operation.
        flops: of the products, a multiplication and an addition being two; rows, columns and
            depths as they are. Noise, norms, activations and elites are left out.
        padded_flops: of the products as tiles execute them, with what is masked.
    """

    launches: int
    kernels: dict[str, int]
    flops: int
    padded_flops: int


def bytes_of(t: Tensor) -> int:
    """Count the bytes of a tensor."""
    return t.numel() * t.element_size()


def _rows_read(a: Args, rows: Strided) -> int:
    """Count the rows that all row tiles read of an input with these strides; equal ones count once a tile."""
    m, n, bm = int(a["M"]), int(a["n"]), int(a["BM"])
    tiles = range(cdiv(m, bm))
    if n > 1 and rows.r == 0:
        return sum((min((i + 1) * bm, m) - 1) // n - i * bm // n + 1 for i in tiles) if rows.e else len(tiles)
    return m if rows.e or rows.r else len(tiles)


def _input(a: Args, k: int) -> int:
    """Count the bytes one column tile of one group reads of the rows and of what is due before they are read."""
    x: Source = a["x"]
    size: int = _rows_read(a, x.x) * k * x.x.ptr.element_size()
    if a["IN_ACT"]:
        size += _rows_read(a, x.stats) * cdiv(k, a["IN_TILE"]) * 8
        size += cdiv(a["M"], a["BM"]) * 2 * k * 4
    return size


def _masks(a: Args, actions: int) -> int:
    """Count the bytes read of the masks of environments."""
    return _rows_read(a, Strided(None, 0, actions, 0)) * actions * 4


def _grouped_layer(a: Args, grid: Grid) -> LaunchWork:
    m, d, bm, bn, groups = a["M"], a["D"], a["BM"], a["BN"], grid[1]
    row_tiles, tiles = cdiv(m, bm), cdiv(d, bn)
    k, side = a["K"] if a["HAS_X"] else 0, a["A"] if a["HAS_SIDE"] else 0
    padded_k = cdiv(k, a["BK"]) * a["BK"] + cdiv(side, a["BA"]) * a["BA"]
    moved = row_tiles * d * (k + side) * a["w"].ptr.element_size()
    if k:
        moved += tiles * _input(a, k)
    moved += tiles * _rows_read(a, a["a"]) * side * 4
    moved += _rows_read(a, Strided(None, 0, a["w"].bias_e, 0)) * d * 4
    # Statistics are written a tile, and read again by each of those of a row that finish it.
    moved += m * tiles * 8 * (1 + tiles * (a["ACT"] > 0))
    moved += a["KEEP"] * m * d * a["y"].ptr.element_size()
    flops, padded = 2 * groups * m * d * (k + side), 2 * prod(grid) * bm * bn * padded_k
    if a["ACT"]:
        moved += row_tiles * 2 * d * 4
    if a["END"]:
        outputs = a["end"].outputs
        flops, padded = flops + 2 * groups * m * d * outputs, padded + 2 * prod(grid) * bm * bn * a["BO"]
        # Each program writes a part of the sums of its rows, and reads all parts of its share of them.
        moved += row_tiles * outputs * (d * a["w"].ptr.element_size() + 4 * tiles) + 2 * m * tiles * outputs * 4
        moved += m * (4 * outputs if a["END"] == ACTIONS else 4) + a["HAS_MASK"] * _masks(a, outputs // 2)
    elif a["ACT"]:
        moved += m * d * (a["STORE"] * a["active"].ptr.element_size() + 4 * a["EXACT"])
    return LaunchWork(flops, padded, groups * moved)


def _last_layer(a: Args, grid: Grid, d: int, per_row: int) -> LaunchWork:
    """Count the product of all `d` columns in one program; `per_row`: bytes of its other inputs and outputs."""
    m, k, (row_tiles, groups) = a["M"], a["K"], grid
    padded = 2 * prod(grid) * a["BM"] * a["BN"] * cdiv(k, a["BK"]) * a["BK"]
    moved = _input(a, k) + row_tiles * d * (k * a["w"].ptr.element_size() + 4) + m * per_row
    return LaunchWork(2 * groups * m * d * k, padded, groups * moved)


def _scalar_head(a: Args, grid: Grid) -> LaunchWork:
    return _last_layer(a, grid, a["D"], 4 + a["D"] * a["GRADIENT"] * a["d"].ptr.element_size())


def _policy_layer(a: Args, grid: Grid) -> LaunchWork:
    useful, padded, moved = _last_layer(a, grid, 2 * a["A"], 8 * a["A"])
    return LaunchWork(useful, padded, moved + a["HAS_MASK"] * _masks(a, a["A"]))


def _activate(a: Args, grid: Grid) -> LaunchWork:
    m, d, (_, tiles, groups) = a["M"], a["D"], grid
    statistics = (tiles - 1) * _rows_read(a, a["x"].stats) * cdiv(d, a["IN_TILE"]) * 8
    return LaunchWork(0, 0, groups * (_input(a, d) + statistics + m * d * a["y"].ptr.element_size()))


def _begin(a: Args, grid: Grid) -> LaunchWork:
    drawn, actions, programs = (a["N"] - a["P"]) * a["A"], a["A"], prod(grid)
    masks = a["MASKED"] * programs * actions
    floats = prod(grid[:2]) * (2 * drawn + 2 * actions) + programs * actions + masks
    return LaunchWork(0, 0, 4 * floats + programs)


def _refine(a: Args, grid: Grid) -> LaunchWork:
    n, elites, actions, (envs, h, tiles) = a["N"], a["K"], a["A"], grid
    program = (h + 2) * n + 1 + a["EPISODIC"] * h * n + a["CHOICE"] * elites
    step = elites * actions + 2 * actions + a["MASKED"] * actions
    step += a["NEXT"] * 2 * (n - a["P"]) * actions + a["CHOICE"] * 2 * actions
    env = n + 3 * elites + a["CHOICE"] * (2 * actions + 2)
    flags = a["CHOICE"] * envs * tiles
    floats = prod(grid) * program + envs * h * step + envs * env
    return LaunchWork(0, 0, 4 * floats + flags + 16 * a["COUNT"])


def _draw(a: Args, grid: Grid) -> LaunchWork:
    return LaunchWork(0, 0, sum(place.size * place.ptr.element_size() for place in a["places"]) + 16 * prod(grid))


def _input_gradient(a: Args, grid: Grid) -> LaunchWork:
    m, d, bm, bn = a["M"], a["D"], a["BM"], a["BN"]
    flops = 2 * grid[1] * a["groups"] * m * d * a["width"]
    return LaunchWork(flops, 2 * prod(grid) * a["groups"] * bm * bn * cdiv(d, a["BK"]) * a["BK"], 0)


def _weight_gradient(a: Args, grid: Grid) -> LaunchWork:
    m, bm, bn = a["M"], a["BM"], a["BN"]
    padded = 2 * prod(grid) * bm * bn * cdiv(m, a["BK"]) * a["BK"]
    return LaunchWork(2 * grid[1] * m * a["D"] * a["K"], padded, 0)


def _logits(a: Args, grid: Grid) -> LaunchWork:
    return _last_layer(a, grid, a["D"], 0)._replace(bytes=0)


_NO_PRODUCTS = (
    "draw_slices_kernel",
    "activation_gradient_kernel",
    "norm_gradient_kernel",
    "add_up_kernel",
    "policy_sample_kernel",
    "policy_gradient_kernel",
    "consistency_kernel",
    "td_target_kernel",
    "running_scale_kernel",
    "summary_kernel",
    "squared_norm_kernel",
    "adam_kernel",
)

KERNELS: dict[str, Callable[[Args, Grid], LaunchWork]] = {
    "grouped_layer_kernel": _grouped_layer,
    "scalar_head_kernel": _scalar_head,
    "policy_layer_kernel": _policy_layer,
    "activate_kernel": _activate,
    "begin_kernel": _begin,
    "refine_kernel": _refine,
    "draw_kernel": _draw,
    "input_gradient_kernel": _input_gradient,
    "weight_gradient_kernel": _weight_gradient,
    "two_hot_loss_kernel": _logits,
    **dict.fromkeys(_NO_PRODUCTS, lambda a, grid: LaunchWork(0, 0, 0)),
}
"""All kernels of plans and updates, and how a launch of each is counted."""


def launch_work(launch: Launch) -> LaunchWork:
    """Count one launch."""
    return KERNELS[launch.name](launch.arguments(), launch.grid)
