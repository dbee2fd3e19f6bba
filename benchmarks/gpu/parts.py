"""`make gpu` runs what a GPU has to show, in one command of under ten minutes.

    python -m tdmpc2_fast.benchmarks.gpu [PART ...] [out=FOLDER] [minutes=9.5]
        [official=CHECKOUT] [jax=CHECKOUT] [wheels=FOLDER]

It needs torch, triton, numpy and pytest (for the tests), and no network; what else `make wheels` put into a folder is
unpacked and used where the machine lacks it. Every part is a process of its own with its own time; one that fails or
takes too long does not stop the others. A short table comes last. Rows of all parts go to one file in `out`, by default
`benchmarks/results`, and `RESULTS.md` and the README's table are made anew. Exit status: 1 where a part failed, 2 where
nothing could be tried.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "build" / "gpu-logs"
RESULTS = ROOT / "benchmarks" / "results"
SITE = ROOT / "build" / "gpu-site"  # what is unpacked from wheels
RUN = "tdmpc2_fast.benchmarks.run"
TESTS = ("_gpu", "_kernel", "_kernels")  # how the names of files with GPU tests end
THREADS = min(8, os.cpu_count() or 1)  # of torch on the host: the same in every run
RESERVE = 15.0  # seconds for the results at the end
_TAIL, _TAILS = 700, 3  # characters shown of a command that failed, and commands of a part
_TO_END = 25.0  # seconds in which a learning run that its own clock ends starts and writes what it has

# What compute-sanitizer watches: it makes a kernel a hundred times slower.
SANITIZED = "tests/test_gpu.py::test_a_replay_is_bitwise_an_eager_plan"


@dataclass(frozen=True)
class Part:
    """Something to run: commands side by side, and the seconds they may take.

    `{seconds}` in a word of a command stands for the seconds after which it is to end by itself.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float


@dataclass
class Outcome:
    """The result of a part."""

    part: Part
    status: str
    seconds: float
    tails: list[str] = field(default_factory=list)


def parts(theirs: Sequence[str] = (), wheels: bool = False, out: Path = RESULTS) -> list[Part]:
    """Return all parts, the most telling first, for the time may end before the last.

    theirs: keys of checkouts.
    wheels: whether the loop's physics will come from wheels where the machine has none.
    out: the folder for learning runs.
    """
    python = (sys.executable, "-P")
    # Side by side, because most of their time is compilation; nothing is timed meanwhile.
    files = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").rglob("test_*.py")) if p.stem.endswith(TESTS)]
    shards = max(1, min(14, (os.cpu_count() or 1) - 2))
    pytest = (*python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-v", "--tb=short", *files)
    tests = tuple(("env", f"TEST_SHARD={i}/{shards}", *pytest) for i in range(shards))

    def command(folder: Path, *words: str) -> tuple[str, ...]:
        return (*python, "-m", RUN, *words, f"threads={THREADS}", f"out={folder}")

    def bench(name: str, seconds: float, *words: str) -> Part:
        return Part(name, (command(LOGS / name, *words),), seconds)

    # What is compiled stays on disk, so these short runs, whose rows nobody reads, save the later ones minutes.
    unread = ROOT / "build" / "gpu-unread"

    def short(*words: str) -> tuple[str, ...]:
        return command(unread, *words, "repeats=3", "budget=0.1")

    warm = (
        (*python, "-m", "tdmpc2_fast.benchmarks.gpu.warm"),
        short("kernels", "envs=1,64", "compiled=false"),
        short("update-kernels", "batch=256,1024", "compiled=false"),
    )
    loop = f"task={_task(wheels)}"
    # The compiler needs minutes for a whole plan; its caches do not outlive some machines.
    compiled = (
        short("planner", "precision=tf32", *theirs),
        short("update", "precision=tf32", *theirs),
        *((short("loop", loop, "precision=tf32", *theirs),) if theirs else ()),
    )
    quick = ("compiled=false", "repeats=50", "budget=2")
    envs, sizes, batches = (1, 4, 16, 64), (5, 19), (256, 1024)
    regimes = (
        *(short("plan-regimes", f"envs={e}") for e in envs),
        *(short("update-regimes", f"size={s}", f"batch={b}") for s in sizes for b in batches),
    )
    several = ("compiled=false", "repeats=30", "budget=0.5")
    return [
        Part("compile", warm, 150),
        Part("tests", tests, 240),
        bench("planner", 40, "planner", "precision=tf32", "compiled=false", "repeats=200", "budget=5"),
        bench("update", 40, "update", "precision=tf32", "compiled=false", "repeats=100", "budget=5"),
        bench("planner-precisions", 30, "planner", "precision=bfloat16,float32", *quick),
        bench("update-bfloat16", 30, "update", "precision=bfloat16", *quick),
        bench("loop", 40, "loop", loop, "precision=tf32", "repeats=100", "budget=5"),
        bench("planner-envs", 50, "planner", "envs=4,16,64,256", *quick),
        Part("compile-baselines", compiled, 300),
        bench("planner-baselines", 90, "planner", "precision=tf32", "repeats=200", "budget=5", *theirs),
        bench("update-baselines", 90, "update", "precision=tf32", "repeats=100", "budget=5", *theirs),
        *((bench("loop-baselines", 90, "loop", loop, "precision=tf32", "repeats=100", *theirs),) if theirs else ()),
        bench("planner-sizes", 60, "planner", "size=1,19,48", *quick),
        bench("planner-317", 60, "planner", "size=317", *quick),
        bench("update-sizes", 60, "update", "size=1,5,19,48", "batch=1024", "precision=tf32,bfloat16", *quick),
        bench("update-317", 90, "update", "size=317", "batch=1024", "precision=bfloat16,tf32", *quick),
        bench("kernels", 40, "kernels", "envs=1,64", *several),
        bench("update-kernels", 40, "update-kernels", "batch=256,1024", *several),
        bench("planner-38", 20, "planner", "actions=38", *quick),
        bench("replay", 20, "replay", "batch=256,1024", *quick),
        *_sanitizer(python),
        Part("compile-regimes", regimes, 150),
        bench("plan-regimes", 60, "plan-regimes", f"envs={_several(envs)}", *quick),
        bench("update-regimes", 60, "update-regimes", f"size={_several(sizes)}", f"batch={_several(batches)}", *quick),
        *_learning(python, wheels, out),
    ]


def _several(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _task(wheels: bool) -> str:
    """Return walker-walk where its simulator is installed, else the environment without physics."""
    return "walker-walk" if wheels or find_spec("dm_control") else "stand-in"


def _sanitizer(python: tuple[str, ...]) -> Iterator[Part]:
    """Yield memcheck and racecheck on a small set of tests, where the tool is installed."""
    if tool := shutil.which("compute-sanitizer"):
        for kind in ("memcheck", "racecheck"):
            words = (tool, "--tool", kind, "--error-exitcode", "9", "--target-processes", "all")
            yield Part(kind, ((*words, *python, "-m", "pytest", "-m", "gpu", SANITIZED),), 90)


def _learning(python: tuple[str, ...], wheels: bool, out: Path) -> Iterator[Part]:
    """Yield, where there is physics, runs of two tasks, two seeds in two precisions side by side."""
    if _task(wheels) != "stand-in":
        words = ("tdmpc2_fast.benchmarks.gpu.learning", "seconds={seconds}", f"out={out / 'learning'}")
        for task in ("walker-walk", "cheetah-run"):
            runs = [(f"precision={p}", f"seed={s}") for s in (1, 2) for p in ("tf32", "bfloat16")]
            yield Part(f"learning-{task}", tuple((*python, "-m", *words, f"task={task}", *run) for run in runs), 300)


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


def _use(wheels: Path) -> str:
    """Put what the machine lacks on the path of every part; return why that is impossible, or nothing."""
    from tdmpc2_fast.benchmarks.gpu.wheels import WheelsError, unpack

    try:
        names = unpack(wheels, SITE)
    except (WheelsError, OSError) as e:
        return str(e)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(SITE))))
    print(f"from {wheels}: {', '.join(names) or 'nothing, the machine has all of it'}", flush=True)
    return ""


def run(part: Part, seconds: float) -> Outcome:
    """Run a part's commands side by side; what is still running when its time is over is ended."""
    LOGS.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    # Unbuffered, so that the log of what is ended says how far it came.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONUNBUFFERED": "1"}
    running = []
    by_itself = f"{max(1.0, seconds - _TO_END):.0f}"
    for i, words in enumerate(part.commands):
        command = [w.replace("{seconds}", by_itself) for w in words]
        log = LOGS / f"{part.name}-{i}.log"
        with log.open("w") as f:
            # A session of its own, so that what it starts ends with it.
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=f, stderr=f, start_new_session=True)
        running.append((process, log))
    failed, late = [], False
    for process, log in running:
        try:
            code = process.wait(max(0.0, start + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
            _end(process)
            code = -1
        if code:
            failed.append(f"{log.name}: ...{log.read_text(errors='replace')[-_TAIL:]}")
    status = "too late" if late else "failed" if failed else "passed"
    counted = test_counts("".join(log.read_text(errors="replace") for _, log in running))
    if counted and status == "passed" and "passed" not in counted:
        status = "failed"  # all were skipped: nothing was tried
    return Outcome(part, ": ".join(filter(None, (status, counted))), time.monotonic() - start, failed)


def test_counts(text: str) -> str:
    """Return the sum of what pytest's closing lines say, as "12 passed, 3 skipped"; empty where there are none."""
    total: Counter[str] = Counter()
    for line in re.findall(r"^[^\n]*\d+ \w+[^\n]* in \d[\d.]*s[^\n]*$", text, re.M):
        total.update({kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", line)})
    return ", ".join(f"{n} {kind}" for kind, n in total.items())


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def gather(out: Path) -> tuple[Path | None, str]:
    """Write the rows of all parts to one file; return it, if there are any, and their table."""
    from tdmpc2_fast.benchmarks.report import read, summary, write
    from tdmpc2_fast.benchmarks.run import new_file

    rows = [r for path in sorted(LOGS.glob("*/*.json")) if path.stat().st_size for r in read(path)]
    if not rows:
        return None, "nothing was measured"
    # Every process measures the machine's ceilings; those of the first are the file's.
    kept = [r for r in rows if r.suite != "ceilings"]
    kept += [r for r in rows if r.suite == "ceilings" and r.date == rows[0].date]
    path = new_file(out, rows[0])
    write(path, kept)
    return path, summary(kept)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = dict(out=str(RESULTS), minutes="9.5", official="", jax="", wheels="")
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
    theirs = [f"{k}={options[k]}" for k in ("official", "jax") if options[k]]
    all_parts = parts(theirs, bool(options["wheels"]), Path(options["out"]))
    unknown = [n for n in names if n not in [p.name for p in all_parts]]
    if unknown:
        print(f"unknown part {unknown[0]!r}, allowed: {', '.join(p.name for p in all_parts)}", file=sys.stderr)
        return 2
    try:
        end = time.monotonic() + 60 * float(options["minutes"])
    except ValueError:
        print(f"minutes: got {options['minutes']!r}, allowed: a number", file=sys.stderr)
        return 2
    if reasons := why_not_here():
        print("make gpu: this machine cannot do it", *(f"- {r}" for r in reasons), sep="\n", file=sys.stderr)
        return 2
    if options["wheels"] and (why := _use(Path(options["wheels"]))):
        print(f"make gpu: {why}", file=sys.stderr)
        return 2
    shutil.rmtree(LOGS, ignore_errors=True)
    outcomes = []
    for part in all_parts:
        if names and part.name not in names:
            continue
        left = end - RESERVE - time.monotonic()
        if left < 5:
            outcomes.append(Outcome(part, "not run: no time was left", 0))
            continue
        print(f"{part.name} ...", flush=True)
        outcomes.append(run(part, min(part.seconds, left)))
        print(f"{part.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
    return finish(outcomes, Path(options["out"]))


def finish(outcomes: Sequence[Outcome], out: Path) -> int:
    """Write the results and print what became of everything; returns the exit status."""
    for outcome in outcomes:
        for tail in outcome.tails[:_TAILS]:
            print(f"\n--- {outcome.part.name}, {tail}")
        if len(outcome.tails) > _TAILS:
            print(f"\n--- {outcome.part.name}: {len(outcome.tails) - _TAILS} more, in {LOGS}")
    path, table = gather(out)
    if path is not None and out == RESULTS:
        from tdmpc2_fast.benchmarks.report import main as regenerate

        if regenerate([str(out)]):
            print("RESULTS.md and the README could not be made anew")
    print(f"\n{table}\n")
    for log in sorted(LOGS.glob("learning-*.log")):
        print(log.read_text(errors="replace").strip().rpartition("\n")[2])  # how far a run came
    for o in outcomes:
        print(f"{o.part.name:20} {o.status:36} {o.seconds:6.0f} s")
    print(f"results: {path or 'none'}; logs: {LOGS}")
    return 0 if all(o.status.startswith("passed") for o in outcomes) else 1
