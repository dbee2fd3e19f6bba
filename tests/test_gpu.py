"""What only a GPU can show: parity of the compiled kernels, and the contract of the captured graph."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_cases
import numpy as np
import plan_oracle
import point_mass
import pytest
import torch
from conftest import ON_GPU, REHEARSED, TINY, random_episode, tiny_config
from data_sets import make_data
from going_on import check_goes_on
from gpu_cases import CONFIGS, SEVERAL, Case
from loop_oracle import everything
from official_like import OfficialLike
from update_oracle import check_gradients, random_batch

from tdmpc2_fast import TDMPC2, Config, ReplayBuffer
from tdmpc2_fast.benchmarks.harness import stand_in
from tdmpc2_fast.compat.accelerate import accelerate, deaccelerate
from tdmpc2_fast.compat.draws import given, plan_order, update_order
from tdmpc2_fast.errors import NonFiniteError
from tdmpc2_fast.kernels.device import cluster_check
from tdmpc2_fast.kernels.device.launch import Precision
from tdmpc2_fast.learn.batch import UpdateTrace
from tdmpc2_fast.learn.kernel_update import KernelUpdate
from tdmpc2_fast.plan.backend import PlanRequest
from tdmpc2_fast.plan.kernel_plan import KernelPlan
from tdmpc2_fast.plan.trace import PlanTrace
from tdmpc2_fast.rng import PlanNoise, UpdateNoise
from tdmpc2_fast.train.data.dataset import DataSet
from tdmpc2_fast.train.data.draws import Draws
from tdmpc2_fast.train.envs.base import Failures
from tdmpc2_fast.train.run.rollouts import DeviceRollouts
from tdmpc2_fast.train.run.trainer import OnlineTrainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device: pytest -m gpu")]

Liven = Callable[[TDMPC2], TDMPC2]
GPU = torch.device("cuda")


def fused_agent(name: str, livened: Liven, count: int = 1, **changes: Any) -> TDMPC2:
    return livened(TDMPC2(CONFIGS[name](**{"device": "cuda", "backend": "triton", **changes}), num_envs=count))


def draw(cfg: Config, count: int) -> PlanNoise:
    return plan_oracle.draw(cfg, count, GPU)


def task_of(cfg: Config, count: int) -> torch.Tensor | None:
    return plan_oracle.task_of(cfg, count, GPU)


def observation(cfg: Config, count: int) -> torch.Tensor:
    return plan_oracle.observation(cfg, count, GPU)


@pytest.mark.skipif(REHEARSED, reason="nothing runs at once in a rehearsal")
def test_neighbours_of_a_cluster_wait_for_each_other() -> None:
    if torch.cuda.get_device_capability(GPU) < (9, 0):
        pytest.skip("clusters come with compute capability 9.0")
    for _ in range(20):
        assert cluster_check.why_not(GPU) is None
    assert cluster_check.how_on(GPU, Precision("bfloat16")).clusters


@pytest.mark.parametrize("case", gpu_cases.parameters(gpu_cases.VALUES))
def test_values_are_as_exact_as_torch_at_the_same_precision(case: Case, livened: Liven) -> None:
    torch_precision = "tf32" if case.precision == "bfloat16" else case.precision
    agent = fused_agent(case.name, livened, case.envs, backend="torch", precision=torch_precision)
    plan_oracle.check_values(agent, case.precision, case.once)


@pytest.mark.parametrize("case", gpu_cases.parameters(gpu_cases.PLANS))
def test_a_replay_is_bitwise_an_eager_plan(case: Case, livened: Liven) -> None:
    count = case.envs
    agent = fused_agent(case.name, livened, count, precision=case.precision)
    plan = agent.planner._plan
    assert isinstance(plan, KernelPlan)
    assert plan.why_eager is None
    obs, task = observation(agent.cfg, count), task_of(agent.cfg, count)
    for t0 in (True, False):
        before, rng = plan.prev_mean.clone(), plan.chain.inputs.rng.clone()
        replayed = plan.plan(PlanRequest(obs, t0, task=task))
        mean = plan.prev_mean.clone()
        plan.prev_mean.copy_(before)
        plan.chain.inputs.rng.copy_(rng)
        eager = plan.plan(PlanRequest(obs, t0, task=task, trace=PlanTrace()))
        assert torch.equal(replayed, eager)
        assert torch.equal(mean, plan.prev_mean)


def test_a_hundred_repeats_are_bitwise_identical(livened: Liven) -> None:
    agent = fused_agent("model_5", livened)
    plan, obs = agent.planner._plan, observation(agent.cfg, 1)
    assert isinstance(plan, KernelPlan)
    rng = plan.chain.inputs.rng.clone()
    found = []
    for _ in range(100):
        plan.chain.inputs.rng.copy_(rng)
        found.append(plan.plan(PlanRequest(obs, True)))
    assert all(torch.equal(found[0], x) for x in found)


def test_inputs_flags_and_new_parameters_are_honoured_after_capture(livened: Liven) -> None:
    agent = fused_agent("odd", livened, SEVERAL)
    plan, obs = agent.planner._plan, observation(agent.cfg, SEVERAL)
    is_first = torch.arange(SEVERAL, device=GPU) == 0
    assert isinstance(plan, KernelPlan)
    rng = plan.chain.inputs.rng.clone()

    def act(obs: torch.Tensor = obs, t0: Any = True, evaluate: Any = False) -> torch.Tensor:
        plan.chain.inputs.rng.copy_(rng)
        return agent.planner.plan(obs, t0, evaluate)

    base = act()
    assert torch.equal(base, act())
    assert not torch.equal(base, act(obs + 1))
    one = act(evaluate=is_first)
    assert not torch.equal(base[0], one[0])
    assert torch.equal(base[1:], one[1:])
    warm = act(t0=~is_first)
    assert not torch.equal(base[0], warm[0])
    assert torch.equal(base[1:], warm[1:])
    livened(agent)
    changed = act()
    assert not torch.equal(base, changed)
    for p in agent.model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.Adam(agent.model.parameters(), fused=True).step()
    stepped = act()
    assert not torch.equal(changed, stepped)
    put_elsewhere(agent)
    assert torch.equal(stepped, act())


def put_elsewhere(agent: TDMPC2) -> None:
    """The same parameters and buffers at other addresses."""
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in agent.model.state_dict().items()}
    agent.model.load_state_dict(state, assign=True)


def test_tensors_a_graph_reads_itself_may_be_put_elsewhere(livened: Liven) -> None:
    agent = fused_agent("multitask", livened, SEVERAL)
    plan, task = agent.planner._plan, task_of(agent.cfg, SEVERAL)
    assert isinstance(plan, KernelPlan)
    obs, rng = observation(agent.cfg, SEVERAL), plan.chain.inputs.rng.clone()

    def act() -> torch.Tensor:
        plan.chain.inputs.rng.copy_(rng)
        return agent.planner.plan(obs, True, task=task)

    before = act()
    put_elsewhere(agent)
    assert torch.equal(before, act())
    assert plan.why_eager is None
    with torch.no_grad():
        agent.model._task_emb.weight.neg_()
    assert not torch.equal(before, act())


def test_the_generator_advances_with_every_replay(livened: Liven) -> None:
    agent = fused_agent("odd", livened, SEVERAL)
    obs = observation(agent.cfg, SEVERAL)
    actions = [agent.planner.plan(obs, True) for _ in range(5)]
    assert len({tuple(a.flatten().tolist()) for a in actions}) == 5
    plan = agent.planner._plan
    assert isinstance(plan, KernelPlan)
    assert int(plan.chain.inputs.rng[1]) == 5


def test_a_call_neither_allocates_nor_waits_nor_aliases(livened: Liven) -> None:
    agent = fused_agent("multitask", livened, SEVERAL)
    obs, task = observation(agent.cfg, SEVERAL), task_of(agent.cfg, SEVERAL)
    first = agent.planner.plan(obs, True, task=task)
    kept = first.clone()
    torch.cuda.synchronize()
    segments = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            action = agent.planner.plan(obs, False, task=task)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == segments
    assert torch.equal(first, kept)
    assert action.data_ptr() != first.data_ptr()


FAILS = """
import warnings, torch
from tdmpc2_fast.cuda_graph import GraphedFunction
x = torch.zeros((), device="cuda")
def waits():
    x.add_(1)
    x.item()
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    graphed = GraphedFunction(waits, x.device, "test")
assert not graphed.captured and "capture failed" in graphed.why_eager
assert any("test: capture failed" in str(w.message) for w in found), found
before = x.item()
graphed()
assert x.item() == before + 1
assert torch.randn(3, device="cuda").isfinite().all()
assert GraphedFunction(lambda: x.add_(1), x.device, "next").captured
"""


def test_a_failed_capture_is_loud_eager_and_spoils_no_other() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", FAILS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_auto_takes_the_kernels_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = TDMPC2(CONFIGS["odd"](device="cuda"), num_envs=SEVERAL)
    name, why = agent.backend
    assert name == "triton"
    assert torch.cuda.get_device_name() in why


@pytest.mark.parametrize(
    ("several", "actions"),
    [
        (dict() if REHEARSED else dict(model_size=5), 6),
        pytest.param(dict(num_envs=3, utd=0.5, env_workers=2), 2, marks=pytest.mark.later),
    ],
    ids=["one", "three"],
)
def test_overlapped_and_serial_loops_are_bitwise_equal(
    several: dict[str, Any], actions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "_DECISIONS", 25)
    stand_in.install(actions)
    model = {} if "model_size" in several else TINY
    episodes = several.get("num_envs", 1)  # side by side: it is for how many the evaluation plans
    keys = dict(model, task=stand_in.NAME, seed_steps=60, steps=240, eval_freq=100, eval_episodes=episodes) | several
    found = []
    for overlap in (False, True, None):
        folder = tmp_path / str(overlap)
        folder.mkdir()
        trainer = OnlineTrainer(Config.from_dict(dict(keys, device="cuda", overlap=overlap)), folder)
        assert trainer.overlap == (overlap is not False)
        trainer.run()
        found.append(everything(trainer))
    assert trainer.agent.updater.steps > 100
    for other in found[1:]:
        assert not [k for k, v in found[0].items() if v != other[k]]


def first_update(name: str, livened: Liven, **changes: Any) -> tuple[TDMPC2, KernelUpdate]:
    """An agent whose update is captured."""
    agent = fused_agent(name, livened, **changes)
    agent.updater.step(random_batch(agent.cfg, GPU))
    update = agent.updater._update
    assert isinstance(update, KernelUpdate)
    assert update.why_eager is None
    return agent, update


@pytest.mark.parametrize("case", gpu_cases.parameters(gpu_cases.UPDATES))
def test_a_replayed_update_is_bitwise_an_eager_one(case: Case, livened: Liven, request: pytest.FixtureRequest) -> None:
    """It leaves what an eager update from the same state leaves."""
    go_the_way_of(case, request)
    agent, update = first_update(case.name, livened, precision=case.precision)
    u = update.chain
    kept = [u.world.param, u.world.exp_avg, u.world.exp_avg_sq, u.world.grad, u.world.step, u.policy.param]
    kept += [u.policy.exp_avg, u.policy.exp_avg_sq, u.policy.step, u.target.param, u.state.scale, u.inputs.rng]
    batch = random_batch(agent.cfg, GPU, 1)
    before = [x.clone() for x in kept]
    metrics = agent.updater.step(batch)
    replayed = [x.clone() for x in kept]
    for x, y in zip(kept, before, strict=True):
        x.copy_(y)
    update.flat.refresh_operands()
    again = agent.updater.step(batch, trace=UpdateTrace.empty())
    assert all(torch.equal(x, y) for x, y in zip(kept, replayed, strict=True))
    assert all(torch.equal(metrics[k], again[k]) for k in metrics)
    assert not torch.equal(before[0], replayed[0])


@pytest.mark.parametrize("case", gpu_cases.parameters(gpu_cases.GRADIENTS))
def test_gradients_are_as_exact_as_torch_at_the_same_precision(
    case: Case, livened: Liven, request: pytest.FixtureRequest
) -> None:
    go_the_way_of(case, request)
    check_gradients(CONFIGS[case.name](device="cuda"), case.precision, livened)


def go_the_way_of(case: Case, request: pytest.FixtureRequest) -> None:
    """Updates within the test go the other way, if the case says so."""
    if case.once is False:
        request.getfixturevalue("other_way")


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_a_thousand_updates_stay_finite_wait_for_nothing_and_see_new_data(precision: str) -> None:
    keys = dict(backend="triton", buffer_size=20_000, steps=20_000)
    cfg = CONFIGS["model_5"](device="cuda", precision=precision, **keys)
    agent, buffer = TDMPC2(cfg), ReplayBuffer(cfg, GPU)
    buffer.add(random_episode(cfg, 101))
    agent.update(buffer)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["num_device_alloc"]
    losses = []
    for i in range(1000):
        if i % 100 == 99:
            episode = random_episode(cfg, 101, seed=i)
            episode["obs"][:] = i
            buffer.add(episode)
            buffer.on_device()  # waits, to copy its table
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses.append(agent.update(buffer)["total_loss"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    agent.updater.synchronise()
    assert torch.stack(losses).isfinite().all()
    assert float(torch.stack(losses[-50:]).mean()) < float(torch.stack(losses[:50]).mean())
    assert torch.cuda.memory_stats()["num_device_alloc"] - allocated < 20
    update = agent.updater._update
    assert isinstance(update, KernelUpdate)
    assert (update.chain.inputs.obs[0, ..., 0] == 999).any()


@pytest.mark.skipif(REHEARSED, reason="pinned memory takes a device")
def test_updates_from_a_data_set_wait_for_nothing(tmp_path: Path, livened: Liven) -> None:
    agent = fused_agent("multitask", livened)
    cfg, (obs_dim,) = agent.cfg, agent.cfg.observation_shape
    widths = {task: (obs_dim, a) for task, a in zip(cfg.tasks, cfg.action_dims, strict=True)}
    draws = Draws(DataSet.open(make_data(tmp_path / "data", *cfg.tasks, **widths)), cfg, GPU)
    for _ in range(2):  # the first one is captured
        agent.updater.step(draws.sample())
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [agent.updater.step(draws.sample())["total_loss"] for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    agent.updater.synchronise()
    draws.close()
    assert torch.stack(losses).isfinite().all()
    assert isinstance(agent.updater._update, KernelUpdate)
    assert agent.updater._update.why_eager is None


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.later), "torch"])
@pytest.mark.parametrize("name", ["odd", "episodic", "multitask"])
def test_an_agent_goes_on_as_if_it_had_not_been_kept(name: str, backend: str) -> None:
    """Its generators, moments and warm start live on the device; they are kept on the host."""
    cfg = CONFIGS[name](device="cuda", backend=backend, seed=int(np.random.default_rng().integers(2**31)))
    check_goes_on(cfg, lambda tensors: {k: v.detach().cpu().clone() for k, v in tensors.items()})


@pytest.mark.later
@pytest.mark.parametrize("name", ["odd", "episodic", "multitask"])
def test_an_official_agent_is_made_fast_in_place_and_given_back(name: str) -> None:
    cfg = CONFIGS[name](device="cuda", dropout=0.0, max_std=0.3)
    agent, plain = OfficialLike(cfg), OfficialLike(cfg)
    accelerate(agent, backend="triton", precision="float32")
    assert not agent.acceleration.left
    for seed in range(3):
        noise, update_noise = draw(cfg, 1), UpdateNoise.draw(cfg, torch.Generator(GPU).manual_seed(seed))
        obs, task, batch = observation(cfg, 1).to(GPU), task_of(cfg, 1), random_batch(cfg, GPU, seed)
        with given(plan_order(noise)):
            wanted = plain.plan(obs, t0=seed == 0, eval_mode=False, task=task)
        got = agent.acceleration.plan(obs, seed == 0, False, task, noise)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-2)
        agent.acceleration.learn(batch, update_noise)
        with given(update_order(update_noise)):
            plain._update(*batch[:4], task=batch.task)
    now = {k: x.clone() for k, x in agent.model.state_dict().items()}
    for k, x in plain.model.state_dict().items():
        torch.testing.assert_close(now[k], x, rtol=1e-3, atol=1e-4)
    deaccelerate(agent)
    assert all(torch.equal(x, now[k]) for k, x in agent.model.state_dict().items())


def test_a_failure_on_the_device_is_raised_by_a_later_call(livened: Liven) -> None:
    agent, update = first_update("odd", livened)
    good = random_batch(agent.cfg, GPU)
    before = update.chain.world.param.clone()

    def fail() -> None:
        agent.updater.step(good._replace(reward=good.reward * torch.nan))  # raises where the device was faster
        agent.updater.synchronise()

    with pytest.raises(NonFiniteError, match=r"update 1: reward_loss, value_loss, total_loss is not"):
        fail()
    assert torch.equal(update.chain.world.param, before)
    agent.updater.step(good)
    agent.updater.synchronise()
    assert not torch.equal(update.chain.world.param, before)


@pytest.mark.later
def test_a_decision_in_a_simulator_on_the_device_waits_for_its_flags_alone() -> None:
    """The prior acts: a planner for this task would be other kernels to compile."""
    cfg = tiny_config(4, 2, point_mass.LONGEST, device="cuda", backend="torch", num_envs=5, mpc=False)
    agent = TDMPC2(cfg)
    envs = point_mass.PointMasses(range(5), agent.device)
    rollouts = DeviceRollouts(envs, cfg, agent.device, Failures(cfg, print))
    for i in range(4 * point_mass.LONGEST):
        lengths = [len(e.rows()["reward"]) for e in rollouts.ended()]
        assert all(point_mass.SHORTEST <= n - 1 <= point_mass.LONGEST for n in lengths)
        if i > 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            rollouts.begin()
            rollouts.act(agent)
            rollouts.step_async()
            rollouts.step_wait()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert rollouts.failures.ended > 5 * 4
    assert rollouts._steps["obs"].is_cuda
    assert rollouts._steps["obs"].isfinite().all()
