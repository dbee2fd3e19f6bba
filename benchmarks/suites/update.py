"""One training step on a batch that is already on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.learn.updater import Batch
from tdmpc2_fast.reference import ReferenceAgent
from tdmpc2_fast.rng import UpdateNoise
from tdmpc2_fast.runtime.backend import resolve_backend

from ..baselines.jax_port import update_variant
from ..baselines.official import accelerated_update, official_update
from ..harness.agents import (
    CompiledReference,
    agent_of,
    batch_of,
    check_captured,
    numbers,
    reference_of,
    update_draws,
    within,
)
from ..harness.measure import Case, Gate, Lineup, Variant
from ..options import Options, backend_of, each

# Relative difference of losses and gradient norms of a first update.
LIMIT = dict(float32=1e-3, tf32=1e-2, bfloat16=5e-2)


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """Yield a case for each size, action dimension, batch size and precision; without kernels bfloat16 is tf32."""
    kernels = resolve_backend(Config(backend=backend_of(options)), options.torch_device).name != "torch"
    precisions = dict.fromkeys("tf32" if p == "bfloat16" and not kernels else p for p in options.precisions)
    return each(case, replace(options, precision=tuple(precisions)), "size", "actions", "batch", "precision")


class Setting:
    """An agent, a batch on its device, draws for an update, and the weights that the update moves."""

    def __init__(self, options: Options, size: int, actions: int, batch: int, precision: str) -> None:
        backend = backend_of(options)
        self.cfg = cfg = options.config(size, actions, precision=precision, batch_size=batch, backend=backend)
        self.agent = agent_of(cfg)
        self.device, self.batch = self.agent.device, batch_of(cfg, self.agent.device)
        self.noise, self.start = update_draws(cfg, self.device), weights_of(self.agent)
        self.facts: dict[str, Any] = dict(size=size, actions=actions, batch=batch, precision=precision, unit="updates")


def case(options: Options, size: int, actions: int, batch_size: int, precision: str) -> Case:
    """Return an update of the product against the baselines'; each goes on from its own last update."""
    at = Setting(options, size, actions, batch_size, precision)
    # The product draws its random numbers; the reference is given them ready-made.
    cfg, agent, batch, noise, start = at.cfg, at.agent, at.batch, at.noise, at.start
    exact = "float32" if at.device.type == "cpu" else "tf32"
    torch_cfg = cfg.replace(backend="torch", precision=exact if precision == "bfloat16" else precision)
    with FlopCounterMode(display=False) as counter:
        on_torch = first_update(agent_of(torch_cfg), start, batch, noise)
    name = agent.updater.backend.name
    wanted = on_torch if name == "torch" else first_update(agent_of(cfg), start, batch, noise)
    lineup = Lineup(name, Variant(partial(learn, agent, batch, name)))

    def against(theirs: Mapping[str, float]) -> Callable[[], Gate]:
        return lambda: Gate.of_metrics(wanted, theirs, LIMIT[precision])

    if name != "torch":
        plain = agent_of(torch_cfg)
        lineup.add("torch", Variant(lambda: plain.updater.step(batch), gate=against(on_torch)))

    def learning(it: ReferenceAgent | CompiledReference) -> Variant:
        first: dict[str, float] = {}

        def run() -> None:
            info = it.update(batch, noise)
            if not first:
                first.update(numbers(info) | moved(start, it.p))

        return Variant(within(cfg, at.device, run), gate=against(first))

    lineup.add("reference", learning(reference_of(agent)))
    if options.compiled:
        lineup.attempt("compiled reference", lambda: learning(CompiledReference(agent)))
    if official := options.official:
        lineup.attempt("official", lambda: official_update(official, agent, batch))
        lineup.attempt("official, accelerated", lambda: accelerated_update(official, agent, batch))
    if jax := options.jax:
        lineup.attempt("JAX port", lambda: update_variant(jax, agent, batch, wanted))
    needed = dict(gflop=counter.get_total_flops() / 1e9, mbyte=_least_bytes(agent, batch) / 1e6)
    return Case("update", "update", lineup.variants, lineup.missing, **at.facts, **needed)


def update_gate(agent: TDMPC2, batch: Batch, limit: float) -> Gate:
    """Return the gate of one update by an agent and by a reference with its weights, on equal draws."""
    reference = reference_of(agent)
    noise = update_draws(agent.cfg, agent.device)
    theirs: dict[str, float] = {}
    within(agent.cfg, agent.device, lambda: theirs.update(numbers(reference.update(batch, noise))))()
    return Gate.of_metrics(numbers(agent.updater.step(batch, noise)), theirs, limit)


def learn(agent: TDMPC2, batch: Batch, backend: str) -> None:
    """Update by this backend.

    Raises:
        RuntimeError: the agent has fallen back to another one, or on a GPU the kernels are not replayed as a graph.
    """
    agent.updater.step(batch)
    if agent.updater.backend.name != backend:
        raise RuntimeError(f"{backend} was to be measured: {agent.updater.backend.why}")
    check_captured(agent.updater._update, agent.device)


def weights_of(agent: TDMPC2) -> dict[str, Tensor]:
    """Return copies of what an update moves."""
    return {k: x.clone() for k, x in tensors_only(agent.model.state_dict()).items() if _is_parameter(x)}


def first_update(agent: TDMPC2, start: Mapping[str, Tensor], batch: Batch, noise: UpdateNoise) -> dict[str, float]:
    """Return what one update reports, and how far it moved the parameters from `start`."""
    return numbers(agent.updater.step(batch, noise)) | moved(start, tensors_only(agent.model.state_dict()))


def moved(start: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how far each part's parameters have moved: a step left out shows here and not in the losses."""
    found: dict[str, float] = {}
    for name, x in start.items():
        part = "moved " + name.split(".")[0]
        found[part] = found.get(part, 0.0) + float((now[name].detach() - x).double().square().sum())
    return {k: v**0.5 for k, v in found.items()}


def _is_parameter(x: Tensor) -> bool:
    return x.is_floating_point() and x.ndim > 1


def _least_bytes(agent: TDMPC2, batch: Batch) -> int:
    """Return the bytes that no cache can save: parameters and moments read and written, targets, batch."""
    targets = set(agent.model._target_Qs_params.parameters())
    trained = sum(p.numel() for p in agent.model.parameters() if p not in targets)
    data = sum(x.numel() * x.element_size() for x in batch if x is not None)
    return 4 * (6 * trained + 2 * sum(p.numel() for p in targets)) + data
