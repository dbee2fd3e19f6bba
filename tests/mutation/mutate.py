"""Says which small changes of the product no test notices; run by hand, see `--help`.

    python tests/mutation/mutate.py map                     # runs tests once: which runs which line
    python tests/mutation/mutate.py run --each 12 --seed 1  # tries twelve mutants of every file
    python tests/mutation/mutate.py run --files replay --each 1000 --minutes 10
    python tests/mutation/mutate.py show                    # share caught, and what survived

A mutant is one edit in a copy of the tree, `build/mutation/tree`, so that processes which tests start run it, too. Of
the tests that run the mutated line the quick ones that run little else come first; the first failure, or a hang, has
caught it. A parent that has imported torch and the like, and nothing of the product, forks a child for each mutant.
After a change of the product the map is made again; it needs the package coverage and takes a few times as long as the
tests. `map TESTS` adds to what is there, and PYTEST_ADDOPTS='-k "not triton"' leaves out what is interpreted. Read
what has survived: it changes nothing, or needs a test that was not mapped or takes too long, or a check is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import coverage
import pytest
from operators import Mutant, mutants

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build" / "mutation"
MAPPED = OUT / "mapped"  # the tree as the tests ran in it
TREE = OUT / "tree"  # the copy that mutants are written into

PRODUCT = [
    "tdmpc2_fast/*.py",
    "tdmpc2_fast/model/*.py",
    "tdmpc2_fast/learn/*.py",
    "tdmpc2_fast/plan/*.py",
    "tdmpc2_fast/runtime/b*.py",
    "train/run/*.py",
    "train/envs/*.py",
    "train/cli/keys.py",
    "train/cli/sweep.py",
    "train/pictures/curves.py",
]
NOT_HERE = re.compile(r"triton|flat_model|packing|sizes|__init__|version|moved|compiling|mujoco_setup|catalogue")
"""What serves kernels or a device only, or is no logic."""
PLAIN_OPS = ("mppi.py", "two_hot.py", "policy_head.py", "normed_linear.py", "activations.py")
"""Files of `kernels/` without kernels; of the others only the references are mutated."""
REFERENCES = r"_reference$"

TESTS = ["tests/algorithm", "tests/train", "tests/kernels"]
FIRST = 4.0, 30
"""Seconds, as mapped, and number of the tests of the first child: most mutants are caught by then."""
PRELOADED = [
    *("triton", "numpy", "torch", "torch._dynamo", "torch.utils.checkpoint", "safetensors.torch", "pytest", "pdb"),
    *("hypothesis", "scipy.stats", "gymnasium.envs.classic_control", "mujoco", "dm_env", "absl.logging", "click"),
    *("rich.live", "rich.table", "matplotlib.figure", "matplotlib.backends.backend_agg", "imageio.v2"),
    *("tensorboard.compat.proto.event_pb2", "multiprocessing.connection", "xml.etree.ElementTree"),
]


TRACER = """
[run]
parallel = true
data_file = {out}/data/lines
context = ${{WHICH_TEST}}
concurrency = multiprocessing,thread
sigterm = true
disable_warnings = no-data-collected,already-imported,module-not-measured,no-sysmon
include =
    {include}
"""


class Chosen:
    """A pytest plugin that runs these tests in this order, and keeps the name of the first that fails."""

    def __init__(self, names: list[str]) -> None:
        self.place = {name: i for i, name in enumerate(names)}
        self.failed = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Drop what was not chosen."""
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda i: self.place[i.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the name of a test that fails."""
        if report.failed and not self.failed:
            self.failed = report.nodeid


class WhichLines:
    """A pytest plugin that notes which lines of the product each test runs, and how long the test takes.

    Processes that a test starts are traced, too. What a shared fixture runs counts for every test that takes it.
    """

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        settings = OUT / "settings.ini"
        (OUT / "data").mkdir(parents=True, exist_ok=True)
        include = "\n    ".join(f"{MAPPED}/{folder}/*" for folder in ("tdmpc2_fast", "kernels", "train"))
        settings.write_text(TRACER.format(out=OUT, include=include))
        os.environ["WHICH_TEST"] = ""
        self.tracer = coverage.Coverage(config_file=str(settings))
        self.tracer.start()
        os.environ["COVERAGE_PROCESS_START"] = str(settings)

    def _enter(self, context: str) -> None:
        os.environ["WHICH_TEST"] = context
        self.tracer.switch_context(context)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Begin a test."""
        self._enter(item.nodeid)
        self.tests[item.nodeid] = {"seconds": 0.0, "passed": True, "fixtures": []}
        result = yield
        self._enter("")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[Any]:
        if fixturedef.scope == "function":
            return (yield)
        before, context = os.environ["WHICH_TEST"], f"{fixturedef.baseid}@{fixturedef.argname}"
        self._enter(context)
        try:
            return (yield)
        finally:
            self._enter(before)

    def pytest_runtest_teardown(self, item: Any) -> None:
        shared = [d for defs in item._fixtureinfo.name2fixturedefs.values() for d in defs if d.scope != "function"]
        self.tests[item.nodeid]["fixtures"] = [f"{d.baseid}@{d.argname}" for d in shared]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests[report.nodeid]
        test["seconds"] += report.duration
        test["passed"] &= report.passed

    def pytest_sessionfinish(self) -> None:
        """Write `map.json`: per test its seconds and, per file, its lines."""
        self.tracer.stop()
        self.tracer.save()
        data = coverage.CoverageData(basename=str(OUT / "all"), suffix=False)
        data.erase()
        for part in sorted((OUT / "data").iterdir()):
            one = coverage.CoverageData(basename=str(part))
            try:
                one.read()
                data.update(one)
            except coverage.CoverageException as e:
                print(f"{part.name} is left out: {e}")
            part.unlink()
        lines: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for file in data.measured_files():
            for line, contexts in data.contexts_by_lineno(file).items():
                for context in contexts:
                    lines[context][str(Path(file).relative_to(MAPPED))].append(line)
        old = json.loads((OUT / "map.json").read_text()) if (OUT / "map.json").exists() else {}
        for name, test in self.tests.items():
            of = {file: set(there) for file, there in lines[name].items()}
            for fixture in test.pop("fixtures"):
                for file, there in lines[fixture].items():
                    of[file] = of.get(file, set()) | set(there)
            old[name] = {**test, "lines": {file: sorted(there) for file, there in of.items()}}
        (OUT / "map.json").write_text(json.dumps(old))


def pytest_configure(config: pytest.Config) -> None:
    """Begin to trace before conftest imports the product, so that lines of modules and classes count for no test."""
    config.pluginmanager.register(WhichLines(), "which-lines")


def copy_tree(product: Path, to: Path) -> None:
    """Make a private copy, the product from here and the rest as it is now, and in it the package as installed."""
    shutil.rmtree(to, ignore_errors=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0"):
        source = (ROOT if name.startswith("tests/") else product) / name
        if name and source.is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name)
    package = to / "build" / "package" / "tdmpc2_fast"
    package.mkdir(parents=True)
    for path in [*(to / "tdmpc2_fast").iterdir(), to / "kernels", to / "train", to / "benchmarks"]:
        (package / path.name).symlink_to(path)


def environment(tree: Path) -> dict[str, str]:
    """Return what processes that run tests in a copy need."""
    path = os.pathsep.join([str(tree / "build" / "package"), str(Path(__file__).parent)])
    return dict(PYTHONPATH=path, OMP_NUM_THREADS="1", TRITON_INTERPRET="1")


def map_lines(tests: list[str]) -> None:
    """Run the tests in the copy, traced, and keep which of them run which line; earlier maps are added to."""
    copy_tree(ROOT, MAPPED)
    command = [sys.executable, "-P", "-m", "pytest", "-p", "mutate", "-p", "no:cacheprovider", "--durations=20"]
    subprocess.run([*command, *tests], cwd=MAPPED, env={**os.environ, **environment(MAPPED)}, check=False)


def all_mutants(pattern: str) -> dict[str, list[Mutant]]:
    """Return the mutants of all files in scope whose path the pattern finds."""
    files = sorted({path for glob in PRODUCT for path in TREE.glob(glob)})
    only = {str(path.relative_to(TREE)): None for path in files if not NOT_HERE.search(path.name)}
    for path in sorted((TREE / "kernels").rglob("*.py")):
        only[str(path.relative_to(TREE))] = None if path.name in PLAIN_OPS else REFERENCES
    found = {
        file: list(mutants(file, (TREE / file).read_bytes(), functions))
        for file, functions in only.items()
        if re.search(pattern, file)
    }
    return {file: some for file, some in found.items() if some}


def drawn(of: dict[str, list[Mutant]], each: int, seed: int) -> list[Mutant]:
    """Draw up to so many mutants of each file, no two on one line; files take turns."""
    turns: list[list[Mutant]] = []
    for file, some in of.items():
        rng, lines = random.Random(f"{seed} {file}"), set()
        for mutant in rng.sample(some, len(some)):
            if mutant.line not in lines and len(lines) < each:
                if len(turns) <= len(lines):
                    turns.append([])
                turns[len(lines)].append(mutant)
                lines.add(mutant.line)
    return [mutant for turn in turns for mutant in turn]


class Map:
    """Which test runs which line of the product."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = json.loads((OUT / "map.json").read_text())
        self.of_line: dict[tuple[str, int], list[str]] = defaultdict(list)
        self.size = {name: 1 + sum(map(len, test["lines"].values())) for name, test in self.tests.items()}
        for name, test in self.tests.items():
            if test["passed"] and (TREE / name.split("::")[0]).exists():
                for file, lines in test["lines"].items():
                    for line in lines:
                        self.of_line[file, line].append(name)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Return the tests to run, the most promising first."""
        for first, last in (mutant.lines, mutant.scope):
            names = {name for line in range(first, last + 1) for name in self.of_line[mutant.file, line]}
            if names:
                break
        return sorted(names, key=lambda name: self._cost(name, mutant.file))

    def _cost(self, name: str, file: str) -> float:
        share = len(self.tests[name]["lines"].get(file, ())) / self.size[name]
        return float(self.tests[name]["seconds"] + 0.05) / (share + 0.01)

    def within(self, names: list[str], seconds: float, most: int) -> list[str]:
        """Return the first of these tests, at most so many, as run in the time, and the first one whatever it takes."""
        left, found = seconds, []
        for name in names[:most]:
            if not found or self.tests[name]["seconds"] <= left:
                found.append(name)
                left -= self.tests[name]["seconds"]
        return found


def attempt(names: list[str], limit: float) -> str:
    """Run these tests in a child and return what caught the mutant, or nothing."""
    answer, log = OUT / "answer", OUT / "child.log"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _run_tests(names, answer, log)
    end = time.monotonic() + limit
    status = 0
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        end_children()
        return "a hang"
    end_children()
    if not answer.exists():
        return f"the end of the process, status {status}"
    code, failed = answer.read_text().split("\n")
    if code == "5":
        raise RuntimeError(f"none of these tests was found: {names[:3]}; make the map again")
    return "" if code == "0" else failed or f"pytest's exit status {code}"


def adopt_orphans() -> None:
    """Become the parent of what a child leaves behind, also in a session of its own (Linux)."""
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def end_children() -> None:
    """End all children of this process, and theirs."""
    while pids := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for pid in map(int, pids):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _run_tests(names: list[str], answer: Path, log: Path) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(TREE)
    chosen = Chosen(names)
    temporary = f"--basetemp={OUT / 'temporary'}"
    files = list(dict.fromkeys(name.split("::")[0] for name in names))
    code = pytest.main(
        ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist", temporary, *files], [chosen]
    )
    answer.write_text(f"{int(code)}\n{chosen.failed}")
    os._exit(0)


def judge(mutant: Mutant, lines: Map, clock: int, seconds: float, most: int) -> dict[str, Any]:
    """Write the mutant into the copy, run tests until one fails, and put the file back."""
    names = lines.tests_of(mutant)
    chosen = lines.within(names, seconds, most)
    first = lines.within(chosen, *FIRST)
    path, began, caught = TREE / mutant.file, time.monotonic(), ""
    source = path.read_bytes()
    try:
        path.write_bytes(mutant.apply(source))
        os.utime(path, (clock, clock))  # of its own, so that no bytecode of another mutant counts as this one's
        for some in (first, [name for name in chosen if name not in set(first)]):
            if some and not caught:
                caught = attempt(some, 20 + 2 * sum(lines.tests[name]["seconds"] for name in some))
    finally:
        path.write_bytes(source)
        os.utime(path, (clock + 1, clock + 1))
    counts = dict(ran=len(chosen), reach=len(names), seconds=round(time.monotonic() - began, 1))
    return dict(asdict(mutant), caught=caught, text=source.splitlines()[mutant.line - 1].decode().strip(), **counts)


def run(given: argparse.Namespace) -> None:
    """Try mutants and append what comes of them to the results; what they have already is not tried again."""
    copy_tree(MAPPED, TREE)
    os.environ.update(environment(TREE))
    sys.path[:0] = [str(TREE / "build" / "package")]
    for name in PRELOADED:
        importlib.import_module(name)
    adopt_orphans()
    lines = Map()
    found = all_mutants(given.files)
    if given.again:
        wanted = {(r["file"], r["line"], r["what"]) for r in read(given.again) if not r["caught"]}
        some = [m for ms in found.values() for m in ms if (m.file, m.line, m.what) in wanted]
    else:
        some = drawn(found, given.each, given.seed)
    results = given.results
    done = {(r["file"], r["start"], r["new"]) for r in (read(results) if results.exists() else [])}
    some = [m for m in some if (m.file, m.start, m.new) not in done]
    total = sum(map(len, found.values()))
    print(
        f"seed {given.seed}: {len(some)} of {total} mutants of {len(found)} files; {len(lines.tests)} tests", flush=True
    )
    began, clock = time.monotonic(), int(time.time()) - 10_000_000
    for i, mutant in enumerate(some):
        if time.monotonic() - began > 60 * given.minutes:
            print(f"time is over after {i} mutants")
            break
        result = dict(judge(mutant, lines, clock + 2 * i, given.seconds, given.tests), seed=given.seed)
        with results.open("a") as f:
            f.write(json.dumps(result) + "\n")
        if not result["caught"]:
            print(_line(result), flush=True)
    show(results)


def read(results: Path) -> list[dict[str, Any]]:
    """Return what came of all mutants tried."""
    return [json.loads(line) for line in results.read_text().splitlines()]


def _line(r: dict[str, Any]) -> str:
    tests = f"{r['ran']} of {r['reach']} tests" if r["reach"] else "no test runs it"
    return f"{r['file']}:{r['line']}: {r['what']}   [{r['text'][:90]}]   ({tests}, {r['seconds']} s)"


def show(results: Path) -> None:
    """Print the share caught, by file, and the survivors."""
    found = read(results)
    tried, caught = Counter(r["file"] for r in found), Counter(r["file"] for r in found if r["caught"])
    for file in sorted(tried):
        print(f"{caught[file]:4d} of {tried[file]:4d}  {file}")
    print(*[_line(r) for r in found if not r["caught"]], sep="\n")
    print(f"caught {caught.total()} of {tried.total()}: {caught.total() / max(tried.total(), 1):.1%}")


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    mapping = commands.add_parser("map", help="run the tests once and keep which of them runs which line")
    mapping.add_argument("tests", nargs="*", default=TESTS, help="files or folders; what was mapped before stays")
    running = commands.add_parser("run", help="try mutants")
    running.add_argument("--files", default="", help="a pattern that paths of the product match")
    running.add_argument("--each", type=int, default=12, help="mutants of a file")
    running.add_argument("--seed", type=int, default=1)
    running.add_argument("--minutes", type=float, default=60, help="of trying; files have had equal turns by then")
    running.add_argument("--seconds", type=float, default=20, help="of the tests of a mutant, as they were mapped")
    running.add_argument("--tests", type=int, default=80, help="of a mutant, at most")
    running.add_argument("--again", type=Path, help="results of an earlier run: only what survived there")
    showing = commands.add_parser("show", help="print the share caught, and what survived")
    for parser_of in (running, showing):
        parser_of.add_argument("--results", type=Path, default=OUT / "results.jsonl")
    given = parser.parse_args()
    if given.command == "map":
        map_lines(given.tests)
    elif given.command == "run":
        run(given)
    else:
        show(given.results)


if __name__ == "__main__":
    main()
