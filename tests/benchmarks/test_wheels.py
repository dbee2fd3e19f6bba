"""Wheels for a machine without network: what is fetched, left out and unpacked; pip itself is played."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tdmpc2_fast.benchmarks.gpu import call, processes, wheels
from tdmpc2_fast.benchmarks.gpu import parts as gpu

HERE = f"cp{sys.version_info.major}{sys.version_info.minor}"


def wheel(folder: Path, name: str, files: tuple[str, ...] = (), tag: str = "py3-none-any") -> Path:
    """A wheel of a package whose module has its name, and of files besides."""
    folder.mkdir(parents=True, exist_ok=True)
    name = name.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    record = [f"{n},sha256=x,1\n" for n in (f"{name}/__init__.py", *files)] + [f"{info}/RECORD,,\n"]
    path = folder / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as file:
        for n in (f"{name}/__init__.py", *files):
            file.writestr(n, f"# {n}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/RECORD", "".join(record))
    return path


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of pip, which puts a wheel of each package asked for into the folder named."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        folder = Path(next(w for w in command if w.startswith("--dest=")).removeprefix("--dest="))
        for word in command:
            if "==" in word:
                name = word.split("==")[0]
                wheel(folder, name, tuple(f"{p}big,file.stl" for p in wheels.LEFT_OUT.get(name, ())))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages of a machine, to be added to."""
    has = {"scipy"}
    monkeypatch.setattr(wheels, "_installed", has.__contains__)
    return has


def test_fetched_is_what_the_machine_lacks_for_its_python(
    tmp_path: Path, pip: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    old, theirs = wheel(tmp_path, "mujoco", tag="cp311-cp311-any"), wheel(tmp_path, "theirs")
    assert wheels.main(["for=3.12", f"into={tmp_path}", "has=lxml, absl_py PyOpenGL numpy"]) == 0
    (command,) = pip
    assert {"--no-deps", "--python-version=3.12", "mujoco==" + wheels.PINS["mujoco"]} <= set(command)
    assert {wheels.package(p) for p in tmp_path.glob("*.whl")} == {"theirs", *wheels.PINS} - {
        "lxml",
        "absl-py",
        "pyopengl",
    }
    assert theirs.exists()
    assert not old.exists()
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".whl"] * len(list(tmp_path.iterdir()))
    assert f"in {tmp_path}" in capsys.readouterr().out


def test_what_no_task_reads_is_left_out_of_wheel_and_record(tmp_path: Path) -> None:
    quoted = "dm_control/locomotion/a,b.xml"
    path = wheel(tmp_path / "from", "dm-control", ("dm_control/locomotion/x.stl", quoted, "dm_control/suite/dog.xml"))
    (tmp_path / "to").mkdir()
    found = wheels.without(path, tmp_path / "to", wheels.LEFT_OUT["dm-control"])
    with zipfile.ZipFile(found) as file:
        names = set(file.namelist())
        record = file.read("dm_control-1.0.dist-info/RECORD").decode()
    assert found.name == path.name
    assert "dm_control/suite/dog.xml" in names
    assert not [n for n in names if "locomotion" in n]
    assert {line.split(",")[0] for line in record.splitlines()} == names - {"dm_control-1.0.dist-info/METADATA"}


def test_unpacked_is_only_what_the_machine_lacks(tmp_path: Path, pip: list[list[str]], bare: set[str]) -> None:
    folder, site = tmp_path / "wheels", tmp_path / "site"
    wheels.fetch("3.12", folder)
    bare |= {"lxml", "tensordict"}
    (site / "stale").mkdir(parents=True)
    names = wheels.unpack(folder, site)
    assert sorted(names) == sorted(wheels.PINS.keys() - bare)
    assert (site / "dm_control" / "__init__.py").is_file()
    assert not [n for n in ("stale", "lxml", "tensordict") if (site / n).exists()]


def test_names_are_looked_up_as_they_are_installed() -> None:
    assert version("numpy")
    assert wheels._installed("numpy")
    assert not wheels._installed("no-such-package-anywhere")


def test_folders_that_cannot_be_used_are_said_to_be_so(tmp_path: Path, pip: list[list[str]], bare: set[str]) -> None:
    folder, site = tmp_path / "wheels", tmp_path / "site"
    with pytest.raises(wheels.WheelsError, match=r"'.*wheels' is no folder; `make wheels` makes it"):
        wheels.unpack(folder, site)
    wheels.fetch("3.12", folder)
    bare.remove("scipy")
    with pytest.raises(wheels.WheelsError, match="lacks scipy"):
        wheels.unpack(folder, site)
    bare.add("scipy")
    (whole,) = folder.glob("mujoco-*")
    data = whole.read_bytes()
    whole.unlink()
    with pytest.raises(wheels.WheelsError, match="lacks mujoco"):
        wheels.unpack(folder, site)
    for broken in (data[: len(data) // 2], data.replace(b"# mujoco", b"# mojuco"), b""):
        whole.write_bytes(broken)
        with pytest.raises(wheels.WheelsError, match=r"mujoco-1.0-py3-none-any.whl is damaged \(.*\); copy"):
            wheels.unpack(folder, site)
    whole.unlink()
    wheel(folder, "mujoco", tag="cp27-cp27m-manylinux_2_27_x86_64")
    with pytest.raises(wheels.WheelsError, match=r"mujoco-.* is not for Python 3.*make wheels FOR=3"):
        wheels.unpack(folder, site)
    (folder / "mujoco-1.0-cp27-cp27m-manylinux_2_27_x86_64.whl").unlink()
    wheel(folder, "mujoco", tag=f"{HERE}-{HERE}-manylinux_2_27_x86_64")
    assert "mujoco" in wheels.unpack(folder, site)


@pytest.mark.parametrize("words", [["for=12"], ["for=3.12; rm"], ["from=x"], ["3.12"]])
def test_bad_words_are_answered(words: list[str], pip: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert wheels.main(words) == 2
    assert "allowed" in capsys.readouterr().err
    assert not pip


def test_what_pip_does_not_get_is_an_error_and_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = wheel(tmp_path, "mujoco")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    assert wheels.main([f"into={tmp_path}"]) == 1
    assert "pip does not get all wheels for Python 3.12" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [old]


def test_the_parts_of_make_gpu_find_what_was_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: list[list[str]], bare: set[str]
) -> None:
    monkeypatch.setattr(call, "SITE", tmp_path / "site")
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    loops = [next(p for p in gpu.parts(wheels=w) if p.name == "loop").commands[0] for w in (False, True)]
    assert ["task=stand-in" in c for c in loops] == [True, False]
    assert ["task=walker-walk" in c for c in loops] == [False, True]
    wheels.fetch("3.12", tmp_path / "wheels")
    wheel(tmp_path / "wheels", "brought-along")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "before"))
    assert call.use(tmp_path / "nowhere").startswith("wheels: ")
    assert call.use(tmp_path / "wheels") == ""
    (tmp_path / "before" / "mujoco").mkdir(parents=True)
    (tmp_path / "before" / "mujoco" / "__init__.py").touch()
    code = "import brought_along, mujoco; print(brought_along.__file__, mujoco.__file__)"
    part = processes.Part("part", ((sys.executable, "-c", code),), 60)
    assert processes.run(part, 60, tmp_path / "logs").status == "passed"
    site, before = (tmp_path / "logs" / "part-0.log").read_text().split()
    assert Path(site).parents[1] == tmp_path / "site"
    assert Path(before).parents[1] == tmp_path / "before"
