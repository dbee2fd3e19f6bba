"""The compile report: it compiles without a GPU, and what is unfit does not pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from tdmpc2_fast import Config, sizes
from tdmpc2_fast.kernels.inspect import report
from tdmpc2_fast.kernels.inspect.compile import SHARED_LIMIT, Compiled
from tdmpc2_fast.kernels.inspect.published import HYPERPARAMETERS, plan_sizes
from tdmpc2_fast.kernels.layers.sizes import MODEL_SIZES

FIT = Compiled("grouped_layer_kernel", 90, "BM=64", 8, 144, 0, 50176, "wgmma HGMMA", 22144)

# A tile far too large for its one warp, which spills for certain; then one that fits.
SPILLS = """
import json, re, torch
from dataclasses import asdict
from tdmpc2_fast.kernels.inspect.compile import build, compile_specialisation, cuobjdump, specialisation
from tdmpc2_fast.kernels.layers.grouped_layer import grouped_layer
from tdmpc2_fast.kernels.device.launch import How, Precision, log_launches
from tdmpc2_fast.kernels.layers.rows import Layer, Rows
from tdmpc2_fast.kernels.layers.tiles import Tile

cpu = torch.device("cpu")
layer = Layer(torch.empty(1, 512, 512, dtype=torch.bfloat16), *(torch.empty(1, 512) for _ in range(3)))
x, y = (Rows.empty(1, 1, 512, 512, torch.bfloat16, cpu) for _ in range(2))
for tile in (Tile(64, 64, 64, 1), Tile(16, 32, 64)):
    with log_launches(dry=True) as log:
        grouped_layer(Rows(x.x), None, layer, y, how=How(Precision("bfloat16")), tile=tile)
    spec = specialisation(log[0])
    code = cuobjdump("--dump-sass", build(spec, 80).asm["cubin"])
    compiled = compile_specialisation(spec, 80)
    local, tensor = (len(re.findall(name, code)) for name in (r"\\b(?:LDL|STL)\\b", r"\\bHMMA\\b"))
    print(json.dumps({**asdict(compiled), "faults": compiled.faults(True), "local": local, "hmma": tensor}))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python in a process that compiles kernels instead of interpreting them."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, check=False)


def test_what_is_compiled_is_the_default() -> None:
    cfg = Config()
    assert {name: getattr(cfg, name) for name in HYPERPARAMETERS} == HYPERPARAMETERS
    for size in MODEL_SIZES:
        for actions in (6, 38):
            full = Config(model_size=size).with_env({"state": (24,)}, actions, 500)
            ours, theirs = plan_sizes(size, 1, actions), sizes.plan_sizes(full, 1)
            same = [f.name for f in fields(ours) if f.type != "float"]
            assert [getattr(ours, name) for name in same] == [getattr(theirs, name) for name in same]


def test_report_compiles_a_plan(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "report.json"
    kernels = {"policy_layer_kernel", "begin_kernel"}
    narrow = ["--precision", "bfloat16", "--arch", "90", "--size", "1", "--envs", "1", "--kernel"]
    done = run("-m", "tdmpc2_fast.kernels.inspect.report", *narrow, *kernels, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    lines = done.stdout.splitlines()
    assert lines[0].split() == list(report.HEAD)
    assert {r["name"] for r in rows} == kernels
    for line, row in zip(lines[1:], rows, strict=False):
        assert line.startswith(row["name"].removesuffix("_kernel") + " ")
        assert row["config"] in line
        assert (row["arch"], row["spills"], row["faults"]) == (90, 0, [])
        assert 16 <= row["registers"] <= 255
        assert 0 <= row["shared"] <= SHARED_LIMIT[90]
        assert row["size"] > 1000
        assert (row["tensor"] != "-") == (row["name"] != "begin_kernel")
    assert f"sm_90: {len(rows)} configurations" in done.stdout


def test_spills_are_seen() -> None:
    pytest.importorskip("triton")
    done = run("-c", SPILLS)
    assert done.returncode == 0, done.stderr
    spilling, fitting = (json.loads(line) for line in done.stdout.splitlines())
    # Local loads and stores in the machine code are what a spill is.
    assert spilling["local"] > 0
    assert spilling["spills"] > 0
    assert spilling["faults"] == [f"spills {spilling['spills']} bytes a thread"]
    assert (fitting["local"], fitting["spills"], fitting["faults"]) == (0, 0, [])
    for row in (spilling, fitting):
        assert row["hmma"] > 0
        assert row["tensor"] == "mma.sync HMMA"


def _changed(**changes: object) -> Compiled:
    return Compiled(**{**FIT.__dict__, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("compiled", "fault"),
    [
        (_changed(spills=16), "spills 16 bytes"),
        (_changed(shared=SHARED_LIMIT[90] + 1), "bytes of shared memory"),
        (_changed(arch=80, shared=SHARED_LIMIT[80] + 1), "bytes of shared memory"),
        (_changed(tensor="-"), "no tensor-core instruction"),
    ],
)
def test_faults(compiled: Compiled, fault: str) -> None:
    assert FIT.faults(needs_tensor=True) == []
    (found,) = compiled.faults(needs_tensor=True)
    assert fault in found
    assert len(compiled.faults(needs_tensor=False)) == int(compiled.tensor != "-")


def test_a_fault_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("bfloat16", FIT, []), ("bfloat16", _changed(spills=16), ["spills 16 bytes a thread"])]
    monkeypatch.setattr(report, "why_not", lambda: None)
    monkeypatch.setattr(report, "configurations", lambda *_: [])
    for found, code in ((rows[:1], 0), (rows, 1)):
        monkeypatch.setattr(report, "compile_all", lambda *_, found=found: iter(found))
        assert report.main([]) == code
    assert "fault: sm_90 bfloat16 grouped_layer_kernel BM=64: spills 16 bytes a thread" in capsys.readouterr().err


def test_says_why_it_cannot_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if report.triton is not None:
        assert report.main([]) == 2
        assert "TRITON_INTERPRET=1" in capsys.readouterr().err
    monkeypatch.setattr(report, "triton", None)
    assert report.main([]) == 2
    assert "triton is not installed" in capsys.readouterr().err
