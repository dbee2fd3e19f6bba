"""The package as a user gets it: few dependencies, floors that do not mix, one top-level name."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from importlib.util import resolve_name
from pathlib import Path

import pytest
from conftest import ROOT

import tdmpc2_fast
from tdmpc2_fast.version import __version__

OPTIONAL = ["triton", "nvtx", "mujoco", "dm_control", "gymnasium", "pytest", "matplotlib", "safetensors"]
OPTIONAL += ["huggingface_hub"]


def test_planning_and_learning_need_only_torch_and_numpy() -> None:
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import torch, tdmpc2_fast as t
cfg = t.Config(latent_dim=16, mlp_dim=16, enc_dim=16, device="cpu").with_env({{"state": (3,)}}, 2, 10)
agent = t.TDMPC2(cfg)
assert agent.act(torch.zeros(3), t0=True).shape == (2,)
buffer = t.ReplayBuffer(cfg)
buffer.add(dict(obs=torch.zeros(9, 3), action=torch.zeros(9, 2), reward=torch.zeros(9)))
agent.update(buffer)
assert not set({OPTIONAL}) & set(sys.modules)
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


def test_training_and_measuring_need_no_package_for_people_to_look_at() -> None:
    absent = ["click", "rich", "tensorboard", "matplotlib", "imageio", "wandb", "scipy", "mujoco", "dm_control"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
import tempfile, pathlib
import tdmpc2_fast.benchmarks.gpu.call, tdmpc2_fast.benchmarks.gpu.predicted, tdmpc2_fast.benchmarks.run
from tdmpc2_fast.benchmarks.harness import stand_in
from tdmpc2_fast.train.run.trainer import OnlineTrainer
from tdmpc2_fast.config import Config
stand_in.install(2)
cfg = Config(task=stand_in.NAME, latent_dim=16, mlp_dim=16, enc_dim=16, device="cpu", steps=5, num_threads=1)
trainer = OnlineTrainer(cfg, pathlib.Path(tempfile.mkdtemp()))
trainer.step()
trainer.close()
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("fine"), done.stderr


def test_names_of_the_package_are_imported_when_they_are_asked_for() -> None:
    code = """
import os, sys
os.environ.pop("OMP_WAIT_POLICY", None), os.environ.pop("GOMP_SPINCOUNT", None)
import tdmpc2_fast as t
assert os.environ["GOMP_SPINCOUNT"] == "6000"
assert set(t.__all__) < set(dir(t))
assert t.Config().horizon == 3 and t.config.Config is t.Config
assert "torch" not in sys.modules
from tdmpc2_fast import *
assert (TDMPC2, load, Planner) == (t.agent.TDMPC2, t.agent.load, t.plan.planner.Planner)
assert all(getattr(t, name) is globals()[name] for name in t.__all__)
assert t.reference.ReferenceAgent and t.kernels.plan and not hasattr(t, "_nothing")
try:
    t.Planer
except AttributeError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "module 'tdmpc2_fast' has no attribute 'Planer'\n", done.stderr


HEAVY = {"torch", "matplotlib", "dm_control", "mujoco", "scipy", "tensorboard", "wandb", "imageio", "triton"}
COMPLETING = dict(_TDMPC2_FAST_COMPLETE="bash_complete", COMP_CWORD="2")


@pytest.mark.parametrize(
    ("args", "env", "also"),
    [
        (["--help"], {}, ("numpy", "gymnasium")),
        ([], {}, ("numpy", "gymnasium")),
        (["--version"], {}, ("numpy", "gymnasium")),
        (["train", "--help"], {}, ("numpy", "gymnasium")),
        (["train", "horizn=5"], {}, ("numpy", "gymnasium")),
        (["resume", "run", "horizn=5"], {}, ("numpy", "gymnasium")),
        (["eval"], {}, ("numpy", "gymnasium")),
        (["trian"], {}, ("numpy", "gymnasium")),
        ([], dict(COMPLETING, COMP_WORDS="tdmpc2-fast train hori"), ("numpy", "gymnasium")),
        ([], dict(COMPLETING, COMP_WORDS="tdmpc2-fast train task=dog-"), ()),
        (["tasks"], {}, ()),
        (["train", "task=walker-wlak"], {}, ()),
        (["train", "seed=1,2", "dry_run=true"], {}, ()),
    ],
    ids=str,
)
def test_what_runs_nothing_imports_nothing_that_takes_long(
    args: list[str], env: dict[str, str], also: tuple[str, ...], tmp_path: Path
) -> None:
    """Counted are modules, not seconds: torch alone takes two."""
    code = f"""
import sys
from tdmpc2_fast.train.cli import main
sys.argv[1:] = {args}
try:
    main()
finally:
    print("imported", *{HEAVY.union(also)} & {{*sys.modules}}, file=sys.stderr)
"""
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "imported"
    assert done.stdout or "error: " in done.stderr


FLOORS = {
    "kernels": "tdmpc2_fast.kernels",
    "tdmpc2_fast": "tdmpc2_fast",
    "train": "tdmpc2_fast.train",
    "benchmarks": "tdmpc2_fast.benchmarks",
}
"""Folders, and the names they are imported by."""
ALLOWED = {
    "kernels": {"torch", "triton", "tdmpc2_fast.kernels"},
    "tdmpc2_fast": {
        *("torch", "triton", "numpy", "safetensors", "nvtx", "typing_extensions", "huggingface_hub", "onnxscript"),
        "tdmpc2_fast",
    },
}


@cache
def modules() -> dict[str, Path]:
    """All modules of the product by name."""
    found = {}
    for floor, package in FLOORS.items():
        for path in (ROOT / floor).rglob("*.py"):
            parts = path.relative_to(ROOT / floor).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


@cache
def imports(name: str) -> set[str]:
    """What a module imports, in functions, too: full names of modules, or of what is in them."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("floor", ALLOWED)
def test_no_arrow_runs_back_up(floor: str) -> None:
    inside = [name for name, path in modules().items() if path.is_relative_to(ROOT / floor)]
    assert inside
    for module in inside:
        for name in imports(module):
            fine = name.split(".")[0] in sys.stdlib_module_names or any(
                name == ok or name.startswith(ok + ".") for ok in ALLOWED[floor]
            )
            assert fine, f"{module} imports {name}"
            assert not {"train", "benchmarks"} & {*name.split(".")}, f"{module} imports {name}"


def test_no_imports_go_in_circles() -> None:
    """Imports in functions count, too: they run, but two modules that need each other are one."""
    graph = {
        module: {n if n in modules() else n.rpartition(".")[0] for n in imports(module)} & modules().keys()
        for module in modules()
    }
    assert sum(map(len, graph.values())) > 500
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


def test_each_file_of_tests_can_be_run_alone() -> None:
    """What one imports from another lies beside it or on the path, not where a whole run has put it."""
    files = list((ROOT / "tests").rglob("*.py"))
    homes = {path.stem: path.parent for path in files}
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    on_path = {ROOT / folder for folder in options["pythonpath"]}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                assert homes.get(name, path.parent) in {path.parent, *on_path}, f"{path} imports {name}"


CROWDED, LONG = 14, 450


def test_folders_and_files_stay_small() -> None:
    files = [path for folder in (*FLOORS, "tests") for path in (ROOT / folder).rglob("*.py")]
    counts = Counter(path.parent for path in files)
    crowded = [f"{folder.relative_to(ROOT)}: {n} files" for folder, n in counts.items() if n > CROWDED]
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    long = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > LONG]
    assert not [*crowded, *long]


def moved() -> dict[str, str]:
    """Old names of modules, and the new ones."""
    packages = [name for name, path in modules().items() if path.name == "__init__.py"]
    tables = {name: getattr(import_module(name), "_MOVED", {}) for name in packages}
    return {f"{name}.{old}": f"{name}.{new}" for name, table in tables.items() for old, new in table.items()}


def test_modules_that_have_moved_are_found_by_their_old_names() -> None:
    found = moved()
    assert len(found) >= 19
    for old, new in found.items():
        module = import_module(old)
        assert module is import_module(new), old
        assert module.__spec__ is not None
        assert module.__name__ == module.__spec__.name == new


def test_modules_that_have_moved_run_by_their_old_names(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "tdmpc2_fast.benchmarks.wheels", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("argument 'nothing': allowed: for=")


def test_only_the_reference_folder_and_the_tests_know_the_reference() -> None:
    files = [*(ROOT / "tdmpc2_fast").rglob("*.py"), *(ROOT / "train").rglob("*.py")]
    knowing = {path.parent for path in files if "ReferenceAgent" in path.read_text()}
    assert knowing == {ROOT / "tdmpc2_fast" / "reference"}


def test_everything_installs_under_one_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    assert all(p == "tdmpc2_fast" or p.startswith("tdmpc2_fast.") for p in packages)
    source = {**project["tool"]["setuptools"]["package-dir"]}
    for package in packages:
        top = max((k for k in source if package == k or package.startswith(k + ".")), key=len)
        folder = ROOT / source[top] / package[len(top) :].strip(".").replace(".", "/")
        assert (folder / "__init__.py").is_file(), package
    folders = {p.parent for d in FLOORS for p in (ROOT / d).rglob("__init__.py")}
    assert len(folders) == len(packages)


def test_version_is_in_one_place() -> None:
    assert tdmpc2_fast.__version__ == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
