"""An experiment: one iteration's rollout and terminal value as one cooperative launch, for few environments.

It saves launches and costs waiting inside one; which is more, nobody has measured. A plan takes it only
where it is given `persistent=`; `bench plan-regimes` compares it with the chain of small kernels.

Runs the same tiles as the chain of small kernels (layer_on_tile, policy_on_tile, scalars_on_tile),
described by a table in device memory with one row a phase, made from the chain's own launches. A
row of a layer depends on the same row of the layer before alone, so programs form teams that share
a block of rows, and only a team waits for itself between phases, on a counter of its own.

What one phase writes, the next reads from other multiprocessors: the counter is advanced with
release and read with acquire semantics, which empties L1; activations are loaded past it (`.cg`)
where the compiler keeps that. All programs must be resident at once, which a cooperative launch
asserts. The interpreter runs programs one after the other and cannot wait: there, each phase is a
launch of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..device.launch import Launch, Precision, cdiv, interpreting, jit, launch, pow2, tl
from ..device.pointers import Slab, Strided
from ..layers.grouped_layer import grouped_layer_kernel
from ..layers.linear_tile import layer_on_tile
from ..layers.policy_layer import policy_layer_kernel, policy_on_tile
from ..layers.rows import MISH, SIMNORM, Due, Source, Weights
from ..layers.scalar_head import scalar_head_kernel, scalars_on_tile
from ..layers.tiles import Tile

# What a phase does: a layer by what is due on its input, the policy's or the scalars' last layer.
_AFTER_LATENT, _AFTER_HIDDEN, _POLICY, _SCALARS = range(4)
AFTER_HIDDEN, POLICY = tl.constexpr(_AFTER_HIDDEN), tl.constexpr(_POLICY)

_HEAD_ROWS = 16
_MOST_GROUPS = 32

# A row of the table: kind, groups, D, K and A, then what the phase's own launch was given before its
# sizes, member by member: `Source`, `Weights`, and after them what differs from kind to kind: side
# input, output and statistics; noise, mask and actions; scalars.
_SOURCE, _WEIGHTS, _REST, _COLUMNS = 5, 18, 26, 38
SOURCE, WEIGHTS, REST, COLUMNS = (tl.constexpr(x) for x in (_SOURCE, _WEIGHTS, _REST, _COLUMNS))


@jit
def _ptr(column, TYPE: tl.constexpr):
    """Return a pointer out of the table; every buffer and slice of one starts at a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(column).to(tl.pointer_type(TYPE)), 16)


@jit
def _plain_ptr(column, TYPE: tl.constexpr):
    """Return a pointer out of the table to something whose alignment is not known."""
    return tl.load(column).to(tl.pointer_type(TYPE))


@jit
def _pitch(column):
    """Return a stride or width out of the table that is a multiple of 16."""
    return tl.multiple_of(tl.load(column), 16)


@jit
def _strided(column, TYPE: tl.constexpr):
    """Return rows whose alignment is not known, from four columns."""
    return Strided(_plain_ptr(column, TYPE), tl.load(column + 1), tl.load(column + 2), tl.load(column + 3))


@jit
def _shared(column, TYPE: tl.constexpr):
    """Return rows as `_strided` does that all groups share: their stride over groups is not read."""
    return Strided(_plain_ptr(column, TYPE), 0, tl.load(column + 2), tl.load(column + 3))


@jit
def _slab(column):
    """Return a slab from three columns; the step is 1, `_row` sees to it."""
    return Slab(_plain_ptr(column, tl.int64), tl.load(column + 1), 1)


@jit
def _source(column, TYPE: tl.constexpr):
    """Return a source from the columns from SOURCE on."""
    x = Strided(_ptr(column, TYPE), _pitch(column + 1), _pitch(column + 2), _pitch(column + 3))
    gamma, beta = _ptr(column + 8, tl.float32), _ptr(column + 9, tl.float32)
    return Source(x, _strided(column + 4, tl.float32), gamma, beta, _slab(column + 10))


@jit
def _weights(column, TYPE: tl.constexpr):
    """Return weights from the columns from WEIGHTS on."""
    ptr, side, bias = _ptr(column, TYPE), _plain_ptr(column + 1, TYPE), _plain_ptr(column + 2, tl.float32)
    return Weights(ptr, side, bias, tl.load(column + 3), tl.load(column + 4), _slab(column + 5))


@jit
def _team_waits(counter_ptr, target):
    """Wait until all programs of the team have made `target` arrivals; orders their memory."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()


@jit
def persistent_kernel(
    table_ptr, counters_ptr, first_phase, last_phase, M, n, low, high, vmin, vmax,
    TEAM: tl.constexpr, HAS_MASK: tl.constexpr, BINS: tl.constexpr, LATENT: tl.constexpr, HIDDEN: tl.constexpr,
    ACTIONS: tl.constexpr, SCALARS: tl.constexpr, LAYERS: tl.constexpr, BA: tl.constexpr, BFLOAT16: tl.constexpr,
    ALONE: tl.constexpr, FROM_L2: tl.constexpr,
):  # fmt: skip
    """Run phases first_phase to last_phase of one block of BM rows; grid (row blocks x TEAM programs,).

    LATENT, HIDDEN: what is due after such a layer. ACTIONS, SCALARS, LAYERS: how these phases compute their products.
    """
    DTYPE: tl.constexpr = tl.bfloat16 if BFLOAT16 else tl.float32
    PARTS: tl.constexpr = LAYERS.BM // SCALARS.BM
    block = tl.program_id(0) // TEAM
    rank = tl.program_id(0) % TEAM
    for phase in range(first_phase, last_phase):
        row = table_ptr + phase * COLUMNS
        kind = tl.load(row)
        groups, D = tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32)
        K, A = _pitch(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)
        x, w, rest = _source(row + SOURCE, DTYPE), _weights(row + WEIGHTS, DTYPE), row + REST
        if kind == POLICY:
            eps, mask_ptr = _shared(rest, tl.float32), _plain_ptr(rest + 4, tl.float32)
            actions = _shared(rest + 5, tl.float32)
            for part in range(rank, PARTS, TEAM):
                policy_on_tile(
                    block * PARTS + part, x, w, eps, mask_ptr, actions, M, n, K, A, low, high,
                    HAS_MASK=HAS_MASK, DUE=HIDDEN, TILE=ACTIONS, FROM_L2=FROM_L2,
                )  # fmt: skip
        elif kind > POLICY:
            scalars = Strided(_plain_ptr(rest, tl.float32), tl.load(rest + 1), tl.load(rest + 2), 1)
            for part in range(rank, groups * PARTS, TEAM):
                tile_m, g = block * PARTS + part // groups, (part % groups).to(tl.int64)
                scalars_on_tile(
                    tile_m, g, x, w, scalars, M, n, D, K, vmin, vmax, scalars,
                    DUE=HIDDEN, MEMBERS=True, BINS=BINS, TILE=SCALARS, FROM_L2=FROM_L2,
                )  # fmt: skip
        else:
            a, stats = _shared(rest, tl.float32), _strided(rest + 8, tl.float32)
            y = Strided(_ptr(rest + 4, DTYPE), tl.load(rest + 5), tl.load(rest + 6), tl.load(rest + 7))
            tiles_n = tl.cdiv(D, LAYERS.BN)
            for part in range(rank, groups * tiles_n, TEAM):
                tile_n, g = part % tiles_n, (part // tiles_n).to(tl.int64)
                if kind == AFTER_HIDDEN:
                    layer_on_tile(
                        block, tile_n, g, x, w, a, y, stats, M, n, D, K, A, None,
                        HAS_X=True, HAS_SIDE=False, ENV_BIAS=False, DUE=HIDDEN, MEMBERS=True, TILE=LAYERS, BA=BA,
                        FROM_L2=FROM_L2,
                    )  # fmt: skip
                else:
                    # The first step has no latent of its own, the policy no action: K or A is 0
                    # there, and that product empty.
                    layer_on_tile(
                        block, tile_n, g, x, w, a, y, stats, M, n, D, K, A, None,
                        HAS_X=True, HAS_SIDE=True, ENV_BIAS=True, DUE=LATENT, MEMBERS=True, TILE=LAYERS, BA=BA,
                        FROM_L2=FROM_L2,
                    )  # fmt: skip
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
    """Runs rollout and terminal value of chosen iterations in one launch each.

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
        device = first[0].args[0].x.ptr.device
        self._steps = torch.arange(_MOST_GROUPS, device=device).repeat(3, 1) * torch.arange(3, device=device)[:, None]
        rows = [[self._row(x) for x in chain] for chain in iterations]
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)
        # The buffers the table points to.
        self._kept = [x.args for chain in iterations for x in chain]
        layers = [x.arguments() for x in first if x.kernel is grouped_layer_kernel]
        policy, scalars = (
            next(x.arguments() for x in first if x.kernel is kernel)
            for kernel in (policy_layer_kernel, scalar_head_kernel)
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
        tiles, even = pow2(cdiv(max(widths), tile.BN)), all(w % tile.BK == 0 for w in widths)
        layers_product = tile.product(even, precision)
        actions, scalar_columns = 2 * pow2(policy["A"], 8), pow2(scalars["D"], 16)
        heads = layers_product._replace(BM=min(_HEAD_ROWS, tile.BM))
        self._constants: dict[str, Any] = dict(
            TEAM=self._team,
            HAS_MASK=policy["HAS_MASK"],
            BINS=scalars["BINS"],
            LATENT=Due(SIMNORM, max([v["V"] for v in layers]), tile.BN, tiles, True),
            HIDDEN=Due(MISH, 1, tile.BN, tiles, True),
            ACTIONS=heads._replace(BN=actions),
            SCALARS=heads._replace(BN=scalar_columns),
            LAYERS=layers_product,
            BA=max(v["BA"] for v in layers),
            BFLOAT16=precision.name == "bfloat16",
            FROM_L2=not interpreting(),
        )
        self._options: dict[str, Any] = dict(num_warps=tile.warps, num_stages=tile.stages)

    def run(self, index: int) -> None:
        """Run iteration `index` of those given."""
        table = self._table[index]
        if interpreting():
            for phase in range(table.shape[0]):
                self._launch(table, phase, phase + 1, alone=True)
        else:
            self._launch(table, 0, table.shape[0], alone=False)

    def _launch(self, table: Tensor, first: int, last: int, alone: bool) -> None:
        launch(
            persistent_kernel, self._grid, table, self._counters, first, last, self._m, self._n, *self._scalars,
            ALONE=alone, launch_cooperative_grid=not alone, **self._constants, **self._options,
        )  # fmt: skip

    def _row(self, launched: Launch) -> list[int]:
        """Return a launch of the chain as a row of the table."""
        v, (_, groups) = launched.arguments(), launched.grid
        k, a = v["K"], v.get("A", 0)
        if launched.kernel is policy_layer_kernel:
            kind = _POLICY
        elif launched.kernel is scalar_head_kernel:
            kind = _SCALARS
        else:
            kind = _AFTER_HIDDEN if v["IN_ACT"] == MISH else _AFTER_LATENT
            k, a = k * v["HAS_X"], a * v["HAS_SIDE"]
        v["x"] = v["x"]._replace(slab=self._with_members(v["x"].slab, v["IN_MEMBERS"]))
        v["w"] = v["w"]._replace(slab=self._with_members(v["w"].slab, v.get("MEMBERS", False)))
        row = [kind, groups, v.get("D", 0), k, a]
        for name in itertools.takewhile(lambda name: name != "M", v):
            row += [x.data_ptr() if isinstance(x, Tensor) else int(x) for x in _leaves(v[name])]
        return row + [0] * (_COLUMNS - len(row))

    def _with_members(self, slab: Slab, drawn: bool) -> Slab:
        """Return the same slabs, from a tensor of them with step 1."""
        if not drawn:
            return Slab(self._steps[slab.step], slab.base, 1)
        if slab.step != 1:
            raise ValueError(f"persistent: got members with stride {slab.step}, allowed: 1")
        return slab


def _leaves(x: Any) -> Iterator[Any]:
    """Yield what a tuple and the tuples in it hold; anything else is its own leaf."""
    if isinstance(x, tuple):
        for member in x:
            yield from _leaves(member)
    else:
        yield x
