"""Planning for many environments: equal to planning for each, independent, well-behaved."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_multitask

from tdmpc2_fast import TDMPC2, Config, Planner
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.errors import InputError
from tdmpc2_fast.learn.updater import Updater
from tdmpc2_fast.plan.trace import PlanTrace
from tdmpc2_fast.reference import ReferenceAgent
from tdmpc2_fast.rng import PlanNoise, generator

Liven = Callable[[TDMPC2], TDMPC2]


def draw(cfg: Config, num_envs: int, seed: int = 0) -> PlanNoise:
    return PlanNoise.draw(cfg, num_envs, generator(seed, "test", torch.device("cpu")))


def of_env(noise: PlanNoise, i: int) -> PlanNoise:
    """The draws of one environment."""
    one = {f.name: getattr(noise, f.name) for f in dataclasses.fields(noise)}
    for name in ("pi_eps", "elite", "action"):
        one[name] = one[name][i : i + 1]
    for name in ("samples", "value_eps"):
        one[name] = one[name][:, i : i + 1]
    return PlanNoise(**one)


CONFIGS = dict(
    plain=tiny_config(),
    one_action=tiny_config(action_dim=1),
    many_actions=tiny_config(action_dim=23, num_samples=19, num_elites=19),
    no_prior=tiny_config(num_pi_trajs=0),
    only_prior=tiny_config(num_pi_trajs=32),
    episodic=tiny_config(episodic=True),
    horizon_1=tiny_config(horizon=1),
    long=tiny_config(horizon=7),
    multitask=tiny_multitask(),
)


def test_a_termination_as_likely_as_not_ends_no_return() -> None:
    """As of a model that has yet to learn when episodes end."""
    agent = TDMPC2(tiny_config(episodic=True))
    obs, noise, values = torch.randn(1, 5), draw(agent.cfg, 1), []
    last = agent.model._termination[-1]
    for bias in (-1.0, 0.0, 1.0):
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(bias)
            agent.model._reward[-1].bias.normal_(generator=torch.Generator().manual_seed(1))
        trace = PlanTrace()
        agent.planner.plan(obs, True, noise=noise, trace=trace)
        values.append(trace.values[0])
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[1], values[2])


@pytest.fixture
def double() -> Iterator[None]:
    """Float64 throughout: no rounding swaps near ties among elites or moves a termination."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", CONFIGS)
def test_many_environments_equal_the_reference_on_each(name: str, livened: Liven) -> None:
    cfg, count = CONFIGS[name], 4
    agent = livened(TDMPC2(cfg))
    planner = Planner(agent.model, count)
    planner.prev_mean.copy_(torch.rand_like(planner.prev_mean) - 0.5)
    obs, noise = torch.randn(count, 5), draw(cfg, count)
    t0, evaluate = torch.tensor([True, False, False, True]), torch.tensor([False, False, True, True])
    task = torch.tensor([0, 1, 2, 1]) if cfg.multitask else None
    before = planner.prev_mean.clone()
    actions = planner.plan(obs, t0, evaluate, task, noise)
    assert actions.dtype == torch.float64
    for i in range(count):
        reference = ReferenceAgent(cfg, tensors_only(agent.model.state_dict()))
        reference.prev_mean.copy_(before[i])
        one_task = None if task is None else task[i : i + 1]
        want = reference.plan(obs[i : i + 1], bool(t0[i]), bool(evaluate[i]), one_task, of_env(noise, i))
        torch.testing.assert_close(actions[i], want, atol=1e-9, rtol=0)
        torch.testing.assert_close(planner.prev_mean[i], reference.prev_mean, atol=1e-9, rtol=0)


def test_an_environment_never_feels_another(agent: TDMPC2, livened: Liven) -> None:
    livened(agent)
    noise, obs = draw(agent.cfg, 3), torch.randn(3, 5)
    first = Planner(agent.model, 3)
    a = first.plan(obs, t0=True, noise=noise)
    other = obs.clone()
    other[1] += 10
    second = Planner(agent.model, 3)
    b = second.plan(other, t0=True, noise=noise)
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert torch.equal(first.prev_mean[[0, 2]], second.prev_mean[[0, 2]])
    assert not torch.equal(a[1], b[1])


def test_bounds_and_trace(agent: TDMPC2, livened: Liven) -> None:
    livened(agent)
    cfg, trace = agent.cfg, PlanTrace()
    planner = Planner(agent.model, 2)
    action = planner.plan(torch.randn(2, 5), t0=True, trace=trace)
    assert action.abs().max() <= 1
    assert len(trace.values) == cfg.effective_iterations
    for actions, mean, std, score, elites in zip(
        trace.actions, trace.means, trace.stds, trace.scores, trace.elites, strict=True
    ):
        assert actions.shape == (2, cfg.horizon, cfg.num_samples, cfg.action_dim)
        assert actions.abs().max() <= 1
        assert std.min() >= cfg.min_std
        assert std.max() <= cfg.max_std
        torch.testing.assert_close(score.sum(-1), torch.ones(2))
        chosen = actions.gather(2, elites[:, None, :, None].expand(-1, cfg.horizon, -1, cfg.action_dim))
        assert (mean <= chosen.amax(2) + 1e-6).all()
        assert (mean >= chosen.amin(2) - 1e-6).all()
    # prior sequences never change
    p = cfg.num_pi_trajs
    assert torch.equal(trace.actions[0][:, :, :p], trace.actions[-1][:, :, :p])


def test_dead_action_dims_stay_dead(livened: Liven) -> None:
    agent = livened(TDMPC2(tiny_multitask()))
    planner = Planner(agent.model, 3)
    actions = planner.plan(torch.randn(3, 5), t0=True, task=torch.tensor([0, 1, 2]))
    assert actions[0, 1:].abs().max() == 0
    assert actions[2, 2:].abs().max() == 0
    assert (actions[1] != 0).all()
    assert planner.prev_mean[0, :, 1:].abs().max() == 0


def test_same_seed_same_plan_and_fresh_draws_each_call(cfg: Config) -> None:
    obs = torch.randn(5)
    one, two = TDMPC2(cfg), TDMPC2(cfg)
    first = one.act(obs, t0=True)
    assert torch.equal(first, two.act(obs, t0=True))
    assert not torch.equal(first, one.act(obs, t0=True))
    assert not torch.equal(first, TDMPC2(cfg.replace(seed=2)).act(obs, t0=True))


def test_parameters_are_read_in_place(agent: TDMPC2, livened: Liven) -> None:
    noise, obs = draw(agent.cfg, 1), torch.randn(1, 5)
    before = agent.planner.plan(obs, t0=True, noise=noise)
    livened(agent)
    assert not torch.equal(before, agent.planner.plan(obs, t0=True, noise=noise))


def test_nan_values_do_not_reach_the_action(agent: TDMPC2) -> None:
    with torch.no_grad():
        agent.model._reward[-1].bias.fill_(torch.nan)  # type: ignore[union-attr, operator]
    assert agent.act(torch.randn(5), t0=True).isfinite().all()


def test_without_mpc_the_policy_acts(cfg: Config) -> None:
    agent = TDMPC2(cfg.replace(mpc=False))
    obs = torch.randn(5)
    assert torch.equal(agent.act(obs, eval_mode=True), agent.act(obs, eval_mode=True))
    assert not torch.equal(agent.act(obs), agent.act(obs))
    assert agent.act(torch.randn(3, 5)).shape == (3, 2)


@pytest.mark.parametrize(
    ("obs", "words"),
    [
        (torch.zeros(4), ["obs", "(4,)", "(5,)"]),
        (torch.zeros(2, 5), ["obs", "(2, 5)", "(1, 5)"]),
        (torch.tensor([0.0, 1.0, torch.nan, 0.0, 0.0]), ["obs", "nan", "[2]", "finite"]),
        (torch.full((5,), torch.inf), ["obs", "inf"]),
    ],
)
def test_bad_observations_are_named(agent: TDMPC2, obs: torch.Tensor, words: list[str]) -> None:
    with pytest.raises(InputError) as e:
        agent.act(obs)
    for word in words:
        assert word in str(e.value)


def test_bad_flags_and_counts_are_named(agent: TDMPC2) -> None:
    with pytest.raises(InputError, match="t0"):
        agent.planner.plan(torch.zeros(1, 5), t0=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(InputError, match=r"num_envs: got 0"):
        Planner(agent.model, 0)


def test_pixels_plan_with_random_shifts() -> None:
    cfg = Config.from_dict(
        dict(obs="rgb", mlp_dim=16, num_samples=8, num_elites=4, num_pi_trajs=2, device="cpu")
    ).with_env({"rgb": (9, 64, 64)}, 2, 500)
    agent = TDMPC2(cfg, num_envs=2)
    obs = torch.randint(0, 256, (2, 9, 64, 64), dtype=torch.uint8)
    assert agent.act(obs, t0=True).shape == (2, 2)
    with pytest.raises(InputError, match="obs: got shape"):
        agent.act(obs[:, :3])


ONES = np.ones(5, np.float32)
FROZEN = ONES.copy()
FROZEN.flags.writeable = False
KINDS: dict[str, Any] = {
    "float64": np.ones(5),
    "reversed": ONES[::-1],
    "strided": np.ones(10, np.float32)[::2],
    "read-only": FROZEN,
    "big-endian": ONES.astype(">f4"),
    "half": ONES.astype(np.float16),
    "long double": ONES.astype(np.longdouble),
    "integers": np.ones(5, np.int64),
    "unsigned": np.ones(5, np.uint16),
    "booleans": np.ones(5, bool),
    "list": [1, 1.0, True, np.float32(1), 1],
    "list of tensors": [torch.ones(())] * 5,
    "dict": {"state": ONES, "rgb": None},
    "with a graph": torch.ones(5, requires_grad=True) * 1,
    "bfloat16": torch.ones(5).bfloat16(),
}


@pytest.mark.parametrize("mpc", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_observations_come_as_people_have_them(cfg: Config, kind: str, mpc: bool) -> None:
    cfg = cfg.replace(mpc=mpc)
    want = TDMPC2(cfg).act(torch.ones(5), t0=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(TDMPC2(cfg).act(KINDS[kind], t0=True), want)


@pytest.mark.parametrize(
    ("obs", "words"),
    [
        (None, "obs: got None"),
        ("abc", "obs: got str"),
        (object(), "obs: got object"),
        ([[1, 2], [3]], "obs: got list"),
        ([torch.ones(2), torch.ones(3)], "tensors of different shapes"),
        (np.ones(5, complex), "complex128"),
        (torch.ones(5, dtype=torch.complex64), "complex64"),
        (torch.ones(5, device="meta"), "on meta"),
        (torch.ones(5).to_sparse(), "sparse"),
        (np.array([None] * 5), "of object"),
        (np.zeros(5, "M8[s]"), "datetime64"),
        ({"rgb": ONES}, r"dict with \['rgb'\], allowed: 'state' in it"),
        ({"state": None}, "obs: got None"),
        (np.full(5, 1e300), "inf at index"),
        (3.0, r"got shape \(\)"),
        ([], r"got shape \(0,\), allowed: \(5,\)"),
    ],
)
@pytest.mark.parametrize("mpc", [True, False])
def test_what_is_no_observation_is_named(cfg: Config, obs: Any, words: str, mpc: bool) -> None:
    with pytest.raises(InputError, match=words):
        TDMPC2(cfg.replace(mpc=mpc)).act(obs)


def test_what_came_is_named_as_it_came(cfg: Config) -> None:
    agent = TDMPC2(cfg, num_envs=4)
    for obs, words in (
        ([1.0] * 5, r"got shape \(5,\), allowed: \(4, 5\)"),
        (np.ones((2, 5)), r"got shape \(2, 5\), allowed: \(4, 5\)"),
    ):
        with pytest.raises(InputError, match=words):
            agent.act(obs)


def test_a_planner_is_made_of_a_model_and_whole_numbers(cfg: Config) -> None:
    agent = TDMPC2(cfg)
    for wrong, words in ((agent, "got TDMPC2, allowed: a WorldModel; its .model is one"), (None, "got None")):
        for make in (Planner, Updater):
            with pytest.raises(InputError, match=f"model: {words}"):
                make(wrong)
    for count in (0, True, 1.5, "2", None, [1]):
        with pytest.raises(InputError, match=r"num_envs: got .*, allowed: an integer of at least 1"):
            Planner(agent.model, count)  # type: ignore[arg-type]
    for seed in (-1, 1.5, "x", True):
        with pytest.raises(InputError, match=r"seed: got .*, allowed: an integer of at least 0"):
            Planner(agent.model, 1, seed)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="num_envs"):
        TDMPC2(cfg, True)
    assert Planner(agent.model, np.int64(2), np.int64(3)).plan(np.ones((2, 5))).shape == (2, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["t0", "eval_mode"])
def test_flags_come_as_people_have_them(cfg: Config, name: str) -> None:
    for yes in (True, np.bool_(True), np.array(True), torch.tensor([True]), [1], np.array(1.0)):
        agent, want = TDMPC2(cfg), TDMPC2(cfg)
        for obs in (torch.ones(5), torch.zeros(5)):
            assert torch.equal(agent.act(obs, **{name: yes}), want.act(obs, **{name: True}))
    for wrong in (None, "yes", 2, 0.5, object(), [True, False], np.array([[True]])):
        with pytest.raises(InputError, match=name):
            TDMPC2(cfg).act(torch.ones(5), **{name: wrong})


def test_the_prior_evaluates_some_environments_and_explores_in_others(cfg: Config) -> None:
    agents = [TDMPC2(cfg.replace(mpc=False)) for _ in range(3)]
    obs, some = torch.randn(3, 5), np.array([True, False, True])
    mixed, means, drawn = (a.act(obs, eval_mode=e) for a, e in zip(agents, (some, True, False), strict=True))
    assert torch.equal(mixed, torch.where(torch.tensor(some)[:, None], means, drawn))
    with pytest.raises(InputError, match="eval_mode"):
        agents[0].act(obs, eval_mode=[True, False])


def test_tasks_come_as_people_have_them() -> None:
    agent = TDMPC2(tiny_multitask())
    for task in (1, np.int64(1), np.array(1), [1], 1.0, torch.tensor([1])):
        assert agent.act(torch.ones(5), task=task).shape == (3,)
    for wrong in (None, "a", 1.5, 3, -1, np.nan, [0, 1], object()):
        with pytest.raises(InputError, match="task"):
            agent.act(torch.ones(5), task=wrong)


def test_pictures_are_pixels() -> None:
    cfg = Config(obs="rgb", latent_dim=32, mlp_dim=16, num_samples=8, num_elites=4, num_pi_trajs=2, device="cpu")
    cfg = cfg.with_env({"rgb": (3, 64, 64)}, 2, 50)
    picture = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    want = TDMPC2(cfg).act(picture)
    last = np.ascontiguousarray(picture.transpose(1, 2, 0)).transpose(2, 0, 1)
    for same in (picture.astype(np.float32), picture.astype(int), {"rgb": picture}, last):
        assert torch.equal(TDMPC2(cfg).act(same), want)
    TDMPC2(cfg).act(picture / 140)  # a dark one, averaged
    for wrong, words in (
        (picture / 255, "from 0 to 1, allowed: pixels from 0 to 255; multiply by 255"),
        (picture / 127.5 - 1, "from -1 to 1"),
        (picture * 2.0, "to 510"),
        (picture > 3, "bool"),
        (picture * np.nan, "nan"),
        (picture[:1], "shape"),
    ):
        with pytest.raises(InputError, match=f"obs: got .*{words}"):
            TDMPC2(cfg).act(wrong)


def test_times_of_calls_by_a_clock_that_is_known(agent: TDMPC2, monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(agent.model)
    assert planner.stats().calls == 0
    assert np.isnan(planner.stats()[1:]).all()
    ticks = (x for call in range(101) for x in (call, call + (1 + call * 37 % 101) / 1000))  # 1 to 101 ms, mixed
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(type(planner._plan), "plan", lambda *_: torch.zeros(1, 2))
    for _ in range(101):
        planner.plan(torch.zeros(1, 5))
    assert planner.stats() == pytest.approx((101, 51, 100))
