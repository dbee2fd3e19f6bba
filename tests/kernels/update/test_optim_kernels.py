"""Norm, clipping, Adam and Polyak averages over flat buffers, against torch's own optimiser in float64."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from judge import pooled, within_twice
from oracle import DEVICE, MARKS, reseed
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import How, Precision, log_launches
from tdmpc2_fast.kernels.update import optim
from tdmpc2_fast.kernels.update.optim import FlatParameters, FlatTarget, Outcome, Rates

pytestmark = MARKS

LR, HEAD_LR, CODE = 3e-4, 0.3 * 3e-4, 5
# A norm is one number, which plain torch may hit by luck, and all that is clipped has its error.
FEW_ROUNDINGS = 2**-21
PRECISIONS = [Precision(name) for name in ("float32", "tf32", "bfloat16")]


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    reseed(request.node.name, request.node.path.name)


def guarded(x: Tensor) -> Tensor:
    """A copy of x, misaligned between NaN."""
    room = torch.full((len(x) + 7,), torch.nan, dtype=x.dtype, device=DEVICE)
    return room[3 : 3 + len(x)].copy_(x)


@dataclass
class State:
    """Buffers of one optimiser."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    partials: Tensor
    step: Tensor
    flag: Tensor
    norm: Tensor
    target: Tensor | None = None
    shadow: Tensor | None = None
    target_shadow: Tensor | None = None
    target_at: int = 0
    precision: Precision = PRECISIONS[0]

    def flat(self, grad: Tensor) -> FlatParameters:
        names = ("param", "exp_avg", "exp_avg_sq", "partials", "step", "shadow")
        return FlatParameters(grad=grad, **{name: getattr(self, name) for name in names})

    @classmethod
    def new(
        cls,
        param: Tensor,
        partials: int | None = None,
        target: tuple[int, int] | None = None,
        precision: Precision = PRECISIONS[0],
    ) -> State:
        """At step 0; target: from and to."""
        n, dtype = len(param), param.dtype

        def poison(size: int, kind: torch.dtype = dtype) -> Tensor:
            return guarded(torch.full((size,), torch.nan, dtype=kind, device=DEVICE))

        shadowed = precision.name != "float32"
        size = target[1] - target[0] if target else 0
        return cls(
            param=guarded(param),
            exp_avg=guarded(torch.zeros_like(param)),
            exp_avg_sq=guarded(torch.zeros_like(param)),
            partials=poison(partials or len(optim.new_partials(param))),
            step=torch.zeros(1, dtype=torch.int64, device=DEVICE),
            flag=torch.zeros(1, dtype=torch.int64, device=DEVICE),
            norm=poison(1),
            target=guarded(torch.randn(size, device=DEVICE, dtype=dtype)) if target else None,
            shadow=poison(n, precision.dtype) if shadowed else None,
            target_shadow=poison(size, precision.dtype) if shadowed and target else None,
            target_at=target[0] if target else 0,
            precision=precision,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {k: x for k, x in vars(self).items() if isinstance(x, Tensor)}

    def take(self, grad: Tensor, reference: bool = False, **changes: Any) -> None:
        """A step."""
        norm, step = (
            (optim.squared_norm_reference, optim.adam_step_reference)
            if reference
            else (optim.squared_norm, optim.adam_step)
        )
        norm(grad, self.partials, self.step)
        tau, code = changes.pop("tau", 0.01), changes.pop("code", CODE)
        rates = replace(Rates(lr=LR, head_lr=HEAD_LR, eps=1e-8, max_norm=20.0), **changes)
        target = None
        if self.target is not None:
            target = FlatTarget(param=self.target, at=self.target_at, tau=tau, shadow=self.target_shadow)
        step(self.flat(grad), rates, target, Outcome(self.flag, self.norm, code), how=How(self.precision))


class Torch:
    """The same with torch's own optimiser, in any type."""

    def __init__(self, param: Tensor, head: int, eps: float, max_norm: float, dtype: torch.dtype) -> None:
        self.parts = [x.clone().to(dtype).requires_grad_() for x in (param[:head], param[head:])]
        groups: list[dict[str, Any]] = [dict(params=self.parts[:1], lr=HEAD_LR), dict(params=self.parts[1:], lr=LR)]
        self.optim = torch.optim.Adam(groups, lr=LR, eps=eps, fused=False)
        self.head, self.max_norm = head, max_norm

    def take(self, grad: Tensor) -> Tensor:
        for x, g in zip(self.parts, (grad[: self.head], grad[self.head :]), strict=True):
            x.grad = g.to(x.dtype, copy=True)
        norm = torch.nn.utils.clip_grad_norm_(self.parts, self.max_norm)
        self.optim.step()
        return norm

    def state(self, name: str) -> Tensor:
        return torch.cat([self.optim.state[x][name] for x in self.parts])

    @property
    def param(self) -> Tensor:
        return torch.cat([x.detach() for x in self.parts])


@pytest.mark.parametrize("max_norm", [20.0, 0.5, 1e9], ids=["at times clipped", "clipped", "never clipped"])
@pytest.mark.parametrize(("n", "head"), [(1, 0), (5, 5), (1000, 333), (10_001, 1025)])
@pooled
def test_steps_are_as_exact_as_torchs(n: int, head: int, max_norm: float) -> None:
    eps = 1e-5 if n == 1000 else 1e-8
    param = torch.randn(n, device=DEVICE) * 0.05
    mine = State.new(param)
    plain, exact = (Torch(param, head, eps, max_norm, dtype) for dtype in (torch.float32, torch.float64))
    for size in (30.0, 0.1, 1e-4, 1.0):
        # Some entries stay near 0, where eps decides.
        grad = guarded(torch.randn(n, device=DEVICE) ** 3 * size / n**0.5)
        grad[n // 2] = 0
        norms = [x.take(grad) for x in (plain, exact)]
        mine.take(grad, head=head, eps=eps, max_norm=max_norm)
        within_twice(mine.norm, norms[0].view(1), norms[1].view(1), FEW_ROUNDINGS)
        within_twice(mine.param, plain.param, exact.param)
        for name in ("exp_avg", "exp_avg_sq"):
            within_twice(getattr(mine, name), plain.state(name), exact.state(name), FEW_ROUNDINGS)
    assert mine.step.item() == 4
    assert mine.flag.item() == 0


def test_corrections_hold_at_any_step() -> None:
    n, head = 64, 20
    param = torch.randn(n, device=DEVICE)
    for t in (1, 2, 10, 999, 100_000, 10**9):
        mine, exact = State.new(param), State.new(param.double())
        for x in (mine, exact):
            x.step.fill_(t - 1)
            x.exp_avg.copy_(torch.linspace(-1, 1, n))
            x.exp_avg_sq.copy_(torch.linspace(0, 2, n))
        grad = torch.randn(n, device=DEVICE)
        # A rate so large that the step, not the parameter, is what is rounded.
        mine.take(grad, head=head, lr=100.0, head_lr=50.0)
        exact.take(grad.double(), reference=True, head=head, lr=100.0, head_lr=50.0)
        torch.testing.assert_close(
            mine.param.double(), exact.param, rtol=1e-6, atol=1e-6 * float(exact.param.abs().max())
        )


@pytest.mark.parametrize("n", [3, 40_001])
def test_reference_is_torchs_optimiser(n: int) -> None:
    param = torch.randn(n, device=DEVICE, dtype=torch.float64)
    mine, other = State.new(param), Torch(param, 1, 1e-8, 0.5, torch.float64)
    for _ in range(3):
        grad = torch.randn(n, device=DEVICE, dtype=torch.float64)
        norm = other.take(grad)
        mine.take(grad, reference=True, head=1, max_norm=0.5)
        torch.testing.assert_close(mine.norm[0], norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(mine.param, other.param, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", [1, 2048, 70_003])
@pytest.mark.parametrize("p", [1, 3, 7, 40])
@pooled
def test_every_number_of_partials_gives_the_norm(n: int, p: int) -> None:
    grad = guarded(torch.randn(n, device=DEVICE))
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    partials, plain = (guarded(torch.full((p,), torch.nan, device=DEVICE)) for _ in range(2))
    exact = torch.empty(p, dtype=torch.float64, device=DEVICE)
    optim.squared_norm(grad, partials, step)
    optim.squared_norm_reference(grad, plain, step)
    optim.squared_norm_reference(grad.double(), exact, step)
    assert step.item() == 3
    torch.testing.assert_close(exact.sum(), grad.double().square().sum(), rtol=1e-12, atol=0)
    within_twice(partials, plain, exact, FEW_ROUNDINGS)
    again = torch.full_like(partials, torch.nan)
    optim.squared_norm(grad, again, step)
    assert torch.equal(partials, again)


def test_partials_are_enough_and_not_too_many() -> None:
    for n, count in ((1, 1), (2048, 1), (2049, 2), (300_000_000, 1024)):
        assert len(optim.new_partials(torch.empty(n, device="meta"))) == count


@pytest.mark.parametrize("target", [None, (0, 2500), (601, 1900), (2499, 2500)])
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: p.name)
def test_shadows_and_targets_follow_the_parameters(precision: Precision, target: tuple[int, int] | None) -> None:
    n, tau = 2500, 0.01
    state = State.new(torch.randn(n, device=DEVICE), target=target, precision=precision)
    state.param[::3] = torch.linspace(1, 2, n, device=DEVICE)[::3].bfloat16() + 2**-8  # ties, unless a step moves them
    for _ in range(2):
        before = None if state.target is None else state.target.clone()
        grad = torch.randn(n, device=DEVICE)
        grad[::3] = 0
        state.take(grad, tau=tau)
        if state.shadow is not None:
            assert state.shadow.dtype == precision.dtype
            assert torch.equal(state.shadow, precision.operand(state.param))
        if state.target is None or before is None or target is None:
            continue
        new = state.param[slice(*target)]
        exact = before.double().lerp(new.double(), tau)
        # Of one entry the terms may cancel. There are three roundings, and torch's may be lucky: of the difference and
        # of its product with tau, each half an ulp of that, and of the sum, or of the old value if it is larger.
        step = 2 * tau * (new.double() - before.double()).abs()
        terms = torch.maximum(before.double().abs(), exact.abs()) + step
        largest = max(1.0, float(terms.max() / exact.abs().max()))
        within_twice(state.target, before.lerp(new, tau), exact, 2**-24 * largest)
        if state.target_shadow is not None:
            assert torch.equal(state.target_shadow, precision.operand(state.target))


@pytest.mark.parametrize("precision", PRECISIONS[1:], ids=lambda p: p.name)
def test_shadows_break_ties_as_the_host_does(precision: Precision) -> None:
    bits = 13 if precision.name == "tf32" else 16
    half = (torch.arange(4096, dtype=torch.int32) << bits | 1 << (bits - 1)) + (100 << 23)
    state = State.new(half.view(torch.float32).to(DEVICE), precision=precision)
    state.take(torch.zeros(4096, device=DEVICE))
    assert torch.equal(state.param, half.view(torch.float32).to(DEVICE))
    assert state.shadow is not None
    assert torch.equal(state.shadow, precision.operand(state.param))


def test_a_tau_of_one_copies() -> None:
    state = State.new(torch.randn(100, device=DEVICE), target=(10, 90))
    state.take(torch.randn(100, device=DEVICE), tau=1.0)
    assert state.target is not None
    assert torch.equal(state.target, state.param[10:90])


def test_programs_take_their_blocks_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 5 * 1024 + 17
    param, grad = torch.randn(n, device=DEVICE), torch.randn(n, device=DEVICE)
    states = []
    for programs in (optim._PROGRAMS, 2):
        monkeypatch.setattr(optim, "_PROGRAMS", programs)
        states.append(State.new(param, partials=3))
        states[-1].take(grad)
    for name, x in states[0].tensors().items():
        assert torch.equal(x, states[1].tensors()[name]), name


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("value", "flag"), [(torch.nan, 0), (torch.inf, 0), (-torch.inf, 0), (3e38, 0), (torch.nan, 9), (1.0, 9), (1.0, 0)]
)
@pytest.mark.parametrize("at", [0, 4999])
def test_a_step_that_fails_leaves_everything_alone(at: int, value: float, flag: int, reference: bool) -> None:
    n = 5000
    state = State.new(torch.randn(n, device=DEVICE), target=(7, 4000), precision=PRECISIONS[1])
    state.take(torch.randn(n, device=DEVICE))
    state.flag.fill_(flag)
    before = {k: x.clone() for k, x in state.tensors().items()}
    grad = torch.randn(n, device=DEVICE)
    grad[at] = value
    state.take(grad, reference)
    fails = value != 1.0
    assert bool(state.norm.isfinite()) != fails
    assert state.flag.item() == (flag or (CODE if fails else 0))
    for name in ("param", "exp_avg", "exp_avg_sq", "shadow", "target", "target_shadow"):
        got, was = (x[name].view(torch.int32) for x in (state.tensors(), before))
        assert torch.equal(got, was) == bool(fails or flag), name


def test_gradient_and_surroundings_are_left_alone() -> None:
    n = 1500
    grad = guarded(torch.randn(n, device=DEVICE) * 100)
    kept = grad.clone()
    state = State.new(torch.randn(n, device=DEVICE), target=(3, 700), precision=PRECISIONS[2])
    state.take(grad)
    assert torch.equal(grad, kept)
    for name, x in state.tensors().items():
        if x.is_floating_point():
            assert x.isfinite().all(), name
            base = torch.as_strided(x, (len(x) + 7,), (1,), 0)
            assert int(base.isnan().sum()) == 7, name


def test_two_launches_and_the_same_signatures() -> None:
    state = State.new(torch.randn(3000, device=DEVICE))
    with log_launches() as log:
        state.take(torch.randn(3000, device=DEVICE))
    assert [x.name for x in log] == ["squared_norm_kernel", "adam_kernel"]
    for name in ("squared_norm", "adam_step"):
        op, reference = (inspect.signature(getattr(optim, x)) for x in (name, f"{name}_reference"))
        assert op == reference


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("param", dict(param=torch.zeros(9))),
        ("exp_avg", dict(exp_avg=torch.zeros(10).double())),
        ("exp_avg_sq", dict(exp_avg_sq=torch.zeros(20)[::2])),
        ("partials", dict(partials=torch.zeros(2000))),
        ("partials", dict(partials=torch.zeros(0))),
        ("step", dict(step=torch.zeros(1))),
        ("flag", dict(flag=torch.zeros(1, dtype=torch.int32))),
        ("norm_out", dict(norm=torch.zeros(2))),
        ("target", dict(target=torch.zeros(11))),
        ("target", dict(target=torch.zeros(4), target_at=7)),
        ("target", dict(target=torch.zeros(4).double())),
        ("shadow", dict(shadow=torch.zeros(10))),
        ("shadow", dict(shadow=torch.zeros(10), precision=PRECISIONS[2])),
        ("target_shadow", dict(target=torch.zeros(4), target_shadow=torch.zeros(4))),
        ("target_shadow", dict(shadow=torch.zeros(10), target=torch.zeros(4), precision=PRECISIONS[1])),
    ],
)
def test_bad_buffers_are_named(name: str, changes: dict[str, Any]) -> None:
    changes = {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in changes.items()}
    state = replace(State.new(torch.zeros(10, device=DEVICE)), **changes)
    with pytest.raises(ValueError, match=rf"^{name}: got .*allowed: "):
        state.take(torch.zeros(10, device=DEVICE))


@pytest.mark.parametrize(("name", "value"), [("head", 11), ("head", -1), ("betas", (0.9, 1.0)), ("code", 0)])
def test_bad_arguments_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got .*allowed: "):
        State.new(torch.zeros(10, device=DEVICE)).take(torch.zeros(10, device=DEVICE), **{name: value})


def test_a_bad_gradient_is_named() -> None:
    for grad in (torch.zeros(2, 5, device=DEVICE), torch.zeros(0, device=DEVICE), torch.zeros(10).long().to(DEVICE)):
        with pytest.raises(ValueError, match=r"^grad: got .*allowed: "):
            State.new(torch.zeros(10, device=DEVICE)).take(grad)
