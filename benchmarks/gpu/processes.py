"""Parts of `make gpu`: commands side by side, which are ended in time and leave what they have."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHES = ROOT / "build" / "gpu-cache"  # what is compiled, so that a later call finds it
GRACE = 4.0  # seconds between the wish that a command ends and its end
_TAIL = 700  # characters shown of a command that failed
_TO_END = 25.0  # seconds in which a learning run that its own clock ends starts and writes what it has
_ENDS = {"PASSED": "passed", "FAILED": "failed", "SKIPPED": "skipped", "ERROR": "errors"}


@dataclass(frozen=True)
class Part:
    """Something to run: commands side by side, and the seconds that they may take.

    `{minutes}` in a word of a command stands for those after which it is to end by itself.
    group: the call that it belongs to. timed: whether nothing may run beside it. beside: whether it runs beside the
    parts that follow, up to the first that is timed, and takes no time of its own.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float
    group: str = "first"
    timed: bool = False
    beside: bool = False


@dataclass
class Outcome:
    """The result of a part."""

    part: Part
    status: str
    seconds: float
    tails: list[str] = field(default_factory=list)


class Running:
    """A part whose commands have been started; `end` is to be called, whatever happens."""

    def __init__(self, part: Part, seconds: float, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.part, self._start = part, time.monotonic()
        # Unbuffered, so that the log of what is ended says how far it came.
        env = dict(PYTHONUNBUFFERED="1", TORCHINDUCTOR_COMPILE_THREADS="4")
        env |= dict(TRITON_CACHE_DIR=str(CACHES / "triton"), TORCHINDUCTOR_CACHE_DIR=str(CACHES / "inductor"))
        env |= {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        by_itself = f"{max(1.0, seconds - _TO_END) / 60:.3f}"
        self._running = []
        for i, words in enumerate(part.commands):
            command = [w.replace("{minutes}", by_itself) for w in words]
            log = logs / f"{part.name}-{i}.log"
            with log.open("w") as f:
                # A session of its own, so that what it starts ends with it.
                process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=f, stderr=f, start_new_session=True)
            self._running.append((process, log))

    def end(self, until: float) -> Outcome:
        """Wait for all commands, but not longer than nearly until that time of the clock; then have them end.

        A time that is over is a wish to end now.
        """
        until = max(until, time.monotonic() + GRACE)
        late = [p for p, _ in self._running if not _done(p, until - GRACE)]
        for process in late:  # pytest counts then, and says what failed
            process.send_signal(signal.SIGINT)
        for process in late:
            _done(process, until)
            with contextlib.suppress(ProcessLookupError):  # what it has started is there yet
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = {log: log.read_text(errors="replace") for _, log in self._running}
        failed = [f"{log.name}: ...{texts[log][-_TAIL:]}" for p, log in self._running if p.returncode]
        status = "too late" if late else "failed" if failed else "passed"
        counted = test_counts(texts.values())
        if counted and status == "passed" and "passed" not in counted:
            status = "failed"  # all were skipped: nothing was tried
        seconds = time.monotonic() - self._start
        return Outcome(self.part, ": ".join(filter(None, (status, counted))), seconds, failed)


def run(part: Part, seconds: float, logs: Path) -> Outcome:
    """Run a part; what is still running when its time is over is ended."""
    until = time.monotonic() + seconds
    return Running(part, seconds, logs).end(until)


def _done(process: subprocess.Popen[bytes], until: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, until - time.monotonic()))
    return process.returncode is not None


def test_counts(logs: Iterable[str]) -> str:
    """Return what became of pytest's tests, as "12 passed, 3 skipped"; empty where there are none.

    A log without a closing line is of a process that was killed: its tests' own lines count, and the last is cut off.
    """
    total: Counter[str] = Counter()
    for text in logs:
        closing = re.findall(r"^[^\n]*\d+ \w+[^\n]* in \d[\d.]*s[^\n]*$", text, re.M)
        for line in closing:
            total.update({kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", line)})
        if not closing:
            lines = re.findall(r"^\S+\.py::[^\n]*", text, re.M)
            ends = [re.search(r" (PASSED|FAILED|SKIPPED|ERROR)\b", line) for line in lines]
            total.update(_ENDS[end[1]] if end else f"cut off ({line.split('::')[1].strip()})"
                         for line, end in zip(lines, ends, strict=True))  # fmt: skip
    return ", ".join(f"{n} {kind}" for kind, n in total.items())
