"""What the documentation shows is there and works: links, commands, the example environment, the notebook."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, tiny_config
from loop_oracle import csvs
from official_like import OfficialLike

pytest.importorskip("dm_control")
pytest.importorskip("click")
pytest.importorskip("rich")
from tdmpc2_fast import TDMPC2, Config, Planner, train
from tdmpc2_fast.train import api, cli
from tdmpc2_fast.train.cli import app, sweep
from tdmpc2_fast.train.envs import SUITES, make_env
from tdmpc2_fast.train.envs.base import RenderError
from tdmpc2_fast.train.signals import Children

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"
QUICK = dict(iterations=1, num_samples=8, num_elites=4, num_pi_trajs=4)  # plans of a model as it is
SMALL = {k: str(v) for k, v in dict(TINY, iterations=1, device="cpu", num_threads=1).items()}


def blocks(path: Path, *languages: str) -> list[str]:
    return [text for language, text in re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(), re.M | re.S)
            if language in languages]  # fmt: skip


def headings(path: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    found = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in headings(path), target


@dataclass(frozen=True)
class Shown:
    """A command, or a piece of Python (no output then), as a page shows it, and the lines shown below it."""

    text: str
    output: list[str]
    python: bool = False


def steps(page: Path) -> Iterator[Shown]:
    """What a reader can run, in the page's order: its blocks, and commands with arguments in a sentence."""
    pattern = r"^```(\w+)\n(.*?)^```|(?<!`)`((?:tdmpc2-fast|python|make) [^`\n]+ [^`\n]+)`"
    for language, block, sentence in re.findall(pattern, page.read_text(), re.M | re.S):
        if language == "python":
            yield Shown(block, [], python=True)
        elif language in ("console", "sh"):
            yield from _commands(block)
        elif sentence:
            yield Shown(sentence, [])


def _commands(block: str) -> list[Shown]:
    """The commands of a block: those behind `$ `, where there are any, else every line; a script is one."""
    if block.startswith("#!"):
        return [Shown(block, [])]
    found: list[Shown] = []
    lines = block.replace("\\\n", " ").splitlines()
    prompt = "$ " if any(line.startswith("$ ") for line in lines) else ""
    for line in filter(str.strip, lines):
        if line.startswith(prompt):
            found.append(Shown(line.removeprefix(prompt), []))
        else:
            found[-1].output.append(line)
    return found


NOT_HERE = {
    r"python3 -m venv|pip |pre-commit ": "installs",
    r"docker |mkdir -p runs$": "an image has to be built",
    r"tensorboard ": "a server, which does not end",
    r"make ": "sets up .venv and takes minutes; that make knows what to do is tried",
    r"eval \"\$\(_TDMPC2|_TDMPC2": "shells, of which tests/train/cli/test_app.py tries bash",
    r"python tests/golden_check|python benchmarks/|python -m tdmpc2_fast\.benchmarks": "have tests of their own",
    r"python tests/mutation/": "takes hours",
    r"python train\.py": "the official code",
    r"torchrun |.*\n#SBATCH(.*\n)*srun torchrun": "several processes; tests/ranks has them",
    r"tdmpc2-fast train task=mw-": "has an interpreter of its own; `make suites` tries it",
    r"tdmpc2-fast eval mt30-1M\.pt": "long episodes; tests/train/multitask/test_multitask_runs.py plays them",
    r"tdmpc2-fast suites install": "installs; tests/train/cli/test_tasks.py tries it",
    r"tdmpc2-fast tasks --check": "plays every task, which takes minutes; tests/train/cli/test_tasks.py plays some",
    r"tdmpc2-fast train task=playground:": "JAX and Playground; tests/train/device/test_playground.py trains on it",
    r"python robot_loop\.py": "tests/train/cli/test_export_command.py runs it",
    r"tdmpc2-fast train .*(data_dir|init)=": "takes data and models; tests/train/run/ trains from some",
    r"tdmpc2-fast data convert (mt30|minari)": "downloads; tests/train/data/ converts such files",
    r".*\[.+\.\.\.\]": "says what may stand there",
}
"""Commands that no test runs as they are shown, and why."""


def test_every_command_is_shown() -> None:
    shown = {name for page in PAGES for step in steps(page) for name in re.findall(r"tdmpc2-fast (\w+)", step.text)}
    assert shown >= {c.name for c in app.COMMANDS} | {"bench"}


# A shell takes the lines apart, as a reader's does; what it calls is written down, and done in this process.
RECORDED = """#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" "" >> "$CALLS"
"""
PROGRAMS = {
    "tdmpc2-fast": RECORDED,
    "python": RECORDED,
    "srun": '#!/bin/sh\nexec "$@"\n',
    "parallel": """#!/bin/bash
read -r first; shift 2; line=${*//\\{%\\}/1}; eval "${line//\\{\\}/$first}"
""",
}


def calls(text: str, folder: Path) -> list[list[str]]:
    """The programs a shell calls for this text, each with its words; of many, the first and the last one."""
    there = folder / "bin"
    there.mkdir(exist_ok=True)
    for name, program in PROGRAMS.items():
        (there / name).write_text(program)
        (there / name).chmod(0o755)
    record = there / "calls"
    record.write_text("")
    env = dict(PATH=f"{there}:{os.environ['PATH']}", HOME=str(folder), CALLS=str(record))
    env |= dict(SLURM_ARRAY_TASK_ID="2", SLURM_CPUS_PER_TASK="1")
    subprocess.run(["bash", "-euc", text], env=env, check=True, timeout=60)
    found = [call.split("\0") for call in record.read_text().split("\0\0")[:-1]]
    assert found, f"it calls nothing of ours, and is not in NOT_HERE: {text}"
    return [found[0], *found[1:][-1:]]


def small(words: list[str]) -> list[str]:
    """The same words with a model, episodes and a run that take a second."""
    name = "train" if "=" in words[0] else words[0]
    given = dict(w.partition("=")[::2] for w in words if "=" in w)
    if "dry_run" in given:
        return words
    dots = any("dot-reach" in w for w in words)  # whose episodes have the length they have
    further = dict(steps="70" if dots else "40", decision="2", device="cpu", num_envs="2")
    values = {k: v for k, v in further.items() if k in given}
    if name == "train" or (name == "eval" and words[1].endswith(".pt")):
        values |= SMALL | dict(eval_episodes=str(min(int(given.get("eval_episodes", 1)), 2)))
        if re.search(r"-v\d", given.get("task", "")):
            values["episode_length"] = "10"
        elif not dots:
            values["env.task_kwargs.time_limit"] = "0.2"
    if name == "eval" and words[1].startswith("examples/"):
        values |= {k: str(v) for k, v in QUICK.items()}
    if name == "train":
        values |= dict(steps="60" if dots else "25", seed_steps="10", eval_freq="10", env_workers="0")
    return [w for w in words if w.partition("=")[0] not in values] + [f"{k}={v}" for k, v in values.items()]


def done(call: list[str]) -> int:
    """The exit status of a call."""
    program, *words = call
    if program == "python" and words[0] == "-m":
        assert words[1] == "tdmpc2_fast.train"
        words = words[2:]
    elif program == "python":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [words[0], *small(words[1:])])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(words[0], run_name="__main__")
        return int(ended.value.code or 0)
    return cli.main(small(words))


class Here(Children):
    """Runs of a sweep, in this process."""

    def run(self, command: Sequence[str], **options: Any) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(sweep._REPORT, options["env"][sweep._REPORT])
            return cli.main(command[command.index("train") :])


class Ends(sweep.Sweep):
    """The first and the last run of a sweep."""

    def __init__(self, runs: Sequence[sweep.Run]) -> None:
        super().__init__([runs[0], runs[-1]])


NUMBER, TIME = r"[-+]?\d[\d,.]*(?:e[-+]\d+)?", r"\d+:\d\d:\d\d|-:--:--"


def fits(shown: str, real: str) -> bool:
    """Whether a line is the one shown but for numbers, times, spaces, and what `...` stands for."""
    pattern = ""
    for part in re.split(rf"(\.\.\.|{TIME}|{NUMBER})", " ".join(shown.split())):
        varies = next((p for p in (TIME, NUMBER) if re.fullmatch(p, part)), None)
        pattern += ".*" if part == "..." else re.escape(part) if varies is None else f"(?:{varies})"
    return re.fullmatch(pattern, " ".join(real.split())) is not None


def trained_in_small(module: Any, env: Any, **keys: Any) -> api.Agent:
    """What calling the module does, with a model that takes a second, for little more than an episode."""
    few = dict(TINY, iterations=1, num_threads=1, steps=230, seed_steps=10, eval_freq=1000, eval_episodes=1)
    return api.train(env, **{**keys, "model_size": None, **few})


@pytest.fixture
def a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What pages make and register is gone afterwards; interpreted, the kernels would run for days."""
    registry = pytest.importorskip("gymnasium").registry
    registered, modules = {**registry}, {*sys.modules}
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("tdmpc2_fast.train.envs.SUITES", {**SUITES})
    monkeypatch.setattr(sweep, "Children", Here)
    monkeypatch.setattr(sweep, "Sweep", Ends)
    monkeypatch.setattr(type(train), "__call__", trained_in_small)
    monkeypatch.setattr("tdmpc2_fast.benchmarks.run.bench", lambda options, suites: 0)  # what it does has tests
    for name in ("display._FIRST_LINE", "display._BETWEEN_LINES", "status._PACE_SECONDS", "status._WORTH_A_LINE"):
        monkeypatch.setattr(f"tdmpc2_fast.train.log.{name}", 0.0)
    yield tmp_path
    registry.clear()
    registry.update(registered)
    for name in [n for n in {*sys.modules} - modules if (tmp_path / f"{n}.py").exists()]:
        del sys.modules[name]


FILES = {"environments.md": ("carts.py", "mine.py", "dot.py")}
"""Names under which pages save their first pieces of Python."""


MADE: dict[str, Callable[[], dict[str, Any]]] = {
    "\naccelerate(agent)": lambda: dict(agent=OfficialLike(tiny_config())),
    "actions = planner.plan(obs, t0=first_step": lambda: dict(obs=torch.zeros(16, 24), first_step=True),
}
"""What the reader of a piece of Python has, by words in it."""


def presupposed(page: str) -> dict[str, Any]:
    """Puts what a page has not made itself into the folder; the names its Python uses without making them."""
    if page in ("README.md", "benchmarks.md"):
        shutil.copytree(ROOT / "examples" / "walker-walk", "examples/walker-walk")
    if page in ("benchmarks.md", "drop-in.md"):
        for checkout in (
            "tdmpc2/tdmpc2/tdmpc2.py",
            "CHECKOUT/tdmpc2/tdmpc2.py",
            "tdmpc2-jax/tdmpc2_jax/tdmpc2.py",
        ):
            Path(checkout).parent.mkdir(parents=True)
            Path(checkout).touch()
    if page in ("commands.md", "checkpoints.md"):
        TDMPC2(tiny_config(223, 38)).save("dog-1.pt")
        TDMPC2(Config(model_size=5).with_env({"state": (24,)}, 6, 500)).save("mine.pt")
    if page == "checkpoints.md":
        TDMPC2(Config(task="mt30", model_size=1)).save("mt30-1M.pt")
    if page == "environments.md":
        Path("my_environments.py").write_text(blocks(ROOT / "docs" / page, "python")[0].replace("Cart-v0", "Mine-v0"))
    if page == "runs.md":
        return dict(obs=torch.zeros(24))
    if page in ("curves.md", "rendering.md", "export.md"):
        assert cli.main(small(["train", "task=cheetah-run"])) == 0
        Path("results/tdmpc2").mkdir(parents=True)
        Path("results/tdmpc2/cheetah-run.csv").write_text("step,reward,seed\n0,1,1\n60,2,1\n")
    if page == "rendering.md":
        planner = Planner.from_checkpoint("runs/cheetah-run/default/1")
        return dict(torch=torch, planner=planner, task="cheetah-run", env=make_env(planner.model.cfg, seed=1))
    return {}


@pytest.mark.parametrize("page", [p for p in PAGES if [*steps(p)]], ids=lambda p: p.name)
def test_what_a_page_shows_is_so(page: Path, a_folder_of_its_own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Followed from an empty folder, in small: each command ends as the page implies and prints such lines."""
    if page.name in ("pixels.md", "quickstart.md", "rendering.md"):
        try:
            make_env(Config(task="walker-walk"), seed=1).render()
        except RenderError as e:
            pytest.skip(f"no renderer here: {e}")
    names = presupposed(page.name)
    files = iter(FILES.get(page.name, ()))
    for step in steps(page):
        if step.python:
            if file := next(files, None):
                Path(file).write_text(step.text)
            else:
                for words, made in MADE.items():
                    names.update(made() if words in step.text else {})
                shorter = step.text.replace("decision=60", "decision=2")
                quicker = shorter.replace('"examples/walker-walk")', f'"examples/walker-walk", **{QUICK})')
                exec(compile(quicker, page.name, "exec"), names)
            continue
        if any(re.match(pattern, step.text) for pattern in NOT_HERE):
            if step.text.startswith("make "):
                tried = 'make() { command make --dry-run "$@"; }\n' + step.text
                subprocess.run(["bash", "-c", tried], cwd=ROOT, check=True, capture_output=True)
            continue
        capfd.readouterr()
        fails = step.output[:1] and step.output[0].startswith("error: ")
        for call in calls(step.text, a_folder_of_its_own):
            assert (cli.main(call[1:]) if fails else done(call)) == (2 if fails else 0), step.text
        out, err = capfd.readouterr()
        if fails:
            assert err.splitlines() == step.output
        lines = iter(out.splitlines())
        for shown in [] if fails else [o for o in step.output if o != "..."]:
            assert any(fits(shown, line) for line in lines), (shown, out)


def run(folder: Path, *words: str) -> str:
    """A program of the page's in a process of its own; what it printed."""
    env = {**os.environ, "MUJOCO_GL": "disable", "PYTHONSAFEPATH": ""}  # a program sees those beside it
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_environment_of_the_page(tmp_path: Path) -> None:
    """Trained in worker processes, stopped between two episodes and gone on with as if it had not been."""
    program, length = blocks(ROOT / "docs" / "environments.md", "python")[2], "max_episode_steps = 50"
    assert length in program
    (tmp_path / "dot.py").write_text(program.replace(length, "max_episode_steps = 20"))
    keys = [*(f"{k}={v}" for k, v in SMALL.items()), "task=dot-reach", "num_envs=2", "seed_steps=30", "eval_episodes=1"]
    shown = run(tmp_path, "dot.py", "train", *keys, "work_dir=whole", "steps=90", "eval_freq=45", "save_video=true")
    assert "done: return" in shown
    assert len([*(tmp_path / "whole" / "videos").glob("*.mp4")]) == 3
    run(tmp_path, "dot.py", "train", *keys, "work_dir=halves", "steps=50", "eval_freq=1000")
    before = csvs(tmp_path / "halves")["train.csv"]
    shown = run(tmp_path, "dot.py", "resume", "halves", "steps=90", "eval_freq=45")
    assert "going on at 50 decisions" in shown
    assert before != csvs(tmp_path / "halves")["train.csv"]
    assert csvs(tmp_path / "halves")["train.csv"] == csvs(tmp_path / "whole")["train.csv"]


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_the_notebook_imports_what_there_is() -> None:
    for cell in cells():
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tdmpc2_fast"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


def test_the_notebook_shows_what_came_of_it() -> None:
    text = NOTEBOOK.read_text()
    code = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == [1, 2, 3, 4, 5]
    outputs = [o for c in code for o in c["outputs"]]
    assert all(c["outputs"] for c in code)
    assert {o["output_type"] for o in outputs} == {"stream", "display_data"}
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2
    assert len(text) < 150_000
    texts = "".join("".join(o.get("text", [])) for o in outputs)
    assert not re.search(r"(^|\s)/\w", texts)  # where it ran is nobody's concern


def test_the_notebook_runs() -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("STEPS = 1000", "STEPS = 200").replace("=64,", "=16,").replace("=128", "=24")
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert [c for c in notebook.cells if c.cell_type == "code"][-1].execution_count == len(cells())
