"""The fused MPPI launches against their plain-torch references in float64."""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from conftest import tiny_config
from judge import pooled, within_twice
from mppi_oracle import MAX_STD, MIN_STD, ULP, Case, Result, exact_refinement, judge, judge_choice, run
from oracle import DEVICE, MARKS

from tdmpc2_fast import TDMPC2
from tdmpc2_fast.kernels.plan import mppi
from tdmpc2_fast.kernels.plan.mppi import Elites, Rule, Samples
from tdmpc2_fast.kernels.plan.mppi_begin import mppi_begin, mppi_begin_reference
from tdmpc2_fast.kernels.plan.mppi_refine import Choice, mppi_refine, mppi_refine_reference
from tdmpc2_fast.plan.planner import Planner
from tdmpc2_fast.plan.trace import PlanTrace
from tdmpc2_fast.rng import PlanNoise

pytestmark = MARKS


# Many environments, each with a score that outweighs the others: a maximum must mean something.
@pytest.mark.parametrize("episodic", [False, True])
@pytest.mark.parametrize("sizes", [dict(e=24, h=1, n=512, p=24, a=6, k=64), dict(e=24, h=1, n=127, p=3, a=7, k=31)])
@pooled
def test_update_is_as_exact_as_torch(sizes: dict[str, int], episodic: bool) -> None:
    case = Case.draw(**sizes, episodic=episodic)
    got = run(case)
    plain = run(case, mppi_refine_reference)
    within_twice(got.values, plain.values, run(case.double(), mppi_refine_reference).values)
    wide, narrow = (exact_refinement(case, got.values, t)[1:] for t in (torch.float64, torch.float32))
    for x, y, exact in zip((got.scores, got.mean, got.std), narrow, wide, strict=True):
        within_twice(x, y, exact)


@pytest.mark.parametrize("form", ["next", "choice", ""])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(e=1, h=1, n=1, p=0, a=1, k=1),
        dict(e=1, h=7, n=37, p=37, a=1, k=5),
        dict(e=7, h=1, n=13, p=0, a=2, k=13, masked=True),
        dict(e=1, h=2, n=65, p=1, a=38, k=64, episodic=True),
        dict(e=2, h=3, n=32, p=4, a=8, k=32, masked=True, episodic=True),
    ],
    ids=lambda sizes: ",".join(f"{k}={v}" for k, v in sizes.items()),
)
def test_update_at_any_size(sizes: dict[str, Any], form: str) -> None:
    case = Case.draw(**sizes, form=form)
    for op in (mppi_refine, mppi_refine_reference):
        judge(case, run(case, op))


@pytest.mark.parametrize(
    "values",
    [
        [0.0] * 11,
        [1.0, 2.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0, 2.0, 1.0, -0.0],
        [0.0, -0.0] * 5 + [0.0],
        [torch.inf] * 4 + [-torch.inf] * 4 + [torch.nan] * 3,
        [torch.nan, -1.0, 1.0, -torch.inf, 0.5, -2.0, 0.0, torch.nan, torch.inf, 1e-40, -1e-40],
        [torch.nan] * 11,
        [-torch.inf] * 11,
        [3e38, -3e38, 1.0, 2e38, -2e38, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
    ],
    ids=["equal", "tied", "signed zeros", "infinities", "mixed", "nan", "-inf", "huge"],
)
@pytest.mark.parametrize("k", [3, 11])
def test_ties_and_numbers_that_are_none(values: list[float], k: int) -> None:
    case = Case.draw(e=1, h=1, n=11, p=2, a=2, k=k, form="choice")
    case = case.with_values(torch.tensor([values], device=DEVICE))
    # (v + v) / 2 of the largest overflows in float32, in torch too
    got, plain = run(case), run(case, mppi_refine_reference)
    assert torch.equal(got.values.isnan(), plain.values.isnan())
    assert torch.equal(got.values.nan_to_num(0), plain.values.nan_to_num(0))
    assert torch.equal(got.elites, plain.elites)
    for name in ("scores", "mean", "std"):
        x = getattr(got, name)
        assert x.isfinite().all()
        torch.testing.assert_close(x, getattr(plain, name), rtol=4 * ULP, atol=16 * ULP / (2 * MIN_STD))
    assert got.choice is not None
    judge_choice(got, got.choice)


def test_a_termination_logit_of_nan_ends_the_return() -> None:
    case = Case.draw(e=1, h=1, n=4, p=0, k=2)
    logits = torch.tensor([[[torch.nan, 0.0, torch.inf, -torch.inf]]], device=DEVICE)
    case = replace(case, termination=logits, scalars=torch.ones_like(case.scalars), discount=case.discount * 0 + 0.5)
    assert run(case).values.tolist() == [[1.0, 1.5, 1.0, 1.5]]


def test_a_nan_action_spreads_only_from_elites() -> None:
    case = Case.draw(e=1, n=6, k=2, p=0)
    case = case.with_values(torch.arange(6.0, device=DEVICE).unsqueeze(0))
    case.actions[0, 1, 0] = torch.nan
    assert run(case).mean.isfinite().all()
    case.actions[0, 1, 5, 2] = torch.nan
    got = run(case)
    assert got.mean.isnan().nonzero().tolist() == got.std.isnan().nonzero().tolist() == [[0, 1, 2]]


def test_no_elite_without_a_score_is_picked() -> None:
    case = Case.draw(e=2, n=9, k=4, p=0, form="choice")
    case = case.with_values(torch.arange(9.0, device=DEVICE).expand(2, 9) * 1e4)
    got = run(case)
    assert got.choice is not None
    assert got.scores.tolist() == [[1, 0, 0, 0]] * 2
    assert got.choice.picked.tolist() == [0, 0]
    zero = got.choice._replace(elite_noise=torch.tensor([[1.0, 0, 0, 0], [torch.nan] * 4], device=DEVICE))
    run(case, choice=zero)
    assert zero.picked.tolist() == [0, 0]


def test_order_of_samples_is_nothing_but_a_name() -> None:
    case = Case.draw(n=50, p=50, k=12)
    case = case.with_values(torch.stack([torch.randperm(50, device=DEVICE) / 4 for _ in range(2)]))
    order = torch.randperm(50, device=DEVICE)
    other = replace(case, scalars=case.scalars[:, :, order].contiguous(), actions=case.actions[:, :, order].clone())
    base, got = run(case), run(other)
    assert torch.equal(order[got.elites], base.elites)
    torch.testing.assert_close(got.mean, base.mean, rtol=0, atol=32 * ULP)
    torch.testing.assert_close(got.std, base.std, rtol=0, atol=32 * ULP / (2 * MIN_STD))


def test_a_shift_of_all_values_leaves_the_scores() -> None:
    values = torch.randint(-64, 64, (2, 40), device=DEVICE) / 16  # exact, shifted too
    case = Case.draw()
    base, got = (run(case.with_values(v)) for v in (values, values + 1024))
    for name in ("elites", "scores", "mean", "std"):
        assert torch.equal(getattr(base, name), getattr(got, name))


@pytest.mark.parametrize("form", ["next", "choice"])
def test_environments_never_mix(form: str) -> None:
    case = Case.draw(e=3, h=2, n=21, p=2, a=9, masked=True, episodic=True, form=form)
    assert case.termination is not None
    assert case.mask is not None
    other = replace(
        case,
        scalars=case.scalars.clone(),
        termination=case.termination.clone(),
        actions=case.actions.clone(),
        noise=case.noise.clone(),
    )
    assert other.termination is not None
    for x in (other.scalars.transpose(0, 1), other.termination.transpose(0, 1), other.actions, other.noise):
        x[1] = torch.nan
    base, got = run(case), run(other)
    pairs = [(getattr(base, f.name), getattr(got, f.name)) for f in fields(Result) if f.name != "choice"]
    if base.choice is not None and got.choice is not None:
        pairs += [
            (getattr(base.choice, x), getattr(got.choice, x)) for x in ("action", "picked", "chosen", "prev_mean")
        ]
    for x, y in pairs:
        assert torch.equal(x[[0, 2]], y[[0, 2]])


def test_scalars_may_be_slices_of_a_larger_buffer() -> None:
    case = Case.draw(episodic=True)
    assert case.termination is not None
    views = []
    for x in (case.scalars, case.termination):
        room = torch.full((2 * x.shape[0], x.shape[2], x.shape[1]), torch.nan, device=DEVICE)
        view = room[::2].transpose(1, 2)
        views.append(view.copy_(x))
    base, got = run(case), run(case, scalars=views[0], termination=views[1])
    assert torch.equal(base.values, got.values)
    assert torch.equal(base.actions, got.actions)


@pytest.mark.parametrize(
    ("e", "h", "n", "p", "a", "masked"),
    [(1, 1, 1, 0, 1, False), (2, 3, 33, 5, 38, True), (7, 2, 17, 0, 3, True), (2, 4, 9, 9, 2, False)],
)
@pytest.mark.parametrize("op", [mppi_begin, mppi_begin_reference])
def test_begin(op: Callable[..., None], e: int, h: int, n: int, p: int, a: int, masked: bool) -> None:
    prev, noise = torch.randn(e, h, a, device=DEVICE), torch.randn(e, h, n - p, a, device=DEVICE)
    mask = (torch.rand(e, a, device=DEVICE) > 0.4).float() if masked else None
    t0 = torch.arange(e, device=DEVICE) % 3 == 1
    actions, mean, std = (torch.full(s, torch.nan, device=DEVICE) for s in ((e, h, n, a), (e, h, a), (e, h, a)))
    op(prev, t0, noise, mask, MAX_STD, Samples(actions, mean, std))
    assert torch.equal(mean, mppi.shift_mean(prev, t0))
    assert (std == MAX_STD).all()
    assert actions[:, :, :p].isnan().all()
    wide = (mean.double(), std.double(), noise.double(), None if mask is None else mask.double())
    torch.testing.assert_close(actions[:, :, p:].double(), mppi.sample_actions(*wide), rtol=0, atol=16 * ULP)


@pytest.mark.parametrize(
    ("op", "reference"), [(mppi_begin, mppi_begin_reference), (mppi_refine, mppi_refine_reference)]
)
def test_references_have_the_same_signature(op: Callable[..., None], reference: Callable[..., None]) -> None:
    assert inspect.signature(op) == inspect.signature(reference)


def test_a_plan_of_the_planner_in_launches(livened: Callable[[TDMPC2], TDMPC2]) -> None:
    cfg = tiny_config()
    model = livened(TDMPC2(cfg)).model
    planner = Planner(model, num_envs=2)
    planner.prev_mean.normal_()
    prev, t0, eval_mode = planner.prev_mean.clone().to(DEVICE), torch.tensor([True, False]), torch.tensor([False, True])
    noise, trace = PlanNoise.draw(cfg, 2, planner.generator), PlanTrace()
    action = planner.plan(torch.randn(2, 5), t0, eval_mode, noise=noise, trace=trace)

    e, h, n, a = trace.actions[0].shape
    p, last = cfg.num_pi_trajs, cfg.effective_iterations - 1
    actions = torch.full((e, h, n, a), torch.nan, device=DEVICE)
    actions[:, :, :p] = trace.pi_actions[0].to(DEVICE)
    mean, std = torch.empty(e, h, a, device=DEVICE), torch.empty(e, h, a, device=DEVICE)
    draws = noise.samples.to(DEVICE)
    mppi_begin(prev, t0.to(DEVICE), draws[0], None, cfg.max_std, Samples(actions, mean, std))
    choice = Choice(
        noise.elite.to(DEVICE),
        noise.action.to(DEVICE),
        eval_mode.to(DEVICE),
        torch.empty(e, a, device=DEVICE),
        prev,
        torch.empty(e, dtype=torch.int64, device=DEVICE),
        torch.empty(e, h, a, device=DEVICE),
    )
    close = dict(rtol=1e-5, atol=1e-5)
    for i in range(cfg.effective_iterations):
        torch.testing.assert_close(actions.cpu(), trace.actions[i], **close)
        scalars = torch.zeros(h + 2, e, n, device=DEVICE)
        scalars[-2:] = trace.values[i].to(DEVICE)
        values, scores = torch.empty(e, n, device=DEVICE), torch.empty(e, cfg.num_elites, device=DEVICE)
        elites = torch.empty(e, cfg.num_elites, dtype=torch.int64, device=DEVICE)
        mppi_refine(
            scalars,
            torch.ones(e, device=DEVICE),
            None,
            Samples(actions, mean, std),
            None,
            Rule.of(cfg),
            Elites(values, elites, scores, torch.empty_like(elites)),
            next_noise=draws[i + 1] if i < last else None,
            choice=choice if i == last else None,
        )
        for got, name in ((elites, "elites"), (scores, "scores"), (mean, "means"), (std, "stds")):
            torch.testing.assert_close(got.cpu(), getattr(trace, name)[i], **close)
    torch.testing.assert_close(choice.action.cpu(), action, **close)
    torch.testing.assert_close(choice.prev_mean.cpu(), planner.prev_mean, **close)
    torch.testing.assert_close(choice.chosen.cpu(), trace.chosen[0], **close)
    assert torch.equal(choice.picked.cpu(), trace.picked[0])


def bad(case: Case) -> dict[str, tuple[str, Any]]:
    """Arguments that are refused: the name in the message, and what comes."""
    x = case.scalars
    return {
        "num_elites 0": ("num_elites", 0),
        "num_elites N+1": ("num_elites", 41),
        "too few rows": ("scalars", x[1:]),
        "float64": ("scalars", x.double()),
        "discount": ("discount", case.discount[:1]),
        "termination": ("termination", x),
        "actions of three dims": ("actions", case.actions[0]),
        "no samples": ("actions", case.actions[:, :, :0]),
        "strided actions": ("actions", case.actions.transpose(0, 1).contiguous().transpose(0, 1)),
        "bool mask": ("mask", torch.ones(2, 3, device=DEVICE, dtype=torch.bool)),
        "much noise": ("next_noise", torch.zeros(2, 3, 41, 3, device=DEVICE)),
        "noise of another width": ("next_noise", torch.zeros(2, 3, 4, 2, device=DEVICE)),
    }


@pytest.mark.parametrize("what", bad(Case.draw()))
def test_bad_arguments_are_named(what: str) -> None:
    case = Case.draw()
    name, value = bad(case)[what]
    with pytest.raises(ValueError, match=rf"^{name}: got .*allowed: "):
        run(case, **{name: value})


def test_bad_outputs_are_named() -> None:
    case = Case.draw(form="choice")
    choice = run(case).choice
    assert choice is not None
    with pytest.raises(ValueError, match=r"^choice: got one beside next_noise"):
        run(case, next_noise=case.noise)
    for name, x in dict(eval_mode=choice.action[:, 0], picked=choice.picked.int(), chosen=choice.prev_mean[:1]).items():
        with pytest.raises(ValueError, match=rf"^choice.{name}: got .*allowed: "):
            run(case, choice=choice._replace(**{name: x}))
    mean, std = torch.zeros(2, 3, 3, device=DEVICE), torch.zeros(2, 3, 3, device=DEVICE)
    t0 = torch.zeros(2, device=DEVICE, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^mean: got prev_mean itself"):
        mppi_begin(mean, t0, case.noise, None, 2.0, Samples(case.actions, mean, std))
    with pytest.raises(ValueError, match=r"^t0: got .*allowed: \(2,\) bool"):
        mppi_begin(mean, t0.float(), case.noise, None, 2.0, Samples(case.actions, mean.clone(), std))


def test_fuzz() -> None:
    seed = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**31)))
    torch.manual_seed(seed)
    rng = random.Random(seed)
    for _ in range(10):
        n = rng.choice([1, 2, 3, 31, 32, 33, rng.randint(1, 300)])
        options: dict[str, Any] = dict(
            e=rng.randint(1, 3),
            h=rng.randint(1, 4),
            n=n,
            p=rng.randint(0, n),
            a=rng.randint(1, 12),
            k=rng.randint(1, n),
            form=rng.choice(["next", "choice", ""]),
            episodic=rng.random() < 0.5,
            masked=rng.random() < 0.5,
        )
        case = Case.draw(**options)
        if rng.random() < 0.3:  # many ties, all exact
            case = case.with_values(torch.randint(-2, 3, case.scalars.shape[1:], device=DEVICE).float())
        try:
            judge(case, run(case))
        except Exception as error:
            line = f"FUZZ_SEED={seed} pytest tests/kernels/plan/test_mppi_kernel.py -k test_fuzz"
            raise AssertionError(f"{options}\nreproduce: {line}") from error
