"""Many matrices copied in one launch."""

from __future__ import annotations

import os
import subprocess
import sys

import oracle
import pytest
import torch
from oracle import DEVICE, MARKS, placed, poisoned, randn
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import Precision, log_launches
from tdmpc2_fast.kernels.plan.copy_table import CopyTable, copy_reference

pytestmark = MARKS


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    return oracle.reseed(request.node.name, "tests/kernels/plan/test_copy_kernel.py")


SIZES = [(1,), (3000,), (7, 1), (37, 5), (300, 301), (5, 40, 24), (3, 1, 9)]


def drawn(precision: Precision) -> tuple[list[tuple[Tensor, Tensor, bool]], list[Tensor]]:
    """Draw pairs, sources between NaN, places NaN; return them, and the buffers these are views of."""
    pairs, buffers = [], []
    for i, size in enumerate(SIZES):
        is_operand = bool(i % 2)
        buffer, to = poisoned(*size, dtype=precision.dtype if is_operand else torch.float32)
        pairs.append((to, placed(randn(*size)), is_operand))
        buffers.append(buffer)
    # Every other row, and columns of wider rows.
    buffer, rows = poisoned(10, 6)
    pairs += [(rows[i::2], randn(5, 9)[:, 1:7], False) for i in range(2)]
    # Slabs that follow each other, whose rows have one stride.
    whole = torch.full((3, 7, 5), torch.nan, device=DEVICE)
    pairs.append((whole, randn(3, 7, 8)[..., 2:7], False))
    return pairs, [*buffers, buffer, whole]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_all_is_copied_and_nothing_else_is_written(precision: str) -> None:
    p = Precision(precision)
    pairs, buffers = drawn(p)
    wanted = [(torch.empty_like(to), source, is_operand) for to, source, is_operand in pairs]
    copy_reference(wanted, p)
    with log_launches() as launches:
        table = CopyTable(pairs, p)
        table.copy()
    assert len(launches) == 1
    for (to, source, is_operand), (want, *_) in zip(pairs, wanted, strict=True):
        assert torch.equal(to, want)
        assert is_operand or torch.equal(to, source)
    assert sum(int((~b.isnan()).sum()) for b in buffers) == sum(to.numel() for to, *_ in pairs)
    for _, source, _ in pairs:
        source.mul_(2)
    table.copy()
    assert all(torch.equal(to, want * 2) for (to, *_), (want, *_) in zip(pairs, wanted, strict=True))


@pytest.mark.parametrize(
    "pair",
    [
        (torch.empty(3, 4), torch.empty(4, 3), False),
        (torch.empty(3, 4), torch.empty(3, 4, dtype=torch.float64), False),
        (torch.empty(3, 4), torch.empty(3, 4), True),
        (torch.empty(3, 4), torch.empty(4, 3).mT, False),
    ],
    ids=["shape", "source", "operand", "strides"],
)
def test_bad_pairs_are_named(pair: tuple[Tensor, Tensor, bool]) -> None:
    with pytest.raises(ValueError, match=r"^pairs: got .*allowed: "):
        CopyTable([pair], Precision("bfloat16"))


COMPILED = """
import torch
from tdmpc2_fast.kernels.inspect.compile import compile_specialisation, specialisation
from tdmpc2_fast.kernels.plan.copy_table import CopyTable
from tdmpc2_fast.kernels.device.launch import Precision, log_launches

for name in ("float32", "tf32", "bfloat16"):
    p = Precision(name)
    with log_launches(dry=True) as log:
        CopyTable([(torch.empty(3, 4, dtype=p.dtype), torch.empty(3, 4), True)], p).copy()
    for arch in (80, 90, 100):
        assert compile_specialisation(specialisation(log[0]), arch).faults(False) == []
"""


def test_it_compiles_for_every_chip() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
