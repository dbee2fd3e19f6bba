"""A plan by the files that `tdmpc2-fast export` writes, in runtimes that execute them, against the product's own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tdmpc2_fast import TDMPC2
from tdmpc2_fast.errors import BackendError
from tdmpc2_fast.export import onnx_file, torch_package
from tdmpc2_fast.export.graphs import PlanGraph

from ..harness.compiled import why_not_compiled
from ..harness.measure import CannotMeasureError, Case, Gate, Lineup, Variant
from ..options import Options, each
from .planner import ACTION_LIMIT, Setting

Inputs = Mapping[str, Tensor]
Run = Callable[[Inputs], list[Tensor]]


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """Yield a case for each size and action dimension."""
    return each(case, options, "size", "actions")


def case(options: Options, size: int, actions: int) -> Case:
    """Return planning for one environment on the CPU in float32; runtimes get their draws ready-made.

    Raises:
        CannotMeasureError: the device is no CPU.
    """
    if options.torch_device.type != "cpu":
        raise CannotMeasureError("exported plans are measured on a CPU, which device=cpu names")
    at = Setting(options, size, actions, 1, "float32")
    agent, obs, noise = at.agent, at.obs, at.noise
    lineup = Lineup(agent.backend.name, Variant(lambda: agent.act(obs)))
    if agent.backend.name != "torch":
        plain = TDMPC2(at.cfg.replace(backend="torch"), 1)
        plain.load(agent.model.state_dict())
        gate = partial(_gate, agent, lambda _: _planned(plain, at), at, {})
        lineup.add("torch", Variant(lambda: plain.act(obs), gate=gate))
    graph = PlanGraph(agent.model)
    given = graph.given(obs, torch.zeros_like(agent.planner.prev_mean), noise)

    def by(runtime: Callable[[PlanGraph, Path], Run]) -> Variant:
        try:
            run = runtime(graph, folder)
        except (BackendError, ImportError) as e:
            raise CannotMeasureError(str(e)) from e
        return Variant(partial(run, given), gate=partial(_gate, agent, run, at, given))

    runtimes = RUNTIMES | ({"AOTInductor": _aot_inductor} if options.compiled else {})
    with tempfile.TemporaryDirectory() as name:  # read when a runtime loads them
        folder = Path(name)
        for runtime, made in runtimes.items():
            lineup.attempt(runtime, partial(by, made))
    return Case("export", "plan", lineup.variants, lineup.missing, **at.facts)


def _planned(agent: TDMPC2, at: Setting) -> list[Tensor]:
    """Return action and mean of a plan from a zero mean, by the draws that all are compared by."""
    agent.planner.prev_mean.zero_()
    action = agent.planner.plan(at.obs, noise=at.noise).clone()
    return [action, agent.planner.prev_mean.clone()]


def _gate(agent: TDMPC2, run: Run, at: Setting, given: Inputs) -> Gate:
    """Return the gate of a whole plan: the largest difference of its action and its mean."""
    both = zip(_planned(agent, at), run(given), strict=True)
    return Gate.worst(*(Gate(float((ours - theirs).abs().max()), ACTION_LIMIT) for ours, theirs in both))


def _onnx(graph: PlanGraph, folder: Path) -> Path:
    path = folder / "plan.onnx"
    if not path.exists():
        onnx_file.write_onnx(graph, path)
    return path


def _onnxruntime(graph: PlanGraph, folder: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin after a plan would slow the variant whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(_onnx(graph, folder), options, providers=["CPUExecutionProvider"])
    names = [p.name for p in graph.outputs]
    return lambda given: [torch.from_numpy(x) for x in session.run(names, {k: v.numpy() for k, v in given.items()})]


def _openvino(graph: PlanGraph, folder: Path) -> Run:
    import openvino

    # Without the hint it computes in bfloat16 where the CPU can.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(_onnx(graph, folder), "CPU", settings)

    def run(given: Inputs) -> list[Tensor]:
        found = compiled({k: v.numpy() for k, v in given.items()})
        return [torch.from_numpy(found[p.name].copy()) for p in graph.outputs]

    return run


def _torch_export(graph: PlanGraph, folder: Path) -> Run:
    (path,) = torch_package.write_package(graph, folder / "plan.pt2")
    module = torch.export.load(path).module()

    def run(given: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return list(module(**given))

    return run


def _aot_inductor(graph: PlanGraph, folder: Path) -> Run:
    if why := why_not_compiled(torch.device("cpu")):
        raise CannotMeasureError(why)
    (path,) = torch_package.write_package(graph, folder / "compiled.pt2", compiled=True)
    package = torch._inductor.aoti_load_package(str(path))
    return lambda given: list(package(**given))


RUNTIMES = {"onnxruntime": _onnxruntime, "openvino": _openvino, "torch.export": _torch_export}
