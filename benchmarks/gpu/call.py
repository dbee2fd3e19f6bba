"""`make gpu` runs what a GPU has to show, in calls of a few minutes.

    python -m tdmpc2_fast.benchmarks.gpu [first|rest|more|PART ...] [minutes=7] [out=FOLDER]
        [official=CHECKOUT] [jax=CHECKOUT] [wheels=FOLDER]

It needs torch, triton, numpy and pytest (for the tests), and no network; what else `make wheels` put into a folder is
unpacked and used where the machine lacks it. Every part is a process of its own. One that fails does not stop the
others, and one that takes too long is ended, but keeps what it has. Each part has seconds of its own; those that it
does not use are the next one's. The call ends in `minutes` at the latest, and says what it did not run. Rows of all
parts go to one file in `out`, by default `benchmarks/results`, written anew after each part; then `RESULTS.md` and the
README's table are made anew. Logs lie in `build/gpu-logs`, or with `out` in a folder there. Exit status: 1 where a part
failed, 2 where nothing could be tried.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .parts import GROUPS, LOGS, RESULTS, parts
from .processes import ROOT, Outcome, Part, Running

if TYPE_CHECKING:
    from tdmpc2_fast.benchmarks.harness.measure import Row

SITE = ROOT / "build" / "gpu-site"  # what is unpacked from wheels
RESERVE = 15.0  # seconds for the results at the end
LEAST = 5.0  # seconds below which nothing is worth starting
_TAILS = 3  # commands of a part whose last lines are shown


def why_not_here() -> list[str]:
    """Return what `make gpu` cannot do on this machine, and why; nothing where all is well."""
    if find_spec("tdmpc2_fast") is None:
        return ["tdmpc2_fast cannot be imported: `make gpu` puts it on the path, and PYTHON chooses the interpreter"]
    missing = [p for p in ("torch", "triton", "numpy", "pytest") if find_spec(p) is None]
    if missing:
        return [f"{p} is not installed for {sys.executable}" for p in missing]
    import torch

    if not torch.cuda.is_available():
        without = f"torch {torch.__version__} was built without CUDA"
        build = without if torch.version.cuda is None else "torch finds no CUDA device"
        return [
            f"{build}: kernels cannot run, graphs cannot be captured, GPU times cannot be measured",
            "without one, `make test` interprets them, `make report` compiles them, `make bench` measures the CPU",
        ]
    from tdmpc2_fast.kernels.device.launch import why_not

    reason = why_not(torch.device("cuda"))
    return [] if reason is None else [f"the kernels cannot run: {reason}"]


def use(wheels: Path) -> str:
    """Put what the machine lacks on the path of every part; return why that is impossible, or nothing."""
    from tdmpc2_fast.benchmarks.gpu.wheels import WheelsError, unpack

    try:
        names = unpack(wheels, SITE)
    except (WheelsError, OSError) as e:
        return str(e)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(SITE))))
    print(f"from {wheels}: {', '.join(names) or 'nothing, the machine has all of it'}", flush=True)
    return ""


def perform(chosen: Sequence[Part], end: float, logs: Path, kept: Callable[[], object]) -> Iterator[Outcome]:
    """Run parts one after the other until the clock shows `end`; yield what became of each.

    kept: called after each timed part, to keep what it has measured.
    """
    due, running = time.monotonic(), list[Running]()
    left = list(chosen)
    try:
        while left:
            part = left.pop(0)
            while part.timed and running:  # what ran beside the others is over
                found = running[0].end(min(due, end))
                del running[0]
                yield found
            due += part.seconds
            until = min(due, end)
            if end - time.monotonic() < LEAST:
                yield Outcome(part, "not run: no time was left", 0)
                continue
            print(f"{part.name} ...", flush=True)
            running.append(Running(part, until - time.monotonic(), logs))
            if not part.beside:
                found = running[-1].end(until)
                del running[-1]
                yield found
            if part.timed:
                kept()
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    yield from [r.end(0.0 if interrupted else min(due, end)) for r in running]
    yield from (Outcome(part, "not run: interrupted", 0) for part in left)


class Kept:
    """The file of all rows of a call, written anew whenever there are more."""

    def __init__(self, out: Path, logs: Path) -> None:
        self.out, self.logs = out, logs
        self.path: Path | None = None

    def rows(self) -> list[Row]:
        """Return the rows that parts have written so far."""
        from tdmpc2_fast.benchmarks.report import read

        rows = [r for path in sorted(self.logs.glob("*/*.json")) if path.stat().st_size for r in read(path)]
        # Every process measures the machine's ceilings; those of the first are the file's.
        kept = [r for r in rows if r.suite != "ceilings"]
        return kept + [r for r in rows if r.suite == "ceilings" and r.date == rows[0].date]

    def write(self) -> list[Row]:
        """Write the file, and beside it what was predicted of its rows; returns them."""
        from tdmpc2_fast.benchmarks.gpu import predicted
        from tdmpc2_fast.benchmarks.report import write
        from tdmpc2_fast.benchmarks.run import new_file

        if rows := self.rows():
            self.path = self.path or new_file(self.out, rows[0])
            write(self.path, rows)
            if page := predicted.page(rows):
                predicted.file_beside(self.path).write_text(page)
        return rows


def finish(outcomes: Sequence[Outcome], kept: Kept) -> int:
    """Write the results and print what became of everything; returns the exit status."""
    from tdmpc2_fast.benchmarks.gpu import predicted
    from tdmpc2_fast.benchmarks.report import main as regenerate
    from tdmpc2_fast.benchmarks.report import summary

    for outcome in outcomes:
        for tail in outcome.tails[:_TAILS]:
            print(f"\n--- {outcome.part.name}, {tail}")
        if len(outcome.tails) > _TAILS:
            print(f"\n--- {outcome.part.name}: {len(outcome.tails) - _TAILS} more, in {kept.logs}")
    rows = kept.write()
    if rows and kept.out == RESULTS and regenerate([str(RESULTS)]):
        print("RESULTS.md and the README could not be made anew")
    print(f"\n{summary(rows) if rows else 'nothing was measured'}\n\n{predicted.page(rows)}")
    for log in sorted(kept.logs.glob("learning-*.log")):
        print(log.read_text(errors="replace").strip().rpartition("\n")[2])  # how far a run came
    for o in outcomes:
        print(f"{o.part.name:20} {o.status:36} {o.seconds:6.0f} s of {o.part.seconds:.0f}")
    print(f"results: {kept.path or 'none'}; logs: {kept.logs}")
    return 0 if all(o.status.startswith("passed") for o in outcomes) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for; returns the exit status."""
    began = time.monotonic()
    words = list(sys.argv[1:] if argv is None else argv)
    options = dict(out=str(RESULTS), minutes="7", official="", jax="", wheels="")
    names = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in options:
            options[name] = value
        elif equals:
            print(f"argument {word!r}: allowed: {', '.join(f'{k}=...' for k in options)}, or a part", file=sys.stderr)
            return 2
        else:
            names.append(word)
    names = names or [GROUPS[0]]
    theirs = [f"{k}={options[k]}" for k in ("official", "jax") if options[k]]
    out = Path(options["out"]).absolute()
    logs = (LOGS if out == RESULTS else out / "logs") / "-".join(names)
    all_parts = parts(theirs, bool(options["wheels"]), out, logs)
    allowed = (*GROUPS, *(p.name for p in all_parts))
    if unknown := [n for n in names if n not in allowed]:
        print(f"unknown part {unknown[0]!r}, allowed: {', '.join(allowed)}", file=sys.stderr)
        return 2
    try:
        minutes = float(options["minutes"])
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        print(f"minutes: got {options['minutes']!r}, allowed: a number above 0", file=sys.stderr)
        return 2
    if reasons := why_not_here():
        print("make gpu: this machine cannot do it", *(f"- {r}" for r in reasons), sep="\n", file=sys.stderr)
        return 2
    if options["wheels"] and (why := use(Path(options["wheels"]))):
        print(f"make gpu: {why}", file=sys.stderr)
        return 2
    shutil.rmtree(logs, ignore_errors=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a machine that takes its time back
    chosen = [p for p in all_parts if p.name in names or p.group in names]
    kept, outcomes = Kept(out, logs), []
    for outcome in perform(chosen, began + 60 * minutes - RESERVE, logs, kept.write):
        print(f"{outcome.part.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
    return finish(outcomes, kept)
