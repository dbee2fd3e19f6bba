"""Objects are copied, pickled, and used in any mode of torch, without a number being another one for it."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import multiprocessing as mp
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import filled_buffer, random_episode, tiny_config, tiny_multitask
from going_on import everything, learn
from test_state import SMALLER

from tdmpc2_fast import TDMPC2, Config, Planner, ReplayBuffer
from tdmpc2_fast.learn.scale import RunningScale


def through_torch_save(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": through_torch_save,
}
MANY = [(way, backend, kind) for way in WAYS for backend in ("torch", "cpu") for kind in ("plain", "multitask")]


@pytest.mark.parametrize(
    ("way", "backend", "kind"), [*MANY, ("deepcopy", "triton", "plain"), ("pickle", "triton", "multitask")]
)
def test_a_copy_made_in_training_goes_on_alike_and_alone(way: str, backend: str, kind: str) -> None:
    make = tiny_multitask if kind == "multitask" else tiny_config
    agent = TDMPC2(make(**SMALLER, backend=backend))
    buffer = filled_buffer(agent.cfg)
    updates = 1 if backend == "triton" else 2  # interpreted kernels take their time
    learn(agent, buffer, updates)
    other, others = WAYS[way]((agent, buffer))
    assert other.planner.model is other.model is other.updater.model is not agent.model
    before = everything(agent)
    assert everything(other) == before
    seen = learn(other, others, updates)
    assert everything(other) != before
    assert everything(agent) == before
    assert learn(agent, buffer, updates) == seen
    assert everything(agent) == everything(other)
    others.add(random_episode(agent.cfg, 20, task=0))
    assert others.num_eps == buffer.num_eps + 1


def go_on(agent: TDMPC2, buffer: ReplayBuffer, answer: Any) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    answer.put(learn(agent, buffer, 1))


@pytest.mark.parametrize("backend", ["torch", "triton", "cpu"])
def test_a_process_is_given_an_agent_and_its_replay(backend: str) -> None:
    agent = TDMPC2(tiny_config(**SMALLER, backend=backend))
    buffer = filled_buffer(agent.cfg)
    learn(agent, buffer, 1)
    copied = copy.deepcopy((agent, buffer))
    ctx = mp.get_context("spawn")
    answer = ctx.SimpleQueue()
    child = ctx.Process(target=go_on, args=(agent, buffer, answer))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert answer.get() == learn(*copied, 1)


@pytest.mark.parametrize("way", WAYS)
def test_single_objects(way: str) -> None:
    cfg = tiny_config()
    agent = TDMPC2(cfg)
    planner = Planner(agent.model, 2, seed=7)
    planner.plan(torch.ones(2, 5))
    scale = RunningScale(0.1, torch.device("cpu"))
    scale.update(torch.arange(20.0).unsqueeze(1))
    copied, model, config, other_scale, updater = WAYS[way]((planner, agent.model, cfg, scale, agent.updater))
    assert copied.model is model is updater.model
    assert torch.equal(copied.plan(torch.ones(2, 5)), planner.plan(torch.ones(2, 5)))
    assert config == cfg
    assert other_scale.value == scale.value
    assert len(WAYS[way](ReplayBuffer(cfg))) == 0
    obs, z = torch.ones(1, 5), agent.model.encode(torch.ones(1, 5))
    with torch.no_grad():
        model._encoder["state"][0].weight.add_(1)
    assert torch.equal(agent.model.encode(obs), z)
    assert not torch.equal(model.encode(obs), z)


def test_a_pickle_of_a_model_in_training_is_of_its_size() -> None:
    """Its parameters are views into buffers, all of which would go along with each."""
    agent = TDMPC2(tiny_config(**SMALLER, backend="triton"))
    before = len(pickle.dumps(agent.model))
    agent.update(filled_buffer(agent.cfg))
    assert len(pickle.dumps(agent.model)) < 1.1 * before


def test_an_optimiser_of_ones_own_is_copied_with_its_model() -> None:
    agent = TDMPC2(tiny_config(**SMALLER, backend="triton"))
    agent.update(filled_buffer(agent.cfg))
    optim = torch.optim.SGD(agent.model.parameters(), lr=1)
    model, optim = copy.deepcopy((agent.model, optim))
    assert {*map(id, model.parameters())} == {id(p) for p in optim.param_groups[0]["params"]}


@contextlib.contextmanager
def default(dtype: torch.dtype = torch.float32, device: str | None = None) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "none": contextlib.nullcontext,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    # Whatever forgets to say where it goes has no memory there.
    "device": lambda: default(device="meta"),
    "float64": lambda: default(torch.float64),
}
MIXED = [(a, b) for a, b in itertools.product(MODES, MODES) if a != "float64"]  # which a model built in it would be


def numbers(cfg: Config, build: str, use: str) -> list[float]:
    """What an agent built in one mode and used in another does, there and, trained once more, outside."""
    with MODES[build]():
        agent, buffer = TDMPC2(cfg), ReplayBuffer(cfg)
        agent, buffer = pickle.loads(pickle.dumps(copy.deepcopy((agent, buffer))))
    with MODES[use]():
        for seed in range(3):
            buffer.add(random_episode(cfg, 20, seed=seed))
        agent.load(copy.deepcopy(agent.model.state_dict()))
        found = [agent.update(buffer)["total_loss"].item() for _ in range(2)]
        found += agent.act([1.0] * 5).tolist() + agent.act([1.0] * 5, eval_mode=True).tolist()
    return [*found, agent.update(buffer)["total_loss"].item(), *agent.act([1.0] * 5).tolist()]


@pytest.fixture(scope="module")
def expected() -> list[list[float]]:
    return [numbers(tiny_config(**SMALLER, mpc=mpc), "none", "none") for mpc in (True, False)]


@pytest.mark.parametrize(("build", "use"), MIXED)
def test_no_mode_of_torch_changes_a_number(build: str, use: str, expected: list[list[float]]) -> None:
    for mpc, want in zip((True, False), expected, strict=True):
        assert numbers(tiny_config(**SMALLER, mpc=mpc), build, use) == want


@pytest.mark.parametrize("mode", ["inference", "device and dtype"])
def test_kernels_are_set_up_in_any_mode(mode: str) -> None:
    cfg = tiny_config(**SMALLER, backend="triton")
    want = learn(TDMPC2(cfg), filled_buffer(cfg), 1)
    agent = TDMPC2(cfg)
    with torch.inference_mode() if mode == "inference" else default(torch.float64, "meta"):
        buffer = filled_buffer(cfg)
        agent = copy.deepcopy(agent)
        agent.planner = Planner(agent.model)
        first = agent.update(buffer)["total_loss"].item()
    assert [first, *agent.act(torch.ones(5)).tolist()] == want


def test_a_model_of_float64_learns_from_a_replay_of_float32() -> None:
    with default(torch.float64):
        agent = TDMPC2(tiny_config(**SMALLER))
    metrics = agent.update(filled_buffer(agent.cfg))
    assert metrics["total_loss"].dtype == torch.float64
    assert agent.act(torch.ones(5)).dtype == torch.float64
