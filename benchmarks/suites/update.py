"""One training step on a batch that is already on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.learn.updater import Batch
from tdmpc2_fast.reference import ReferenceAgent
from tdmpc2_fast.rng import UpdateNoise, generator
from tdmpc2_fast.runtime.backend import resolve_backend

from ..baselines.jax_port import update_variant
from ..baselines.official import official_update
from ..harness.agents import CompiledReference, agent_of, batch_of, check_captured, numbers, reference_of, within
from ..harness.measure import CannotMeasureError, Case, Gate, Variant
from ..options import Options, backend_of

# Relative difference of losses and gradient norms of a first update.
LIMIT = dict(float32=1e-3, tf32=1e-2, bfloat16=5e-2)


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """One case for each size, action dimension, batch size and precision; without kernels bfloat16 is tf32."""
    kernels = resolve_backend(Config(backend=backend_of(options)), options.torch_device).name == "triton"
    precisions = list(dict.fromkeys("tf32" if p == "bfloat16" and not kernels else p for p in options.precisions))
    for size in options.size:
        for actions in options.actions:
            for batch in options.batch:
                for precision in precisions:
                    yield partial(case, options, size, actions, batch, precision)


def case(options: Options, size: int, actions: int, batch_size: int, precision: str) -> Case:
    """An update of the product against the baselines'; each goes on from its own last update."""
    cfg = options.config(size, actions, precision=precision, batch_size=batch_size, backend=backend_of(options))
    agent = agent_of(cfg)
    torch_cfg = cfg.replace(backend="torch", precision="tf32" if precision == "bfloat16" else precision)
    device = agent.device
    batch = batch_of(cfg, device)
    # The product draws its random numbers; the reference is given them ready-made.
    noise = UpdateNoise.draw(cfg, generator(options.seed, "benchmark", device))
    start = weights_of(agent)
    with FlopCounterMode(display=False) as counter:
        on_torch = first_update(agent_of(torch_cfg), start, batch, noise)
    name = agent.updater.backend.name
    wanted = on_torch if name == "torch" else first_update(agent_of(cfg), start, batch, noise)
    missing: dict[str, str] = {}
    variants = {name: Variant(partial(learn, agent, batch, name))}
    if name != "torch":
        plain = agent_of(torch_cfg)
        variants["torch"] = Variant(
            lambda: plain.updater.step(batch), gate=lambda: Gate.of_metrics(wanted, on_torch, LIMIT[precision])
        )

    def learning(it: ReferenceAgent | CompiledReference) -> Variant:
        first: dict[str, float] = {}

        def run() -> None:
            info = it.update(batch, noise)
            if not first:
                first.update(numbers(info) | moved(start, it.p))

        return Variant(within(cfg, device, run), gate=lambda: Gate.of_metrics(wanted, first, LIMIT[precision]))

    variants["reference"] = learning(reference_of(agent))
    if options.compiled:
        try:
            variants["compiled reference"] = learning(CompiledReference(agent))
        except CannotMeasureError as e:
            missing["compiled reference"] = str(e)
    if options.official:
        try:
            variants["official"] = official_update(options.official, agent, batch)
        except CannotMeasureError as e:
            missing["official"] = str(e)
    if options.jax:
        try:
            variants["JAX port"] = update_variant(options.jax, agent, batch, wanted)
        except CannotMeasureError as e:
            missing["JAX port"] = str(e)
    return Case(
        "update",
        "update",
        variants,
        missing,
        size=size,
        actions=actions,
        batch=batch_size,
        precision=precision,
        unit="updates",
        gflop=counter.get_total_flops() / 1e9,
        mbyte=_least_bytes(agent, batch) / 1e6,
    )


def update_gate(agent: TDMPC2, batch: Batch, limit: float) -> Gate:
    """One update of an agent and of a reference with its weights, on equal draws."""
    reference = reference_of(agent)
    noise = UpdateNoise.draw(agent.cfg, generator(agent.cfg.seed, "benchmark", agent.device))
    theirs: dict[str, float] = {}
    within(agent.cfg, agent.device, lambda: theirs.update(numbers(reference.update(batch, noise))))()
    return Gate.of_metrics(numbers(agent.updater.step(batch, noise)), theirs, limit)


def learn(agent: TDMPC2, batch: Batch, backend: str) -> None:
    """An update by this backend, which it has fallen back from where its kernels failed.

    Raises:
        RuntimeError: it has, or on a GPU they are not replayed as a graph.
    """
    agent.updater.step(batch)
    if agent.updater.backend.name != backend:
        raise RuntimeError(f"{backend} was to be measured: {agent.updater.backend.why}")
    check_captured(agent.updater._update, agent.device)


def weights_of(agent: TDMPC2) -> dict[str, Tensor]:
    """Copies of what an update moves."""
    return {k: x.clone() for k, x in tensors_only(agent.model.state_dict()).items() if _is_parameter(x)}


def first_update(agent: TDMPC2, start: Mapping[str, Tensor], batch: Batch, noise: UpdateNoise) -> dict[str, float]:
    """What one update reports, and how far it moved the parameters from `start`."""
    return numbers(agent.updater.step(batch, noise)) | moved(start, tensors_only(agent.model.state_dict()))


def moved(start: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """How far the parameters of each part have moved: a step that was left out shows here and not in the losses."""
    found: dict[str, float] = {}
    for name, x in start.items():
        part = "moved " + name.split(".")[0]
        found[part] = found.get(part, 0.0) + float((now[name].detach() - x).double().square().sum())
    return {k: v**0.5 for k, v in found.items()}


def _is_parameter(x: Tensor) -> bool:
    return x.is_floating_point() and x.ndim > 1


def _least_bytes(agent: TDMPC2, batch: Batch) -> int:
    """What crosses the memory bus whatever the caches do: parameters and moments read and written, targets, batch."""
    targets = set(agent.model._target_Qs_params.parameters())
    trained = sum(p.numel() for p in agent.model.parameters() if p not in targets)
    data = sum(x.numel() * x.element_size() for x in batch if x is not None)
    return 4 * (6 * trained + 2 * sum(p.numel() for p in targets)) + data
