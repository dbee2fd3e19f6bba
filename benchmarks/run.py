"""The command `tdmpc2-fast bench`: measure, print a table, write rows and draw a picture."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tdmpc2_fast import Config, __version__
from tdmpc2_fast.errors import BackendError, CheckpointError, ConfigError, InputError, did_you_mean
from tdmpc2_fast.train.run.threads import choose_threads

from .harness.machine import Facts, this_machine
from .harness.measure import CannotMeasureError, Case, Ceilings, Row, measure, profiled
from .options import Options, describe, parse
from .plots import draw
from .report import machine_of, splits, text_table, write
from .suites import ceilings, environments, export, kernels, loop, planner, regimes, replay, update, update_kernels

SUITES: dict[str, Callable[[Options], Iterator[Callable[[], Case]]]] = {
    "planner": planner.cases,
    "update": update.cases,
    "kernels": kernels.cases,
    "update-kernels": update_kernels.cases,
    "plan-regimes": regimes.plan_cases,
    "update-regimes": regimes.update_cases,
    "export": export.cases,
    "replay": replay.cases,
    "environment": environments.cases,
    "loop": loop.cases,
}
DEFAULT = ("planner", "update")

USAGE = f"""tdmpc2-fast {__version__}

  tdmpc2-fast bench [SUITE ...] [key=value ...]

measures against the eager and the compiled reference, and the official code where official=CHECKOUT is
given, in one run. Suites: {", ".join(SUITES)}, all; default: {", ".join(DEFAULT)}.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if all was measured, 1 if results differed somewhere, 2 if it cannot be done."""
    args = list(sys.argv[1:] if argv is None else argv)
    if any(a in ("-h", "--help", "help") for a in args):
        print(f"{USAGE}\nkeys:\n{describe()}")
        return 0
    try:
        suites = _suites([a for a in args if "=" not in a])
        options = parse([a for a in args if "=" in a])
        if options.checkpoint is not None and suites != ["planner"]:
            asked = f"got {options.checkpoint!r} for {', '.join(suites)}"
            raise ConfigError(f"bench key 'checkpoint': {asked}, allowed: for planner alone")
        return bench(options, suites)
    except (BackendError, CheckpointError, ConfigError, InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was measured is in the results file", file=sys.stderr)
        return 130


def _suites(words: Sequence[str]) -> list[str]:
    for word in words:
        if word not in SUITES and word != "all":
            raise ConfigError(f"unknown suite {word!r}.{did_you_mean(word, [*SUITES, 'all'])}")
    return list(SUITES) if "all" in words else list(dict.fromkeys(words)) or list(DEFAULT)


def bench(options: Options, suites: Sequence[str]) -> int:
    """Measure, and write all rows after each case; returns the exit status."""
    device = options.torch_device
    logging.getLogger("torch").setLevel(logging.ERROR)  # torch.compile's remarks on code it is given
    choose_threads(Config(num_threads=options.threads))
    machine = this_machine(device)
    path = new_file(Path(options.out), machine)
    what = f"{machine.label}, torch {machine.torch_version}, commit {machine.commit or 'unknown'}"
    print(f"{what}; rows go to {path}\n", flush=True)
    rows: list[Row] = []
    broken: list[str] = []
    case: Case | None = None
    found: list[Row] = []
    for make in ceilings.cases(options):
        rows += measure(make(), machine, options.repeats, 0.5, options.seed, Ceilings())
    machine = machine.under_load()
    write(path, rows)
    reached = ceilings.reached(rows)
    print(text_table(rows), flush=True)
    for suite in suites:
        for make in SUITES[suite](options):
            case, found = None, []  # the one before makes room
            try:
                case = make()
                found = measure(case, machine, options.repeats, options.budget, options.seed, reached)
            except CannotMeasureError as e:
                print(f"\n{suite}: not measured: {e}", flush=True)
                continue
            except Exception as e:  # whatever it is, the other cases are still measured
                traceback.print_exc()
                broken.append(f"{suite}: {type(e).__name__}: {e}")
                continue
            rows += found
            write(path, rows)
            print("", text_table(found), *splits(found), sep="\n", flush=True)
    if case is not None and found:
        rows[-len(found) :] = profiled(case, found, device)
        write(path, rows)
    print(f"\n{machine_of(rows)}\n{draw(rows, path.with_suffix('.png'))}\n{path}")
    failed = [r for r in rows if r.gate == "failed"]
    for r in failed:
        error = "NaN" if r.gate_error is None else f"{r.gate_error:.2g}"
        pair = f"{r.suite} {r.case}: {r.product} and {r.variant}"
        print(f"error: {pair} differ by {error}, allowed {r.gate_limit:.2g}: no ratio is shown", file=sys.stderr)
    for why in broken:
        print(f"error: {why}", file=sys.stderr)
    return 1 if failed or broken else 0


def new_file(folder: Path, facts: Facts) -> Path:
    """Make a new results file, named after its machine, day and commit; those already there are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", (facts.gpu or facts.cpu).removeprefix("NVIDIA ").lower()).strip("-")
    stem = f"{slug}-{facts.date[:10]}-{facts.commit.rstrip('+') or 'unknown'}"
    for n in itertools.count(1):
        path = folder / (f"{stem}.json" if n == 1 else f"{stem}-{n}.json")
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)  # two runs started together get two files
            break
    return path


if __name__ == "__main__":
    sys.exit(main())
