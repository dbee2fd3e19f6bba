"""One iteration's rollout and terminal value as one cooperative launch: an option for few environments.

Runs the same tiles as the chain of small kernels (layer_on_tile, policy_on_tile, scalars_on_tile),
described by a table in device memory with one row a phase, made from the chain's own launches. A
row of a layer depends on the same row of the layer before alone, so programs form teams that share
a block of rows, and only a team waits for itself between phases, on a counter of its own.

What one phase writes, the next reads from other multiprocessors: activations are loaded past L1
(`.cg`), and the counter is advanced with release and read with acquire semantics. All programs
must be resident at once, which a cooperative launch asserts. The interpreter runs programs one
after the other and cannot wait: there, each phase is a launch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .launch import Launch, Precision, cdiv, interpreting, jit, launch, pow2, tl
from .linear_tile import MISH, SIMNORM, layer_on_tile
from .policy_layer import policy_layer_kernel, policy_on_tile
from .scalar_head import scalar_head_kernel, scalars_on_tile
from .tiles import Tile

# What a phase does: a layer by what is due on its input, the policy's or the scalars' last layer.
_AFTER_LATENT, _AFTER_HIDDEN, _POLICY, _SCALARS = range(4)
AFTER_HIDDEN, POLICY = tl.constexpr(_AFTER_HIDDEN), tl.constexpr(_POLICY)

_HEAD_ROWS = 16
_MOST_GROUPS = 32

# Columns of the table, by the names of the kernels' arguments; `kind` and `groups` are ours.
_FIELDS = [
    "kind",
    "groups",
    "x_ptr",
    "x_g",
    "x_e",
    "x_r",
    "in_stats_ptr",
    "in_stats_g",
    "in_stats_e",
    "in_stats_r",
    "in_gamma_ptr",
    "in_beta_ptr",
    "in_members_ptr",
    "in_base",
    "a_ptr",
    "a_e",
    "a_r",
    "w_ptr",
    "side_ptr",
    "bias_ptr",
    "bias_s",
    "bias_e",
    "members_ptr",
    "base",
    "y_ptr",
    "y_g",
    "y_e",
    "y_r",
    "stats_ptr",
    "stats_g",
    "stats_e",
    "stats_r",
    "D",
    "K",
    "A",
    "eps_ptr",
    "eps_e",
    "eps_r",
    "mask_ptr",
]
FIELDS = tl.constexpr(len(_FIELDS))


@jit
def _ptr(row, COLUMN: tl.constexpr, TYPE: tl.constexpr):
    """A pointer out of the table; every buffer and slice of one starts at a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(row + COLUMN).to(tl.pointer_type(TYPE)), 16)


@jit
def _plain_ptr(row, COLUMN: tl.constexpr, TYPE: tl.constexpr):
    """A pointer out of the table to something whose alignment is not known."""
    return tl.load(row + COLUMN).to(tl.pointer_type(TYPE))


@jit
def _pitch(row, COLUMN: tl.constexpr):
    """A stride or width out of the table that is a multiple of 16."""
    return tl.multiple_of(tl.load(row + COLUMN), 16)


@jit
def _team_waits(counter_ptr, target):
    """Until all programs of the team have finished `target` arrivals; orders their memory."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()


@jit
def persistent_kernel(
    table_ptr,
    counters_ptr,
    first_phase,
    last_phase,
    M,
    n,
    low,
    high,
    vmin,
    vmax,
    TEAM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    V: tl.constexpr,
    IN_TILES: tl.constexpr,
    BINS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BA: tl.constexpr,
    BH: tl.constexpr,
    HEAD_BK: tl.constexpr,
    POLICY_BN: tl.constexpr,
    SCALAR_BN: tl.constexpr,
    MISH: tl.constexpr,
    SIMNORM: tl.constexpr,
    EVEN_K: tl.constexpr,
    BFLOAT16: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ALONE: tl.constexpr,
    FROM_L2: tl.constexpr,
):
    """Phases first_phase..last_phase of one block of BM rows; grid (row blocks x TEAM programs,)."""
    DTYPE: tl.constexpr = tl.bfloat16 if BFLOAT16 else tl.float32
    block = tl.program_id(0) // TEAM
    rank = tl.program_id(0) % TEAM
    for phase in range(first_phase, last_phase):
        row = table_ptr + phase * FIELDS
        kind = tl.load(row)
        groups = tl.load(row + 1).to(tl.int32)
        # Arguments in the order in which the tiles take them.
        source = (
            _ptr(row, 2, DTYPE),
            _pitch(row, 3),
            _pitch(row, 4),
            _pitch(row, 5),
            _plain_ptr(row, 6, tl.float32),
            tl.load(row + 7),
            tl.load(row + 8),
            tl.load(row + 9),
            _ptr(row, 10, tl.float32),
            _ptr(row, 11, tl.float32),
            _plain_ptr(row, 12, tl.int64),
            tl.load(row + 13),
            1,
        )
        w, bias = _ptr(row, 17, DTYPE), _plain_ptr(row, 19, tl.float32)
        slabs = (_plain_ptr(row, 22, tl.int64), tl.load(row + 23), 1)
        y_g, y_e, y_r = tl.load(row + 25), tl.load(row + 26), tl.load(row + 27)
        D, K, A = tl.load(row + 32).to(tl.int32), _pitch(row, 33).to(tl.int32), tl.load(row + 34).to(tl.int32)
        if kind == POLICY:
            eps = (_plain_ptr(row, 35, tl.float32), tl.load(row + 36), tl.load(row + 37))
            actions = (_plain_ptr(row, 38, tl.float32), _plain_ptr(row, 24, tl.float32), y_e, y_r)
            for part in range(rank, BM // BH, TEAM):
                tile_m = block * (BM // BH) + part
                # fmt: off
                policy_on_tile(
                    tile_m, *source, w, bias, *eps, *actions, M, n, K, A, low, high, HAS_MASK, MISH, 1, BN, IN_TILES,
                    True, BH, POLICY_BN, HEAD_BK, EVEN_K, BFLOAT16, DOT, INTERPRETED, FROM_L2,
                )
                # fmt: on
        elif kind > POLICY:
            scalars = (_plain_ptr(row, 24, tl.float32), y_g, y_e)
            for part in range(rank, groups * (BM // BH), TEAM):
                tile_m, g = block * (BM // BH) + part // groups, (part % groups).to(tl.int64)
                # fmt: off
                scalars_on_tile(
                    tile_m, g, *source, w, bias, *slabs, *scalars, M, n, D, K, vmin, vmax, MISH, 1, BN, IN_TILES,
                    True, True, BINS, BH, SCALAR_BN, HEAD_BK, EVEN_K, BFLOAT16, DOT, INTERPRETED, FROM_L2,
                )
                # fmt: on
        else:
            a = (_plain_ptr(row, 14, tl.float32), tl.load(row + 15), tl.load(row + 16))
            weights = (w, _plain_ptr(row, 18, DTYPE), bias, tl.load(row + 20), tl.load(row + 21))
            stats = (_plain_ptr(row, 28, tl.float32), tl.load(row + 29), tl.load(row + 30), tl.load(row + 31))
            out = (_ptr(row, 24, DTYPE), y_g, y_e, y_r)
            tiles_n = tl.cdiv(D, BN)
            for part in range(rank, groups * tiles_n, TEAM):
                tile_n, g = part % tiles_n, (part // tiles_n).to(tl.int64)
                # The flags: a main input, a side input, a bias per environment, what is due.
                if kind == AFTER_HIDDEN:
                    # fmt: off
                    layer_on_tile(
                        block, tile_n, g, *source, *a, *weights, *slabs, *out, *stats, M, n, D, K, A, True, False,
                        False, MISH, 1, BN, IN_TILES, True, True, BM, BN, BK, BA, EVEN_K, BFLOAT16, DOT, INTERPRETED,
                        FROM_L2,
                    )
                    # fmt: on
                else:
                    # The first step has no latent of its own, the policy no action: K or A is 0
                    # there, and that product empty.
                    # fmt: off
                    layer_on_tile(
                        block, tile_n, g, *source, *a, *weights, *slabs, *out, *stats, M, n, D, K, A, True, True, True,
                        SIMNORM, V, BN, IN_TILES, True, True, BM, BN, BK, BA, EVEN_K, BFLOAT16, DOT, INTERPRETED,
                        FROM_L2,
                    )
                    # fmt: on
        if not ALONE:
            counter = counters_ptr + block
            if phase + 1 < last_phase:
                _team_waits(counter, TEAM * (phase + 1 - first_phase))
            else:
                # The last to finish leaves the counter as the next launch wants it.
                tl.debug_barrier()
                before = tl.atomic_add(counter, 1, sem="acq_rel")
                if before == TEAM * (last_phase - first_phase) - 1:
                    tl.atomic_xchg(counter, 0)


class PersistentRollout:
    """Rollout and terminal value of chosen iterations, one launch each.

    Args:
        iterations: launches of the chain, in order, for each iteration, all over the same rows.
        precision: of the products.
        processors: programs that may be resident at once.
        tile: BM, BN, BK and warps of the layers; all statistics are of BN columns.

    Raises:
        ValueError: widths that are no multiples of 16, or more rows than programs serve.
    """

    def __init__(
        self, iterations: Sequence[Sequence[Launch]], precision: Precision, processors: int, tile: Tile
    ) -> None:
        first = iterations[0]
        device = first[0].args[0].device
        self._steps = torch.arange(_MOST_GROUPS, device=device).repeat(3, 1) * torch.arange(3, device=device)[:, None]
        rows = [[self._row(x) for x in chain] for chain in iterations]
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)
        # The buffers the table points to.
        self._kept = [x.args for chain in iterations for x in chain]
        layers = [_named(x) for x in first if x.kernel not in (policy_layer_kernel, scalar_head_kernel)]
        policy, scalars = (
            next(_named(x) for x in first if x.kernel is kernel) for kernel in (policy_layer_kernel, scalar_head_kernel)
        )
        self._m, self._n = layers[0]["M"], layers[0]["n"]
        widths = {v["K"] for v in layers if v["HAS_X"]} | {v["D"] for v in layers}
        if any(w % 16 for w in widths):
            raise ValueError(f"persistent: got widths {sorted(widths)}, allowed: multiples of 16")
        blocks = cdiv(self._m, tile.BM)
        self._team = min(processors // blocks, 2 * cdiv(max(widths), tile.BN))
        if self._team < 1:
            raise ValueError(f"persistent: got {blocks} blocks of rows, allowed: at most {processors}")
        self._grid = (blocks * self._team,)
        self._counters = torch.zeros(blocks, dtype=torch.int32, device=device)
        self._scalars = (policy["low"], policy["high"], scalars["vmin"], scalars["vmax"])
        head_bk = min(tile.BK, 64)
        self._constants: dict[str, object] = dict(
            TEAM=self._team,
            HAS_MASK=policy["HAS_MASK"],
            V=max([v["V"] for v in layers]),
            IN_TILES=pow2(cdiv(max(widths), tile.BN)),
            BINS=scalars["BINS"],
            BM=tile.BM,
            BN=tile.BN,
            BK=tile.BK,
            BA=max(v["BA"] for v in layers),
            BH=min(_HEAD_ROWS, tile.BM),
            HEAD_BK=head_bk,
            POLICY_BN=2 * pow2(policy["A"], 8),
            SCALAR_BN=pow2(scalars["D"], 16),
            MISH=MISH,
            SIMNORM=SIMNORM,
            EVEN_K=all(w % tile.BK == 0 for w in widths),
            BFLOAT16=precision.name == "bfloat16",
            DOT=precision.dot,
            INTERPRETED=interpreting(),
            FROM_L2=not interpreting(),
        )
        self._options = dict(num_warps=tile.warps, num_stages=tile.stages)

    def run(self, index: int) -> None:
        """Iteration `index` of those given."""
        table = self._table[index]
        if interpreting():
            for phase in range(table.shape[0]):
                self._launch(table, phase, phase + 1, alone=True)
        else:
            self._launch(table, 0, table.shape[0], alone=False)

    def _launch(self, table: Tensor, first: int, last: int, alone: bool) -> None:
        launch(
            persistent_kernel,
            self._grid,
            table,
            self._counters,
            first,
            last,
            self._m,
            self._n,
            *self._scalars,
            ALONE=alone,
            launch_cooperative_grid=not alone,
            **self._constants,
            **self._options,
        )

    def _row(self, launched: Launch) -> list[int]:
        """A launch of the chain as a row of the table."""
        v = _named(launched)
        groups = launched.grid[1] if len(launched.grid) > 1 else 1
        if launched.kernel is policy_layer_kernel:
            kind = _POLICY
        elif launched.kernel is scalar_head_kernel:
            kind = _SCALARS
        else:
            kind = _AFTER_HIDDEN if v["IN_ACT"] == MISH else _AFTER_LATENT
            v |= dict(K=v["K"] if v["HAS_X"] else 0, A=v["A"] if v["HAS_SIDE"] else 0)
        v |= dict(kind=kind, groups=groups)
        for prefix, used in (("in_", v["IN_MEMBERS"]), ("", v.get("MEMBERS", False))):
            step = v.get(prefix + "step", 0)
            if not used:
                v[prefix + "members_ptr"] = self._steps[step]
            elif step != 1:
                raise ValueError(f"persistent: got members with stride {step}, allowed: 1")
        entries = (v.get(name, 0) for name in _FIELDS)
        return [x.data_ptr() if isinstance(x, Tensor) else int(x) for x in entries]


def _named(launched: Launch) -> dict[str, Any]:
    """Arguments and constants of a launch by name."""
    return dict(zip(launched.kernel.arg_names, launched.args, strict=False)) | launched.options
