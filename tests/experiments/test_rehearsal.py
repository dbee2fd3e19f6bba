"""GPU tests rehearsed on the CPU, and that the rehearsal refuses what a GPU would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PYTHONPATH, ROOT

# Runs the files given, one after the other, and prints how each ended.
PLAY = """
import json, os, runpy, sys, traceback
os.environ["TRITON_INTERPRET"] = "1"
import rehearsal, torch
rehearsal.begin()
ends = {}
for file in sys.argv[1:]:
    try:
        runpy.run_path(file)
        ends[file] = ""
    except BaseException:
        ends[file] = traceback.format_exc()
    torch.cuda.set_sync_debug_mode("default")
print(json.dumps(ends))
"""

BEGIN = """
import pytest, torch
x, h = torch.ones(3, device="cuda"), torch.ones(3)
"""

# What a rehearsal has to tell apart; each of these goes wrong, or right, as it would on a device.
CASES = dict(
    places="""
assert x.is_cuda and (2 * x)[1:].device == torch.device("cuda", 0) and torch.zeros_like(x).is_cuda
assert h.device.type == "cpu" and x.cpu().device.type == "cpu" and h.to(x).is_cuda and not h.is_cuda
assert torch.nn.Linear(2, 2).to("cuda").weight.is_cuda
""",
    mixed="""
with pytest.raises(RuntimeError, match="same device"):
    x + h
x + torch.tensor(2.0)
x.copy_(h)
x[:2] = h[:2]
""",
    waits="""
torch.cuda.set_sync_debug_mode("error")
torch.cuda.synchronize()
for wait in (x.sum().item, lambda: bool(x[0]), x.tolist, x.cpu, x.nonzero, lambda: x[x > 0], lambda: h.to("cuda"),
             lambda: torch.equal(x, x), lambda: x[[0, 1]], lambda: torch.tensor([1.0], device="cuda")):
    with pytest.raises(RuntimeError, match="synchronizing"):
        wait()
h.pin_memory().to("cuda", non_blocking=True).add_(1)
torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
""",
    graphs="""
w, total = torch.full((3,), 2.0, device="cuda", requires_grad=True), torch.zeros(3, device="cuda")
def step():
    with torch.enable_grad():
        (x * w).square().sum().backward()
    total.add_(w.grad)
    w.grad.zero_()
step()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    step()
total.zero_()
x.fill_(3)
graph.replay()
graph.replay()
assert total.tolist() == [2 * 2 * 9 * 2.0] * 3
with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
    x.sum().item()
""",
    gradients="""
from tdmpc2_fast.kernels.autograd import normed_linear
x, w = (torch.randn(n, 16, device="cuda", requires_grad=True) for n in (8, 32))
ones = torch.ones(32, device="cuda")
y = torch.cat([normed_linear(x, w, ones, ones, ones), x @ w.mT], 0)
d_x, d_w = torch.autograd.grad(y.square().sum(), (x, w))
assert d_x.is_cuda and d_w.is_cuda
with torch.no_grad():
    d_x.add_(x)
""",
    kernels="""
from tdmpc2_fast.kernels.device.launch import jit, launch, tl
@jit
def double(x_ptr, PDL: tl.constexpr):
    at = x_ptr + tl.program_id(0)
    tl.store(at, 2 * tl.load(at))
launch(double, (3,), x, pdl=True)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    launch(double, (3,), x, pdl=True)
x.fill_(5)
graph.replay()
assert x.tolist() == [10, 10, 10]
with pytest.raises(ValueError, match="cpu tensor"):
    launch(double, (3,), h, pdl=True)
""",
)


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([PYTHONPATH, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-P", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | dict(PYTHONPATH=paths) | env,
    )


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Play all cases in one process, and return what each raised."""
    folder = tmp_path_factory.mktemp("cases")
    for name, case in CASES.items():
        (folder / f"{name}.py").write_text(BEGIN + case)  # kernels are read from a file
    done = run("-c", PLAY, *(str(folder / f"{name}.py") for name in CASES))
    assert done.returncode == 0, done.stderr[-2000:]
    return {Path(file).stem: end for file, end in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("name", CASES)
def test_what_a_device_does_and_refuses(name: str, ends: dict[str, str]) -> None:
    assert not ends[name], ends[name][-2000:]


GPU_TESTS = [
    "test_a_replay_is_bitwise_an_eager_plan[multitask-tf32-E7]",
    "test_a_replayed_update_is_bitwise_an_eager_one[pixels-tf32]",
    "test_a_failure_on_the_device_is_raised_by_a_later_call",
]


def test_gpu_tests_pass_in_rehearsal() -> None:
    names = [f"tests/test_gpu.py::{name}" for name in GPU_TESTS]
    said = run("-m", "pytest", "-rA", "-p", "no:cacheprovider", *names, TDMPC2_REHEARSE="1").stdout
    assert [name for name in names if f"PASSED {name}\n" not in said] == [], said[-3000:]
