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
    streams="""
import streams
a, b, event = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Event()
def work(stream):
    with torch.cuda.stream(stream):
        x.copy_(x)
    return streams.done[-1]
first, second = work(a), work(b)
assert not streams.ordered(first, second) and streams.ordered(first, work(a))
event.record(a)
event.query()
assert not streams.ordered(first, work(b))
b.wait_event(event)
assert streams.ordered(first, work(b)) and not streams.ordered(work(a), work(b))
from tdmpc2_fast.runtime.on_device import OnDevice
turns, last = OnDevice(x.device, "test"), []
with pytest.raises(KeyError), torch.cuda.stream(a), turns.turn():
    last.append(work(a))
    raise KeyError
assert not streams.ordered(last[0], work(b))
with torch.cuda.stream(b), turns.turn():
    assert streams.ordered(last[0], work(b))
last = work(a)
torch.cuda.synchronize()
assert streams.ordered(last, work(b))
""",
    falling_back="""
import warnings
from tdmpc2_fast.runtime.cuda_graph import GraphedFunction
calls = []
def graphed(error, times, message="fails"):
    calls.clear()
    def fn():
        calls.append(error)
        if len(calls) <= times:
            raise error(message)
        x.add_(1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        made = GraphedFunction(fn, x.device, "test")
    return made, [str(w.message) for w in found]
for error in (RuntimeError, torch.AcceleratorError, torch.cuda.OutOfMemoryError):
    made, said = graphed(error, 1)
    assert not made.captured and made.why_eager == "warm-up failed: fails", made.why_eager
    assert said == ["test: warm-up failed: fails; running eagerly, which is slower"], said
    before = x[0].item()
    made()
    assert x[0].item() == before + 1
    # What fails eagerly, too, is no matter of graphs.
    with pytest.raises(error, match="fails") as raised:
        graphed(error, 9)
    assert "test: its kernels cannot run on cuda:0, captured or not" in raised.value.__notes__[0]
# What is no error of the device is none to fall back for.
with pytest.raises(ValueError, match="fails"):
    graphed(ValueError, 1)
assert len(calls) == 1
assert graphed(ValueError, 0)[0].captured
# A device that failed for good is said to have, whether in warm-up or in capture.
def dead(*_):
    if calls:
        raise torch.AcceleratorError("an illegal memory access")
for in_capture in (False, True):
    calls.clear()
    alive, capture = torch.cuda.synchronize, torch.cuda.graph
    def fn():
        if torch.cuda.is_current_stream_capturing() or not in_capture:
            calls.append(fn)
            torch.cuda.synchronize = dead
            dead()
    try:
        with pytest.raises(torch.AcceleratorError, match="illegal"):
            GraphedFunction(fn, x.device, "test")
    finally:
        torch.cuda.synchronize = alive
    assert len(calls) == 1
""",
    staging="""
import itertools, rehearsal, streams
from conftest import tiny_config, tiny_multitask
from tdmpc2_fast import TDMPC2
from tdmpc2_fast.errors import InputError
with rehearsal.without_kernels():
    for cfg in (tiny_config(device="cuda"), tiny_multitask(device="cuda")):
        agent = TDMPC2(cfg, num_envs=2)
        inputs, copies, there = agent.planner._plan.chain.inputs, [], torch.tensor([1, 2], device="cuda")
        flags = (True, False, torch.tensor([True, False]), torch.tensor([False, True], device="cuda"))
        for i, (t0, evaluate) in zip(range(100), itertools.cycle(itertools.product(flags, flags[1:]))):
            obs = torch.full((2, *cfg.observation_shape), i + 1.0, device="cuda" if i % 5 == 4 else None)
            task = (i % 3, torch.tensor([i % 3, 0]), there)[i % 7 % 3]
            start = len(streams.done)
            agent.planner.plan(obs, t0, evaluate, task if cfg.multitask else None)
            work = [w.what for w in streams.done[start:]]
            # What is on the device goes on from there; all else is one copy.
            given = (obs, t0, evaluate, task if cfg.multitask else None)
            assert work == ["copy_"] * (1 + sum(torch.is_tensor(x) and x.is_cuda for x in given)) + ["replay"], work
            copies.append(streams.done[start])
            with rehearsal._plainly():  # else the host would wait
                assert (inputs.obs == i + 1).all()
                for buffer, flag in ((inputs.t0, t0), (inputs.eval_mode, evaluate)):
                    assert buffer.tolist() == ([flag] * 2 if isinstance(flag, bool) else flag.tolist())
                if cfg.multitask:
                    given = agent.planner._plan._task.tolist()
                    assert given == ([task] * 2 if isinstance(task, int) else task.tolist())
            # Pinned memory is written again when its last copy is over, and the host waits for no newer plan.
            assert i < 32 or streams.host_saw(copies[i - 32])
            assert not streams.host_saw(copies[max(0, i - 15)]), i
        huge = torch.full((2, *cfg.observation_shape), 3e38)  # whose sum is not finite
        negated = torch.complex(huge, huge).conj().imag
        assert negated.is_neg()
        for obs in (huge, negated):
            agent.planner.plan(obs, task=0)
            assert torch.equal(inputs.obs.cpu(), obs)
        with pytest.raises(InputError, match="obs: got nan at index .0, 1."):
            agent.planner.plan(torch.tensor([[1.0, float("nan")] + [0.0] * (cfg.observation_shape[0] - 2)] * 2), task=0)
""",
    access="""
import rehearsal, streams
from conftest import tiny_config, tiny_multitask
from gpu_cases import of_pixels
from update_oracle import random_batch
from tdmpc2_fast import TDMPC2
writer, reader = torch.cuda.Stream(), torch.cuda.Stream()
def on(stream, call):
    start = len(streams.done)
    with torch.cuda.stream(stream):
        call()
    return [w for w in streams.done[start:] if w.stream is stream]
def the(work, what):
    return [w for w in work if w.what == what][-1]
def waits(before, after):
    return streams.ordered(before, after)
with rehearsal.without_kernels():
    for cfg in (tiny_config(device="cuda"), tiny_multitask(device="cuda"), of_pixels(device="cuda")):
        agent = TDMPC2(cfg)
        batch, task = random_batch(cfg, torch.device("cuda")), 0 if cfg.multitask else None
        obs = torch.zeros(1, *cfg.observation_shape)
        update = lambda: agent.updater.step(batch)
        plan = lambda: agent.planner.plan(obs, True, task=task)
        on(writer, update)
        torch.cuda.synchronize()
        wrote = the(on(writer, update), "replay")
        planned = on(reader, plan)
        assert waits(wrote, the(planned, "copy_table_kernel")), cfg.obs
        # What is not packed is read by the replay itself.
        read = "copy_table_kernel" if cfg.obs == "state" and task is None else "replay"
        again = on(writer, update)
        assert waits(the(planned, read), the(again, "replay")), cfg.obs
        on(reader, plan)
        planned = the(on(reader, plan), "replay")
        assert waits(planned, the(on(writer, update), "replay")) == (read == "replay")
        kept = agent.model.state_dict().items()
        state = {k: v + 1 if torch.is_tensor(v) and v.dim() else v for k, v in kept}
        packed = the(on(reader, plan), "copy_table_kernel")
        loaded = on(writer, lambda: agent.load(state))
        assert waits(packed, the(loaded, "copy_"))
        assert waits(the(loaded, "copy_"), the(on(reader, plan), "copy_table_kernel"))
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


def test_the_host_is_soon_done_with_a_plan() -> None:
    done = run(str(Path(__file__).with_name("host_time.py")), TRITON_INTERPRET="1")
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: float(micros) for name, micros, *_ in map(str.split, done.stdout.splitlines())}
    # On a machine that is also busy with others; they are some 30 and 8.
    assert found["plan"] < 200
    assert found["refresh"] < 60


GPU_TESTS = [
    "test_a_replay_is_bitwise_an_eager_plan[multitask-tf32-E7]",
    "test_a_replayed_update_is_bitwise_an_eager_one[pixels-tf32]",
    "test_a_failure_on_the_device_is_raised_by_a_later_call",
    "test_an_official_agent_is_made_fast_in_place_and_given_back[multitask]",
]


def test_gpu_tests_pass_in_rehearsal() -> None:
    names = [f"tests/test_gpu.py::{name}" for name in GPU_TESTS]
    said = run("-m", "pytest", "-rA", "-p", "no:cacheprovider", *names, TDMPC2_REHEARSE="1").stdout
    assert [name for name in names if f"PASSED {name}\n" not in said] == [], said[-3000:]
