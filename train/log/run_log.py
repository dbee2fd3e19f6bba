"""The numbers of a run on their way to its files and to its display."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdmpc2_fast.config import Config
from tdmpc2_fast.model.files import replacing

from .display import choose
from .sinks import Csv, Disk, Sink, TensorBoard, WandB
from .status import Clock, Status, counted

WALL_CLOCK = ("elapsed_time", "decisions_per_second")
"""The last columns of `train.csv`: what two equal runs differ in."""
WALL_CLOCK_OFFLINE = ("elapsed_time", "updates_per_second", "draw_time")
"""The same of a run from data: `draw_time` counts the seconds that updates waited for their batches."""


class RunLog:
    """Keeps `config.json`, the CSV files, TensorBoard, Weights & Biases and the display of a run.

    `step` counts environment steps, action repeat included, like the published curves;
    decisions are calls of the planner.

    Args:
        cfg: the completed config.
        folder: the run folder.
        action_repeat: environment steps per decision.
        about: facts for the header, in order, e.g. `{"model": "1,012,345 parameters", "device": "cpu"}`.
        unit: what the run counts: decisions, or the updates of one that has no environment.
        rank: of this process among those that share the run. Only the first one writes and shows; others warn.
        resumed: what `state` returned when the checkpoint was written that the run goes on from.
            Rows after it are taken back: they belong to a stretch that is run again.

    Raises:
        ConfigError: `enable_wandb` or `display=live` without the package.
        OSError: a file that cannot be written at the start.
    """

    def __init__(
        self,
        cfg: Config,
        folder: Path,
        action_repeat: int,
        about: Mapping[str, str],
        resumed: Mapping[str, Any] | None = None,
        unit: str = "decisions",
        rank: int = 0,
    ) -> None:
        if rank:
            cfg = cfg.replace(display="none", enable_wandb=False, save_csv=False, tensorboard=False)
        self.cfg, self.action_repeat, self.unit = cfg, action_repeat, unit
        self.clock = Clock()
        self._status = Status(cfg, folder, action_repeat, about, self.clock, unit)
        self._closed = False
        self._warned: set[str] = set()
        self._who = f"rank {rank}: " if rank else ""
        saved: Mapping[str, Any] = resumed or {}
        if resumed is not None:
            self._status.load(resumed["status"])
        path, text = folder / "config.json", json.dumps(cfg.to_dict(), indent=1) + "\n"
        if not rank and (not path.exists() or path.read_text() != text):
            with replacing(path) as tmp:
                tmp.write_text(text)
        self._display = choose(self._status)
        disk = Disk(self.note, self.warn)
        self.sinks: dict[str, Sink] = {}
        if cfg.enable_wandb:
            self.sinks["wandb"] = WandB(cfg, folder, saved.get("wandb"), self.note, self.warn)
        if cfg.save_csv:
            self.sinks["csv"] = Csv(folder, cfg.seed, disk, saved.get("csv"))
        if cfg.tensorboard:
            try:
                self.sinks["tensorboard"] = TensorBoard(folder, disk, saved.get("tensorboard"))
            except ImportError:
                self.note("no TensorBoard files: the package is missing; pip install 'tdmpc2-fast[train]'")

    def step(self, decisions: int, replay: float) -> None:
        """Note, after every decision, how many there were, and the filled share of the replay, 0 to 1."""
        self._show(self._status.step(decisions, replay))

    def busy(self, what: str, done: int, total: int) -> None:
        """Note how far a long stretch between two decisions is, e.g. `busy("pretraining", 10, 1000)`."""
        now = self._status.busy(what, done, total)
        if text := self._status.foretold(now):
            self.note(text)
        self._show(now)

    def _show(self, now: float) -> None:
        if now >= self._display.due:
            self._display.show(now)

    def episode(self, decisions: int, row: Mapping[str, Any]) -> None:
        """Write the row of a training episode that has ended; None is what is not known yet."""
        self._row(decisions, row, dict(zip(WALL_CLOCK, self._clocks(), strict=True)))

    def updates(self, updates: int, row: Mapping[str, Any]) -> None:
        """Write the row of a run from data after so many updates."""
        clocks = *self._clocks(), round(self.clock.seconds.get("draw", 0.0), 3)
        self._row(updates, row, dict(zip(WALL_CLOCK_OFFLINE, clocks, strict=True)))

    def _clocks(self) -> tuple[float, float | None]:
        rate = self._status.rate
        return round(self._status.elapsed, 2), None if rate is None else round(rate, 3)

    def _row(self, count: int, row: Mapping[str, Any], clocks: Mapping[str, Any]) -> None:
        self._status.row = row
        self._write("train", count, {self.unit: count, **row, **clocks})

    def time_split(self) -> str:
        """Say what share of its time each part of the run took, in words."""
        total = max(self._status.elapsed, 1e-9)
        return ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in self.clock.so_far().items())

    def evaluation(
        self,
        decisions: int,
        mean: float,
        std: float,
        episodes: int,
        success: float = 0.0,
        more: Mapping[str, float | None] | None = None,
    ) -> None:
        """Write the mean and the spread of the returns of an evaluation after so many decisions of training.

        more: of several tasks, `normalized_score`, and `return+TASK` and `success+TASK` of each.
        """
        more = more or {}
        self._status.evaluated(mean)
        self._write("eval", decisions, {"return": mean, "return_std": std, "success": success, **more})
        succeeded = f"  success {success:.2f}" if success else ""
        if (score := more.get("normalized_score")) is not None:
            succeeded += f"  score {score:.1f}"
        if each := [f"{k.partition('+')[2]} {v:.1f}" for k, v in more.items() if k.startswith("return+")]:
            self._display.note("tasks  " + ", ".join(each))
        self._display.note(
            f"eval   step {decisions * self.action_repeat:>9,}  return {mean:8.1f} ± {std:.1f}{succeeded}"
            f"  ({counted(episodes, 'episode')})"
        )

    def _write(self, kind: str, decisions: int, values: Mapping[str, Any]) -> None:
        for sink in self.sinks.values():
            sink.write(kind, decisions * self.action_repeat, values)

    def note(self, text: str) -> None:
        """Show a line."""
        self._display.note(text)

    def warn(self, text: str) -> None:
        """Show, on every display, that something went wrong and the run goes on."""
        self._display.warn(self._who + text)

    def warn_once(self, text: str, about: str | None = None) -> None:
        """Warn, unless this session was warned of the same thing: `about` names it, or the text does."""
        if (about or text) not in self._warned:
            self._warned.add(about or text)
            self.warn(text)

    def state(self) -> dict[str, Any]:
        """Return `resumed` for a later session, JSON-ready; CSV rows so far are on the disk when it returns."""
        return dict(status=self._status.state(), **{name: sink.state() for name, sink in self.sinks.items()})

    def close(self, summary: Sequence[str] = ()) -> None:
        """End the display and the files, then print the lines of `summary`; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        lost = [text for text in (sink.close() for sink in self.sinks.values()) if text]
        if lost:
            self.warn(f"never written: {', '.join(lost)}")
        self._display.close([] if self._who else summary)
