"""The losses as differentiable torch ops: gradients against float64 autograd, and what torch asks of an op."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from autograd_oracle import RoundedProduct, dense, leaves, transposed
from judge import judge, pooled
from oracle import DEVICE, MARKS, in_precisions, placed, poisoned, randn
from torch import Tensor, nn

from tdmpc2_fast.kernels.autograd.losses import consistency, squashed_gaussian, two_hot_cross_entropy
from tdmpc2_fast.kernels.cpu.build import why_not as why_not_built
from tdmpc2_fast.kernels.device.launch import Precision, log_launches
from tdmpc2_fast.kernels.layers.policy_head import policy_head
from tdmpc2_fast.kernels.layers.two_hot import soft_cross_entropy
from tdmpc2_fast.kernels.losses.policy_sample import Sample, policy_sample_gradient, policy_sample_gradient_reference
from tdmpc2_fast.kernels.losses.two_hot_loss import BINARY

pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned_memory")]
OPS = torch.ops.tdmpc2_fast
CODE: dict[str, Any] = dict(num_bins=101, vmin=-10.0, vmax=10.0)
RANGE: dict[str, Any] = dict(low=-10.0, high=0.5)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    return oracle.reseed(request.node.name, "tests/kernels/autograd/test_autograd_loss_kernels.py")


def head_inputs(
    lead: tuple[int, ...] = (2, 33),
    k: int = 24,
    bins: int = 101,
    groups: int = 0,
    shared: bool = False,
    targets: int = 0,
) -> list[Tensor]:
    """x, weight, bias and target; logits are of size one."""
    several, width = (groups,) if groups else (), max(bins, 1)
    goal = randn(*(targets,) * (targets > 0), *lead)
    return [
        randn(*(1,) * shared or several, *lead, k),
        randn(*several, width, k) / k**0.5,
        randn(*several, width),
        goal.sigmoid() if bins == BINARY else goal.sign() * (3 * goal.abs()).expm1(),
    ]


def head_as_written(
    tensors: list[Tensor], d: Tensor, dtype: torch.dtype, p: Precision, bins: int, ends: tuple[float, float]
) -> list[Tensor]:
    """Loss and gradients of the head as one writes it, products in one type, losses of bfloat16 in float32."""
    *tensors, target = tensors
    x, weight, bias = (dense(t, dtype).requires_grad_() for t in tensors)
    one, out = weight.ndim == 2, []
    for g in range(1 if one else len(weight)):
        own, w, b, goal = (x, weight, bias, target)
        if not one:
            own, w, b, goal = x[min(g, len(x) - 1)], weight[g], bias[g], target[min(g, len(target) - 1)]
        y = RoundedProduct.apply(own, w, p) + b if p.name == "tf32" else F.linear(own, w, b)
        y = y.float() if dtype == torch.bfloat16 else y
        goal = goal.to(y).unsqueeze(-1)
        if bins == BINARY:
            value = F.binary_cross_entropy_with_logits(y, goal, reduction="none")
        else:
            value = soft_cross_entropy(y, goal, bins, *ends)
        out.append(value.squeeze(-1))
    loss = out[0] if one else torch.stack(out)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight, bias), d.to(loss))]


# Those of one row stay below `judge.ENOUGH` entries: an RMS of one row is that row's luck.
CASES: list[dict[str, Any]] = [
    dict(),
    dict(lead=(3, 5), k=67, bins=0),
    dict(lead=(37,), k=5, bins=5, ends=(-1.0, 2.0), strided=True),
    dict(lead=(), k=16),
    dict(groups=3, shared=True, targets=1),
    dict(groups=2, targets=2, bins=1, strided=True),
    dict(lead=(9,), k=130, bins=BINARY),
    dict(groups=2, targets=1, lead=(), k=3, bins=256),
    dict(lead=(65,), dtype=torch.bfloat16, strided=True),
    dict(lead=(1,), k=1, bins=2),
]


@pytest.mark.parametrize(("precision", "case"), in_precisions(CASES))
@pooled
def test_gradients_of_any_head(precision: str, case: dict[str, Any]) -> None:
    case = dict(case)
    strided, dtype, ends = case.pop("strided", False), case.pop("dtype", torch.float32), case.pop("ends", (-10.0, 10.0))
    bins = case.get("bins", 101)
    p, place = Precision(precision), transposed if strided else lambda t: t

    def draw() -> tuple[list[Tensor], Tensor]:
        """Inputs, and the gradient that arrives."""
        tensors = [place(t.to(dtype)) if t.ndim else t.to(dtype) for t in head_inputs(**case)]
        inner = tensors[0].shape[tensors[1].ndim - 2 : -1]
        d = randn(*tensors[1].shape[:-2], *inner)
        return [*leaves(tensors[:3]), tensors[3]], place(d) if d.ndim else d

    tensors, d = draw()
    loss = two_hot_cross_entropy(*tensors, num_bins=bins, vmin=ends[0], vmax=ends[1], precision=precision)
    assert loss.dtype == torch.float32
    found = [loss.detach(), *torch.autograd.grad(loss, tensors[:3], d)]
    # Of few rows plain torch's may all be lucky: it is given several draws.
    rows = d.numel() // max(case.get("groups", 0), 1)
    draws = [(tensors, d), *(draw() for _ in range(max(1, 128 // rows)))]
    exact, plain = (
        [torch.stack(x) for x in zip(*(head_as_written(*given, t, q, bins, ends) for given in draws), strict=True)]
        for t, q in ((torch.float64, Precision("float32")), (p.dtype, p))
    )
    for name, got, want, reference in zip(("loss", "x", "weight", "bias"), found, exact, plain, strict=True):
        assert got.shape == want.shape[1:]
        assert name == "loss" or got.dtype == dtype
        judge(name, got, want[0], reference.to(got.dtype), want, 1 if name in ("loss", "x") else rows)


def gaussian_inputs(*lead: int, a: int = 3, masked: bool = False) -> list[Any]:
    """Logits, noise and mask; no sample is near the end of float32's tanh, where all errors are luck."""
    logits = torch.cat([3 * torch.rand(*lead, a, device=DEVICE) - 1.5, randn(*lead, a)], -1)
    mask = (torch.arange(a, device=DEVICE) < torch.randint(1, a + 1, (*lead[-1:], 1), device=DEVICE)).float()
    return [logits, randn(*lead, a).clamp(-2, 2), mask if masked else None]


def gaussian_as_written(
    given: list[Any], arriving: list[Tensor | None], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Action, log-probability and scaled entropy, and the gradient of the logits."""
    logits, eps, mask = (None if t is None else t.detach().to(dtype) for t in given)
    out = policy_head(logits.requires_grad_(), eps, *RANGE.values(), mask)
    results = [out.action, out.log_prob.squeeze(-1), out.scaled_entropy.squeeze(-1)]
    pairs = [(y, d.to(dtype)) for y, d in zip(results, arriving, strict=True) if d is not None]
    (g,) = torch.autograd.grad([y for y, _ in pairs], logits, [d for _, d in pairs])
    return [y.detach() for y in results], g


def arriving_at(given: list[Any], which: tuple[int, ...] = (0, 1, 2)) -> list[Tensor | None]:
    """Gradients of some of the results; none of an entropy that divides by almost 0."""
    eps = given[1]
    d: list[Any] = [randn(*eps.shape), randn(*eps.shape[:-1]), randn(*eps.shape[:-1])]
    out = policy_head(*(t.detach().double() for t in given[:2]), *RANGE.values(), given[2])
    d[2].masked_fill_(out.log_prob.squeeze(-1).abs() < 0.1, 0)
    return [x if i in which else None for i, x in enumerate(d)]


@pytest.mark.parametrize(
    ("lead", "a", "options"),
    [
        ((2, 33), 6, {}),
        ((3, 41), 38, dict(masked=True)),
        ((97,), 1, dict(strided=True)),
        ((2, 33), 3, dict(masked=True, strided=True)),
        ((2, 33), 3, dict(which=(0,))),
        ((2, 33), 3, dict(which=(1,), masked=True)),
        ((2, 33), 3, dict(which=(0, 2))),
        ((2, 33), 4, dict(dtype=torch.bfloat16)),
        ((), 6, dict(masked=True)),
    ],
    ids=str,
)
@pooled
def test_gradients_of_the_squashed_gaussian(lead: tuple[int, ...], a: int, options: dict[str, Any]) -> None:
    which, dtype = options.get("which", (0, 1, 2)), options.get("dtype", torch.float32)

    def draw() -> tuple[list[Any], list[Tensor | None]]:
        given = gaussian_inputs(*lead, a=a, masked=options.get("masked", False))
        place = transposed if options.get("strided") else lambda t: t
        logits, eps, mask = (None if t is None else place(t) for t in given)
        given = [logits.to(dtype).detach().requires_grad_(), eps.to(dtype), mask]
        return given, arriving_at(given, which)

    given, arriving = draw()
    results = squashed_gaussian(*given, **RANGE)
    pairs = [(y, d.to(y)) for y, d in zip(results, arriving, strict=True) if d is not None]
    (g,) = torch.autograd.grad([y for y, _ in pairs], given[0], [d for _, d in pairs])
    arriving = [None if d is None else d.to(y) for y, d in zip(results, arriving, strict=True)]
    draws = [(given, arriving), *(draw() for _ in range(4 if lead else 256))]
    found: list[list[Tensor]] = []
    for t in (torch.float64, torch.float32):
        written = [gaussian_as_written(*x, t) for x in draws]
        found.append([torch.stack(x) for x in zip(*([*results, d] for results, d in written), strict=True)])
    for name, got, want, plain in zip(("action", "log_prob", "entropy", "g"), [*results, g], *found, strict=True):
        assert got.dtype == (dtype if name in ("action", "g") else torch.float32)
        judge(name, got.detach(), want[0], plain.to(got.dtype), want)


@pytest.mark.parametrize("masked", [False, True])
@pooled
def test_the_gradient_kernel_and_its_reference(masked: bool) -> None:
    e, n, a = 3, 33, 5
    given = gaussian_inputs(e, n, a=a, masked=masked)
    arriving = arriving_at(given)
    assert all(d is not None for d in arriving)
    (_, exact), (_, plain) = (gaussian_as_written(given, arriving, t) for t in (torch.float64, torch.float32))
    want = torch.empty(1, e, n, 2 * a, dtype=torch.float64, device=DEVICE)
    policy_sample_gradient_reference(Sample(given[0][None].double(), *given[1:], **RANGE), *arriving, want)
    oracle.agree(want[0], exact)
    buffer, got = poisoned(1, e, n, 2 * a)
    logits, eps, mask = (None if t is None else placed(t) for t in given)
    policy_sample_gradient(Sample(logits[None], eps, mask, **RANGE), *(placed(d) for d in arriving), got)
    judge("gradient", got[0], exact, plain, exact)
    oracle.assert_written(buffer, got)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lead", "width"), [((3, 13), 40), ((67,), 200), ((), 8), ((65,), 1)])
@pooled
def test_gradients_of_consistency(lead: tuple[int, ...], width: int, dtype: torch.dtype, strided: bool) -> None:
    place = transposed if strided else lambda t: t
    z, next_z = (place(torch.rand(*lead, width, device=DEVICE).to(dtype)) for _ in range(2))
    z, d = z.detach().requires_grad_(), randn(*lead)
    loss = consistency(z, next_z)
    assert loss.dtype == torch.float32
    (got,) = torch.autograd.grad(loss, z, d)
    assert got.dtype == dtype
    found = []
    for t in (torch.float64, torch.float32):
        leaf = z.detach().to(t).requires_grad_()
        y = (leaf - next_z.to(t)).square().mean(-1)
        found.append((y.detach(), torch.autograd.grad(y, leaf, d.to(t))[0]))
    exact, plain = found
    judge("loss", loss.detach(), exact[0], plain[0], exact[0], terms=width)
    judge("z", got, exact[1], plain[1].to(dtype), exact[1], terms=4)


@pytest.mark.parametrize("which", [(1, 2), (0,), (2,), (0, 1), ()], ids=str)
def test_only_gradients_that_are_wanted_are_computed(which: tuple[int, ...]) -> None:
    *tensors, target = head_inputs()
    complete, d = leaves(tensors), randn(2, 33)
    two_hot_cross_entropy(*complete, target, **CODE).backward(d)
    for i in which:
        tensors[i].requires_grad_()
    # The log is this thread's; on a GPU autograd has threads of its own.
    with log_launches() as launches, torch.autograd.set_multithreading_enabled(False):
        loss = two_hot_cross_entropy(*tensors, target, **CODE)
        assert loss.requires_grad == bool(which)
        if which:
            loss.backward(d)
    expected = ["two_hot_loss_kernel"] + ["input_gradient_kernel"] * (0 in which)
    expected += ["weight_gradient_kernel"] * any(i in which for i in (1, 2))
    assert [launch.name for launch in launches] == expected
    for i, (t, other) in enumerate(zip(tensors, complete, strict=True)):
        assert torch.equal(t.grad, other.grad) if i in which else t.grad is None


def test_constants_get_no_gradient() -> None:
    (logits, eps, _), (z, next_z) = gaussian_inputs(7), leaves([randn(7, 8), randn(7, 8)])
    *head, target = head_inputs()
    eps.requires_grad_(), target.requires_grad_()
    with log_launches() as launches, torch.autograd.set_multithreading_enabled(False):
        squashed_gaussian(logits, eps, **RANGE)[0].sum().backward()
        two_hot_cross_entropy(*head, target, **CODE).sum().backward()
        consistency(z, next_z).sum().backward()
    assert [launch.name for launch in launches] == ["policy_sample_kernel", "two_hot_loss_kernel", "consistency_kernel"]
    assert eps.grad is None
    assert target.grad is None
    assert next_z.grad is None
    assert z.grad is not None


@pytest.mark.parametrize("groups", [0, 3])
def test_no_rows(groups: int) -> None:
    *tensors, target = head_inputs(lead=(2, 0), groups=groups, targets=groups)
    tensors = leaves(tensors)
    loss = two_hot_cross_entropy(*tensors, target, **CODE)
    assert loss.shape == ((3,) if groups else ()) + (2, 0)
    loss.sum().backward()
    assert tensors[0].grad is not None
    for t in tensors[1:]:
        assert torch.equal(t.grad, torch.zeros_like(t))
    logits, z = leaves([randn(2, 0, 6), randn(0, 8)])
    action, log_prob, entropy = squashed_gaussian(logits, randn(2, 0, 3), **RANGE)
    (action.sum() + (log_prob + entropy).sum() + consistency(z, randn(0, 8)).sum()).backward()
    assert logits.grad.shape == (2, 0, 6)
    assert z.grad.shape == (0, 8)


def test_a_target_that_is_nan_is_a_loss_that_is_nan() -> None:
    *tensors, target = head_inputs(lead=(3,))
    target[1] = torch.nan
    assert two_hot_cross_entropy(*tensors, target, **CODE).isnan().tolist() == [False, True, False]


def call_head(**changes: Any) -> None:
    tensors = dict(zip(("x", "weight", "bias", "target"), head_inputs(), strict=True))
    two_hot_cross_entropy(**tensors | CODE | {k: v(tensors[k]) if callable(v) else v for k, v in changes.items()})


def call_gaussian(**changes: Any) -> None:
    tensors = dict(zip(("logits", "eps", "mask"), gaussian_inputs(2, 33, masked=True), strict=True))
    squashed_gaussian(**tensors | RANGE | {k: v(tensors[k]) if callable(v) else v for k, v in changes.items()})


def call_consistency(**changes: Any) -> None:
    tensors = dict(z=randn(3, 8), next_z=randn(3, 8))
    consistency(**tensors | {k: v(tensors[k]) for k, v in changes.items()})


@pytest.mark.parametrize(
    ("call", "name", "change"),
    [
        (call_head, "x", lambda t: t[..., 1:]),
        (call_head, "x", lambda t: t.double()),
        (call_head, "weight", lambda t: t[1:]),
        (call_head, "weight", lambda t: t[0]),
        (call_head, "bias", lambda t: t[1:]),
        (call_head, "target", lambda t: t[..., None]),
        (call_head, "target", lambda t: t[0, 0]),
        (call_head, "target", lambda t: t.long()),
        (call_head, "target", lambda t: t.to("meta")),
        (call_head, "num_bins", 257),
        (call_head, "num_bins", -2),
        (call_head, "vmin", 10.0),
        (call_head, "precision", "float16"),
        (call_gaussian, "logits", lambda t: t[..., 1:]),
        (call_gaussian, "logits", lambda t: t.half()),
        (call_gaussian, "eps", lambda t: t[..., 1:]),
        (call_gaussian, "eps", lambda t: t.to("meta")),
        (call_gaussian, "mask", lambda t: t[..., 1:]),
        (call_gaussian, "mask", lambda t: t.expand(1, 2, 33, 3)),
        (call_gaussian, "low", 1.0),
        (call_consistency, "z", lambda t: t.long()),
        (call_consistency, "next_z", lambda t: t[1:]),
        (call_consistency, "next_z", lambda t: t.double()),
    ],
)
def test_an_error_names_the_argument(call: Any, name: str, change: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got .*allowed: "):
        call(**{name: change})


def test_one_target_of_several_groups_is_named() -> None:
    *tensors, _ = head_inputs(groups=3)
    with pytest.raises(ValueError, match=r"^target: got shape \(2, 33\), allowed: \(3 or 1, 2, 33\)"):
        two_hot_cross_entropy(*tensors, randn(2, 33), **CODE)


@pytest.mark.parametrize(("call", "name"), [(call_head, "x"), (call_gaussian, "logits"), (call_consistency, "z")])
def test_without_triton_a_cpu_runs_kernels_of_its_own(call: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("oracle.DEVICE", torch.device("cpu"))
    monkeypatch.setattr(f"{__name__}.DEVICE", torch.device("cpu"))
    if why_not_built() is None:
        call()
    monkeypatch.setattr("tdmpc2_fast.kernels.device.launch.why_not_built", lambda: "no compiler")
    with pytest.raises(ValueError, match=rf"^{name}: got device cpu, allowed: one that runs the kernels; no compiler"):
        call()


@pytest.mark.parametrize("name", ["two_hot_cross_entropy", "squashed_gaussian", "consistency"])
def test_a_second_derivative_is_refused(name: str) -> None:
    if name == "consistency":
        leaf, next_z = leaves([randn(7, 8), randn(7, 8)])
        loss = consistency(leaf, next_z)
    elif name == "squashed_gaussian":
        leaf, eps, _ = gaussian_inputs(7)
        loss = squashed_gaussian(leaf.requires_grad_(), eps, **RANGE)[1]
    else:
        leaf, *rest = head_inputs()
        loss = two_hot_cross_entropy(leaf.requires_grad_(), *rest, **CODE)
    (d,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: got a second derivative"):
        d.sum().backward()


@pytest.mark.parametrize("case", [dict(), dict(groups=2, shared=True, targets=1), dict(bins=0)], ids=str)
def test_torch_finds_nothing_wrong_with_the_head(case: dict[str, Any]) -> None:
    tensors = head_inputs(lead=(7,), **case)
    options = (case.get("bins", 101), -10.0, 10.0, "bfloat16" if case else "float32")
    torch.library.opcheck(OPS.two_hot_cross_entropy.default, (*leaves(tensors[:3]), tensors[3], *options))
    loss, kept = OPS.two_hot_cross_entropy.default(*tensors, *options)
    for wanted in ((True, True), (False, True), (True, False)):
        args = (torch.randn_like(loss), kept, *tensors[:3], options[-1], *wanted)
        torch.library.opcheck(OPS.two_hot_cross_entropy_backward.default, args)


@pytest.mark.parametrize("masked", [False, True])
def test_torch_finds_nothing_wrong_with_the_other_ops(masked: bool) -> None:
    logits, *constants = gaussian_inputs(7, masked=masked)
    args = (logits.requires_grad_(), *constants, *RANGE.values())
    torch.library.opcheck(OPS.squashed_gaussian.default, args)
    arriving = [randn(7, 3), None if masked else randn(7), randn(7)]
    torch.library.opcheck(OPS.squashed_gaussian_backward.default, (*arriving, logits.detach(), *args[1:]))
    if not masked:
        z = randn(7, 8).requires_grad_()
        torch.library.opcheck(OPS.consistency.default, (z, randn(7, 8)))
        torch.library.opcheck(OPS.consistency_backward.default, (randn(7), randn(7, 8), z.detach()))


class Net(nn.Module):
    """Losses of somebody's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head, self.policy = nn.Linear(24, 16), nn.Linear(16, 101), nn.Linear(16, 6)

    def forward(self, x: Tensor, eps: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        z = self.encoder(x)
        action, _, entropy = squashed_gaussian(self.policy(z), eps, mask, **RANGE)
        loss = two_hot_cross_entropy(z, self.head.weight, self.head.bias, target, **CODE)
        return loss + action.sum(-1) - 0.1 * entropy + consistency(z, z.roll(1, 0).detach())


def test_an_exported_module_is_the_eager_one() -> None:
    net = Net().to(DEVICE)

    def inputs(steps: int) -> tuple[Tensor, ...]:
        mask = (torch.rand(5, 3, device=DEVICE) > 0.3).float()
        return randn(steps, 5, 24), randn(steps, 5, 3), randn(steps, 5), mask

    steps = torch.export.Dim("steps")
    program = torch.export.export(net, inputs(3), dynamic_shapes=({0: steps}, {0: steps}, {0: steps}, None))
    for given in (inputs(3), inputs(11)):
        assert torch.equal(program.module()(*given), net(*given))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_module_is_the_eager_one(dynamic: bool) -> None:
    torch._dynamo.reset()
    net = Net().to(DEVICE)
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 7):
        mask = (torch.rand(rows, 3, device=DEVICE) > 0.3).float()
        given, d = (randn(3, rows, 24).requires_grad_(), randn(3, rows, 3), randn(3, rows), mask), randn(3, rows)
        wanted = (given[0], *net.parameters())
        y, z = net(*given), compiled(*given)
        assert torch.equal(y, z)
        for a, b in zip(torch.autograd.grad(y, wanted, d), torch.autograd.grad(z, wanted, d), strict=True):
            assert torch.equal(a, b)
