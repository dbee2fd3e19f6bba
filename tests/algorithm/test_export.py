"""Exported plans and priors give the numbers of `Planner`, draw by draw, wherever they run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, tiny_config, tiny_multitask
from torch import Tensor

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.errors import BackendError, ConfigError
from tdmpc2_fast.export import DEFAULT_OPSET, OPSETS, onnx_file, torch_package
from tdmpc2_fast.export.graphs import Graph, PlanGraph, PriorGraph
from tdmpc2_fast.rng import PlanNoise

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

SHORT = dict(iterations=2, horizon=2, backend="torch", precision="float32")
SHORTER = SHORT | dict(iterations=1)
PIXELS = dict(obs="rgb", num_channels=4, latent_dim=64)


def pixel_config() -> Config:
    return Config.from_dict({**TINY, **SHORTER, **PIXELS, "device": "cpu"}).with_env({"rgb": (3, 64, 64)}, 2, 50)


CONFIGS: dict[str, Callable[[], Config]] = {
    "state": lambda: tiny_config(**SHORT),
    "rgb": pixel_config,
    "multitask": lambda: tiny_multitask(**SHORT),
    "episodic": lambda: tiny_config(**SHORT, episodic=True),
    "many actions": lambda: tiny_config(action_dim=20, **SHORTER),
    "no prior": lambda: tiny_config(**SHORTER, num_pi_trajs=0),
    "num_bins=0": lambda: tiny_config(**SHORTER, num_bins=0),
    "num_bins=1": lambda: tiny_config(**SHORTER, num_bins=1),
}
Run = Callable[[dict[str, Tensor]], list[Tensor]]


class Made:
    """An agent, its graphs, and their files in ONNX."""

    def __init__(self, agent: TDMPC2, folder: Path, opset: int = DEFAULT_OPSET) -> None:
        self.agent, self.folder = agent, folder
        if agent.cfg.multitask:  # rows longer than 1, which a lookup shortens, and shorter ones
            agent.model._task_emb.weight.data.mul_(torch.tensor([[8.0], [1.0], [0.1]]))
        self.plan, self.prior = PlanGraph(agent.model), PriorGraph(agent.model)
        for graph in (self.plan, self.prior):
            assert onnx_file.write_onnx(graph, self.at(graph), opset) == [self.at(graph)]

    def at(self, graph: Graph, ending: str = "onnx") -> Path:
        return self.folder / f"{graph.kind}.{ending}"


@pytest.fixture(scope="module", params=CONFIGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(liven(TDMPC2(CONFIGS[request.param]())), tmp_path_factory.mktemp("export"))


def liven(agent: TDMPC2) -> TDMPC2:
    """Weights that make values and rewards differ."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in agent.model.parameters():
            p.add_((0.3 * torch.randn(p.shape, generator=g) / max(p.shape[-1], 1) ** 0.5).to(p))
    return agent


def by_onnxruntime(path: Path, _: Graph) -> Run:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda given: [torch.from_numpy(x) for x in session.run(["action", "mean"], arrays(given))]


def by_openvino(path: Path, _: Graph) -> Run:
    ov = pytest.importorskip("openvino")
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        found = compiled(arrays(given))
        return [torch.from_numpy(found[name].copy()) for name in ("action", "mean")]

    return run


def by_torch(path: Path, graph: Graph) -> Run:
    path = path.with_suffix(".pt2")
    assert torch_package.write_package(graph, path) == [path]
    extra = dict.fromkeys(graph.metadata(), "")
    program = torch.export.load(path, extra_files=extra)
    assert extra == graph.metadata()
    module = program.module()
    return lambda given: list(module(**given))


def by_aot_inductor(path: Path, graph: Graph) -> Run:
    path = path.with_name(f"{path.stem}-compiled.pt2")
    assert torch_package.write_package(graph, path, compiled=True) == [path]
    package = torch._inductor.aoti_load_package(str(path))
    assert package.get_metadata().items() >= graph.metadata().items()
    return lambda given: list(package(**given))


def arrays(given: dict[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: x.numpy() for name, x in given.items()}


def check_plans(made: Made, run: Run) -> None:
    """An episode of four decisions, the last of which is an evaluation's."""
    cfg, planner = made.agent.cfg, made.agent.planner
    g = torch.Generator().manual_seed(1)
    mean = torch.zeros_like(planner.prev_mean)
    for i in range(4):
        task = i % 3 if cfg.multitask else None
        obs = observation(cfg, g)
        noise = PlanNoise.draw(cfg, 1, g)
        wanted = planner.plan(obs, t0=i == 0, eval_mode=i == 3, task=task, noise=noise)
        given = made.plan.given(obs, mean, noise, task)
        if i == 3:
            given["action_noise"] = torch.zeros_like(given["action_noise"])
        action, mean = run(given)
        torch.testing.assert_close(action, wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(mean, planner.prev_mean, atol=1e-4, rtol=0)
    assert planner.prev_mean.abs().max() > 0.1


def check_priors(made: Made, run: Run) -> None:
    cfg, model = made.agent.cfg, made.agent.model
    g = torch.Generator().manual_seed(2)
    for i in range(3):
        task = torch.tensor([i]) if cfg.multitask else None
        obs, eps = observation(cfg, g), torch.randn(1, cfg.need("action_dim"), generator=g)
        given = dict(obs=obs, eps=eps) | ({} if task is None else dict(task=task))
        if cfg.obs == "rgb":
            given["shift"] = torch.tensor([[[[i, 6 - i]]]])
        with torch.no_grad():
            out = model.policy(model.encode(obs, task, given.get("shift")), task, eps)
        action, mean = run(given)
        torch.testing.assert_close(action, out.action, atol=1e-4, rtol=0)
        torch.testing.assert_close(mean, out.mean, atol=1e-4, rtol=0)


def observation(cfg: Config, g: torch.Generator) -> Tensor:
    shape = (1, *cfg.observation_shape)
    if cfg.obs == "rgb":
        return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    return torch.randn(shape, generator=g)


@pytest.mark.parametrize("by", [by_onnxruntime, by_openvino, by_torch])
def test_same_numbers_draw_by_draw(made: Made, by: Callable[[Path, Graph], Run]) -> None:
    check_plans(made, by(made.at(made.plan), made.plan))
    check_priors(made, by(made.at(made.prior), made.prior))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state", "rgb", "multitask"])
def test_same_numbers_compiled(name: str, tmp_path: Path) -> None:
    made = Made(liven(TDMPC2(CONFIGS[name]())), tmp_path)
    check_plans(made, by_aot_inductor(made.at(made.plan), made.plan))
    check_priors(made, by_aot_inductor(made.at(made.prior), made.prior))


def test_of_equal_values_the_first_are_elites(tmp_path: Path) -> None:
    """All are equal before the first update, and which are taken depends on a stable sort."""
    made = Made(TDMPC2(tiny_config(**SHORTER)), tmp_path)
    check_plans(made, by_onnxruntime(made.at(made.plan), made.plan))


def test_files_say_what_they_take(made: Made) -> None:
    """A program needs nothing but the file: shapes, types, and the law of each draw."""
    import onnx

    cfg = made.agent.cfg
    for graph in (made.plan, made.prior):
        model = onnx.load(made.at(graph))
        shapes = {
            x.name: (tuple(d.dim_value for d in x.type.tensor_type.shape.dim),
                     str(onnx.helper.tensor_dtype_to_np_dtype(x.type.tensor_type.elem_type)))
            for x in [*model.graph.input, *model.graph.output]
        }  # fmt: skip
        assert shapes == {p.name: (p.shape, p.dtype) for p in [*graph.inputs, *graph.outputs]}
        said = {p.key: p.value for p in model.metadata_props}
        assert said == graph.metadata()
        assert said["graph"] == graph.kind
        given = {"obs", "prev_mean", "task"}
        assert {*json.loads(said["draws"])} == {p.name for p in graph.inputs} - given
    assert made.plan.metadata()["iterations"] == str(cfg.effective_iterations)
    assert ("pi_eps" in made.plan.example()) == (cfg.num_pi_trajs > 0)
    for graph in (made.plan, made.prior):
        assert not graph.state_dict().keys() & {"model._target_Qs_params.0.weight"}  # which no plan reads
        for path in made.folder.glob(f"{graph.kind}*"):
            assert str(ROOT).encode() not in path.read_bytes()  # where it was made is nobody's concern


def test_exporting_leaves_the_model_alone() -> None:
    model = liven(TDMPC2(tiny_multitask(**SHORT))).model
    model._task_emb.weight.data.mul_(8)
    before = {k: v.clone() for k, v in model.named_parameters()}
    graph = PlanGraph(model)
    assert graph.model._task_emb.weight.norm(dim=-1).max() < 1.001
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    assert all(p.requires_grad == (not k.startswith("_target")) for k, p in model.named_parameters())


@pytest.mark.parametrize("opset", OPSETS)
def test_the_ends_of_the_range_of_opsets(opset: int, tmp_path: Path) -> None:
    import onnx

    made = Made(liven(TDMPC2(CONFIGS["rgb"]())), tmp_path, opset)
    path = made.at(made.plan)
    (used,) = onnx.load(path).opset_import
    assert (used.domain, used.version) == ("", opset)
    check_plans(made, by_onnxruntime(path, made.plan))


@pytest.mark.parametrize("opset", [17, 24, "18", True])
def test_a_wrong_opset_is_answered_by_name(opset: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"opset: got .*, allowed: an integer of at least 18 and at most 23"):
        onnx_file.write_onnx(None, tmp_path / "a.onnx", opset)  # type: ignore[arg-type]


def test_weights_beyond_one_file_lie_beside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_file, "_ONE_FILE", 1000)
    prior = PriorGraph(TDMPC2(tiny_config(**SHORT)).model)
    path = tmp_path / "new" / "prior.onnx"
    assert onnx_file.write_onnx(prior, path) == [path, path.with_name("prior.onnx.data")]
    given = prior.example()
    with torch.no_grad():
        wanted = prior(**given)
    torch.testing.assert_close(by_onnxruntime(path, prior)(given), list(wanted))
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_file, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(BackendError, match=r"ONNX files need no_such_package; pip install 'tdmpc2-fast\[export\]'"):
        onnx_file.check_onnx()

    def none() -> str:
        raise RuntimeError("no compiler on the path")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with pytest.raises(BackendError, match=r"compiled: needs a C\+\+ compiler .*no compiler on the path"):
        torch_package.write_package(PriorGraph(TDMPC2(tiny_config()).model), tmp_path / "a.pt2", compiled=True)
    assert [*tmp_path.iterdir()] == []
