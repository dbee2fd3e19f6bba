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
from tdmpc2_fast.train.run.rollouts import HostRollouts
from tdmpc2_fast.train.run.trainer import OnlineTrainer

from ..baselines.official import official_agent, official_plan, official_update
from ..harness import stand_in
from ..harness.agents import agent_of, numbers, plan_draws, reference_of, within
from ..harness.measure import CannotMeasureError, Case, Gate, Lineup, Variant, synchronise
from ..options import Options, backend_of, each
from .planner import plan_gate
from .update import LIMIT, update_gate

_SPLIT_DECISIONS = 10


class _InLoop:
    """A baseline behind the methods the loop calls, its products at the config's precision."""

    def __init__(self, agent: TDMPC2, plan: Callable[[Tensor, bool], Any], update: Callable[[Any], Any]) -> None:
        self.agent, self._plan, self._update = agent, plan, update

    def plan(self, obs: Tensor, t0: Tensor) -> Tensor:
        """Plan: (1, obs_dim) -> (1, A)."""
        return torch.as_tensor(self._within(lambda: self._plan(obs, bool(t0)))).unsqueeze(0)

    def update(self, buffer: Any) -> dict[str, Tensor]:
        """Update as `TDMPC2.update` does."""
        return dict(self._within(lambda: self._update(buffer)).items())

    def _within(self, run: Callable[[], Any]) -> Any:
        return within(self.agent.cfg, self.agent.device, run)()


def _reference(agent: TDMPC2) -> _InLoop:
    """Return the reference for the loop, with draws of the product's streams."""
    reference, draws = reference_of(agent), generator(agent.cfg.seed, "update", agent.device)

    def plan(obs: Tensor, t0: bool) -> Tensor:
        noise = PlanNoise.draw(agent.cfg, 1, agent.planner.generator)
        return reference.plan(obs, t0, False, None, noise)

    def update(buffer: Any) -> dict[str, Tensor]:
        noise = UpdateNoise.draw(agent.cfg, draws)
        return reference.update(Batch(*buffer.sample()), noise)

    return _InLoop(agent, plan, update)


def _official(checkout: str, agent: TDMPC2) -> _InLoop:
    """Return the official agent for the loop; the buffer is ours."""
    theirs = official_agent(checkout, agent, compiled=agent.device.type == "cuda")
    return _InLoop(agent, lambda obs, t0: theirs.act(obs[0], t0), theirs.update)


class _Timed:
    """An agent for the loop; while `parts` is set, it waits for each part and notes its time: nothing overlaps."""

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

    def act(self, obs: Tensor, t0: Tensor, task: None = None) -> Tensor:
        """Act as `TDMPC2.act` does for a batch of one task."""
        obs = self.timed("copy", lambda: obs.to(self.device, non_blocking=True))
        action = self.timed("plan", lambda: self.inner.plan(obs, t0))
        copied: Tensor = self.timed("copy", action.cpu)
        return copied

    def update(self, buffer: Any) -> dict[str, Tensor]:
        """Update as `TDMPC2.update` does."""
        metrics: dict[str, Tensor] = self.timed("update", lambda: self.inner.update(buffer))
        return metrics


class Loop:
    """A trainer past its seed phase that takes one decision at a time.

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
        assert isinstance(self.trainer.rollouts, HostRollouts)
        envs = self.trainer.rollouts.envs
        step = envs.step_wait
        envs.step_wait = lambda: self.agent.timed("environment", step)  # type: ignore[method-assign]

    def step(self) -> None:
        """Take one decision, and make the update due after it."""
        self.trainer.step()

    def split(self) -> dict[str, float]:
        """Return the milliseconds of a decision by part, each part waited for."""
        self.agent.parts = parts = defaultdict[str, float](float)
        synchronise(self.agent.device)
        start = time.perf_counter()
        for _ in range(_SPLIT_DECISIONS):
            self.step()
        synchronise(self.agent.device)
        wall = 1e3 * (time.perf_counter() - start) / _SPLIT_DECISIONS
        self.agent.parts = None
        found = {k: parts[k] / _SPLIT_DECISIONS for k in ("plan", "update", "environment", "copy")}
        found["other"] = wall - sum(found.values())
        return {k: round(v, 4) for k, v in found.items()}


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """Yield the loop of one environment, with an update a decision, at each size and precision."""
    return each(case, options, "size", "precisions")


def case(options: Options, size: int, precision: str) -> Case:
    """Return product and baselines in the same loop, in environments of their own with equal seeds."""
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
    noise = plan_draws(agent.cfg, 1, agent.device)
    # Of the agent in the loop, which has hardly learned, all values are nearly equal: its elites are rounding's.
    trained = agent_of(agent.cfg)
    reference = Loop(cfg, _reference)

    def gate() -> Gate:
        """Compare an update on the loop's data, or where torch draws the loops' own first updates; and a plan."""
        if agent.updater.backend.name == "torch":
            learned = Gate.of_metrics(ours.first_update, reference.first_update, LIMIT[precision])
        else:
            learned = update_gate(agent_of(agent.cfg), Batch(*ours.trainer.buffer.sample()), LIMIT[precision])
        return Gate.worst(learned, plan_gate(trained, reference_of(trained), 1, noise, obs))

    def official(checkout: str) -> Variant:
        theirs = Loop(cfg, partial(_official, checkout))
        plan = official_plan(checkout, trained, obs[0], noise).gate
        learn = official_update(checkout, trained, Batch(*ours.trainer.buffer.sample())).gate
        assert plan is not None
        assert learn is not None
        return Variant(theirs.step, gate=lambda: Gate.worst(plan(), learn(), gate()), split=theirs.split)

    lineup = Lineup(agent.backend.name, Variant(ours.step, split=ours.split))
    lineup.add("reference", Variant(reference.step, gate=gate, split=reference.split))
    if checkout := options.official:
        lineup.attempt("official", lambda: official(checkout))
    at: dict[str, Any] = dict(size=size, envs=1, actions=agent.cfg.action_dim, batch=cfg.batch_size)
    return Case("loop", options.task, lineup.variants, lineup.missing, **at, precision=precision, unit="decisions")
