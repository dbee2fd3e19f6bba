"""What launches of a head's last layer share: its checks and tile, how its kernel reads, its logits in plain torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..device.launch import How, cdiv
from .grouped_layer import check_input, grouped_layer_reference
from .rows import Layer, Rows, Slabs, Source, Weights, packed, source
from .tiles import Tile, head_tile


def last_layer(
    x: Rows,
    layer: Layer,
    lead: tuple[int, int, int],
    outputs: int,
    *,
    how: How,
    slabs: Slabs,
    tile: Tile | None,
    columns: int | None = None,
) -> tuple[tuple[int, int], tuple[Source, Weights], dict[str, Any]]:
    """Return grid, inputs and constants of a kernel in which one program has all outputs of its rows.

    Args:
        x: (G or 1, E, n, K) rows; an activation due is applied.
        layer: packed (S, outputs, K), no LayerNorm.
        lead: G, E and n.
        outputs: what the layer must have.
        how: precision of the product, and whether the launch may start early.
        slabs: slab of `layer` of each group.
        tile: None takes the table's.
        columns: that it should be wide; None is `outputs`.

    Raises:
        ValueError: naming the argument, what came and what is allowed.
    """
    groups, e, n = lead
    d, k = layer.weight.shape[1:]
    check_input(x, layer, groups, e, n)
    if x.layer is not None and x.stats is None:
        raise ValueError("x: got rows of a layer without statistics, allowed: with them, or rows with nothing due")
    if d != outputs:
        raise ValueError(f"layer: got {d} outputs, allowed: {outputs}")
    tile = tile or head_tile(e * n, groups, columns or outputs, k, how.precision.name)
    tile.check(outputs, x)
    reads, due = source(x)
    return (cdiv(e * n, tile.BM), groups), (reads, packed(layer, slabs)), dict(DUE=due, **tile.options(k, how))


def last_layer_reference(x: Rows, layer: Layer, out: Tensor, how: How, slabs: Slabs) -> Tensor:
    """Compute logits (G, E, n, D) in plain torch, in the type of `out`; G, E, n are `out`'s first."""
    logits = out.new_empty(*out.shape[:3], layer.width)
    return grouped_layer_reference(x, None, layer, Rows(logits), how=how, slabs=slabs).x
