"""Many matrices copied, and rounded to operands of products, in one launch.

Packed weights are some sixty slices of parameters; copied one after the other, their launches would
take longer than their bytes. A table on the device has addresses and strides of all of them, and each
program finds its part there. Cost: every entry read and written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.arithmetic import round_bits, store_rounded
from ..device.launch import Precision, await_producers, interpreting, jit, launch, on_cpu, tl

_KINDS = dict(float32=0, tf32=1, bfloat16=2)
_TF32, _BFLOAT16 = tl.constexpr(_KINDS["tf32"]), tl.constexpr(_KINDS["bfloat16"])
_COLUMNS = 7  # of the table: both addresses, columns, entries, both row strides, kind


@jit
def copy_table_kernel(
    table_ptr, parts_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr
):
    """Copy BLOCK entries of one matrix; grid (parts,)."""
    part = parts_ptr + 2 * tl.program_id(0)
    row = table_ptr + tl.load(part) * COLUMNS
    source = tl.load(row).to(tl.pointer_type(tl.float32))
    to = tl.load(row + 1)
    width, count = tl.load(row + 2).to(tl.int32), tl.load(row + 3)
    kind = tl.load(row + 6)
    await_producers(PDL)
    i = tl.load(part + 1) + tl.arange(0, BLOCK)
    ok = i < count
    i = i.to(tl.int32)
    x = tl.load(source + (i // width) * tl.load(row + 4) + i % width, mask=ok, other=0.0)
    at = (i // width) * tl.load(row + 5) + i % width
    if kind == _BFLOAT16:
        store_rounded(to.to(tl.pointer_type(tl.bfloat16)) + at, x, ok, INTERPRETED)
    else:
        if kind == _TF32:
            x = round_bits(x, 13)
        tl.store(to.to(tl.pointer_type(tl.float32)) + at, x, mask=ok)


class CopyTable:
    """Holds what is copied where, as addresses: tensors may be written, and must not be replaced.

    Args:
        pairs: (to, source, whether it is an operand of products) of equal shapes, up to three dims,
            contiguous in the last one. Sources are float32; operands take the precision's type, and at
            tf32 are rounded to it; all else is float32.
        precision: of the products.
    """

    def __init__(self, pairs: list[tuple[Tensor, Tensor, bool]], precision: Precision) -> None:
        self._held = pairs
        block = 2**16 if on_cpu() else 1024
        table, parts = [], []
        for to, source, is_operand in pairs:
            wanted = precision.dtype if is_operand else torch.float32
            if to.shape != source.shape or (to.dtype, source.dtype) != (wanted, torch.float32):
                got = f"{tuple(source.shape)} {source.dtype} to {tuple(to.shape)} {to.dtype}"
                raise ValueError(f"pairs: got {got}, allowed: equal shapes, torch.float32 to {wanted}")
            kind = _KINDS[precision.name if is_operand else "float32"]
            for x, y in _matrices(to, source):
                addresses = [y.data_ptr(), x.data_ptr()]
                table.append([*addresses, y.shape[1], y.numel(), y.stride(0), x.stride(0), kind])
                parts += [[len(table) - 1, start] for start in range(0, y.numel(), block)]
        self._table, self._parts = (torch.tensor(x, device=pairs[0][0].device) for x in (table, parts))
        self._block = block

    def copy(self, pdl: bool = False) -> None:
        """Copy all; pdl: programmatic dependent launch."""
        launch(
            copy_table_kernel, (len(self._parts),), self._table, self._parts,
            COLUMNS=_COLUMNS, BLOCK=self._block, INTERPRETED=interpreting(), pdl=pdl, num_warps=4,
        )  # fmt: skip


def _matrices(to: Tensor, source: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return a pair as pairs of matrices with rows of one stride."""
    if to.ndim == 3:
        if all(x.stride(0) == x.shape[1] * x.stride(1) for x in (to, source)):
            return _matrices(to.flatten(0, 1), source.flatten(0, 1))
        return [m for slabs in zip(to, source, strict=True) for m in _matrices(*slabs)]
    for x in (to, source):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"pairs: got strides {x.stride()}, allowed: contiguous in the last dim")
    return [(to, source) if to.ndim == 2 else (to[None], source[None])]


def copy_reference(pairs: list[tuple[Tensor, Tensor, bool]], precision: Precision) -> None:
    """Compute `CopyTable.copy` in plain torch."""
    for to, source, is_operand in pairs:
        to.copy_(precision.operand(source) if is_operand else source)
