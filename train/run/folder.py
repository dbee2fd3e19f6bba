"""Where a run leaves its files: a folder of its own, which one process at a time writes to."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError

try:
    import fcntl
except ImportError:  # not on Windows, where nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]

_LOCK = "run.lock"
_FIRST = {_LOCK, "config.json"}  # there before anything came of a run


def home(cfg: Config) -> Path:
    """Return the folder a run is meant for: `work_dir`, or `runs/TASK/EXP_NAME/SEED`."""
    return Path(cfg.work_dir) if cfg.work_dir else Path("runs") / cfg.task / cfg.exp_name / str(cfg.seed)


def new_folder(cfg: Config) -> Path:
    """Make a folder for a new run; nothing that is already there is touched.

    The default one gets a number behind it when it is taken; an explicit `work_dir` that is
    taken is an error, and so is any that is taken where `resume=auto` is to find it again.
    """
    base = home(cfg)
    fixed = "work_dir" if cfg.work_dir else "resume" if cfg.resume else None
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for n in itertools.count(1):
            folder = base if n == 1 else base.with_name(f"{base.name}-{n}")
            try:
                folder.mkdir()  # fails if it exists: two runs started together get two folders
                return folder
            except FileExistsError:
                if fixed and (not folder.is_dir() or not untouched(folder)):
                    raise ConfigError(
                        f"config key {fixed!r}: the folder {str(folder)!r} is taken and has no checkpoint to go on "
                        "from, allowed: a new or empty folder"
                        if cfg.resume
                        else f"config key {fixed!r}: {str(folder)!r} is taken, allowed: a new or empty folder "
                        "(resume=auto goes on with the run in it)"
                    ) from None
                if fixed:
                    return folder
    except OSError as e:
        raise ConfigError(f"config key 'work_dir': cannot make {str(base)!r}: {e.strerror}") from e
    raise AssertionError("itertools.count ended")


def untouched(folder: Path) -> bool:
    """Tell whether no run has left more there than its wish to begin: no checkpoint, no number."""
    return {p.name for p in folder.iterdir() if not _unfinished(p)} <= _FIRST


def _unfinished(path: Path) -> bool:
    """Tell whether this belongs to a first checkpoint in whose writing a run was killed."""
    if path.is_dir() and path.name in ("checkpoints", "replay"):
        return all(map(_unfinished, path.iterdir()))
    return path.name.startswith(".") and ".tmp" in path.name


def discard(folder: Path) -> None:
    """Remove the folder of a run that could not begin."""
    with contextlib.suppress(OSError):
        if {p.name for p in folder.iterdir()} <= _FIRST:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


@contextlib.contextmanager
def locked(folder: Path, what: str = "run") -> Iterator[None]:
    """Keep other processes from writing to this run, or what else it is.

    Raises:
        ConfigError: one is at it.
    """
    if fcntl is None:
        yield
        return
    with open(folder / f"{what}.lock", "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise ConfigError(
                f"{what} {str(folder)!r}: process {f.read().strip() or '?'} is writing to it, allowed: one at a time"
            ) from None
        f.truncate(0)
        f.write(f"{os.getpid()}\n")
        f.flush()
        yield
