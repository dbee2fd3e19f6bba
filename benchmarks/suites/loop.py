"""The training loop end to end: decisions a second, and where the time of one goes."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.learn.updater import Batch
from tdmpc2_fast.rng import PlanNoise, UpdateNoise, generator
from tdmpc2_fast.train.run.trainer import OnlineTrainer

from ..baselines.official import official_agent, official_plan, official_update
from ..harness import stand_in
from ..harness.agents import agent_of, numbers, reference_of, within
from ..harness.measure import CannotMeasureError, Case, Gate, Variant, synchronise
from ..options import Options, backend_of
from .planner import plan_gate
from .update import LIMIT, update_gate

_SPLIT_DECISIONS = 10


class _ReferenceInLoop:
    """The reference behind the methods the loop calls, with draws of the product's streams."""

    def __init__(self, agent: TDMPC2) -> None:
        self.agent, self.reference = agent, reference_of(agent)
        self._generator = generator(agent.cfg.seed, "update", agent.device)

    def plan(self, obs: Tensor, t0: Tensor) -> Tensor:
        """(1, obs_dim) -> (1, A)."""
        noise = PlanNoise.draw(self.agent.cfg, 1, self.agent.planner.generator)
        plan = partial(self.reference.plan, obs, bool(t0), False, None, noise)
        action: Any = within(self.agent.cfg, self.agent.device, plan)()
        return torch.as_tensor(action).unsqueeze(0)

    def update(self, buffer: Any) -> dict[str, Tensor]:
        """As `TDMPC2.update`."""
        noise = UpdateNoise.draw(self.agent.cfg, self._generator)
        learn = partial(self.reference.update, Batch(*buffer.sample()), noise)
        info: Any = within(self.agent.cfg, self.agent.device, learn)()
        return dict(info)


class _OfficialInLoop:
    """The official agent behind the methods the loop calls; the buffer is ours."""

    def __init__(self, checkout: str, agent: TDMPC2) -> None:
        self.agent = agent
        self.theirs = official_agent(checkout, agent, compiled=agent.device.type == "cuda")

    def plan(self, obs: Tensor, t0: Tensor) -> Tensor:
        """(1, obs_dim) -> (1, A)."""
        action: Any = within(self.agent.cfg, self.agent.device, lambda: self.theirs.act(obs[0], bool(t0)))()
        return torch.as_tensor(action).unsqueeze(0)

    def update(self, buffer: Any) -> dict[str, Tensor]:
        """As `TDMPC2.update`."""
        info: Any = within(self.agent.cfg, self.agent.device, lambda: self.theirs.update(buffer))()
        return dict(info.items())


class _Timed:
    """An agent for the loop; while `parts` is set, it waits after each part and notes its time: nothing overlaps."""

    def __init__(self, agent: TDMPC2, inner: Any) -> None:
        self.inner, self.cfg, self.model, self.device = inner, agent.cfg, agent.model, agent.device
        self.parts: defaultdict[str, float] | None = None

    def timed(self, part: str, run: Callable[[], Any]) -> Any:
        if self.parts is None:
            return run()
        synchronise(self.device)
        start = time.perf_counter()
        result = run()
        synchronise(self.device)
        self.parts[part] += 1e3 * (time.perf_counter() - start)
        return result

    def act(self, obs: Tensor, t0: Tensor) -> Tensor:
        """As `TDMPC2.act` for a batch."""
        obs = self.timed("copy", lambda: obs.to(self.device, non_blocking=True))
        action = self.timed("plan", lambda: self.inner.plan(obs, t0))
        copied: Tensor = self.timed("copy", action.cpu)
        return copied

    def update(self, buffer: Any) -> dict[str, Tensor]:
        """As `TDMPC2.update`."""
        metrics: dict[str, Tensor] = self.timed("update", lambda: self.inner.update(buffer))
        return metrics


class Loop:
    """A trainer past its seed phase, one decision at a time.

    wrap: makes a baseline of the trainer's agent; None for the product.
    """

    def __init__(self, cfg: Config, wrap: Callable[[TDMPC2], Any] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tdmpc2-loop-")
        self.trainer = OnlineTrainer(cfg, Path(self._folder.name))
        self.product = self.trainer.agent
        self.agent = _Timed(self.product, wrap(self.product) if wrap else self.product)
        self.trainer.agent = self.agent  # type: ignore[assignment]
        while not self.trainer.progress.seeded:
            self.trainer.step()
        self.first_update = numbers(self.trainer.metrics)
        step = self.trainer.envs.step_wait
        self.trainer.envs.step_wait = lambda: self.agent.timed("environment", step)  # type: ignore[method-assign]

    def step(self) -> None:
        """One decision, and the update due after it."""
        self.trainer.step()

    def split(self) -> dict[str, float]:
        """Milliseconds of a decision by part, each part waited for."""
        parts: defaultdict[str, float] = defaultdict(float)
        self.agent.parts = parts
        wall = self._wall()
        self.agent.parts = None
        found = {k: parts[k] / _SPLIT_DECISIONS for k in ("plan", "update", "environment", "copy")}
        found["other"] = wall - sum(found.values())
        return {k: round(v, 4) for k, v in found.items()}

    def _wall(self) -> float:
        synchronise(self.agent.device)
        start = time.perf_counter()
        for _ in range(_SPLIT_DECISIONS):
            self.step()
        synchronise(self.agent.device)
        return 1e3 * (time.perf_counter() - start) / _SPLIT_DECISIONS


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """One environment, one update a decision; each size and precision."""
    for size in options.size:
        for precision in options.precisions:
            yield partial(case, options, size, precision)


def case(options: Options, size: int, precision: str) -> Case:
    """Product and baselines in the same loop, in environments of their own with equal seeds."""
    if options.task == stand_in.NAME:
        stand_in.install(options.actions[0])
    cfg = Config.from_dict(
        options.keys(
            size,
            task=options.task,
            backend=backend_of(options),
            precision=precision,
            batch_size=options.batch[0],
            # One update ends the seed phase; what is timed is the steady state after it.
            seed_steps=1,
            buffer_size=20_000,
            eval_episodes=1,
            save_agent=False,
            tensorboard=False,
            display="none",
        )
    )
    try:
        ours = Loop(cfg)
    except ConfigError as e:
        raise CannotMeasureError(str(e)) from e
    agent = ours.product
    shape = agent.cfg.observation_shape
    obs = torch.randn(1, *shape, generator=torch.Generator().manual_seed(options.seed))
    noise = PlanNoise.draw(agent.cfg, 1, generator(options.seed, "benchmark", agent.device))
    # Of the agent in the loop, which has hardly learned, all values are nearly equal: its elites are rounding's.
    trained = agent_of(agent.cfg)
    variants = {agent.backend.name: Variant(ours.step, split=ours.split)}
    reference = Loop(cfg, _ReferenceInLoop)

    def gate() -> Gate:
        """An update of both on the loop's data; and a plan. Where torch draws, the loops' own first updates."""
        if agent.updater.backend.name == "torch":
            learned = Gate.of_metrics(ours.first_update, reference.first_update, LIMIT[precision])
        else:
            learned = update_gate(agent_of(agent.cfg), Batch(*ours.trainer.buffer.sample()), LIMIT[precision])
        return Gate.worst(learned, plan_gate(trained, reference_of(trained), 1, noise, obs))

    variants["reference"] = Variant(reference.step, gate=gate, split=reference.split)
    missing: dict[str, str] = {}
    if options.official:
        checkout = options.official
        try:
            theirs = Loop(cfg, partial(_OfficialInLoop, checkout))
            plan = official_plan(checkout, trained, obs[0], noise)[1]
            learn = official_update(checkout, trained, Batch(*ours.trainer.buffer.sample())).gate
            assert learn is not None
            variants["official"] = Variant(
                theirs.step, gate=lambda: Gate.worst(plan(), learn(), gate()), split=theirs.split
            )
        except CannotMeasureError as e:
            missing["official"] = str(e)
    return Case(
        "loop",
        options.task,
        variants,
        missing,
        size=size,
        envs=1,
        actions=agent.cfg.action_dim,
        batch=options.batch[0],
        precision=precision,
        unit="decisions",
    )
