"""The whole plan on the Triton backend: equal to the torch backend and to the recorded plans."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_runner
import plan_oracle
import pytest
import torch
from conftest import GOLDEN, filled_buffer, tiny_config, tiny_multitask
from golden_cases import Case
from oracle import KERNELS, QUIET
from plan_oracle import draw

from tdmpc2_fast import TDMPC2, Config, Planner, WorldModel
from tdmpc2_fast.errors import BackendError, InputError
from tdmpc2_fast.kernels.device.launch import (
    KERNEL_ERRORS,
    How,
    Precision,
    log_launches,
    native,
    why_not,
)
from tdmpc2_fast.kernels.inspect.published import plan_sizes
from tdmpc2_fast.kernels.plan.buffers import PlanWeights
from tdmpc2_fast.kernels.plan.chain import PlanChain
from tdmpc2_fast.plan.backend import PlanRequest
from tdmpc2_fast.plan.kernel_plan import KernelPlan
from tdmpc2_fast.plan.torch_plan import TorchPlan
from tdmpc2_fast.plan.trace import PlanTrace
from tdmpc2_fast.runtime.backend import Backend

WHY_NOT = why_not(torch.device("cpu"))
pytestmark = [pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)), QUIET]

Liven = Callable[[TDMPC2], TDMPC2]


def recorded(case: str, k: int) -> Any:
    """Of each case the first plan, and a warm start of one; `make golden` replays the others, too."""
    return pytest.param(case, k, marks=pytest.mark.slow if k and (case, k) != ("episodic", 1) else ())


PLANS = [(case, k) for case in golden_runner.cases(GOLDEN) for k in range(len(Case(GOLDEN, case).meta["plans"]))]


@pytest.mark.parametrize(("case", "k"), [recorded(*plan) for plan in PLANS])
def test_recorded_plans_are_reproduced_draw_by_draw(case: str, k: int) -> None:
    checker = golden_runner.Checker(Case(GOLDEN, case), KERNELS)
    checker.plan(k)
    bad = [f"{d.name} off by {d.worst:.2e}, limit {d.limit:.1e}" for d in checker.found if not d.ok]
    assert not bad, "\n".join(bad)
    assert len(checker.found) > 8


def small(**changes: Any) -> Config:
    """A config whose plans have few launches: each takes the interpreter its time."""
    return tiny_config(**{"backend": KERNELS, "iterations": 2, "horizon": 2, **changes})


CONFIGS = dict(
    plain=small(),
    one_action=small(action_dim=1),
    many_actions=small(action_dim=38, num_samples=19, num_elites=19, iterations=1),
    no_prior=small(num_pi_trajs=0),
    only_prior=small(num_pi_trajs=32),
    one_sample=small(num_samples=1, num_elites=1, num_pi_trajs=1),
    episodic=small(episodic=True),
    horizon_1=small(horizon=1),
    long=small(horizon=6),
    deep_encoder=small(num_enc_layers=4),
    symlog=small(num_bins=1),
    plain_regression=small(num_bins=0),
    odd_widths=small(latent_dim=40, mlp_dim=51, enc_dim=37, simnorm_dim=4, obs_dim=7),
    multitask=tiny_multitask(backend=KERNELS, iterations=2),
)


def observations(cfg: Config, num_envs: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randn(num_envs, *cfg.observation_shape, generator=g)


@pytest.mark.parametrize(
    "once",
    [True, False],
    ids=["once", "by each reader"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_torch_backend(once: bool, name: str, livened: Liven) -> None:
    cfg, count = CONFIGS[name], 3
    agent = livened(TDMPC2(cfg, num_envs=count))
    fused = KernelPlan(agent.model, count, seed=1, once=once)
    plain = TorchPlan(agent.model, count, agent.planner.generator)
    before = torch.rand(plain.prev_mean.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    for plan in (fused, plain):
        plan.prev_mean.copy_(before)
    t0, evaluate = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    task = torch.tensor([0, 2, 1]) if cfg.multitask else None
    traces = PlanTrace(), PlanTrace()
    noise, obs = draw(cfg, count), observations(cfg, count)
    got, want = (
        plan.plan(PlanRequest(obs, t0, evaluate, task, noise, trace))
        for plan, trace in zip((fused, plain), traces, strict=True)
    )
    assert [x.tolist() for x in traces[0].elites] == [x.tolist() for x in traces[1].elites]
    for field in ("z", "pi_actions", "actions", "values", "scores", "means", "stds", "chosen", "picked"):
        for a, b in zip(getattr(traces[0], field), getattr(traces[1], field), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=lambda m, f=field: f"{f}: {m}")
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(fused.prev_mean, plain.prev_mean, rtol=2e-5, atol=2e-5)


def test_pixels_equal_the_torch_backend() -> None:
    keys = dict(obs="rgb", mlp_dim=16, num_samples=8, num_elites=4, num_pi_trajs=2, device="cpu", backend=KERNELS)
    cfg = Config.from_dict(keys).with_env({"rgb": (9, 64, 64)}, 2, 500)
    agent = TDMPC2(cfg, num_envs=2)
    obs = torch.randint(0, 256, (2, 9, 64, 64), dtype=torch.uint8)
    plain, noise = TorchPlan(agent.model, 2, agent.planner.generator), draw(cfg, 2)
    got = agent.planner.plan(obs, True, True, None, noise)
    torch.testing.assert_close(got, plain.plan(PlanRequest(obs, True, True, noise=noise)), rtol=1e-5, atol=1e-5)
    assert agent.act(obs, t0=True).shape == (2, 2)


@pytest.fixture
def planner(livened: Liven) -> Planner:
    return livened(TDMPC2(small(), num_envs=3)).planner


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize(
    ("cfg", "once"),
    [
        (tiny_config(iterations=1), False),
        (tiny_config(iterations=1, episodic=True), True),
        (tiny_multitask(iterations=1), True),
    ],
    ids=["single", "episodic", "multitask"],
)
def test_values_are_as_exact_as_torch_at_the_same_precision(
    cfg: Config, precision: str, once: bool, livened: Liven
) -> None:
    plan_oracle.check_values(livened(TDMPC2(cfg, num_envs=16)), precision, once)


def test_bfloat16_stays_near(livened: Liven) -> None:
    exact = livened(TDMPC2(small(), num_envs=2))
    rough = TDMPC2(small(precision="bfloat16"), num_envs=2)
    rough.load(exact.model.state_dict())
    noise, obs = draw(exact.cfg, 2), observations(exact.cfg, 2)
    a, b = PlanTrace(), PlanTrace()
    exact.planner.plan(obs, True, noise=noise, trace=a)
    rough.planner.plan(obs, True, noise=noise, trace=b)
    # 8 bits of mantissa, a dozen layers: values agree to a few per cent of their spread.
    spread = a.values[0].std()
    assert (a.values[0] - b.values[0]).abs().max() < 0.3 * spread
    assert not torch.equal(a.values[0], b.values[0])


def test_an_environment_never_feels_another(planner: Planner) -> None:
    noise, obs = draw(planner.cfg, 3), observations(planner.cfg, 3)
    a = planner.plan(obs, True, noise=noise)
    mean = planner.prev_mean.clone()
    other = obs.clone()
    other[1] += 10
    b = planner.plan(other, True, noise=noise)
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert torch.equal(mean[[0, 2]], planner.prev_mean[[0, 2]])
    assert not torch.equal(a[1], b[1])


def test_properties_of_every_iteration(planner: Planner) -> None:
    cfg, trace = planner.cfg, PlanTrace()
    action = planner.plan(torch.randn(3, 5), True, trace=trace)
    assert action.abs().max() <= 1
    assert len(trace.values) == cfg.effective_iterations
    for actions, mean, std, score, elites in zip(
        trace.actions, trace.means, trace.stds, trace.scores, trace.elites, strict=True
    ):
        assert actions.abs().max() <= 1
        assert std.min() >= cfg.min_std
        assert std.max() <= cfg.max_std
        torch.testing.assert_close(score.sum(-1), torch.ones(3))
        chosen = actions.gather(2, elites[:, None, :, None].expand(-1, cfg.horizon, -1, cfg.action_dim))
        assert (mean <= chosen.amax(2) + 1e-6).all()
        assert (mean >= chosen.amin(2) - 1e-6).all()
    p = cfg.num_pi_trajs
    assert torch.equal(trace.actions[0][:, :, :p], trace.actions[-1][:, :, :p])


def test_same_seed_same_plans_and_fresh_draws_each_call() -> None:
    obs = torch.randn(5)
    one, two, other = TDMPC2(small()), TDMPC2(small()), TDMPC2(small(seed=2))
    first = one.act(obs, t0=True)
    assert torch.equal(first, two.act(obs, t0=True))
    second = one.act(obs, t0=True)
    assert not torch.equal(first, second)
    assert torch.equal(second, two.act(obs, t0=True))
    assert not torch.equal(first, other.act(obs, t0=True))


def test_new_parameters_are_honoured(livened: Liven) -> None:
    agent = TDMPC2(small())
    noise, obs = draw(agent.cfg, 1), observations(agent.cfg, 1)
    before = agent.planner.plan(obs, True, noise=noise)
    livened(agent)
    after = agent.planner.plan(obs, True, noise=noise)
    assert not torch.equal(before, after)
    plain = TorchPlan(agent.model, 1, agent.planner.generator)
    torch.testing.assert_close(after, plain.plan(PlanRequest(obs, True, noise=noise)), rtol=2e-5, atol=2e-5)
    state = {k: v.clone() for k, v in TDMPC2(small()).model.state_dict().items() if torch.is_tensor(v)}
    agent.load(state)
    assert torch.equal(before, agent.planner.plan(obs, True, noise=noise))


def test_a_planner_beside_the_learner_sees_each_update() -> None:
    agent = TDMPC2(small())
    beside, buffer, obs = Planner(agent.model, 1, seed=7), filled_buffer(agent.cfg), observations(agent.cfg, 1)
    beside.plan(obs, True)
    for _ in range(2):
        agent.update(buffer)
        anew = TDMPC2(agent.cfg)
        anew.load(agent.model.state_dict())
        other = Planner(anew.model, 1, seed=7)
        other.load_state(beside.state())
        assert torch.equal(beside.plan(obs, True), other.plan(obs, True))
    noise = draw(agent.cfg, 1)
    assert torch.equal(beside.plan(obs, True, noise=noise), agent.planner.plan(obs, True, noise=noise))


def test_an_action_is_not_overwritten_by_the_next_plan(planner: Planner) -> None:
    first = planner.plan(torch.randn(3, 5), True)
    kept = first.clone()
    planner.plan(torch.randn(3, 5))
    assert torch.equal(first, kept)


def test_nan_values_do_not_reach_the_action(planner: Planner) -> None:
    with torch.no_grad():
        planner.model._reward[-1].bias.fill_(torch.nan)  # type: ignore[union-attr, operator]
    assert planner.plan(torch.randn(3, 5), True).isfinite().all()


def test_dead_action_dims_stay_dead(livened: Liven) -> None:
    agent = livened(TDMPC2(tiny_multitask(backend=KERNELS), num_envs=3))
    actions = agent.planner.plan(torch.randn(3, 5), True, task=torch.tensor([0, 1, 2]))
    assert actions[0, 1:].abs().max() == 0
    assert actions[2, 2:].abs().max() == 0
    assert (actions[1] != 0).all()
    assert agent.planner.prev_mean[0, :, 1:].abs().max() == 0


def test_an_update_between_plans_is_seen(livened: Liven) -> None:
    from conftest import filled_buffer

    agent = livened(TDMPC2(small()))
    noise, obs = draw(agent.cfg, 1), observations(agent.cfg, 1)
    agent.planner.plan(obs, True, noise=noise)
    agent.update(filled_buffer(agent.cfg))
    plain = TorchPlan(agent.model, 1, agent.planner.generator)
    torch.testing.assert_close(
        agent.planner.plan(obs, True, noise=noise),
        plain.plan(PlanRequest(obs, True, noise=noise)),
        rtol=2e-5,
        atol=2e-5,
    )


def test_tensors_read_without_a_copy_may_be_put_elsewhere(livened: Liven) -> None:
    cfg = tiny_multitask(backend=KERNELS, iterations=1)
    agent = livened(TDMPC2(cfg, num_envs=3))
    plan, task = agent.planner._plan, torch.tensor([0, 1, 2])
    assert isinstance(plan, KernelPlan)
    noise, obs, captured = draw(cfg, 3), observations(cfg, 3), plan._graph
    agent.planner.plan(obs, True, task=task, noise=noise)
    mean, rng = plan.prev_mean.clone(), plan.chain.inputs.rng.clone()
    assert plan._graph is captured
    state = agent.model.state_dict()
    state["_task_emb.weight"] = torch.rand_like(state["_task_emb.weight"])
    agent.model.load_state_dict(state, assign=True)
    got = agent.planner.plan(obs, False, task=task, noise=noise)
    assert plan._graph is not captured
    other = Planner(agent.model, 3)
    other.prev_mean.copy_(mean)
    assert torch.equal(got, other.plan(obs, False, task=task, noise=noise))
    assert torch.equal(plan.chain.inputs.rng, rng + torch.tensor([0, 1]))
    # On a GPU a plan without given draws is a replay: of the graph of the new tensors.
    assert agent.planner.plan(obs, task=task).isfinite().all()


def test_a_second_thread_is_refused_and_two_planners_are_not(planner: Planner) -> None:
    obs, entered, leave = torch.randn(3, 5), threading.Event(), threading.Event()
    inner = planner._plan.plan

    def slow(*args: Any) -> torch.Tensor:
        entered.set()
        assert leave.wait(120)
        return inner(*args)

    planner._plan.plan = slow  # type: ignore[method-assign]
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(planner.plan(obs, True)))
    thread.start()
    assert entered.wait(120)
    with pytest.raises(InputError, match="one planner per thread"):
        planner.plan(obs, True)
    assert Planner(planner.model, 3).plan(obs, True).shape == (3, 2)
    leave.set()
    thread.join()
    assert found[0].shape == (3, 2)
    planner._plan.plan = inner  # type: ignore[method-assign]
    assert planner.plan(obs).shape == (3, 2)


def test_stats_count_calls_and_order_quantiles(planner: Planner) -> None:
    assert planner.stats().calls == 0
    for _ in range(3):
        planner.plan(torch.randn(3, 5), True)
    calls, median, p99 = planner.stats()
    assert calls == 3
    assert 0 < median <= p99


def test_a_planner_comes_from_a_checkpoint(tmp_path: Path, livened: Liven) -> None:
    agent = livened(TDMPC2(small(), num_envs=2))
    agent.save(tmp_path / "model")
    planner = Planner.from_checkpoint(tmp_path / "model", num_envs=2)
    assert planner.backend.name == KERNELS
    noise, obs = draw(agent.cfg, 2), observations(agent.cfg, 2)
    assert torch.equal(planner.plan(obs, True, noise=noise), agent.planner.plan(obs, True, noise=noise))
    plain = Planner.from_checkpoint(tmp_path / "model", num_envs=5, backend="torch")
    assert plain.plan(torch.randn(5, 5)).shape == (5, 2)


def test_noise_of_another_shape_is_named(planner: Planner) -> None:
    noise = draw(planner.cfg, 1)
    with pytest.raises(InputError, match=r"noise.pi_eps: got shape \(1, 2, 4, 2\), allowed: \(3, 2, 4, 2\)"):
        planner.plan(torch.randn(3, 5), True, noise=noise)


@pytest.mark.triton
def test_auto_plans_with_torch_where_a_kernel_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    (error,) = KERNEL_ERRORS

    def too_large(*args: Any) -> None:
        raise error("out of resource: shared memory")

    monkeypatch.setattr("tdmpc2_fast.plan.kernel_plan.KernelPlan.__init__", too_large)
    chosen = Backend("triton", "there is a GPU")
    monkeypatch.setattr("tdmpc2_fast.runtime.chosen.resolve_backend", lambda *args: chosen)
    with pytest.warns(RuntimeWarning, match="out of resource: shared memory; planning with torch"):
        planner = Planner(WorldModel(tiny_config()))
    assert planner.backend.name == "torch"
    assert planner.plan(torch.randn(1, 5)).shape == (1, 2)
    with pytest.raises(BackendError, match="out of resource"):
        Planner(WorldModel(small()))


def test_logs_of_launches_nest_and_end(planner: Planner) -> None:
    plan = planner._plan
    assert isinstance(plan, KernelPlan)
    with log_launches() as outer, log_launches(dry=True) as inner:
        plan.chain.begin()
    assert outer == inner
    assert len(inner) == 1
    with log_launches() as log:
        plan.chain.begin()
    assert len(log) == 1


def test_a_model_changed_under_its_planner_is_named(planner: Planner) -> None:
    planner.model.double()
    with pytest.raises(InputError, match=r"model: got torch.float64 on cpu, allowed: torch.float32 on cpu"):
        planner.plan(torch.randn(3, 5), True)


def test_a_plan_of_the_5m_model_is_95_launches_and_on_a_cpu_109() -> None:
    sizes = plan_sizes(5, 1, 6)
    precision, cpu = Precision("bfloat16"), torch.device("cpu")
    plan = PlanChain(sizes, PlanWeights.empty(sizes, precision, cpu), How(precision), cpu)
    with log_launches(dry=True) as log:
        plan.run()
    # On a CPU last layers have launches of their own.
    assert len(log) == (109 if native() else 95)
