"""What the documentation shows is there and works: links, commands, the example environment, the notebook."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from loop_oracle import csvs

pytest.importorskip("click")
pytest.importorskip("rich")
from tdmpc2_fast import Config
from tdmpc2_fast.train import app, keys, sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"
SMALL = "latent_dim=16 mlp_dim=16 enc_dim=16 num_q=2 num_samples=32 num_elites=8 batch_size=8 device=cpu num_threads=1"


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


SHOWN_FOR_THE_ANSWER = ("train horizn=5", "train --batch-size 512", "train task=walker-walk batch_size=0")
PLACEHOLDERS = re.compile(r"(?<==)(\$\w+|\{\}|N)$")  # a number, once a shell or a person has filled it in


def commands(page: Path) -> list[list[str]]:
    """The words behind `tdmpc2-fast`, or behind a program that stands for it, of every line shown."""
    text = "\n".join(blocks(page, "console", "sh")).replace("\\\n", " ")
    found = re.findall(r"(?:\btdmpc2-fast|python \w+\.py|tdmpc2_fast\.train) +([^#'|>\n]+)", text)
    shown = [shlex.split(line) for line in found if line.strip() not in SHOWN_FOR_THE_ANSWER]
    return [["train", *words] if "=" in words[0] else words for words in shown]


def test_every_command_is_shown() -> None:
    shown = {words[0] for page in PAGES for words in commands(page)}
    assert shown >= {c.name for c in app.COMMANDS} | {"bench"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_shown_are_understood(page: Path) -> None:
    own = {c.name: c.own for c in app.COMMANDS}
    for name, *rest in commands(page):
        if name in ("bench", "--version") or rest == ["--help"]:
            continue
        assert name in own
        words = [PLACEHOLDERS.sub("1", w) for w in rest]
        kind = own[name]
        if kind is not None:
            _, words = keys.options(words, kind)
        paths, words = keys.arguments(words)
        assert len(paths) == 1 or name in ("train", "tasks", "plot"), rest
        assert not paths or name != "train", rest
        notes: list[str] = []
        for each in [r.words for r in sweep.expand(words)] if name == "train" else [words]:
            Config.from_dict(keys.parse(each, notes.append))
        assert not notes, rest


def run(folder: Path, *words: str) -> str:
    """A program of the page's in a process of its own; what it printed."""
    env = {**os.environ, "MUJOCO_GL": "disable", "PYTHONSAFEPATH": ""}  # a program sees those beside it
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_environment_of_the_page(tmp_path: Path) -> None:
    """Trained in worker processes, stopped half-way, gone on with as if it had not been; tried as the page says."""
    programs = [b for b in blocks(ROOT / "docs" / "environments.md", "python") if "my_environments" not in b]
    (tmp_path / "dot.py").write_text(programs[1])
    (tmp_path / "try_it.py").write_text(programs[2])
    run(tmp_path, "try_it.py")
    keys = [*SMALL.split(), "task=dot-reach", "num_envs=2", "seed_steps=60", "eval_episodes=1"]
    shown = run(tmp_path, "dot.py", "train", *keys, "work_dir=whole", "steps=150", "eval_freq=75", "save_video=true")
    assert "done: return" in shown
    assert len([*(tmp_path / "whole" / "videos").glob("*.mp4")]) == 3
    run(tmp_path, "dot.py", "train", *keys, "work_dir=halves", "steps=74", "eval_freq=1000")
    shown = run(tmp_path, "dot.py", "resume", "halves", "steps=150", "eval_freq=75")
    assert "going on at 74 decisions" in shown
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
