"""`make wheels` fetches, on a machine with network, what a GPU machine without one lacks.

    python benchmarks/gpu/wheels.py [for=3.12] [into=build/wheels] [has=NAME,NAME]

The packages are those that the loop's physics and the official code import or declare, besides torch, numpy, scipy, and
pytest with what it needs. `for` is the Python of the machine they are meant for (Linux, x86-64), and `has` names what
that machine has already. `make gpu WHEELS=FOLDER` unpacks them there. Needs pip. Exit status: 1 where something cannot
be fetched, 2 where the words are wrong.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# The official code pins tensordict 0.8.3 beside torch 2.7.1. Under torch 2.11 its results are the same, but
# torch.compile breaks a plan at every vmap; with this one a plan is one graph.
PINS = {
    "dm-control": "1.0.50",
    "mujoco": "3.17.0",
    "dm-env": "1.6",
    "dm-tree": "0.1.10",
    "labmaze": "1.0.6",
    "absl-py": "2.5.1",
    "attrs": "26.1.0",
    "etils": "1.15.0",
    "fsspec": "2026.9.0",
    "glfw": "2.11.0",
    "lxml": "6.1.3",
    "pyopengl": "3.1.10",
    "pyparsing": "3.3.3",
    "websockets": "17.4",
    "wrapt": "2.5.2",
    "tensordict": "0.12.4",
    "cloudpickle": "3.1.2",
    "importlib-metadata": "8.7.0",
    "orjson": "3.13.0",
    "pyvers": "0.2.3",
    "zipp": "4.1.2",
}
# No task of the suite reads these, and they are two thirds of all.
LEFT_OUT = {
    "dm-control": ("dm_control/locomotion/", "dm_control/mujoco/testing/", "dm_control/blender/"),
    "mujoco": ("mujoco/experimental/",),
    "labmaze": ("labmaze/assets/",),
}
NOT_BROUGHT = ("scipy",)  # imported by the physics, and as large as all the others
_TAGS = ("manylinux_2_17", "manylinux2014", "manylinux_2_27", "manylinux_2_28")


class WheelsError(Exception):
    """Wheels that cannot be fetched or used."""


def normal(name: str) -> str:
    """Return a package's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def package(wheel: Path) -> str:
    """Return the package that a wheel holds."""
    return normal(wheel.name.split("-")[0])


def fetch(python: str, into: Path, has: Collection[str] = ()) -> list[Path]:
    """Fetch the wheels for a Python version into a folder, in place of those of an earlier time.

    Raises:
        WheelsError: pip does not get one of them.
    """
    wanted = [f"{n}=={v}" for n, v in PINS.items() if n not in has]
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into) as folder:
        platforms = [f"--platform={tag}_x86_64" for tag in _TAGS]
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
        command = [sys.executable, "-m", "pip", "download", *options, *platforms, f"--dest={folder}", *wanted]
        if subprocess.run(command, check=False).returncode:
            raise WheelsError(f"pip does not get all wheels for Python {python}; it says above why")
        for old in into.glob("*.whl"):
            if package(old) in PINS:
                old.unlink()
        return [without(w, into, LEFT_OUT.get(package(w), ())) for w in sorted(Path(folder).glob("*.whl"))]


def without(wheel: Path, into: Path, left_out: tuple[str, ...]) -> Path:
    """Copy a wheel to a folder without what lies under some paths; its RECORD names the rest."""
    path = into / wheel.name
    if not left_out:
        return Path(shutil.copy(wheel, path))
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            if item.filename.startswith(left_out):
                continue
            data = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(line for line in lines if not line.lstrip('"').startswith(left_out)).encode()
            new.writestr(item, data)
    return path


def unpack(folder: Path, into: Path) -> list[str]:
    """Unpack, into an emptied folder, the wheels of packages this machine lacks; returns their names.

    What the machine has is skipped, so that the folder may come anywhere on the path and hides nothing.

    Raises:
        WheelsError: the folder is missing or incomplete, or a wheel is damaged or for another Python.
    """
    wheels = {package(w): w for w in sorted(folder.glob("*.whl")) if not _installed(package(w))}
    lacking = [n for n in (*PINS, *NOT_BROUGHT) if n not in wheels and not _installed(n)]
    if not folder.is_dir() or lacking:
        what = f"lacks {', '.join(lacking)}" if folder.is_dir() else "is no folder"
        raise WheelsError(f"wheels: {str(folder)!r} {what}; `make wheels` makes it, on a machine with network")
    shutil.rmtree(into, ignore_errors=True)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    for wheel in wheels.values():
        if not {"py3", f"cp{here.replace('.', '')}"} & set(wheel.stem.split("-")[-3].split(".")):
            raise WheelsError(f"wheels: {wheel.name} is not for Python {here}; `make wheels FOR={here}` fetches those")
        try:
            with zipfile.ZipFile(wheel) as file:
                file.extractall(into)
        except (zipfile.BadZipFile, zlib.error, EOFError) as e:
            raise WheelsError(f"wheels: {wheel.name} is damaged ({e}); copy the folder again") from e
    return list(wheels)


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch what the words ask for; returns the exit status."""
    options = {"for": "3.12", "into": "build/wheels", "has": ""}
    for word in sys.argv[1:] if argv is None else argv:
        key, equals, value = word.partition("=")
        if not equals or key not in options:
            print(f"argument {word!r}: allowed: {', '.join(f'{k}=...' for k in options)}", file=sys.stderr)
            return 2
        options[key] = value
    if not re.fullmatch(r"3\.\d+", options["for"]):
        print(f"for: got {options['for']!r}, allowed: a Python version like 3.12", file=sys.stderr)
        return 2
    has = {normal(n) for n in re.split(r"[,\s]+", options["has"])}
    try:
        wheels = fetch(options["for"], Path(options["into"]), has)
    except (WheelsError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")
    print(f"{sum(w.stat().st_size for w in wheels) / 2**20:6.1f} MiB  in {options['into']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
