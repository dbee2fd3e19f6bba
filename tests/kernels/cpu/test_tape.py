"""Plans and updates from a tape: the bits of single launches, on any number of threads, with the weights of now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import filled_buffer, tiny_config, tiny_multitask

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.kernels.cpu.build import bfloat16, why_not
from tdmpc2_fast.kernels.cpu.tape import TapedFunction
from tdmpc2_fast.learn.kernel_update import KernelUpdate
from tdmpc2_fast.plan.kernel_plan import KernelPlan
from tdmpc2_fast.plan.trace import PlanTrace

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# Two tiles of samples and more, and widths that no vector divides.
WIDE = dict(backend="cpu", num_samples=150, latent_dim=40, mlp_dim=51, enc_dim=37, simnorm_dim=4, dropout=0.2)
CONFIGS: dict[str, Config] = dict(
    plain=tiny_config(**WIDE),
    no_prior=tiny_config(**WIDE, num_pi_trajs=0),
    many_priors=tiny_config(**WIDE, num_pi_trajs=130),
    episodic=tiny_config(**WIDE, episodic=True),
    multitask=tiny_multitask(**WIDE),
    one_step=tiny_config(**WIDE, horizon=1),
)
if bfloat16():
    CONFIGS["bfloat16"] = tiny_config(**WIDE, precision="bfloat16")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def trained(cfg: Config, taped: bool, count: int = 1, num_threads: int = 1) -> tuple[list[Any], dict[str, Any]]:
    """Return actions and metrics of some decisions, each with an update, and the last weights."""
    torch.set_num_threads(num_threads)
    agent, buffer = TDMPC2(cfg, num_envs=count), filled_buffer(cfg)
    plan, seen = agent.planner._plan, []
    update = agent.updater._update
    assert isinstance(plan, KernelPlan)
    assert isinstance(update, KernelUpdate)
    assert isinstance(plan._graph, TapedFunction)
    if not taped:
        # The same calls, each launch at once.
        plan._graph = lambda stale=True: plan._run()  # type: ignore[assignment, misc]
        update._device.captured = lambda run, written: run  # type: ignore[method-assign, assignment, return-value]
    obs = torch.linspace(-1, 1, 5 * count).view(count, 5)
    task = torch.arange(count) % 3 if cfg.multitask else None
    for step in range(3):
        seen.append(agent.planner.plan(obs, step == 0, task=task).tolist())
        seen.append({k: float(v) for k, v in agent.update(buffer).items()})
    return seen, {k: v.clone() for k, v in agent.model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_tape_gives_the_bits_of_its_launches(name: str, count: int) -> None:
    (seen, weights), (wanted, theirs) = (trained(CONFIGS[name], taped, count) for taped in (True, False))
    assert seen == wanted
    assert all(torch.equal(weights[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    (seen, weights), *others = (trained(CONFIGS[name], True, 2, n) for n in (1, 2, 3))
    for theirs, their_weights in others:
        assert seen == theirs
        assert all(torch.equal(weights[k], their_weights[k]) for k in weights)


@pytest.mark.parametrize("watched", [False, True])
def test_weights_that_others_change_are_taken_in(watched: bool) -> None:
    """Also where the plan that saw the change first was no replay."""
    cfg = CONFIGS["plain"]
    agent, other = TDMPC2(cfg), TDMPC2(cfg)
    obs = torch.ones(1, 5)
    assert torch.equal(agent.planner.plan(obs, True), other.planner.plan(obs, True))
    with torch.no_grad():
        for model in (agent.model, other.model):
            for p in model.parameters():
                p.mul_(0.5)
    if watched:
        agent.planner.plan(obs, trace=PlanTrace())
    fresh = TDMPC2(cfg)
    fresh.load(agent.model.state_dict())
    fresh.planner.load_state(agent.planner.state())
    assert torch.equal(agent.planner.plan(obs, True), fresh.planner.plan(obs, True))


def test_numbers_of_torch_go_on_with_the_kernels() -> None:
    cfg = CONFIGS["plain"]
    agents = [TDMPC2(cfg.replace(backend=backend)) for backend in ("torch", "cpu")]
    agents[0].update(filled_buffer(cfg))
    agents[1].load(agents[0].model.state_dict())
    agents[1].updater.load_state(agents[0].updater.state())
    metrics = [agent.update(filled_buffer(cfg)) for agent in agents]
    assert {k: v.isfinite().item() for k, v in metrics[1].items()} == dict.fromkeys(metrics[0], True)


def test_weights_in_shared_memory_stay_there_and_are_read_at_every_plan() -> None:
    """Other processes have that memory, and their writes advance no counter of torch here."""
    cfg = CONFIGS["plain"]
    agent, alone = TDMPC2(cfg), TDMPC2(cfg)
    agent.model.share_memory()
    places = {k: p.data_ptr() for k, p in agent.model.named_parameters()}
    for one in (agent, alone):
        one.update(filled_buffer(cfg))
        one.update(filled_buffer(cfg))
    theirs = dict(alone.model.named_parameters())
    assert {k: p.data_ptr() for k, p in agent.model.named_parameters()} == places
    assert all(torch.equal(p, theirs[k]) for k, p in agent.model.named_parameters())
    obs = torch.ones(1, 5)
    agent.planner.plan(obs, True)
    for p in agent.model.parameters():
        p.detach().numpy()[...] *= 0.5
    fresh = TDMPC2(cfg)
    fresh.load(agent.model.state_dict())
    fresh.planner.load_state(agent.planner.state())
    assert torch.equal(agent.planner.plan(obs, True), fresh.planner.plan(obs, True))
