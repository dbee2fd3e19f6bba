"""What the tests of the MPPI launches share: cases, and their judge.

Ranks are judged on the values the kernel itself stored, so that no near-tie decides a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from oracle import DEVICE
from torch import Tensor

from tdmpc2_fast.kernels.plan import mppi
from tdmpc2_fast.kernels.plan.mppi import Elites, Rule, Samples
from tdmpc2_fast.kernels.plan.mppi_refine import Choice, mppi_refine, mppi_refine_reference

ULP = 2**-24
MIN_STD, MAX_STD = 0.05, 2.0


@dataclass(frozen=True)
class Case:
    """Arguments of one refinement; `form` is what follows it: "next", "choice" or "" for nothing."""

    scalars: Tensor
    discount: Tensor
    termination: Tensor | None
    actions: Tensor
    mask: Tensor | None
    num_elites: int
    noise: Tensor
    form: str = "next"
    temperature: float = 0.5

    @classmethod
    def draw(
        cls,
        e: int = 2,
        h: int = 3,
        n: int = 40,
        p: int = 5,
        a: int = 3,
        k: int = 8,
        form: str = "next",
        episodic: bool = False,
        masked: bool = False,
    ) -> Case:
        def rand(*size: int) -> Tensor:
            return torch.randn(*size, device=DEVICE)

        # No logit near the threshold, where rounding would decide; some exactly on it.
        logits = rand(h, e, n)
        logits = (logits + 0.1 * logits.sign()) * (torch.rand_like(logits) > 0.1)
        return cls(
            scalars=rand(h + 2, e, n) * 3,
            discount=torch.rand(e, device=DEVICE) * 0.1 + 0.9,
            termination=logits if episodic else None,
            actions=rand(e, h, n, a).tanh(),
            mask=(torch.rand(e, a, device=DEVICE) > 0.4).float() if masked else None,
            num_elites=k,
            noise=rand(e, h, n - p, a),
            form=form,
        )

    def with_values(self, values: Tensor) -> Case:
        """The same samples with these values."""
        scalars = torch.zeros_like(self.scalars)
        scalars[-2:] = values
        return replace(self, scalars=scalars, discount=torch.ones_like(self.discount), termination=None)

    def double(self) -> Case:
        cast = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x.double() for name, x in cast.items() if isinstance(x, Tensor)})


@dataclass(frozen=True)
class Result:
    values: Tensor
    elites: Tensor
    scores: Tensor
    order: Tensor
    mean: Tensor
    std: Tensor
    actions: Tensor
    choice: Choice | None


def run(case: Case, op: Callable[..., None] = mppi_refine, **changes: Any) -> Result:
    """One refinement into poisoned outputs, on a copy of the actions.

    changes: of arguments, by their own names or by those of what is in `samples`, `rule` and `elites`.
    """
    e, h, n, a = case.actions.shape
    k = case.num_elites

    def poison(*size: int) -> Tensor:
        return torch.full(size, torch.nan, device=DEVICE, dtype=case.actions.dtype)

    out = dict(values=poison(e, n), scores=poison(e, k), mean=poison(e, h, a), std=poison(e, h, a))
    out["elites"] = torch.full((e, k), -1, device=DEVICE)
    out["order"] = torch.full((e, k), -1, device=DEVICE)
    choice = None
    if case.form == "choice":
        g = torch.Generator().manual_seed(e + h + n + a)
        choice = Choice(
            elite_noise=torch.empty(e, k).exponential_(generator=g).to(case.actions),
            action_noise=torch.randn(e, a, generator=g).to(case.actions),
            eval_mode=(torch.arange(e) % 2 == 1).to(DEVICE),
            action=poison(e, a),
            prev_mean=poison(e, h, a),
            picked=torch.full((e,), -1, device=DEVICE),
            chosen=poison(e, h, a),
            counter=torch.tensor([5, 2**40], device=DEVICE),
        )
    args: dict[str, Any] = dict(
        scalars=case.scalars,
        discount=case.discount,
        termination=case.termination,
        actions=case.actions.clone(),
        mask=case.mask,
        num_elites=k,
        next_noise=case.noise if case.form == "next" else None,
        choice=choice,
    )
    args.update(changes)
    samples = Samples(args.pop("actions"), out["mean"], out["std"])
    rule = Rule(args.pop("num_elites"), case.temperature, MIN_STD, MAX_STD)
    op(samples=samples, rule=rule, elites=Elites(out["values"], out["elites"], out["scores"], out["order"]), **args)
    return Result(**out, actions=samples.actions, choice=choice)


def exact_values(case: Case) -> tuple[Tensor, Tensor]:
    """Values in float64, and the sum of the sizes of their terms."""
    exact = run(case.double(), mppi_refine_reference).values
    sizes = run(replace(case, scalars=case.scalars.abs()).double(), mppi_refine_reference).values
    q = case.scalars[-2:].double().abs().sum(0)
    return exact, sizes + q


def exact_refinement(case: Case, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    mask = None if case.mask is None else case.mask.to(dtype)
    rule = Rule(case.num_elites, case.temperature, MIN_STD, MAX_STD)
    return mppi.refine(values.to(dtype), case.actions.to(dtype), rule, mask)


def judge(case: Case, got: Result) -> None:
    """All a single update must satisfy, at any size."""
    h = case.actions.shape[1]
    exact, sizes = exact_values(case)
    finite = exact.isfinite()
    assert torch.equal(got.values[~finite].nan_to_num(9), exact[~finite].float().nan_to_num(9))
    # Two roundings a step for the weight and two for the sum, three at the end.
    error = (got.values.double() - exact).abs()[finite]
    assert (error <= (4 * h + 3) * ULP * sizes[finite]).all()

    assert torch.equal(got.elites, exact_refinement(case, got.values, torch.float32)[0])
    # float64's largest number is another one, so infinities are replaced first.
    _, score, mean, std = exact_refinement(case, got.values.nan_to_num(0), torch.float64)
    # Scores sum to one and actions are at most 1: a dozen roundings, whatever the number of elites.
    tolerance = dict(rtol=0, atol=16 * ULP)
    torch.testing.assert_close(got.scores.double(), score, **tolerance)
    torch.testing.assert_close(got.scores.sum(-1), torch.ones_like(got.scores[:, 0]), **tolerance)
    torch.testing.assert_close(got.mean.double(), mean, **tolerance)
    # The square root magnifies the error of the variance by at most 1 / (2 min_std).
    torch.testing.assert_close(got.std.double(), std, rtol=4 * ULP, atol=16 * ULP / (2 * MIN_STD))

    mask = torch.ones_like(got.mean[:, 0]) if case.mask is None else case.mask
    live = mask.unsqueeze(1).expand_as(got.std) > 0
    assert (got.mean[~live] == 0).all()
    assert (got.std[~live] == 0).all()
    assert ((got.std[live] >= MIN_STD) & (got.std[live] <= MAX_STD)).all()
    elites = mppi.take_samples(case.actions, got.elites)
    assert (got.mean <= elites.amax(2) + 16 * ULP)[live].all()
    assert (got.mean >= elites.amin(2) - 16 * ULP)[live].all()

    p = case.actions.shape[2] - (case.noise.shape[2] if case.form == "next" else 0)
    assert torch.equal(got.actions[:, :, :p], case.actions[:, :, :p])
    if case.form == "next":
        wide = (got.mean.double(), got.std.double(), case.noise.double(), mask.double())
        torch.testing.assert_close(got.actions[:, :, p:].double(), mppi.sample_actions(*wide), rtol=0, atol=8 * ULP)
    if got.choice is not None:
        judge_choice(got, got.choice)


def judge_choice(got: Result, choice: Choice) -> None:
    key = got.scores.double().log() - choice.elite_noise.double().log()
    picked = key.gather(1, choice.picked.unsqueeze(1))
    assert (picked.squeeze(1) >= key.amax(1) - 1e-5).all()
    index = got.elites.gather(1, choice.picked.unsqueeze(1))
    assert torch.equal(choice.chosen, mppi.take_samples(got.actions, index).squeeze(2))
    assert torch.equal(choice.prev_mean, got.mean)
    explore = (~choice.eval_mode).unsqueeze(1) * got.std[:, 0].double() * choice.action_noise
    torch.testing.assert_close(
        choice.action.double(), (choice.chosen[:, 0] + explore).clamp(-1, 1), rtol=0, atol=8 * ULP
    )
    assert choice.counter is not None
    assert choice.counter.tolist() == [5, 2**40 + 1]
