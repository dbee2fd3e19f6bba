"""Online training: one loop for one environment and for many.

The official schedule, counted in decisions: random actions (the agent's, where it began with
weights) up to and including `seed_steps` (and on, until an episode has ended: with many
environments that can be later); there, as many updates as seed steps; from then on `utd`
updates per decision. Evaluation at the first episode boundary after every `eval_freq`
decisions, at the start, and at the end.

The order within a decision is official, too: episodes that ended in the last one enter the
replay, their environments are reset, the agent acts, the environments step, the agent learns.
An update therefore never sees the step of its own decision, and runs beside it where `overlap`
says so; otherwise the host waits for it first. Nothing else differs, and no number does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import override

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.config import Config
from tdmpc2_fast.learn.replay import ReplayBuffer
from tdmpc2_fast.runtime.backend import resolve_device
from tdmpc2_fast.runtime.ranks import ALONE, Ranks
from tdmpc2_fast.seeds import stream_seed

from ..envs import complete
from ..envs.apart.workers import leave_if_imported_anew
from ..envs.base import env_seed
from ..envs.given import Source
from ..log.run_log import RunLog
from . import resume
from .checkpoints import Checkpoints, Saved
from .doubts import Doubts
from .episode import Played
from .loops.base import Trainer, about, begin_with
from .loops.mixed import Mixed, shares
from .loops.offline import Stream
from .overlap import updates_on
from .rollouts import rollouts_in
from .shared.dealing import deal
from .stop import Stop

_LAUNCHED_AT_ONCE = 16  # updates of pretraining, between which a run can stop and show itself


class OnlineTrainer(Trainer):
    """Trains one agent on one task.

    Args:
        cfg: config without what the environment fills in.
        folder: where CSVs and checkpoints go.
        saved: the checkpoint of this run to go on from.
        stop: looked at between steps.
        source: where its environments come from; default by `cfg.task`.
        evaluation: where those come from that it is evaluated in; default as `source`.
        data: what a share of each batch comes from, where `mix` says so; closed at the end.
        facts: what the header of the run says of the data.
        ranks: those that share the run: each has its share of the environments, and a replay of what it plays.

    Raises:
        ConfigError: the task terminates and `episodic` is not set, among others.
    """

    def __init__(
        self,
        cfg: Config,
        folder: Path,
        saved: Saved | None = None,
        stop: Stop | None = None,
        source: Source | None = None,
        evaluation: Source | None = None,
        data: Stream | None = None,
        facts: Mapping[str, str] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        leave_if_imported_anew()
        restarts, dropped = resume.made_anew(saved)
        source = source or Source()
        own = ranks.part(cfg)
        first = source.first(own, env_seed(own.seed, 0, restarts + dropped))
        cfg = complete(cfg, first)
        self.own = own = ranks.part(cfg)

        # What acts, remembers and learns.
        notes = list(getattr(first, "notes", ()))
        self.buffer = ReplayBuffer(own.replace(batch_size=shares(own)[0]), resolve_device(cfg.device))
        self.data, self.sampler = data, self.buffer if data is None else Mixed(self.buffer, data)
        stacked = getattr(first, "frames", 1)
        gbyte = self.buffer.check_memory(stacked) / 1e9
        if cfg.obs == "rgb":
            once = f"; of the {stacked} frames in an observation, one a step is kept" if stacked > 1 else ""
            notes.append(f"replay: {gbyte:.3g} GB of memory for {self.buffer.capacity:,} steps{once}")
        agent = TDMPC2(cfg, ranks=ranks)
        if saved is None:
            begin_with(agent, notes)
        # Updates on the CPU and environments want the same cores, and an update takes far longer than a step.
        self.overlap = agent.device.type == "cuda" if cfg.overlap is None else cfg.overlap
        updates = updates_on(agent.updater, self.overlap)
        super().__init__(agent, folder, stop, source, evaluation or source, updates, ranks)
        self.random = np.random.default_rng(stream_seed(own.seed, "random actions"))

        # What leaves traces, so that what fails above leaves none: files, then processes.
        resumed = None if saved is None else saved.values["log"]
        header = about(agent, ranks) | dict(facts or {})
        self.log = RunLog(cfg, folder, first.action_repeat, header, resumed, rank=ranks.rank)
        for note in notes:
            self.log.note(note)
        self.doubts = Doubts(cfg, self.log.warn_once if ranks.first else lambda *_: None)
        self.checkpoints = Checkpoints(folder, cfg.keep_checkpoints, ranks)
        self.envs = source.together(own, first, self.log.warn, restarts, dropped)
        self.rollouts = rollouts_in(self.envs, own, agent.device, self.log.warn, restarts, dropped)
        if saved is not None:
            resume.restore(self, saved)

    @override
    def step(self) -> None:
        """Make one decision in every environment, and the updates due with it."""
        self._settle()
        with self.log.clock.part("environment"):
            self.rollouts.begin()
        with self.log.clock.part("plan"):
            self._act()
        with self.log.clock.part("environment"):
            self.rollouts.step_async()
        self._learn()
        with self.log.clock.part("environment"):
            self.rollouts.step_wait()
        self.log.step(self.progress.decisions, len(self.buffer) / self.buffer.capacity)

    @override
    def close(self) -> None:
        super().close()
        self.envs.close()
        if self.data is not None:
            self.data.close()

    @override
    def state(self, whole: bool) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        under_way, envs = self.rollouts.state(self.log.warn_once) if whole else ({}, None)
        parts: dict[str, Mapping[str, Tensor]] = dict(replay=self.buffer.state(), **under_way)
        parts |= {} if self.data is None else dict(data=self.data.state())
        return parts, dict(
            random=self.random.bit_generator.state,
            envs=envs,
            restarts=self.rollouts.restarts,
            dropped=self.rollouts.failures.dropped,
        )

    @override
    def restore(self, parts: Mapping[str, Mapping[str, Tensor]], saved: Saved) -> None:
        values = saved.values
        if saved.dealt:
            deal(saved, self.buffer, self.checkpoints.replay, self.ranks)
            self.log.note(f"{len(saved.dealt)} ranks wrote it, {self.ranks.count} go on: replays are dealt out anew")
        else:
            self.buffer.restore(parts["replay"], self.checkpoints.replay.read(saved.chunks))
            self.random.bit_generator.state = values["random"]
        if self.data is not None:
            self.data.load_state(parts["data"])
        if values["envs"] is None:
            self.log.note("the episodes under way are not in the checkpoint: new ones are begun")
        else:
            self.rollouts.restore(parts, values["envs"], self.log.warn)

    @override
    def why_nothing_learned(self) -> str:
        return self.doubts.why_nothing_learned(self.buffer)

    @override
    def result(self) -> str:
        dropped = self.rollouts.failures.dropped
        return f"{dropped} training episodes were dropped, since their environment failed" if dropped else ""

    @property
    @override
    def replay(self) -> ReplayBuffer:
        return self.buffer

    @property
    @override
    def any_ended(self) -> bool:
        return self.rollouts.any_ended

    @property
    @override
    def at_boundary(self) -> bool:
        return self.rollouts.at_boundary

    @override
    def _begin(self) -> None:
        self._launch(pretraining=True)  # what is left over where the run was stopped in it

    # ---- a decision, in its order

    @override
    def _settle(self) -> None:
        """Queue what follows behind the updates launched; move episodes that have ended into replay and log."""
        with self.log.clock.part("update"):
            self._updates.join()
            if self.rollouts.any_ended:
                self._updates.wait()  # they read the replay
        before, rows = self.buffer.num_eps, []
        for episode in self.rollouts.ended():
            self.buffer.add(episode.rows())
            self.doubts.episode(episode)
            rows.append(self._row(episode))
            if self.ranks.count == 1:
                self.log.episode(self.progress.decisions, rows[-1] | self._losses())
        if self.ranks.count > 1 and self._something_ended:
            self._something_ended = False
            self._record(self.ranks.told([before, rows]))

    def _record(self, each: list[Any]) -> None:
        """Log the episodes of all ranks, of each how many there were before and the rows; numbers are of the run."""
        episodes, losses = sum(before for before, _ in each), self._losses()
        for row in (row for _, rows in each for row in rows):
            episodes += 1
            self.log.episode(self.progress.decisions, row | dict(episode=episodes) | losses)

    def _row(self, episode: Played) -> dict[str, Any]:
        return dict(
            episode=self.buffer.num_eps,
            **({} if episode.task is None else dict(task=self.cfg.tasks[episode.task])),
            episode_reward=round(episode.total, 2),
            episode_success=episode.success,
            episode_length=len(episode),
            episode_terminated=float(episode.terminates),
        )

    def _act(self) -> None:
        """Choose an action for every environment: random at first where the agent knows nothing, then the agent's."""
        self.progress.decisions += self.cfg.num_envs
        if self.progress.seeded or self.cfg.has_weights:
            self.rollouts.act(self.agent)
        else:
            size = (self.own.num_envs, self.cfg.need("action_dim"))
            self.rollouts.take(self.random.uniform(-1, 1, size).astype(np.float32))

    def _learn(self) -> None:
        """Launch the updates that are due."""
        now = self.progress
        pretraining = not now.seeded and now.decisions > self._seed_steps and self._all_can_learn
        if now.seeded:
            now.updates_due += self.cfg.utd * self.cfg.num_envs
        elif pretraining:
            now.seeded = True
            self.log.note(f"pretraining on the seed data: {self._seed_steps:,} updates")
            now.updates_due += self._seed_steps
        else:
            self.doubts.seeded(now.decisions, self.buffer)
        self._launch(pretraining)

    def _launch(self, pretraining: bool) -> None:
        """Launch updates until none is due; in pretraining, until the run is asked to stop."""
        with self.log.clock.part("update"):
            while self.progress.updates_due >= 1 and not (pretraining and self._stopping()):
                self._updates.launch(self._update)
                self.progress.updates_due -= 1
                left = int(self.progress.updates_due)
                if pretraining and left % _LAUNCHED_AT_ONCE == 0:
                    self._updates.wait()
                    self.log.busy("pretraining", self._seed_steps - left, self._seed_steps)
            if not self.overlap:
                self._updates.wait()

    def _update(self) -> None:
        self.metrics = self.agent.update(self.sampler)

    @property
    def _all_can_learn(self) -> bool:
        return self.ranks.every(self.buffer.num_sampleable > 0)

    @property
    def _seed_steps(self) -> int:
        return self.cfg.seed_steps or 0
