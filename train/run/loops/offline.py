"""Offline training: updates from recorded episodes, with no environment until the agent is evaluated.

A step of the run is one update, and `step` in its files counts updates, as in the official offline training. What is
drawn comes from a `Stream`, which hands over a batch that is ready; `draw` in the time split is what the update waited.
On a GPU nothing here waits for the device: batches are copied, and updates launched, behind those under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from typing_extensions import override

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.config import Config
from tdmpc2_fast.learn.batch import Batch
from tdmpc2_fast.runtime.ranks import ALONE, Ranks

from ...envs.given import Source
from ...log.run_log import RunLog
from .. import resume
from ..checkpoints import Checkpoints, Saved
from ..overlap import updates_on
from ..stop import Stop
from .base import Trainer, about, begin_with

_BETWEEN_AGREEMENTS = 16  # updates: ranks wait for each other's hosts no more often
_BETWEEN_ROWS = 1_000
"""Updates between two rows of `train.csv`; the official code writes every tenth of them."""


class Stream(Protocol):
    """A data set that batches are drawn from."""

    def sample(self) -> Batch:
        """Return the next `batch_size` slices, as of `Config`."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return all that the batches to come are drawn from."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the batch that would have come after `state`."""
        ...

    def close(self) -> None:
        """End what reads ahead."""
        ...


class OfflineTrainer(Trainer):
    """Trains one agent from a data set.

    Args:
        cfg: a completed config.
        data: what is learned from; closed at the end.
        folder: where CSVs and checkpoints go.
        saved: the checkpoint of this run to go on from.
        stop: looked at between updates.
        source: where the environments come from that it is evaluated in; default by `cfg.task`.
        facts: what the header of the run says of the data.
        ranks: those that share the run; `data` gives each its share of a batch.
    """

    def __init__(
        self,
        cfg: Config,
        data: Stream,
        folder: Path,
        saved: Saved | None = None,
        stop: Stop | None = None,
        source: Source | None = None,
        facts: Mapping[str, str] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        source, agent, notes = source or Source(), TDMPC2(cfg, ranks=ranks), list[str]()
        if saved is None:
            begin_with(agent, notes)
        super().__init__(agent, folder, stop, source, source, updates_on(agent.updater, overlap=False), ranks)
        self._agrees_every = _BETWEEN_AGREEMENTS
        self.data = data
        resumed = None if saved is None else saved.values["log"]
        header = about(agent, ranks) | dict(facts or {})
        self.log = RunLog(cfg, folder, 1, header, resumed, "updates", ranks.rank)
        for note in notes:
            self.log.note(note)
        self.checkpoints = Checkpoints(folder, cfg.keep_checkpoints, ranks)
        self._written = 0 if saved is None else saved.values["written"]
        if saved is not None:
            resume.restore(self, saved)

    @override
    def step(self) -> None:
        """Make one update."""
        with self.log.clock.part("draw"):
            batch = self.data.sample()
        with self.log.clock.part("update"):
            self.metrics = self.agent.updater.step(batch)
        self.progress.decisions += 1
        if self.progress.decisions % _BETWEEN_ROWS == 0:
            self._write_row()
        self.log.step(self.progress.decisions, 0.0)

    @override
    def close(self) -> None:
        super().close()
        self.data.close()

    @override
    def state(self, whole: bool) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        return dict(data=self.data.state()), dict(written=self._written)

    @override
    def restore(self, parts: Mapping[str, Mapping[str, Tensor]], saved: Saved) -> None:
        self.data.load_state(parts["data"])

    @override
    def why_nothing_learned(self) -> str:
        return "no update was made"

    @override
    def result(self) -> str:
        return f"its time: {self.log.time_split()}"

    @override
    def _settle(self) -> None:
        with self.log.clock.part("update"):
            self._updates.wait()  # or an evaluation is blamed for what is under way
        if self.progress.decisions > self._written:
            self._write_row()

    def _write_row(self) -> None:
        self._written = self.progress.decisions
        self.log.updates(self._written, self._losses())
