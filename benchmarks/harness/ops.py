"""A case for one op of the product, beside the op as one writes it in torch, eager and compiled.

The product is the fused kernel, of the GPU or the CPU, and the torch backend's op where there is none. A GPU is
measured by a CUDA graph of many executions, which leaves next to no time of the host in the result; as in a plan, what
fits into L2 is found there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from tdmpc2_fast import Config
from tdmpc2_fast.kernels.device.cluster_check import how_on
from tdmpc2_fast.kernels.device.launch import Precision, natively
from tdmpc2_fast.runtime.backend import resolve_backend

from ..options import Options, backend_of, each
from .agents import within
from .compiled import why_not_compiled
from .measure import Case, Gate, Variant

_INNER = 100  # executions in a CUDA graph
# RMS difference of two results by the baseline's standard deviation.
_LIMIT = dict(float32=1e-5, tf32=2e-3, bfloat16=2e-2)

Op = Callable[[], Tensor]
"""It executes once and returns its result for the comparison."""


class OpBench:
    """What ops of one size and precision share.

    envs, batch: those of the rows, whichever an op has.
    """

    def __init__(
        self,
        options: Options,
        suite: str,
        size: int,
        precision: str,
        *,
        envs: int | None = None,
        batch: int | None = None,
    ) -> None:
        self.options, self.suite, self.size, self._envs, self._batch = options, suite, size, envs, batch
        self.cfg: Config = options.config(size, options.actions[0], precision=precision)
        self.precision, self.device = Precision(precision), options.torch_device
        self.backend = resolve_backend(Config(backend=backend_of(options)), self.device).name
        self.fused = self.backend != "torch"
        self.how = how_on(self.device, self.precision)
        self._random = torch.Generator(self.device).manual_seed(options.seed)

    def randn(self, *size: int) -> Tensor:
        """Draw standard normal numbers on the device."""
        return torch.randn(*size, generator=self._random, device=self.device)

    def case(
        self,
        name: str,
        fused: Op,
        ours: Op,
        plain: Op,
        reset: Callable[[], object] | None = None,
        compiled: Callable[[], Op] | None = None,
        summary: Callable[[Tensor], Tensor] = Tensor.double,
        limit: float | None = None,
        shape: str = "",
        gflop: float | None = None,
        mbyte: float | None = None,
    ) -> Case:
        """Return a case of these three ways to do an op.

        reset: undoes what an execution changes, before each that is compared.
        compiled: makes the compiled baseline, where it is not `plain` compiled as a whole.
        summary: what is compared of the results.
        """
        allowed = _LIMIT[self.precision.name] if limit is None else limit
        product = self._by_kernels(fused) if self.fused else ours

        def result(op: Op) -> Tensor:
            if reset is not None:
                reset()
            found = within(self.cfg, self.device, op)()
            assert isinstance(found, Tensor)
            return summary(found).clone()

        def gate(baseline: Op) -> Gate:
            wanted = result(baseline)
            return Gate.of_values(result(product), wanted, allowed)

        variants = {self.backend: self._variant(product)}
        variants["reference"] = self._variant(plain, partial(gate, plain))
        missing = {}
        if self.options.compiled:
            if why := why_not_compiled(self.device):
                missing["compiled reference"] = why
            else:
                torch._dynamo.reset()
                fast = torch.compile(plain) if compiled is None else compiled()
                variants["compiled reference"] = self._variant(fast, partial(gate, fast))
        return Case(
            self.suite,
            name,
            variants,
            missing,
            size=self.size,
            envs=self._envs,
            actions=self.options.actions[0],
            batch=self._batch,
            precision=self.precision.name,
            shape=shape,
            gflop=gflop,
            mbyte=mbyte,
        )

    def _by_kernels(self, op: Op) -> Op:
        def run() -> Tensor:
            with natively(self.backend == "cpu"):
                return op()

        return run

    def _variant(self, op: Op, gate: Callable[[], Gate] | None = None) -> Variant:
        run = within(self.cfg, self.device, op)
        if self.device.type != "cuda":
            return Variant(run, gate=gate)
        graph: list[torch.cuda.CUDAGraph] = []

        def captured() -> None:
            if not graph:
                graph.append(_capture(run))
            graph[0].replay()

        return Variant(captured, inner=_INNER, gate=gate)


def _capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture a graph of many executions."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(_INNER):
            run()
    return graph


def op_cases(
    ops: Sequence[str], bench: Callable[..., OpBench], options: Options, *keys: str
) -> Iterator[Callable[[], Case]]:
    """Yield each op, a method of `bench`, for each combination of the options' values of these keys."""

    def case(make: Callable[[], OpBench], op: str) -> Case:
        of = make()
        with natively(of.backend == "cpu"):  # some inputs are what a kernel wrote
            found: Case = getattr(of, op)()
        return found

    for make in each(bench, options, *keys):
        yield from (partial(case, make, op) for op in ops)


def mbyte(*tensors: Tensor) -> float:
    """Return the MB that must be read and written at least once."""
    return sum(x.numel() * x.element_size() for x in tensors) / 1e6
