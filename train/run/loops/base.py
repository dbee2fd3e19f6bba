"""What every run does, from data or from environments: it steps, evaluates, saves, and ends where it is asked to.

A run counts its steps in `progress.decisions`: decisions where it trains online, updates where it trains offline.
Evaluation comes at the first boundary after every `eval_freq` steps, at the start, and at the end; a checkpoint before
each evaluation, every `checkpoint_minutes`, and at the end.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.kernels.losses.running_scale import MAX_BATCH
from tdmpc2_fast.learn.metrics import metric_names
from tdmpc2_fast.learn.replay import ReplayBuffer
from tdmpc2_fast.model import checkpoint
from tdmpc2_fast.model.transfer import Donor, begin_from
from tdmpc2_fast.runtime.ranks import ALONE, Ranks

from ...envs.given import Source
from ...log.run_log import RunLog
from .. import resume
from ..checkpoints import Checkpoints, Saved
from ..evaluate import Evaluation, Evaluator
from ..events import Callback, Calls
from ..overlap import Updates
from ..resume import Progress
from ..shared.evaluation import SharedEvaluator
from ..stop import Stop, Stopped


class Trainer:
    """A run around one agent; subclasses say what a step is, and what of it is kept.

    Args:
        agent: what is trained.
        folder: where CSVs and checkpoints go.
        stop: looked at between steps.
        source: where its environments come from.
        evaluation: where those come from that it is evaluated in.
        updates: what runs the updates.
        ranks: those that share the run; each calls the same methods at the same time.
    """

    log: RunLog  # made when nothing can fail any more
    checkpoints: Checkpoints

    def __init__(
        self,
        agent: TDMPC2,
        folder: Path,
        stop: Stop | None,
        source: Source,
        evaluation: Source,
        updates: Updates,
        ranks: Ranks = ALONE,
    ) -> None:
        self.agent, self.cfg, self.folder = agent, agent.cfg, folder
        self.stop, self.source, self.evaluation = stop or Stop(), source, evaluation
        self._updates, self.ranks = updates, ranks
        if agent.updater.backend.name != "torch" and agent.cfg.batch_size > MAX_BATCH:
            raise ConfigError(
                f"config key 'batch_size': got {agent.cfg.batch_size}, allowed: at most {MAX_BATCH} with "
                f"backend={agent.updater.backend.name}; backend=torch takes more"
            )
        ranks.spread([*agent.model.parameters(), *agent.model.buffers()])
        # What the loop keeps from one step to the next.
        self.progress = Progress()
        self.metrics: dict[str, Tensor] = {}
        self.evaluator: Evaluator | SharedEvaluator | None = None  # made when it is first needed
        self.evaluated: dict[str, Any] = {}  # what came of the last evaluation
        self.ended = False  # because a callback said so
        self._evaluated_now: Evaluation | None = None  # where that was at an evaluation
        self._evaluating = False
        self._saved_at = time.monotonic()
        self._agrees_every = 1  # steps after which ranks agree whether to stop, to save or to end
        self._something_ended = False  # on any rank

    # ---- what a kind of run says of itself

    def step(self) -> None:
        """Make one step."""
        raise NotImplementedError

    def state(self, whole: bool) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """Return what going on takes beyond what all runs have: tensors by part, and JSON-ready values.

        whole: as for `resume.save`.
        """
        raise NotImplementedError

    def restore(self, parts: Mapping[str, Mapping[str, Tensor]], saved: Saved) -> None:
        """Take up what `state` returned."""
        raise NotImplementedError

    def why_nothing_learned(self) -> str:
        """Return why a run that has ended made no update."""
        raise NotImplementedError

    def result(self) -> str:
        """Return what the summary adds to the result; empty where there is nothing to add."""
        return ""

    @property
    def replay(self) -> ReplayBuffer | None:
        """What it has played; None of a run that plays nothing."""
        return None

    @property
    def any_ended(self) -> bool:
        """Tells whether an episode has ended that is not in the log yet."""
        return False

    @property
    def at_boundary(self) -> bool:
        """Tells whether an evaluation may come before the next step."""
        return True

    def _begin(self) -> None:
        """Do what was left over where the run was stopped."""

    def _settle(self) -> None:
        """Bring log and memory up to the last step, before an evaluation."""

    def close(self) -> None:
        """Free what the updates and the environments hold."""
        self._updates.close()
        if self.evaluator is not None:
            self.evaluator.close()

    # ---- the run

    def run(self) -> Evaluation:
        """Train for `steps` steps; return the last evaluation.

        Raises:
            Stopped: `stop` said so; the checkpoint to go on from is written.
        """
        try:
            self._begin()
            self._stop_or_save()
            while self.progress.decisions < self.cfg.steps and not self.ended:
                if self._evaluation_due and self.ranks.any(self.at_boundary):
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
            # An evaluation begins with a checkpoint; and a rank alone can write none.
            if self.ranks.count == 1 and not in_a_hurry and not self._evaluating:
                self._save(whole=False)
            raise
        finally:
            self.close()

    def call(self, callbacks: Sequence[Callback]) -> None:
        """Tell callbacks of the rows and evaluations to come, and end where one of them says so."""
        if callbacks:
            self.log.sinks["callbacks"] = Calls(callbacks, self)

    def make_evaluator(self) -> Evaluator | SharedEvaluator:
        """Return what plays the episodes of an evaluation, or this rank's share of them."""
        if self.ranks.count == 1:
            return Evaluator(self.agent, self.evaluation)
        return SharedEvaluator(self.agent, self.evaluation, self.ranks)

    def _losses(self) -> dict[str, float | None]:
        """Return the metrics of the last update, all of them None before the first."""
        names = metric_names(self.cfg.episodic)
        known = [k for k in names if k in self.metrics]
        # One copy from the device, not one a metric.
        read = torch.stack([self.metrics[k] for k in known]).tolist() if known else []
        return dict.fromkeys(names) | dict(zip(known, read, strict=True))

    # ---- between two steps

    @property
    def _evaluation_due(self) -> bool:
        """Tells whether a multiple of `eval_freq` steps was passed since the last evaluation."""
        now, period = self.progress, self.cfg.eval_freq
        return now.evaluated_at < 0 or now.decisions // period > now.evaluated_at // period

    def _evaluate(self) -> Evaluation:
        """Save, evaluate, and mark the weights as the best if they are."""
        self._settle()
        saved, now = self._save(), self.progress
        with self.log.clock.part("evaluation"):
            if self.evaluator is None:
                self.evaluator = self.make_evaluator()
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
                if self.agent.updater.steps or self.cfg.has_weights:
                    now.best = found.merit
            except OSError as e:
                self.log.warn(f"checkpoints/best stays what it was: {e}")
        return found

    def _stop_or_save(self) -> None:
        """Write a checkpoint if it is time, and end if that is asked for."""
        if self.ranks.count > 1 and self.progress.decisions % self._agrees_every:
            return
        minutes = self.cfg.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        # The first rank's clock, and callbacks, are those of the run.
        asked = self.stop.wanted(), self.ranks.first and due, self.ended, self.any_ended
        signal, save, ended, some = self.ranks.most(*asked)
        self.ended, self._something_ended = bool(ended), bool(some)
        if signal or save:
            self._save()
        if signal:
            raise Stopped(signal)

    def _stopping(self) -> bool:
        """Tell whether any rank was asked to stop; all ask at the same time."""
        return self.ranks.any(self.stop.asked)

    def _save(self, whole: bool = True) -> bool:
        """Write a checkpoint unless switched off, with no update under way; tell whether it was written."""
        self._saved_at = time.monotonic()
        if not self.cfg.save_agent:
            return False
        if whole:
            self._updates.wait()
        return resume.save(self, whole)


def begin_with(agent: TDMPC2, notes: list[str]) -> None:
    """Take the weights that a new run begins with, where a checkpoint is given: all of them, or those that fit."""
    cfg = agent.cfg
    if cfg.checkpoint is not None:
        path = checkpoint.find_checkpoint(cfg.checkpoint)
        weights, made_with = checkpoint.read(path)
        checkpoint.load_into(agent.model, weights, repr(str(path)), notes.append, made_with)
    elif cfg.init is not None:
        notes.append(begin_from(agent.model, Donor.read(cfg.init), cfg.init_task))


def about(agent: TDMPC2, ranks: Ranks = ALONE) -> dict[str, str]:
    """Return the facts about an agent that the header of a run shows."""
    shared = {} if ranks.count == 1 else dict(ranks=str(ranks.count))
    return shared | dict(
        model=f"{agent.model.total_params:,} parameters",
        device=str(agent.device),
        backend=f"{agent.backend.name} ({agent.backend.why})",
        threads=str(torch.get_num_threads()),
    )
