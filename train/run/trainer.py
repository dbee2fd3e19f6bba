"""Online training: one loop for one environment and for many.

The official schedule, counted in decisions: random actions up to and including
`seed_steps` (and on, until an episode has ended: with many environments that can be later);
there, as many updates as seed steps; from then on `utd` updates per decision. Evaluation
at the first episode boundary after every `eval_freq` decisions, at the start, and at the end.

The order within a decision is official, too: episodes that ended in the last one enter the
replay, their environments are reset, the agent acts, the environments step, the agent learns.
An update therefore never sees the step of its own decision, and runs beside it where `overlap`
says so; otherwise the host waits for it first. Nothing else differs, and no number does.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.config import Config
from tdmpc2_fast.learn.metrics import metric_names
from tdmpc2_fast.learn.replay import ReplayBuffer
from tdmpc2_fast.model import checkpoint
from tdmpc2_fast.runtime.backend import resolve_device
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
from .evaluate import Evaluation, Evaluator
from .events import Callback, Calls
from .overlap import updates_on
from .resume import Progress
from .rollouts import rollouts_in
from .stop import Stop, Stopped

_LAUNCHED_AT_ONCE = 16  # updates of pretraining, between which a run can stop and show itself


class OnlineTrainer:
    """Trains one agent on one task.

    Args:
        cfg: config without what the environment fills in.
        folder: where CSVs and checkpoints go.
        saved: the checkpoint of this run to go on from.
        stop: looked at between steps.
        source: where its environments come from; default by `cfg.task`.
        evaluation: where those come from that it is evaluated in; default as `source`.

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
    ) -> None:
        leave_if_imported_anew()
        restarts, dropped = resume.made_anew(saved)
        self.source = source or Source()
        self.evaluation = evaluation or self.source
        first = self.source.first(cfg, env_seed(cfg.seed, 0, restarts + dropped))
        self.cfg = cfg = complete(cfg, first)
        self.folder, self.stop = folder, stop or Stop()

        # What acts, remembers and learns.
        notes = list(getattr(first, "notes", ()))
        self.buffer = ReplayBuffer(cfg, resolve_device(cfg.device))
        stacked = getattr(first, "frames", 1)
        gbyte = self.buffer.check_memory(stacked) / 1e9
        if cfg.obs == "rgb":
            once = f"; of the {stacked} frames in an observation, one a step is kept" if stacked > 1 else ""
            notes.append(f"replay: {gbyte:.3g} GB of memory for {self.buffer.capacity:,} steps{once}")
        self.agent = agent = TDMPC2(cfg)
        if cfg.checkpoint is not None and saved is None:
            path = checkpoint.find_checkpoint(cfg.checkpoint)
            weights, made_with = checkpoint.read(path)
            checkpoint.load_into(agent.model, weights, repr(str(path)), notes.append, made_with)
        # Updates on the CPU and environments want the same cores, and an update takes far longer than a step.
        self.overlap = agent.device.type == "cuda" if cfg.overlap is None else cfg.overlap
        self._updates = updates_on(agent.updater, self.overlap)

        # What the loop keeps from one decision to the next.
        self.progress = Progress()
        self.random = np.random.default_rng(stream_seed(cfg.seed, "random actions"))
        self.metrics: dict[str, Tensor] = {}
        self.evaluator: Evaluator | None = None  # made when it is first needed
        self.evaluated: dict[str, Any] = {}  # what came of the last evaluation
        self.ended = False  # because a callback said so
        self._evaluated_now: Evaluation | None = None  # where that was at an evaluation
        self._evaluating = False
        self._saved_at = time.monotonic()

        # What leaves traces, so that what fails above leaves none: files, then processes.
        resumed = None if saved is None else saved.values["log"]
        self.log = RunLog(cfg, folder, first.action_repeat, _about(agent), resumed)
        for note in notes:
            self.log.note(note)
        self.doubts = Doubts(cfg, self.log.warn_once)
        self.checkpoints = Checkpoints(folder, cfg.keep_checkpoints)
        self.envs = self.source.together(cfg, first, self.log.warn, restarts, dropped)
        self.rollouts = rollouts_in(self.envs, cfg, agent.device, self.log.warn, restarts, dropped)
        if saved is not None:
            resume.restore(self, saved)

    def run(self) -> Evaluation:
        """Train for `steps` decisions; return the last evaluation.

        Raises:
            Stopped: `stop` said so; the checkpoint to go on from is written.
        """
        try:
            self._launch(pretraining=True)  # what is left over where the run was stopped in it
            self._stop_or_save()
            while self.progress.decisions < self.cfg.steps and not self.ended:
                if self._evaluation_due and self.rollouts.at_boundary:
                    self._evaluate()
                self.step()
                self._stop_or_save()
            found = self._evaluated_now or self._evaluate()
            self._save()
            return found
        except Stopped:
            raise
        except BaseException as e:
            self._updates.close()  # those under way end, so that the weights saved are of whole updates
            in_a_hurry = isinstance(e, KeyboardInterrupt) and self.stop.asked
            if not in_a_hurry and not self._evaluating:  # an evaluation begins with a checkpoint
                self._save(whole=False)
            raise
        finally:
            self.close()

    def call(self, callbacks: Sequence[Callback]) -> None:
        """Tell callbacks of the episodes and evaluations to come, and end where one of them says so."""
        if callbacks:
            self.log.sinks["callbacks"] = Calls(callbacks, self)

    def step(self) -> None:
        """Make one decision in every environment, and the updates due with it."""
        self._store()
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

    def close(self) -> None:
        """Free what the updates and the environments hold."""
        self._updates.close()
        self.envs.close()
        if self.evaluator is not None:
            self.evaluator.close()

    # ---- a decision, in its order

    def _store(self) -> None:
        """Queue what follows behind the updates launched; move episodes that have ended into replay and log."""
        with self.log.clock.part("update"):
            self._updates.join()
            if self.rollouts.any_ended:
                self._updates.wait()  # they read the replay
        for episode in self.rollouts.ended():
            self.buffer.add(episode.rows())
            self.doubts.episode(episode)
            self._record(episode)

    def _record(self, episode: Played) -> None:
        row: dict[str, Any] = dict(
            episode=self.buffer.num_eps,
            **({} if episode.task is None else dict(task=self.cfg.tasks[episode.task])),
            episode_reward=round(episode.total, 2),
            episode_success=episode.success,
            episode_length=len(episode),
            episode_terminated=float(episode.terminates),
        )
        names = metric_names(self.cfg.episodic)
        known = [k for k in names if k in self.metrics]
        # One copy from the device, not one a metric.
        read = torch.stack([self.metrics[k] for k in known]).tolist() if known else []
        self.log.episode(self.progress.decisions, row | dict.fromkeys(names) | dict(zip(known, read, strict=True)))

    def _act(self) -> None:
        """Choose an action for every environment: random at first, then the agent's."""
        self.progress.decisions += self.cfg.num_envs
        if self.progress.seeded:
            self.rollouts.act(self.agent)
        else:
            size = (self.cfg.num_envs, self.cfg.need("action_dim"))
            self.rollouts.take(self.random.uniform(-1, 1, size).astype(np.float32))

    def _learn(self) -> None:
        """Launch the updates that are due."""
        now = self.progress
        pretraining = not now.seeded and now.decisions > self._seed_steps and self.buffer.num_sampleable > 0
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
            while self.progress.updates_due >= 1 and not (pretraining and self.stop.asked):
                self._updates.launch(self._update)
                self.progress.updates_due -= 1
                left = int(self.progress.updates_due)
                if pretraining and left % _LAUNCHED_AT_ONCE == 0:
                    self._updates.wait()
                    self.log.busy("pretraining", self._seed_steps - left, self._seed_steps)
            if not self.overlap:
                self._updates.wait()

    def _update(self) -> None:
        self.metrics = self.agent.update(self.buffer)

    @property
    def _seed_steps(self) -> int:
        return self.cfg.seed_steps or 0

    # ---- between two decisions

    @property
    def _evaluation_due(self) -> bool:
        """Tells whether a multiple of `eval_freq` decisions was passed since the last evaluation."""
        now, period = self.progress, self.cfg.eval_freq
        return now.evaluated_at < 0 or now.decisions // period > now.evaluated_at // period

    def _evaluate(self) -> Evaluation:
        """Save, evaluate, and mark the weights as the best if they are."""
        self._store()
        saved, now = self._save(), self.progress
        with self.log.clock.part("evaluation"):
            if self.evaluator is None:
                self.evaluator = Evaluator(self.agent, self.evaluation)
            step = now.decisions * self.log.action_repeat
            video = self.folder / "videos" / f"{step}.mp4" if self.cfg.save_video else None
            busy = functools.partial(self.log.busy, "evaluating")
            self._evaluating = saved
            found = self.evaluator.run(self.stop, busy, video, self.log.warn_once)
            self._evaluating = False
        now.evaluated_at, episodes = now.decisions, len(found.returns)
        self._evaluated_now = None
        self.evaluated = {"return": found.mean_return, "return_std": found.std_return, "episodes": episodes}
        success = float(np.mean(found.successes))
        self.log.evaluation(now.decisions, found.mean_return, found.std_return, episodes, success, found.columns())
        self._evaluated_now = found if self.ended else None
        if saved and (now.best is None or found.merit > now.best):
            try:
                self.checkpoints.mark_best(resume.about_weights(self))
                # What an agent returns that has learned nothing is no bar: a few lucky episodes would set it.
                if self.agent.updater.steps or self.cfg.checkpoint is not None:
                    now.best = found.merit
            except OSError as e:
                self.log.warn(f"checkpoints/best stays what it was: {e}")
        return found

    def _stop_or_save(self) -> None:
        """Write a checkpoint if it is time, and end if that is asked for."""
        minutes = self.cfg.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        if self.stop.asked or due:
            self._save()
        self.stop.check()

    def _save(self, whole: bool = True) -> bool:
        """Write a checkpoint unless switched off, with no update under way; tell whether it was written."""
        self._saved_at = time.monotonic()
        if not self.cfg.save_agent:
            return False
        if whole:
            self._updates.wait()
        return resume.save(self, whole)


def _about(agent: TDMPC2) -> dict[str, str]:
    """Return the facts about an agent that the header of a run shows."""
    return dict(
        model=f"{agent.model.total_params:,} parameters",
        device=str(agent.device),
        backend=f"{agent.backend.name} ({agent.backend.why})",
        threads=str(torch.get_num_threads()),
    )
