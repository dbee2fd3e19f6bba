"""Interpreters of suites whose packages exclude ours: a virtual environment for each, made by a command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from tdmpc2_fast.errors import ConfigError

PLACE = "TDMPC2_SUITES"
_STAMP = "tdmpc2-fast.json"


def home(name: str) -> Path:
    """Return the folder of a suite's interpreter: in `$TDMPC2_SUITES`, or in the environment of this one."""
    place = os.environ.get(PLACE)
    return (Path(place).expanduser() if place else Path(sys.prefix, "share", "tdmpc2-fast", "suites")) / name


def python_of(name: str) -> Path:
    """Return a suite's interpreter, which need not be there."""
    folder = home(name)
    return folder / ("Scripts" if os.name == "nt" else "bin") / ("python.exe" if os.name == "nt" else "python")


def command(name: str) -> str:
    """Return what makes a suite's interpreter."""
    return f"tdmpc2-fast suites install {name}"


def missing(name: str, requirements: Sequence[str]) -> str:
    """Say why a suite's interpreter cannot be used; the text is empty where it can."""
    try:
        made_of = json.loads((home(name) / _STAMP).read_text())["requirements"]
    except (OSError, ValueError, LookupError, TypeError):
        return f"needs an interpreter of its own: {command(name)}"
    if made_of != list(requirements):
        return f"has an interpreter made by another version: {command(name)} makes it anew"
    if not python_of(name).exists():
        return f"has an interpreter whose Python is gone: {command(name)} makes it anew"
    return ""


def here(name: str) -> bool:
    """Tell whether this process is of that interpreter."""
    return Path(sys.prefix).name == name and Path(sys.prefix, _STAMP).exists()


def install(name: str, requirements: Sequence[str], python: str | None = None, installer: str | None = None) -> Path:
    """Make a suite's interpreter anew and return its Python; what fails leaves the one that is there.

    Args:
        name: of the suite.
        requirements: of pip, all that it needs.
        python: an interpreter to make it of; default this one.
        installer: `uv` or `pip`; default uv where it is installed.

    Raises:
        ConfigError: an installer that is not there, or that fails.
    """
    uv = shutil.which("uv")
    installer = installer or ("uv" if uv else "pip")
    if installer not in ("uv", "pip") or (installer == "uv" and uv is None):
        allowed = "pip" if uv is None else "uv, pip"
        raise ConfigError(f"installer: got {installer!r}, allowed: {allowed}")
    folder, base = home(name), python or _base()
    _check_ours(folder)
    new = folder.with_name(f".{name}-{os.getpid()}")  # what is there serves until the new one is whole
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove(new)
    except OSError as e:
        raise ConfigError(f"{folder}: {e.strerror}; set {PLACE} to a folder that can be written") from e
    try:
        into = str(new / python_of(name).relative_to(folder))
        if installer == "uv":
            _run(["uv", "venv", "--quiet", "--seed", "--python", base, str(new)])
            _run(["uv", "pip", "install", "--quiet", "--python", into, *requirements])
        else:
            _run([base, "-m", "venv", str(new)])
            _run([into, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements])
        (new / _STAMP).write_text(json.dumps({"requirements": list(requirements)}, indent=1) + "\n")
        _remove(folder)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return python_of(name)


def remove(name: str) -> bool:
    """Delete a suite's interpreter; tell whether there was one.

    Raises:
        ConfigError: something else is in its place, or cannot be deleted.
    """
    folder = home(name)
    _check_ours(folder)
    try:
        return _remove(folder)
    except OSError as e:
        raise ConfigError(f"{folder}: {e.strerror}") from e


def _check_ours(folder: Path) -> None:
    """Raise `ConfigError` where something lies in an interpreter's place that was not made here."""
    if folder.exists() and not (folder / _STAMP).is_file():
        raise ConfigError(
            f"{folder}: got something that is no interpreter of a suite, allowed: none; delete it yourself, or set "
            f"{PLACE} to another folder"
        )


def _remove(folder: Path) -> bool:
    there = folder.exists()
    if there:
        shutil.rmtree(folder)
    return there


def _base() -> str:
    """Return the Python that this environment was made of: what is made of an environment's own goes with it."""
    version = sysconfig.get_python_version()
    for path in (Path(sys.base_prefix, "bin", f"python{version}"), Path(sys.base_prefix, "python.exe")):
        if path.exists():
            return str(path)
    return sys.executable


def _run(call: Sequence[str]) -> None:
    try:
        found = subprocess.run(call, text=True, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except OSError as e:
        raise ConfigError(f"{call[0]}: {e.strerror}") from e
    if found.returncode:
        said = " ".join(found.stderr.split())[-600:]
        raise ConfigError(f"{' '.join(call[:4])} ... failed (exit code {found.returncode}): {said}")
