"""Where the numbers of a run go: CSV files, TensorBoard, Weights & Biases.

None of them may end a run of days. What cannot be written now is kept and written later.
"""

from __future__ import annotations

import csv
import io
import netrc
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.model.files import replacing

from .status import counted

_PROJECT = "tdmpc2-fast"
_WANDB_SECONDS = 20.0


class Disk:
    """Says what is wrong with the disk, once per outage and not once per row."""

    def __init__(self, note: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self._note, self._warn = note, warn
        self._failing: set[Path] = set()

    def failed(self, path: Path, error: OSError) -> None:
        """Note that `path` could not be written."""
        if not self._failing:
            self._warn(
                f"cannot write {path}: {error.strerror or error}; the run goes on and keeps what is unwritten in "
                "memory. Make room or repair access: it is written with the next row"
            )
        self._failing.add(path)

    def worked(self, path: Path) -> None:
        """Note that all of `path` is written."""
        if path in self._failing:
            self._failing.remove(path)
            if not self._failing:
                self._note("the files are written again, with all that was kept")

    def cut(self, path: Path, size: int) -> None:
        """Take back what lies behind the first `size` bytes of `path`, all of it or nothing."""
        kept = path.read_bytes() if path.exists() else b""
        if len(kept) < size:
            known = f"{path} has {len(kept):,} bytes, the checkpoint knows {size:,}"
            self._warn(f"{known}: rows are missing; it goes on as it is")
        elif len(kept) > size:
            with replacing(path) as tmp:
                tmp.write_bytes(kept[:size])


class Records:
    """A file that grows by whole records: one that is half written is taken back and waits.

    Args:
        path: the file; its folder is made.
        disk: hears of what fails.
        head: what an empty file begins with.
        waiting: records of an earlier session that were never written, as `state` has them.
    """

    def __init__(self, path: Path, disk: Disk, head: bytes = b"", waiting: Sequence[str] = ()) -> None:
        self.path, self.head = path, head
        self._waiting = [r.encode("latin-1") for r in waiting]
        self._disk = disk
        self._torn_at: int | None = None  # bytes before a record that was written in part

    def append(self, record: bytes) -> None:
        """Write what waits, then `record`."""
        self._waiting.append(record)
        self._flush()

    def state(self) -> dict[str, Any]:
        """Return the bytes on the disk and the records that wait, for `Disk.cut` and `waiting` of a later session."""
        if self._waiting or self.path.exists():
            self._flush(sync=True)
        held = self.path.stat().st_size if self.path.exists() else 0
        size = held if self._torn_at is None else self._torn_at
        return dict(bytes=size, waiting=[r.decode("latin-1") for r in self._waiting])

    def close(self) -> str | None:
        """Write what waits; return how many rows could not be written, in words."""
        if self._waiting:
            self._flush()
        return counted(len(self._waiting), "row") if self._waiting else None

    def _flush(self, sync: bool = False) -> None:
        """Write what waits; `sync` also sees it onto the disk."""
        written = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as f:
                if self._torn_at is not None:
                    f.truncate(self._torn_at)
                for record in self._waiting:
                    self._torn_at = f.seek(0, os.SEEK_END)
                    rest = memoryview(record if self._torn_at else self.head + record)
                    while rest:
                        rest = rest[f.write(rest) :]
                    written += 1
                self._torn_at = None
                if sync:
                    os.fsync(f.fileno())
        except OSError as e:
            if self._torn_at is not None:
                with suppress(OSError):
                    os.truncate(self.path, self._torn_at)
                    self._torn_at = None
            self._disk.failed(self.path, e)
        else:
            self._disk.worked(self.path)
        del self._waiting[:written]


class Sink(Protocol):
    """Takes rows of numbers at environment steps. What it cannot write it keeps or counts; it never ends a run."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write a row of `kind` train or eval; None values are left out."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a later session of this run needs to go on, JSON-ready."""
        ...

    def close(self) -> str | None:
        """Finish; return what was not written, in words."""
        ...


class Csv(Sink):
    """Writes `eval.csv` with the official columns, `train.csv` with all there is, and `success.csv` where there is any.

    Of several tasks `eval.csv` also has `normalized_score`, and `return+TASK` and `success+TASK` of each.

    Of a task that has no success nothing is known until the end, so rows of `success.csv` wait for the first one.
    """

    def __init__(self, folder: Path, seed: int, disk: Disk, resumed: Mapping[str, Any] | None) -> None:
        self._seed = seed
        self._columns: dict[str, list[str]] = {}
        self._files: dict[str, Records] = {}
        self._without: list[list[int]] = list((resumed or {}).get("without", []))  # rows before any success
        for kind in ("train", "eval", "success"):
            path, known = folder / f"{kind}.csv", (resumed or {}).get(kind, dict(bytes=0, waiting=[]))
            if resumed is not None:
                disk.cut(path, known["bytes"])
            if path.exists() and path.stat().st_size:
                with open(path, newline="") as f:
                    self._columns[kind] = next(csv.reader(f))  # of an earlier version it may have fewer
            self._files[kind] = Records(path, disk, waiting=known["waiting"])

    @override
    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if kind == "eval":
            self._succeeded(step, values.get("success") or 0.0)
            own = {k: None if v is None else round(v, 4) for k, v in values.items() if _of_tasks(k)}
            self._append(kind, dict(step=step, reward=round(values["return"], 1), seed=self._seed, **own))
        else:
            self._append(kind, dict(step=step, **values))

    def _succeeded(self, step: int, share: float) -> None:
        if not share and "success" not in self._columns:
            self._without.append([step, 0])
            return
        for at, value in [*self._without, (step, round(share, 4))]:
            self._append("success", dict(step=at, reward=value, seed=self._seed))
        self._without = []

    def _append(self, kind: str, values: Mapping[str, Any]) -> None:
        columns = self._columns.setdefault(kind, list(values))
        self._files[kind].head = _line(columns)
        self._files[kind].append(_line(["" if values.get(c) is None else values[c] for c in columns]))

    @override
    def state(self) -> dict[str, Any]:
        return {kind: f.state() for kind, f in self._files.items()} | {"without": self._without}

    @override
    def close(self) -> str | None:
        lost = [(f.close(), f.path.name) for f in self._files.values()]
        return ", ".join(f"{rows} of {name}" for rows, name in lost if rows) or None


def _of_tasks(name: str) -> bool:
    """Tell whether a value is of an evaluation of several tasks."""
    return name == "normalized_score" or "+" in name


def by_task(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return numbers alone: those of an episode of one of several tasks under the official names, `NAME+TASK`."""
    task = values.get("task")
    names = {k: f"{k}+{task}" if task and k.startswith("episode_") else k for k in values if k != "task"}
    return {name: values[k] for k, name in names.items()}


def _line(cells: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


class TensorBoard(Sink):
    """Writes event files in `tensorboard/`, one per session of a run.

    They are in tensorboard's own record format, but not written with its `SummaryWriter`: that
    writes in a thread, and a disk that is full for a moment leaves it dead, half a record in
    the file and a traceback in the terminal.
    """

    def __init__(self, folder: Path, disk: Disk, resumed: Mapping[str, Any] | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._writer = Event, Summary, RecordWriter
        self._folder = folder / "tensorboard"
        if resumed is not None:
            for path in self._folder.glob("*.tfevents.*"):
                if path.name in resumed["bytes"]:
                    disk.cut(path, resumed["bytes"][path.name])
                else:
                    path.unlink()  # of a session after the checkpoint: run again
        path = self._folder / f"events.out.tfevents.{time.time_ns() // 1000:016d}.{socket.gethostname()}.{os.getpid()}"
        head, waiting = self._record(file_version="brain.Event:2"), [] if resumed is None else resumed["waiting"]
        self._file = Records(path, disk, head, waiting)

    def _record(self, **fields: Any) -> bytes:
        data = io.BytesIO()
        self._writer(data).write(self._event(wall_time=time.time(), **fields).SerializeToString())
        return data.getvalue()

    @override
    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        scalars = [
            self._summary.Value(tag=f"{kind}/{k}", simple_value=float(v))
            for k, v in by_task(values).items()
            if v is not None
        ]
        self._file.append(self._record(step=step, summary=self._summary(value=scalars)))

    @override
    def state(self) -> dict[str, Any]:
        own = self._file.state()
        sizes = {p.name: p.stat().st_size for p in self._folder.glob("*.tfevents.*")}
        if self._file.path.name in sizes:
            sizes[self._file.path.name] = own["bytes"]
        return dict(bytes=sizes, waiting=own["waiting"])

    @override
    def close(self) -> str | None:
        rows = self._file.close()
        return f"{rows} of TensorBoard" if rows else None


class WandB(Sink):
    """Writes a Weights & Biases run with the official names, group, tags and keys.

    It is offline without an account, and where the server does not answer within 20 seconds.
    """

    def __init__(
        self,
        cfg: Config,
        folder: Path,
        resumed: Mapping[str, Any] | None,
        note: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        wandb = wandb_package()
        self._warn = warn
        exp = re.sub("[^0-9a-zA-Z]+", "-", cfg.exp_name)
        limits = dict(init_timeout=_WANDB_SECONDS, login_timeout=_WANDB_SECONDS, finish_timeout=_WANDB_SECONDS)
        known: dict[str, Any] = {k: v for k, v in limits.items() if k in wandb.Settings.model_fields}
        # Its output would tear the live display, and catching ours would fight with it.
        settings = wandb.Settings(silent=True, console="off", **known)
        wandb.setup(settings)

        def start(mode: Any) -> Any:
            return wandb.init(
                project=cfg.wandb_project or _PROJECT,
                entity=cfg.wandb_entity,
                name=str(cfg.seed),
                group=f"{cfg.task}-{exp}",
                tags=[cfg.task, exp, f"seed:{cfg.seed}"],
                dir=str(folder),
                config=cfg.to_dict(),
                id=None if resumed is None else resumed["id"],
                resume=None if resumed is None else "allow",
                mode=mode,
                settings=settings,
            )

        mode = None if "WANDB_MODE" in os.environ or _has_account(wandb.Settings().base_url) else "offline"
        try:
            self._run: Any = start(mode)
        except wandb.errors.Error as e:
            reason = str(e).splitlines()[0]
            warn(f"Weights & Biases cannot be reached: {reason}")
            self._run = start("offline")
        self._id = self._run.id
        if self._run.offline:
            why = " for want of an account (WANDB_API_KEY or wandb login)" if mode == "offline" else ""
            text = f"Weights & Biases: offline{why}; to send the run later: wandb sync {self._run.settings.sync_dir}"
        else:
            text = f"Weights & Biases: {self._run.url}"
        if not cfg.wandb_silent:
            note(text)

    @override
    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._run is None or step < self._run.step:  # what the server has already stays
            return
        official = {"return": "episode_reward", "return_std": "episode_reward_std", "success": "episode_success"}
        named = {}
        for k, v in dict(step=step, **by_task(values)).items():
            name, plus, task = k.partition("+")
            if v is not None:
                named[official.get(name, name) + plus + task] = v
        try:
            self._run.log({f"{kind}/{k}": v for k, v in named.items()}, step=step)
        except Exception as e:  # a service that died: nothing of it is worth the run
            self._warn(f"Weights & Biases stopped: {e}; the run goes on without it, the CSV files have everything")
            self._run = None

    @override
    def state(self) -> dict[str, Any]:
        return dict(id=self._id)

    @override
    def close(self) -> str | None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as e:
                return f"some rows for Weights & Biases ({e}; wandb sync sends them)"
        return None


def wandb_package() -> Any:
    """Return the package; where it is missing, raise a `ConfigError` that says how to get it."""
    try:
        import wandb
    except ImportError as e:
        raise ConfigError(
            "config key 'enable_wandb': the package wandb is missing; pip install 'tdmpc2-fast[wandb]', "
            "or set enable_wandb=false"
        ) from e
    return wandb


def _has_account(server: str) -> bool:
    """Tell whether there is a key for the server, by the ways wandb knows."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for path in (os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"):
        if path and Path(path).is_file():
            with suppress(netrc.NetrcParseError, OSError):
                hosts = netrc.netrc(str(path)).hosts
                return urlparse(server).hostname in hosts or "api.wandb.ai" in hosts
    return False
