"""What a plan costs, counted from the arguments of the launches of a dry run: nothing is estimated.

Needs neither a GPU nor Triton, and holds no weights. Tiles are those a GPU is given, under
Triton's interpreter, too. No time follows from these numbers alone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device.launch import Launch, Precision, cdiv, log_launches
from ..device.pointers import Slab, Strided
from ..layers.rows import Source, Weights
from ..plan.buffers import PlanSizes, PlanWeights
from ..plan.chain import PlanChain

Args = dict[str, Any]
"""Arguments and constants of a launch by name."""

Grid = tuple[int, ...]


@dataclass(frozen=True)
class PlanWork:
    """What one plan of all its environments costs.

    Attributes:
        launches: kernels launched.
        kernels: launches by kernel name.
        flops: of the products, a multiplication and an addition being two; rows, columns and
            depths as they are. Noise, norms, activations and elites are left out.
        padded_flops: of the products as tiles execute them, with what is masked.
        bytes: what must cross the memory bus once whatever the caches do: weights (every slab a
            plan may use, so all critics, though an iteration draws two), inputs, random draws, and
            the action, mean and plan counter written.
        l2_bytes: what programs read and write, all told: a layer's weights once a row tile, its
            input once a column tile. One program reads an element once.
    """

    launches: int
    kernels: dict[str, int]
    flops: int
    padded_flops: int
    bytes: int
    l2_bytes: int


def plan_work(sizes: PlanSizes, precision: Precision) -> PlanWork:
    """Count a plan of these sizes.

    One environment, bfloat16, GFLOP beside those the products need by hand (6 actions unless said):
    1M 12.23 (12.2), 5M 31.61 (31.7), 5M with 38 actions 43.39 (43.4), 19M 107.2 (108), 48M 261.9
    (263), 317M 1257 (1260). So no product is computed that need not be.
    """
    plan, log = dry_plan(sizes, precision)
    flops = padded = l2 = 0
    for launch in log:
        work = launch_work(launch)
        flops, padded, l2 = flops + work.flops, padded + work.padded_flops, l2 + work.bytes
    kernels = dict(Counter(launch.name for launch in log))
    return PlanWork(len(log), kernels, flops, padded, _compulsory_bytes(plan, log), l2)


class LaunchWork(NamedTuple):
    """What a launch costs: FLOP of its products, those with padding, and bytes its programs move."""

    flops: int
    padded_flops: int
    bytes: int


def launch_work(launch: Launch) -> LaunchWork:
    """Count one launch."""
    return LaunchWork(*(KERNELS | UPDATE_KERNELS)[launch.name](launch.arguments(), launch.grid))


def dry_plan(
    sizes: PlanSizes,
    precision: Precision,
    pdl: bool = False,
    throughput: bool | None = None,
    persistent: int = 0,
) -> tuple[PlanChain, list[Launch]]:
    """A plan, and its launches as on a GPU, none of them executed; options as of `PlanChain`.

    Weights take no memory. Activations are never touched, so they take address space alone.
    """
    with not_interpreted():
        weights = PlanWeights.empty(sizes, precision, torch.device("meta"))
        plan = PlanChain(sizes, weights, precision, torch.device("cpu"), pdl, throughput, persistent)
        with log_launches(dry=True) as log:
            plan.run()
    return plan, log


@contextmanager
def not_interpreted() -> Iterator[None]:
    """Within: tiles as on a GPU; the interpreter's are larger."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _rows_read(a: Args, rows: Strided) -> int:
    """Rows that all row tiles read of an input with these strides; equal ones count once a tile."""
    m, n, bm = int(a["M"]), int(a["n"]), int(a["BM"])
    tiles = range(cdiv(m, bm))
    if n > 1 and rows.r == 0:
        return sum((min((i + 1) * bm, m) - 1) // n - i * bm // n + 1 for i in tiles) if rows.e else len(tiles)
    return m if rows.e or rows.r else len(tiles)


def _input(a: Args, k: int) -> int:
    """Bytes that one column tile of one group reads of the rows and of what is due before they are read."""
    x: Source = a["x"]
    size: int = _rows_read(a, x.x) * k * x.x.ptr.element_size()
    if a["IN_ACT"]:
        size += _rows_read(a, x.stats) * cdiv(k, a["IN_TILE"]) * 8
        size += cdiv(a["M"], a["BM"]) * 2 * k * 4
    return size


def _grouped_layer(a: Args, grid: Grid) -> tuple[int, int, int]:
    m, d, bm, bn, groups = a["M"], a["D"], a["BM"], a["BN"], grid[1]
    row_tiles, tiles = cdiv(m, bm), cdiv(d, bn)
    k, side = a["K"] if a["HAS_X"] else 0, a["A"] if a["HAS_SIDE"] else 0
    padded_k = cdiv(k, a["BK"]) * a["BK"] + cdiv(side, a["BA"]) * a["BA"]
    moved = row_tiles * d * (k + side) * a["w"].ptr.element_size()
    if k:
        moved += tiles * _input(a, k)
    moved += tiles * _rows_read(a, a["a"]) * side * 4
    moved += _rows_read(a, Strided(None, 0, a["w"].bias_e, 0)) * d * 4
    moved += m * d * a["y"].ptr.element_size() + m * tiles * 8
    return 2 * groups * m * d * (k + side), 2 * prod(grid) * bm * bn * padded_k, groups * moved


def _last_layer(a: Args, grid: Grid, d: int, per_row: int) -> tuple[int, int, int]:
    """The product of all `d` columns in one program; `per_row`: bytes of its other inputs and outputs."""
    m, k, (row_tiles, groups) = a["M"], a["K"], grid
    padded = 2 * prod(grid) * a["BM"] * a["BN"] * cdiv(k, a["BK"]) * a["BK"]
    moved = _input(a, k) + row_tiles * d * (k * a["w"].ptr.element_size() + 4) + m * per_row
    return 2 * groups * m * d * k, padded, groups * moved


def _scalar_head(a: Args, grid: Grid) -> tuple[int, int, int]:
    return _last_layer(a, grid, a["D"], 4 + a["D"] * a["GRADIENT"] * a["d"].ptr.element_size())


def _policy_layer(a: Args, grid: Grid) -> tuple[int, int, int]:
    useful, padded, moved = _last_layer(a, grid, 2 * a["A"], 8 * a["A"])
    return useful, padded, moved + a["HAS_MASK"] * _rows_read(a, Strided(None, 0, a["A"], 0)) * a["A"] * 4


def _activate(a: Args, grid: Grid) -> tuple[int, int, int]:
    m, d, (_, tiles, groups) = a["M"], a["D"], grid
    statistics = (tiles - 1) * _rows_read(a, a["x"].stats) * cdiv(d, a["IN_TILE"]) * 8
    return 0, 0, groups * (_input(a, d) + statistics + m * d * a["y"].ptr.element_size())


def _begin(a: Args, grid: Grid) -> tuple[int, int, int]:
    drawn, actions, programs = (a["N"] - a["P"]) * a["A"], a["A"], prod(grid)
    masks = a["MASKED"] * programs * actions
    return 0, 0, 4 * (prod(grid[:2]) * (2 * drawn + 2 * actions) + programs * actions + masks) + programs


def _update(a: Args, grid: Grid) -> tuple[int, int, int]:
    n, elites, actions, (envs, h, tiles) = a["N"], a["K"], a["A"], grid
    program = (h + 2) * n + 1 + a["EPISODIC"] * h * n + a["CHOICE"] * elites
    step = elites * actions + 2 * actions + a["MASKED"] * actions
    step += a["NEXT"] * 2 * (n - a["P"]) * actions + a["CHOICE"] * 2 * actions
    env = n + 3 * elites + a["CHOICE"] * (2 * actions + 2)
    flags = a["CHOICE"] * envs * tiles
    return 0, 0, 4 * (prod(grid) * program + envs * h * step + envs * env) + flags + 16 * a["COUNT"]


def _noise(a: Args, grid: Grid) -> tuple[int, int, int]:
    floats = sum(a[f"{x}_n"] for x in ("pi_eps", "samples", "value_eps", "action", "elite"))
    return 0, 0, 4 * floats + 8 * (a["members_n"] + a["shift_n"]) + 16 * prod(grid)


def _input_gradient(a: Args, grid: Grid) -> tuple[int, int, int]:
    m, d, bm, bn = a["M"], a["D"], a["BM"], a["BN"]
    flops = 2 * grid[1] * a["groups"] * m * d * a["width"]
    return flops, 2 * prod(grid) * a["groups"] * bm * bn * cdiv(d, a["BK"]) * a["BK"], 0


def _weight_gradient(a: Args, grid: Grid) -> tuple[int, int, int]:
    m, bm, bn = a["M"], a["BM"], a["BN"]
    return 2 * grid[1] * m * a["D"] * a["K"], 2 * prod(grid) * bm * bn * cdiv(m, a["BK"]) * a["BK"], 0


def _logits(a: Args, grid: Grid) -> tuple[int, int, int]:
    return (*_last_layer(a, grid, a["D"], 0)[:2], 0)


def _no_products(a: Args, grid: Grid) -> tuple[int, int, int]:
    return 0, 0, 0


KERNELS: dict[str, Callable[[Args, Grid], tuple[int, int, int]]] = {
    "grouped_layer_kernel": _grouped_layer,
    "scalar_head_kernel": _scalar_head,
    "policy_layer_kernel": _policy_layer,
    "activate_kernel": _activate,
    "begin_kernel": _begin,
    "refine_kernel": _update,
    "noise_kernel": _noise,
}
"""All kernels of plans, and how a launch of each is counted."""

UPDATE_KERNELS: dict[str, Callable[[Args, Grid], tuple[int, int, int]]] = {
    "input_gradient_kernel": _input_gradient,
    "weight_gradient_kernel": _weight_gradient,
    "two_hot_loss_kernel": _logits,
    "update_noise_kernel": _no_products,
    "draw_slices_kernel": _no_products,
    "activation_gradient_kernel": _no_products,
    "norm_gradient_kernel": _no_products,
    "add_up_kernel": _no_products,
    "policy_sample_kernel": _no_products,
    "policy_gradient_kernel": _no_products,
    "consistency_kernel": _no_products,
    "td_target_kernel": _no_products,
    "running_scale_kernel": _no_products,
    "squared_norm_kernel": _no_products,
    "adam_kernel": _no_products,
}
"""Kernels of updates that are not a plan's; of these the products are counted alone."""


def _compulsory_bytes(plan: PlanChain, log: list[Launch]) -> int:
    """As `PlanWork.bytes` says."""
    used: dict[tuple[int, int], int] = {}
    ours = {id(t) for layer in plan.weights.layers() for t in layer.tensors()}
    for launch in log:
        a, groups = launch.arguments(), launch.grid[-1]
        if "w" in a:
            w: Weights = a["w"]
            read = [w.bias_ptr] + [w.ptr] * a.get("HAS_X", True) + [w.side_ptr] * a.get("HAS_SIDE", False)
            _note(used, ours, read, _slabs(w.slab, a.get("MEMBERS", False), groups, len(w.ptr)))
        if a.get("IN_ACT"):
            x: Source = a["x"]
            _note(used, ours, [x.gamma_ptr, x.beta_ptr], _slabs(x.slab, a["IN_MEMBERS"], groups, len(x.gamma_ptr)))
    i, d = plan.inputs, plan.draws
    moved = [getattr(x, f.name) for x in (i, d) for f in fields(x)]
    moved += [plan.state.action, i.prev_mean, i.rng[1:]]
    return sum(used.values()) + sum(_size(t) for t in moved if t is not None)


def _slabs(slab: Slab, drawn: bool, groups: int, count: int) -> list[int]:
    """Slabs a launch may read; where critics are drawn, all of them."""
    if drawn:
        return list(range(slab.base + int(slab.members_ptr.min()), count))
    return [slab.base + slab.step * g for g in range(groups)]


def _note(used: dict[tuple[int, int], int], ours: set[int], tensors: list[Tensor], slabs: list[int]) -> None:
    for t in tensors:
        if id(t) in ours:
            used.update({(id(t), s): _size(t) // len(t) for s in slabs})


def _size(t: Tensor) -> int:
    return t.numel() * t.element_size()
