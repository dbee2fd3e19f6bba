"""The normed layer as a differentiable torch op: gradients against float64 autograd, and what torch asks of an op."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from autograd_oracle import RoundedProduct, dense, leaves, transposed
from judge import judge, pooled
from oracle import DEVICE, MARKS, in_precisions, randn
from torch import Tensor, nn

from tdmpc2_fast.kernels.autograd.layer import normed_linear
from tdmpc2_fast.kernels.cpu.build import why_not as why_not_built
from tdmpc2_fast.kernels.device.launch import Precision, log_launches

pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned_memory")]
NAMES = ("x", "weight", "bias", "ln_weight", "ln_bias")
OP = torch.ops.tdmpc2_fast.normed_linear.default
BACKWARD = torch.ops.tdmpc2_fast.normed_linear_backward.default


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    return oracle.reseed(request.node.name, "tests/kernels/autograd/test_autograd_kernels.py")


def inputs(
    lead: tuple[int, ...] = (2, 33), k: int = 24, d: int = 40, groups: int = 0, shared: bool = False
) -> list[Tensor]:
    """x, weight, bias, ln_weight, ln_bias; the pre-activation is of size one."""
    several = (groups,) if groups else ()
    first = () if not groups else (1,) if shared else several
    return [
        randn(*first, *lead, k),
        randn(*several, d, k) / k**0.5,
        randn(*several, d),
        1 + 0.3 * randn(*several, d),
        0.3 * randn(*several, d),
    ]


def as_written(
    tensors: list[Tensor], d: Tensor, dtype: torch.dtype, precision: Precision, options: dict[str, Any]
) -> list[Tensor]:
    """The layer as one writes it and its gradients, all in one type: y, then those of the inputs."""
    x, *parameters = (dense(t, dtype).requires_grad_() for t in tensors)
    one_group = parameters[0].ndim == 2
    keep, v = options.get("keep"), options.get("simnorm_dim", 0)
    out = []
    for g in range(1 if one_group else len(parameters[0])):
        weight, bias, gamma, beta = parameters if one_group else [t[g] for t in parameters]
        own = x if one_group else x[min(g, len(x) - 1)]
        y = (
            RoundedProduct.apply(own, weight, precision) + bias
            if precision.name == "tf32"
            else F.linear(own, weight, bias)
        )
        if keep is not None:
            y = y * ((keep if one_group else keep[g]) * options["scale"]).to(dtype)
        y = F.layer_norm(y, y.shape[-1:], gamma, beta, 1e-5)
        out.append(y.unflatten(-1, (-1, v)).softmax(-1).flatten(-2) if v else F.mish(y))
    result = out[0] if one_group else torch.stack(out)
    return [result.detach(), *torch.autograd.grad(result, (x, *parameters), dense(d, dtype))]


CASES: list[dict[str, Any]] = [
    dict(),
    dict(lead=(3, 5), k=67, d=24, v=8),
    dict(lead=(37,), k=5, d=136, v=2, strided=True),
    dict(lead=(), k=24, d=56),
    dict(groups=3, keep=True),
    dict(groups=3, shared=True, v=4),
    dict(keep=True, v=8, strided=True),
    dict(lead=(4, 1, 11), k=40, d=101, keep=True),
    dict(lead=(9,), k=384, d=512, v=64),
    dict(lead=(65,), dtype=torch.bfloat16),
    dict(groups=2, shared=True, lead=(33,), dtype=torch.bfloat16, v=8, strided=True, keep=True),
    dict(groups=2, lead=(), d=24),
    dict(groups=1, shared=True, lead=(3, 7), k=1, strided=True),
    dict(lead=(1,), k=1, d=1),
]


@pytest.mark.parametrize(("precision", "case"), in_precisions(CASES))
@pooled
def test_gradients_of_any_layer(precision: str, case: dict[str, Any]) -> None:
    case = dict(case)
    v, keep, strided, dtype = (case.pop(n, None) for n in ("v", "keep", "strided", "dtype"))
    p, place = Precision(precision), transposed if strided else lambda t: t

    def draw() -> tuple[list[Tensor], Tensor, dict[str, Any]]:
        """Inputs, the gradient that arrives, and options."""
        tensors = [place(t.to(dtype or torch.float32)) for t in inputs(**case)]
        result = (*tensors[1].shape[:-2], *tensors[0].shape[tensors[1].ndim - 2 : -1], tensors[1].shape[-2])
        options: dict[str, Any] = dict(simnorm_dim=v or 0)
        if keep:
            bytes_ = (torch.rand(result, device=DEVICE) < 0.7).to(torch.uint8)
            options |= dict(keep=bytes_.mT.contiguous().mT if strided else bytes_, scale=1 / 0.7)
        return leaves(tensors), place(randn(*result).to(dtype or torch.float32)), options

    tensors, d, options = draw()
    y = normed_linear(*tensors, precision=precision, **options)
    found = [y.detach(), *torch.autograd.grad(y, tensors, d)]
    # Of few rows plain torch's may all be lucky: it is given several draws.
    rows = d.numel() // d.shape[-1]
    draws = [(tensors, d, options), *(draw() for _ in range(max(1, 64 // rows)))]
    exact, plain = (
        [torch.stack(x) for x in zip(*(as_written(*given[:2], t, q, given[2]) for given in draws), strict=True)]
        for t, q in ((torch.float64, Precision("float32")), (p.dtype, p))
    )
    for name, got, want, reference in zip(("y", *NAMES), found, exact, plain, strict=True):
        assert got.dtype == (dtype or torch.float32)
        assert got.shape == want.shape[1:]
        terms = 1 if name in ("y", "x") else rows
        judge(name, got, want[0], reference.to(got.dtype), want, terms)


@pytest.mark.parametrize("which", [(1, 2, 3, 4), (0,), (2,), (0, 3), ()], ids=str)
def test_only_gradients_that_are_wanted_are_computed(which: tuple[int, ...]) -> None:
    tensors = inputs()
    complete = leaves(tensors)
    d = randn(2, 33, 40)
    normed_linear(*complete, simnorm_dim=8).backward(d)
    for i in which:
        tensors[i].requires_grad_()
    # The log is this thread's; on a GPU autograd has threads of its own.
    with log_launches() as launches, torch.autograd.set_multithreading_enabled(False):
        y = normed_linear(*tensors, simnorm_dim=8)
        assert y.requires_grad == bool(which)
        if which:
            y.backward(d)
    names = [launch.name for launch in launches]
    expected = ["grouped_layer_kernel", "activate_kernel"]
    expected += ["activation_gradient_kernel"] * bool(which) + ["input_gradient_kernel"] * (0 in which)
    expected += ["weight_gradient_kernel"] * any(i in which for i in range(1, 5))
    assert names == expected
    for i, (t, other) in enumerate(zip(tensors, complete, strict=True)):
        assert torch.equal(t.grad, other.grad) if i in which else t.grad is None


def test_the_activation_is_not_kept_for_backward() -> None:
    kept = []
    tensors = leaves(inputs())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = normed_linear(*tensors)
    assert y.numel() in [t.numel() for t in kept], "not even the pre-activation was"
    assert y.data_ptr() not in [t.data_ptr() for t in kept]


@pytest.mark.parametrize("groups", [0, 3])
def test_no_rows(groups: int) -> None:
    tensors = leaves(inputs(lead=(2, 0), groups=groups))
    y = normed_linear(*tensors)
    assert y.shape == ((3,) if groups else ()) + (2, 0, 40)
    y.sum().backward()
    assert tensors[0].grad is not None
    assert tensors[0].grad.shape == tensors[0].shape
    for t in tensors[1:]:
        assert torch.equal(t.grad, torch.zeros_like(t))


def test_an_expanded_gradient_and_a_second_backward() -> None:
    tensors = leaves(inputs(lead=(1,), d=8))
    y = normed_linear(*tensors)
    once = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
    again = torch.autograd.grad(y, tensors, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def keep_of(*size: int) -> Tensor:
    return torch.ones(size, dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("x", dict(x=lambda t: t[..., 1:])),
        ("x", dict(x=lambda t: t.double())),
        ("x", dict(x=lambda t: t[0, 0, 0])),
        ("weight", dict(weight=lambda t: t[0])),
        ("weight", dict(weight=lambda t: t[:, :0], x=lambda t: t[..., :0])),
        ("weight", dict(weight=lambda t: t.half())),
        ("weight", dict(weight=lambda t: t.to("meta"))),
        ("x", dict(weight=lambda t: t.expand(3, -1, -1))),
        ("bias", dict(bias=lambda t: t[1:])),
        ("ln_weight", dict(ln_weight=lambda t: t[None])),
        ("ln_bias", dict(ln_bias=lambda t: t.long())),
        ("simnorm_dim", dict(simnorm_dim=3)),
        ("simnorm_dim", dict(simnorm_dim=16)),
        ("simnorm_dim", dict(simnorm_dim=128)),
        ("simnorm_dim", dict(simnorm_dim=-8)),
        ("keep", dict(keep=keep_of(2, 33, 39))),
        ("keep", dict(keep=keep_of(2, 33, 40).bool())),
        ("precision", dict(precision="float16")),
    ],
    ids=lambda x: x if isinstance(x, str) else "+".join(x),
)
def test_an_error_names_the_argument(name: str, changes: dict[str, Any]) -> None:
    tensors = dict(zip(NAMES, inputs(), strict=True))
    options = {key: value for key, value in changes.items() if key not in NAMES}
    for key in changes.keys() - options.keys():
        tensors[key] = changes[key](tensors[key])
    with pytest.raises(ValueError, match=rf"^{name}: got .*allowed: "):
        normed_linear(**tensors, **options)


@pytest.mark.skipif(why_not_built() is not None, reason=str(why_not_built()))
def test_without_triton_a_cpu_runs_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    tensors, d = leaves([t.cpu() for t in inputs()]), randn(2, 33, 40).cpu()
    y = normed_linear(*tensors, simnorm_dim=8, precision="tf32")
    found = [y, *torch.autograd.grad(y, tensors, d)]
    # Not rounded to tf32, which is not a CPU's.
    exact = as_written(tensors, d, torch.float64, Precision("float32"), dict(simnorm_dim=8))
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_a_device_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("tdmpc2_fast.kernels.device.launch.why_not_built", lambda: "no compiler")
    with pytest.raises(ValueError, match=r"^x: got device cpu, allowed: one that runs the kernels; no compiler"):
        normed_linear(*(t.cpu() for t in inputs()))


def test_a_second_derivative_is_refused() -> None:
    tensors = leaves(inputs())
    (dx,) = torch.autograd.grad(normed_linear(*tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="normed_linear: got a second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [dict(), dict(groups=2, shared=True), dict(d=72)], ids=str)
def test_torch_finds_nothing_wrong_with_the_op(case: dict[str, Any], precision: str) -> None:
    tensors = leaves(inputs(lead=(7,), **case))
    keep = None
    if case.get("groups"):
        keep = (torch.rand(2, 7, 40, device=DEVICE) < 0.7).to(torch.uint8)
    options = (keep, 1.25, 8, precision)
    torch.library.opcheck(OP, (*tensors, *options))
    plain = [t.detach() for t in tensors]
    y, *saved = OP(*plain, *options)
    for to_x, to_parameters in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(BACKWARD, (torch.randn_like(y), *saved, *plain, *options, to_x, to_parameters))


class Net(nn.Module):
    """Two layers of somebody's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 16)
        self.norms = nn.ModuleList([nn.LayerNorm(40), nn.LayerNorm(16)])

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.norms
        x = normed_linear(x, self.first.weight, self.first.bias, a.weight, a.bias)
        return normed_linear(x, self.second.weight, self.second.bias, b.weight, b.bias, simnorm_dim=8)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_module_is_the_eager_one(dynamic: bool) -> None:
    torch._dynamo.reset()
    net = Net().to(DEVICE)
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 7):
        x, d = randn(3, rows, 24).requires_grad_(), randn(3, rows, 16)
        wanted = (x, *net.parameters())
        y, z = net(x), compiled(x)
        assert torch.equal(y, z)
        for a, b in zip(torch.autograd.grad(y, wanted, d), torch.autograd.grad(z, wanted, d), strict=True):
            assert torch.equal(a, b)


def test_an_exported_module_is_the_eager_one() -> None:
    net = Net().to(DEVICE)
    x = randn(3, 5, 24)
    rows = torch.export.Dim("rows")
    program = torch.export.export(net, (x,), dynamic_shapes=({1: rows},))
    assert sum(node.target is OP for node in program.graph.nodes) == 2
    for given in (x, randn(3, 11, 24)):
        assert torch.equal(program.module()(given), net(given))
