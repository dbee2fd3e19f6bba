"""Saving a run and going on with it: all that its loop keeps goes into a checkpoint, and comes back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import RanksError
from tdmpc2_fast.learn.replay import ReplayBuffer
from tdmpc2_fast.model import checkpoint
from tdmpc2_fast.runtime.ranks import Ranks

from ..envs.given import Source
from ..log.run_log import RunLog
from .checkpoints import Checkpoints, Saved
from .evaluate import Evaluator
from .shared.evaluation import SharedEvaluator


@dataclass
class Progress:
    """How far a run has come, in the numbers that its loop counts with."""

    decisions: int = 0
    updates_due: float = 0.0
    seeded: bool = False  # the agent acts, and learns
    evaluated_at: int = -1  # decisions
    best: float | None = None  # `Evaluation.merit`


class Resumable(Protocol):
    """What of a run is saved and taken up again."""

    cfg: Config
    agent: TDMPC2
    evaluator: Evaluator | SharedEvaluator | None
    evaluation: Source
    checkpoints: Checkpoints
    log: RunLog
    progress: Progress
    metrics: dict[str, Tensor]
    evaluated: dict[str, Any]
    ranks: Ranks

    def make_evaluator(self) -> Evaluator | SharedEvaluator:
        """Return what plays its evaluations."""
        ...

    @property
    def replay(self) -> ReplayBuffer | None:
        """What it has played, where it plays."""
        ...

    def state(self, whole: bool) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """Return what this kind of run keeps beside."""
        ...

    def restore(self, parts: Mapping[str, Mapping[str, Tensor]], saved: Saved) -> None:
        """Take up what `state` returned."""
        ...


def save(run: Resumable, whole: bool) -> bool:
    """Write a checkpoint, unless the weights are not worth keeping; tell whether it was written.

    whole: False leaves out environments and the episodes in them, after one has failed.
    """
    try:
        if not all(bool(p.isfinite().all()) for p in run.agent.model.parameters()):
            run.log.warn("no checkpoint: weights are not finite; the last one stays")
            return False
        _check_alike(run)
        run.checkpoints.save(run.agent.model, *_state(run, whole), run.replay, about_weights(run))
        return True
    except OSError as e:
        run.log.warn(
            f"no checkpoint could be written: {e}. What was written before is whole. Make room or mend the disk; "
            "the next checkpoint is tried when it is due"
        )
    except Exception as e:
        if whole:
            raise
        run.log.warn(f"no checkpoint: {type(e).__name__}: {e}")  # what it follows from is told next
    return False


def _check_alike(run: Resumable) -> None:
    """Raise `RanksError` where ranks have come to differ, of whose weights the first one's would be written."""
    if run.ranks.count == 1:
        return
    bits = [p.detach().float().view(torch.int32).sum(dtype=torch.int64) for p in run.agent.model.parameters()]
    sums = run.ranks.told(torch.stack(bits).tolist())
    if any(x != sums[0] for x in sums):
        other = next(rank for rank, x in enumerate(sums) if x != sums[0])
        raise RanksError(f"the weights of rank {other} are no longer those of rank 0: the run ends, and writes none")


def about_weights(run: Resumable) -> dict[str, Any]:
    """Return what `checkpoints.trained` tells of the weights as they are."""
    decisions = run.progress.decisions
    facts = dict(step=decisions * run.log.action_repeat, updates=run.agent.updater.steps)
    facts |= dict(decisions=decisions) if run.log.unit == "decisions" else {}
    return facts | (run.evaluated if run.progress.evaluated_at == decisions else {})


def _state(run: Resumable, whole: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return everything to go on from but weights and steps of the replay."""
    parts: dict[str, Mapping[str, Tensor]] = dict(
        planner=run.agent.planner.state(),
        updater=run.agent.updater.state(),
        metrics=run.metrics,
    )
    if run.evaluator is not None:
        parts["evaluation"] = run.evaluator.planner.state()
    own, more = run.state(whole)
    parts |= own
    values = asdict(run.progress) | dict(
        **more,
        evaluation=None if run.evaluator is None else run.evaluator.states(),
        log=run.log.state(),
        made_by=_made_by(run),
    )
    return {f"{part}/{name}": x for part, found in parts.items() for name, x in found.items()}, values


def made_anew(saved: Saved | None) -> tuple[int, int]:
    """Return the restarts of a run's environments and its dropped episodes: seeds of new environments count both."""
    if saved is None:
        return 0, 0
    # Where the environments' states are not known, others are made than those that led to it.
    return saved.values.get("restarts", 0) + (saved.values["envs"] is None), saved.values.get("dropped", 0)


def restore(run: Resumable, saved: Saved) -> None:
    """Bring a run that was just made to where the checkpoint was written."""
    values, parts = saved.values, _parts(saved.tensors)
    agent = run.agent
    checkpoint.load_into(agent.model, saved.weights, repr(str(saved.folder)))
    agent.updater.load_state(parts.get("updater", {}))
    if "planner" in parts:
        agent.planner.load_state(parts["planner"])
    run.metrics = {k: x.to(agent.device) for k, x in parts.get("metrics", {}).items()}
    run.progress = Progress(**{f.name: values[f.name] for f in fields(Progress)})
    if values["evaluation"] is not None:
        run.evaluator = run.make_evaluator()
        run.evaluator.restore(values["evaluation"], parts["evaluation"])
    run.restore(parts, saved)
    before, now = values["made_by"], _made_by(run)
    changed = [f"{k} {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]]
    if changed:
        run.log.note(f"going on with {', '.join(changed)}: the same algorithm, but not bit for bit the same numbers")


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by what stands before the slash in their names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        part, _, rest = name.partition("/")
        found.setdefault(part, {})[rest] = x
    return found


def _made_by(run: Resumable) -> dict[str, str]:
    """Return what the rounding of a run depends on."""
    agent = run.agent
    return dict(
        device=torch.cuda.get_device_name(agent.device) if agent.device.type == "cuda" else "cpu",
        backend=agent.backend.name,
        precision=run.cfg.precision,
        torch=torch.__version__,
        threads=str(torch.get_num_threads()),
    )
