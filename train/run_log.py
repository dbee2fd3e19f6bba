"""Where a run leaves its files, and the lines a person sees."""

from __future__ import annotations

import csv
import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError

_EVAL_COLUMNS = ("step", "reward", "seed")
_SECONDS_BETWEEN_LINES = 5.0


def run_folder(cfg: Config) -> Path:
    """A folder for a new run; nothing that is already there is touched.

    The default `runs/TASK/EXP_NAME/SEED` gets a number behind it when it is taken; an
    explicit `work_dir` that is taken is an error.
    """
    base = Path(cfg.work_dir) if cfg.work_dir else Path("runs") / cfg.task / cfg.exp_name / str(cfg.seed)
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for n in itertools.count(1):
            folder = base if n == 1 else base.with_name(f"{base.name}-{n}")
            try:
                folder.mkdir()  # fails if it exists: two runs started together get two folders
                return folder
            except FileExistsError:
                if cfg.work_dir and (not folder.is_dir() or any(folder.iterdir())):
                    raise ConfigError(
                        f"config key 'work_dir': {str(folder)!r} is taken, allowed: a new or empty folder"
                    ) from None
                if cfg.work_dir:
                    return folder
    except OSError as e:
        raise ConfigError(f"config key 'work_dir': cannot make {str(base)!r}: {e.strerror}") from e
    raise AssertionError("itertools.count ended")


class RunLog:
    """Writes `config.json`, `eval.csv` (official columns) and `train.csv`, and prints progress.

    `step` in `eval.csv` counts environment steps, action repeat included, like the published
    curves; everywhere else steps are decisions.
    """

    def __init__(self, cfg: Config, folder: Path, action_repeat: int) -> None:
        self.cfg, self.folder, self.action_repeat = cfg, folder, action_repeat
        (folder / "config.json").write_text(json.dumps(cfg.to_dict(), indent=1) + "\n")
        self._train_columns: list[str] | None = None
        self._start = self._last_line = time.monotonic()
        self._last_decisions = 0

    def evaluation(self, decisions: int, mean: float, std: float, episodes: int) -> None:
        """One evaluation, at this many decisions of training."""
        step = decisions * self.action_repeat
        self._append("eval.csv", _EVAL_COLUMNS, dict(step=step, reward=round(mean, 1), seed=self.cfg.seed))
        print(
            f"eval   step {step:>9,}  decisions {decisions:>9,}  return {mean:8.1f} ± {std:.1f}"
            f"  ({episodes} episodes)  {self._elapsed()}",
            flush=True,
        )
        self._last_line, self._last_decisions = time.monotonic(), decisions

    def episode(self, decisions: int, row: Mapping[str, Any]) -> None:
        """One finished training episode; a line is printed every few seconds at most."""
        if self._train_columns is None:
            self._train_columns = ["step", "decisions", *row]
        values = dict(step=decisions * self.action_repeat, decisions=decisions, **row)
        self._append("train.csv", self._train_columns, values)
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            rate = (decisions - self._last_decisions) / max(now - self._last_line, 1e-9)
            losses = "".join(
                f"  {name.removesuffix('_loss')} {row[name]:.3f}"
                for name in ("consistency_loss", "reward_loss", "value_loss", "pi_loss")
                if row.get(name) is not None
            )
            print(
                f"train  step {decisions * self.action_repeat:>9,}  return {row['episode_reward']:8.1f}"
                f"  {rate:6.1f} decisions/s{losses}  {self._elapsed()}",
                flush=True,
            )
            self._last_line, self._last_decisions = now, decisions

    def note(self, text: str) -> None:
        """A line of its own."""
        print(text, flush=True)

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._start)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _append(self, name: str, columns: list[str] | tuple[str, ...], row: Mapping[str, Any]) -> None:
        if not self.cfg.save_csv:
            return
        path = self.folder / name
        new = not path.exists()
        with open(path, "a", newline="") as f:
            writer = csv.DictWriter(f, columns, restval="", extrasaction="ignore", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
