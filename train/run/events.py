"""What a program is told of a run as it goes, and how it ends one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from typing_extensions import override

from tdmpc2_fast.agent import TDMPC2

from ..log.sinks import Sink


class Event(NamedTuple):
    """Something that happened: an episode of training ended, updates from data were made, or an evaluation.

    Values of an episode are those of a row of `train.csv`, `episode_reward` among them, and so are those of updates,
    which have losses only; of an evaluation `return`, `return_std` and `success`.
    """

    kind: str  # episode, updates or evaluation
    step: int  # environment steps, or updates, as in the files
    values: Mapping[str, Any]
    agent: TDMPC2


class Callback(Protocol):
    """A function that is told of events. False as its answer ends the run, as if its steps were done."""

    def __call__(self, event: Event) -> bool | None:
        """Take note of an event."""
        ...


class Told(Protocol):
    """What of a run callbacks reach."""

    agent: TDMPC2
    ended: bool


class Calls(Sink):
    """Passes the rows of a log on to callbacks. What one of them raises ends the run."""

    def __init__(self, callbacks: Sequence[Callback], run: Told) -> None:
        self._callbacks, self._run = callbacks, run

    @override
    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        what = "evaluation" if kind == "eval" else "episode" if "episode_reward" in values else "updates"
        event = Event(what, step, {k: v for k, v in values.items() if v is not None}, self._run.agent)
        for callback in self._callbacks:
            answer = callback(event)
            if isinstance(answer, (bool, np.bool_)) and not answer:
                self._run.ended = True

    @override
    def state(self) -> dict[str, Any]:
        return {}

    @override
    def close(self) -> None:
        return None
