"""Slots are counted right, and machine code that is unfit does not pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tdmpc2_fast.kernels.backward.gradient_tile import Gradient
from tdmpc2_fast.kernels.backward.norm_gradient import norm_gradient
from tdmpc2_fast.kernels.device.launch import How, Precision, log_launches
from tdmpc2_fast.kernels.inspect import sass, slots
from tdmpc2_fast.kernels.inspect.plan_work import not_interpreted
from tdmpc2_fast.kernels.layers.grouped_layer import activate_rows
from tdmpc2_fast.kernels.layers.rows import Layer, Rows

# Layers of two depths on two chips, as a process that compiles sees them; then one whose directive was left out.
EXAMINE = """
import json, torch
from dataclasses import replace
from tdmpc2_fast.kernels.device.launch import How, Precision, log_launches
from tdmpc2_fast.kernels.inspect.compile import build, specialisation
from tdmpc2_fast.kernels.inspect.slots import call_of, examine
from tdmpc2_fast.kernels.layers.grouped_layer import grouped_layer
from tdmpc2_fast.kernels.layers.rows import Layer, Rows
from tdmpc2_fast.kernels.layers.tiles import Tile

cpu, bf16 = torch.device("cpu"), torch.bfloat16
found = []
for arch, depth, finish in ((90, 512, True), (90, 1024, True), (80, 512, False), (80, 1024, False)):
    layer = Layer(torch.empty(1, 512, depth, dtype=bf16), *(torch.empty(1, 512) for _ in range(3)))
    x = Rows(torch.empty(1, 1, 512, depth, dtype=bf16), operand=True)
    how = How.of_chip(arch, Precision("bfloat16"))
    with log_launches(dry=True) as log:
        out = Rows.empty(1, 1, 512, 512, bf16, cpu)
        grouped_layer(x, None, layer, out, how=how, finish=finish, tile=Tile(64, 64, 64))
    (launch,) = log
    spec, call = specialisation(launch), None
    done = examine(spec, arch, (call_of(launch, spec),))
    found.append(dict(cluster=spec.cluster, faults=done.faults, **done.calls[call_of(launch, spec)]._asdict()))
    if finish:
        undirected = replace(spec, cluster=1)
        assert ".reqnctapercluster" not in build(undirected, arch).asm["ptx"]
        assert ".reqnctapercluster 8, 1, 1" in build(spec, arch).asm["ptx"]
print(json.dumps(found))
"""


def test_loops_are_followed_and_clusters_asked_for() -> None:
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", EXAMINE], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    shallow, deep, old_shallow, old_deep = json.loads(done.stdout)
    # An instruction is 64 x 64 x 16 there, 16 x 8 x 16 by one of four warps here.
    assert (shallow["tensor"], deep["tensor"]) == (512 // 16, 1024 // 16)
    assert (old_shallow["tensor"], old_deep["tensor"]) == (64 * 64 * 512 // 2048 // 4, 64 * 64 * 1024 // 2048 // 4)
    for less, more in ((shallow, deep), (old_shallow, old_deep)):
        assert less["instructions"] < more["instructions"] < 2 * less["instructions"]
    # Products are in flight together: all are waited for at the end, not each.
    assert (shallow["waits"], deep["waits"]) == (1, 1)
    assert [x["cluster"] for x in (shallow, deep, old_shallow, old_deep)] == [8, 8, 1, 1]
    assert not any(x["faults"] for x in (shallow, deep, old_shallow, old_deep))


def program(text: str) -> list[sass.Instruction]:
    """Return machine code of one line an instruction, 16 bytes each."""
    lines = (line.strip() for line in text.strip().splitlines())
    return sass.parse("\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines)))


def warp(arguments: bytes = b"", at: int = 0) -> sass.Warp:
    return sass.Warp(arguments, 90, (at, 0, 0), (7, 1, 1))


def test_a_walk_counts_what_runs() -> None:
    code = program("""
        ULDC UR4, c[0x0][0x210]
        MOV R0, RZ
        S2R R2, SR_CTAID.X
        IADD3 R0, R0, 0x3, RZ
        LDG.E R5, [R6.64]
        ISETP.GE.AND P0, PT, R0, UR4, PT
        @!P0 BRA 0x30
        ISETP.NE.AND P1, PT, R2, RZ, PT
        @P1 EXIT
        STG.E [R6.64], R5
        EXIT
    """)
    for bound, times in ((1, 1), (3, 1), (10, 4)):
        found = sass.walk(code, warp(bound.to_bytes(4, "little")))
        assert (found.executed["LDG.E"], found.executed["STG.E"]) == (times, 1)
        assert found.instructions == 3 + 4 * times + 4
    # Another program leaves before it stores.
    assert sass.walk(code, warp((3).to_bytes(4, "little"), at=2)).executed["STG.E"] == 0


def test_a_division_by_reciprocal_is_followed() -> None:
    # 45 // 7 and 45 % 7 as the compiler has them.
    code = program("""
        MOV R7, 0x7
        MOV R5, 0x2d
        I2F.U32.RP R4, R7
        MUFU.RCP R4, R4
        IADD3 R2, R4, 0xffffffe, RZ
        F2I.FTZ.U32.TRUNC.NTZ R3, R2
        MOV R2, RZ
        IADD3 R6, RZ, -R3, RZ
        IMAD R9, R6, R7, RZ
        IMAD.HI.U32 R3, R3, R9, R2
        IMAD.HI.U32 R3, R3, R5, RZ
        IMAD R2, R3, -R7, R5
        ISETP.GE.U32.AND P1, PT, R2, R7, PT
        @P1 IADD3 R2, R2, -R7, RZ
        @P1 IADD3 R3, R3, 0x1, RZ
        EXIT
    """)
    state = warp()
    sass.walk(code, state)
    assert (state.word("R3"), state.word("R2")) == (6, 3)


def test_what_is_not_known_is_passed_by() -> None:
    code = program("""
        LDG.E R5, [R6.64]
        ISETP.NE.AND P0, PT, R5, RZ, PT
        @P0 BRA 0x0
        @!P0 BRA 0x50
        CALL.REL.NOINC 0x60
        EXIT
        FADD R1, R1, R1
        RET.REL.NODEC R2 0x0
    """)
    # A loop is left, and around what is called there is a way.
    assert sass.walk(code, warp()).instructions == 5


def test_a_walk_without_an_end_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"no end after \d+ instructions"):
        sass.walk(program("BRA 0x0"), warp())


def test_products_that_wait_for_each_other_are_a_fault() -> None:
    assert slots._serial(slots.Executed(2000.0, 32, 1)) == []
    assert slots._serial(slots.Executed(2000.0, 33, 33)) == ["33 waits for 33 products"]


def test_memory_before_the_wait_is_a_fault() -> None:
    early = program("LDG.E R5, [R6.64]\nACQBULK\nEXIT")
    late = program("LDC R5, c[0x0][0x210]\nACQBULK\nLDG.E R5, [R6.64]\nEXIT")
    assert slots._early(early) == ["LDG.E before it waits for the kernels ahead"]
    assert slots._early(late) == []
    assert slots._early(program("EXIT")) == ["never waits for the kernels ahead"]


@pytest.mark.parametrize("width", [1, 3, 8, 40, 512])
def test_kernels_that_write_over_their_input_have_an_entry_a_thread(width: int) -> None:
    vectors = [torch.empty(1, width) for _ in range(3)]
    x = Rows.empty(1, 1, 5, width, torch.float32, torch.device("cpu"))
    assert x.stats is not None
    x = replace(x, layer=Layer(torch.empty(1, width, 4), *vectors), tile=32)
    gradient = replace(Gradient.empty(1, 1, 5, width, torch.float32, torch.device("cpu"), True), rows=x, tile=32)
    with not_interpreted(), log_launches(dry=True) as log:
        activate_rows(x, x.x, how=How(Precision("float32")))
        norm_gradient(gradient)
        norm_gradient(replace(gradient, vectors=None))
    for launch in log:
        assert slots._in_place(launch.name, launch.options, launch.options["num_warps"]) == []
    assert slots._in_place("activate_kernel", dict(BM=1, BN=8), 2) == ["8 entries for 64 threads, in place"]


def test_arguments_lie_as_they_are_declared() -> None:
    ptx = ".entry k(.param .u32 k_param_0, .param .u64 .ptr .global k_param_1, .param .f32 k_param_2)"
    words = slots.packed((7, None, 1.0), ptx)
    assert len(words) == 20
    assert int.from_bytes(words[:4], "little") == 7
    assert int.from_bytes(words[8:16], "little") % 16 == 0
    assert words[16:] == b"\0\0\x80\x3f"
