"""What `make gpu` runs: its parts, in their order, each with the seconds of a call that are its own.

The first call has what tells most: whether plans and updates are right, and how fast they are at 5M. The second has
the other baselines and sizes; `more` is everything else, as far as there is time. A kernel takes seconds to compile, so
each call compiles, on all cores and before anything is timed, the kernels of what it runs and no others.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from .processes import ROOT, Part

LOGS = ROOT / "build" / "gpu-logs"
RESULTS = ROOT / "benchmarks" / "results"
RUN = "tdmpc2_fast.benchmarks.run"
WARM = "tdmpc2_fast.benchmarks.gpu.warm"
GROUPS = ("first", "rest", "more")
CALL = 390.0  # seconds of the parts of the first call, and of those of the second
TESTS = ("_kernel", "_kernels")  # how the names of other files with GPU tests end
THREADS = min(8, os.cpu_count() or 1)  # of torch on the host: the same in every run

# What compute-sanitizer watches: it makes a kernel a hundred times slower.
SANITIZED = "tests/test_gpu.py::test_a_replay_is_bitwise_an_eager_plan[odd-tf32-E7]"

_PYTHON = (sys.executable, "-P")
_BOTH = "precision=bfloat16,tf32"
# The official code computes in tf32 whatever we do.
_TF32 = "precision=tf32"
# Several runs share the machine, whose host only launches; what they leave are numbers.
_LEARNT = ("eval_episodes=4", "num_threads=1", "save_agent=false")
_QUICK = ("compiled=false", "repeats=50", "budget=1")


def parts(theirs: Sequence[str] = (), wheels: bool = False, out: Path = RESULTS, logs: Path = LOGS) -> list[Part]:
    """Return all parts, the most telling first, for the time may end before the last.

    theirs: keys of checkouts.
    wheels: whether the loop's physics will come from wheels where the machine has none.
    out: the folder for learning runs.
    logs: the folder for rows of parts.
    """
    loop = f"task={_task(wheels)}"
    return [*_first(theirs, loop, logs), *_rest(logs), *_more(theirs, loop, logs), *_learning(wheels, out)]


def _command(folder: Path, *words: str) -> tuple[str, ...]:
    return (*_PYTHON, "-m", RUN, *words, f"threads={THREADS}", f"out={folder}")


def _short(*words: str) -> tuple[str, ...]:
    """Return a run whose rows nobody reads: what it compiles stays on disk."""
    return _command(ROOT / "build" / "gpu-unread", *words, "repeats=3", "budget=0.1")


def _bench(logs: Path, group: str, name: str, seconds: float, *words: str) -> Part:
    return Part(name, (_command(logs / name, *words),), seconds, group, timed=True)


def _warm(name: str, seconds: float, group: str, *of: str) -> Part:
    return Part(name, ((*_PYTHON, "-m", WARM, *of),), seconds, group)


def _tests(name: str, seconds: float, group: str, marked: str, files: Sequence[str]) -> Part:
    """Return tests in shards side by side; nothing is timed meanwhile."""
    shards = max(1, min(14, (os.cpu_count() or 1) - 2))
    # Verbose, so that the log of what is killed says what was passed.
    pytest = (*_PYTHON, "-m", "pytest", "-m", marked, "-p", "no:cacheprovider", "-vv", "--tb=short", *files)
    return Part(name, tuple(("env", "TDMPC2_GPU=1", f"TEST_SHARD={i}/{shards}", *pytest) for i in range(shards)),
                seconds, group)  # fmt: skip


def _first(theirs: Sequence[str], loop: str, logs: Path) -> Iterator[Part]:
    """Yield the parts of the first call."""

    def bench(name: str, seconds: float, *words: str) -> Part:
        return _bench(logs, "first", name, seconds, *words)

    timing = (_BOTH, "compiled=false", "repeats=200", "budget=5")
    against = (_TF32, "compiled=false", "repeats=100", "budget=3", *theirs)
    if theirs:
        shorts = (_short(suite, _TF32, "compiled=false", *theirs) for suite in ("planner", "update"))
        yield Part("compile-theirs", tuple(shorts), 0, beside=True)
    yield _warm("compile", 110, "first", "planner", "update", "tests")
    yield _tests("tests", 90, "first", "gpu and not later", ["tests/test_gpu.py"])
    yield bench("planner", 35, "planner", *timing)
    yield bench("update", 35, "update", *timing)
    yield bench("loop", 40, "loop", loop, *timing)
    if theirs:
        yield bench("planner-theirs", 45, "planner", *against)
        yield bench("update-theirs", 35, "update", *against)


def _rest(logs: Path) -> Iterator[Part]:
    """Yield the parts of the second call."""

    def bench(name: str, seconds: float, *words: str) -> Part:
        return _bench(logs, "rest", name, seconds, *words)

    # torch.compile needs minutes for a whole plan.
    shorts = tuple(_short(suite, _TF32) for suite in ("planner", "update"))
    against = (_TF32, "repeats=100", "budget=4")
    names = ("planner-baselines", "update-baselines", "planner-envs", "small", "planner-38")
    yield Part("compile-baselines", shorts, 0, "rest", beside=True)
    yield _warm("compile-rest", 110, "rest", *names)
    yield bench("planner-baselines", 60, "planner", *against)
    yield bench("update-baselines", 45, "update", *against)
    yield bench("planner-envs", 35, "planner", "envs=16,64,256", _BOTH, *_QUICK)
    yield bench("small", 30, "planner", "update", "size=1", _BOTH, *_QUICK)
    yield bench("planner-38", 20, "planner", "actions=38", _BOTH, *_QUICK)
    yield _warm("compile-large", 50, "rest", "large")
    yield bench("large", 40, "planner", "update", "size=19,48", "batch=1024", _BOTH, *_QUICK)


def _more(theirs: Sequence[str], loop: str, logs: Path) -> Iterator[Part]:
    """Yield what is left, most of it with kernels of its own."""

    def bench(name: str, seconds: float, *words: str) -> Part:
        return _bench(logs, "more", name, seconds, *words)

    files = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").rglob("test_*.py")) if p.stem.endswith(TESTS)]
    envs, sizes, batches = "1,4,16,64", (5, 19), (256, 1024)
    regimes = (
        *(_short("plan-regimes", f"envs={e}") for e in envs.split(",")),
        *(_short("update-regimes", f"size={s}", f"batch={b}") for s in sizes for b in batches),
    )
    several = ("compiled=false", "repeats=30", "budget=0.5")
    kernels = (_short("kernels", "envs=1,64", "compiled=false"), _short("update-kernels", "compiled=false"))
    if theirs:
        yield bench("loop-theirs", 90, "loop", loop, _TF32, "repeats=100", "budget=3", *theirs)
    yield _warm("compile-tests", 100, "more", "more-tests")
    yield _tests("more-tests", 120, "more", "gpu and later", ["tests/test_gpu.py"])
    yield _tests("kernel-tests", 150, "more", "gpu", files)
    yield Part("compile-kernels", kernels, 60, "more")
    yield bench("kernels", 40, "kernels", "envs=1,64", *several)
    yield bench("update-kernels", 40, "update-kernels", "batch=256,1024", *several)
    yield bench("replay", 20, "replay", "batch=256,1024", *_QUICK)
    yield bench("float32", 60, "planner", "update", "precision=float32", *_QUICK)
    yield _warm("compile-317", 60, "more", "large-317")
    yield bench("large-317", 90, "planner", "update", "size=317", "batch=1024", _BOTH, *_QUICK)
    yield from _sanitizer()
    yield Part("compile-regimes", regimes, 150, "more")
    yield bench("plan-regimes", 60, "plan-regimes", f"envs={envs}", *_QUICK)
    yield bench("update-regimes", 60, "update-regimes", "size=5,19", "batch=256,1024", *_QUICK)


def _task(wheels: bool) -> str:
    """Return walker-walk where its simulator is installed, else the environment without physics."""
    return "walker-walk" if wheels or find_spec("dm_control") else "stand-in"


def _sanitizer() -> Iterator[Part]:
    """Yield memcheck and racecheck on a small test, where the tool is installed."""
    if tool := shutil.which("compute-sanitizer"):
        for kind in ("memcheck", "racecheck"):
            words = (tool, "--tool", kind, "--error-exitcode", "9", "--target-processes", "all")
            yield Part(kind, ((*words, *_PYTHON, "-m", "pytest", "-m", "gpu", SANITIZED),), 90, "more")


def _learning(wheels: bool, out: Path) -> Iterator[Part]:
    """Yield, where there is physics, runs of two tasks, two seeds in two precisions side by side."""
    if _task(wheels) != "stand-in":
        words = ("tdmpc2_fast.benchmarks.learning", "minutes={minutes}", f"out={out / 'learning'}", *_LEARNT)
        for task in ("walker-walk", "cheetah-run"):
            runs = [(f"precision={p}", f"seed={s}") for s in (1, 2) for p in ("tf32", "bfloat16")]
            commands = tuple((*_PYTHON, "-m", *words, f"task={task}", *run) for run in runs)
            yield Part(f"learning-{task}", commands, 300, "more", timed=True)
