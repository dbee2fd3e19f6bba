"""What all tests share: small configs and random episodes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import arithmetic  # noqa: F401
import numpy as np
import pytest
import torch

# `pytest -m gpu` compiles kernels and runs them on the GPU; every other run interprets them on
# the CPU. Triton decides when a kernel is defined, so this comes before the first import. The
# environment tells worker processes, which do not see the command line.
if "gpu" in sys.argv:
    os.environ["TDMPC2_GPU"] = "1"
ON_GPU = os.environ.get("TDMPC2_GPU") == "1" and torch.cuda.is_available()
REHEARSED = os.environ.get("TDMPC2_REHEARSE") == "1"
if REHEARSED or not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
if REHEARSED:
    import rehearsal

    rehearsal.begin()
    ON_GPU = True
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    import interpreter  # noqa: F401

from small_configs import TINY, tiny_config, tiny_multitask  # noqa: F401

import tdmpc2_fast.learn.kernel_update
import tdmpc2_fast.plan.kernel_plan  # noqa: F401 - defined now: some tests leave the interpreter
from tdmpc2_fast import TDMPC2, Config, ReplayBuffer
from tdmpc2_fast.kernels.cpu.build import bfloat16
from tdmpc2_fast.kernels.cpu.build import why_not as why_not_built
from tdmpc2_fast.kernels.device import launch

# TDMPC2_NATIVE=1 runs the tests of kernels on the C++ ones of the CPU instead.
launch._open.native = os.environ.get("TDMPC2_NATIVE") == "1"
if launch.native() and (why := why_not_built()) and "is not installed" not in why:
    raise RuntimeError(f"TDMPC2_NATIVE=1: the CPU's kernels were to be tested, and cannot be: {why}")

# Small tensors gain nothing from more threads, and one thread does not mind a busy machine.
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
SUPPORT = ROOT / "tests" / "support"
SHARED = ("", "support", "support/oracles", "support/environments", "experiments")
PYTHONPATH = os.pathsep.join(str(ROOT / "tests" / folder) for folder in SHARED)
"""Of processes that import what tests share."""


def random_episode(cfg: Config, length: int, seed: int = 0, task: int | None = None) -> dict[str, Any]:
    """An episode as the training loop stores it: row 0 has NaN action and reward."""
    rng = np.random.default_rng(seed)
    episode: dict[str, Any] = dict(
        obs=rng.standard_normal((length, *cfg.obs_shape["state"])).astype(np.float32),  # type: ignore[index]
        action=rng.uniform(-1, 1, (length, cfg.action_dim)).astype(np.float32),
        reward=rng.uniform(0, 2, length).astype(np.float32),
        terminated=np.zeros(length, np.float32),
    )
    episode["action"][0] = episode["reward"][0] = np.nan
    if task is not None:
        episode["task"] = np.full(length, task)
    return episode


def filled_buffer(cfg: Config, episodes: int = 4, length: int = 20) -> ReplayBuffer:
    """A replay with some random episodes, tasks in turn."""
    buffer = ReplayBuffer(cfg)
    for i in range(episodes):
        buffer.add(random_episode(cfg, length, seed=i, task=i % len(cfg.tasks) if cfg.multitask else None))
    return buffer


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None]:
    """On a GPU the kernels' own tests run there, too; TEST_SHARD=i/n takes every n-th test from the i-th on."""
    no_bfloat16 = launch.native() and not bfloat16()
    for item in items:
        if launch.native() and (item.get_closest_marker("triton") or "tf32" in item.name):
            item.add_marker(pytest.mark.skip("of Triton alone: a CPU has no tf32"))
        if no_bfloat16 and "bfloat16" in item.name and "algorithm" in item.path.parts:
            item.add_marker(pytest.mark.skip("agents are refused bfloat16 on this CPU"))
        if ON_GPU and item.path.name.endswith(("_kernel.py", "_kernels.py")):
            item.add_marker(pytest.mark.gpu)
    yield  # others leave out what is not asked for
    if shard := os.environ.get("TEST_SHARD"):
        start, step = map(int, shard.split("/"))
        items[:] = items[start::step]


@pytest.fixture(autouse=True)
def tf32_where_the_test_says_so(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU plain torch, too, computes in tf32 in tests of it."""
    torch.set_float32_matmul_precision("high" if "tf32" in request.node.name else "highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What is allocated is NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4, device="cuda" if ON_GPU else "cpu").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cfg() -> Config:
    return tiny_config()


@pytest.fixture
def agent(cfg: Config) -> TDMPC2:
    return TDMPC2(cfg)


@pytest.fixture
def other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates compute activations and gradients of LayerNorms once where readers would, and the other way round."""
    monkeypatch.setattr("tdmpc2_fast.kernels.update.chain.native", lambda: not launch.native())


@pytest.fixture
def livened() -> Callable[[TDMPC2], TDMPC2]:
    """Gives an agent non-zero last layers, so that values and rewards differ."""

    def liven(agent: TDMPC2, seed: int = 0) -> TDMPC2:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in agent.model.parameters():
                p.add_((0.3 * torch.randn(p.shape, generator=g) / max(p.shape[-1], 1) ** 0.5).to(p))
        return agent

    return liven
