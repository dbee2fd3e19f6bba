"""Builds the C++ kernels when they are first used, for this machine's CPU, and keeps them in a cache.

Any C++17 compiler does: the sources include no header of torch or Python. Threads are those of the
OpenMP runtime that torch itself has loaded, found through torch's library, so there is never a second one.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

SOURCES = Path(__file__).with_name("src")

CACHE = "TDMPC2_CACHE"
"""Environment variable: folder for compiled kernels; by default `tdmpc2-fast` in the user's cache folder."""
ISA = "TDMPC2_CPU_ISA"
"""Environment variable: instructions to use, one of `_MACHINES`; by default all this CPU has."""

FLAGS = "TDMPC2_CPU_FLAGS"
"""Environment variable: more flags for the compiler, for tests: sanitizers, `-DEMULATE_AMX`."""

_PATIENCE = 300.0  # seconds for a file to compile
_NEEDS = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}}
_MACHINES = {"native": "native", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fvisibility=hidden",
)  # fmt: skip


class CannotBuild(RuntimeError):
    """The kernels cannot be had on this machine; the message says why, in one line."""


class Kernels(NamedTuple):
    """The compiled kernels."""

    library: ctypes.CDLL
    path: Path
    bfloat16: str  # what computes products of bfloat16: AMX, AVX512-BF16, or nothing
    lanes: int  # floats of a vector
    threads: bool  # whether torch's OpenMP runtime can be asked for more than one
    compiler: str


@lru_cache
def kernels() -> Kernels:
    """Return the kernels, compiled if this machine has not done so before.

    Raises:
        CannotBuild: there is no compiler, it failed, or the cache cannot be written.
    """
    return _load(_flags())


@lru_cache
def why_not() -> str | None:
    """Say why the kernels cannot run on this machine's CPU; None where they can. The first time this compiles them."""
    try:
        kernels()
    except CannotBuild as e:
        return str(e)
    return None


def bfloat16() -> str:
    """Name what computes products of bfloat16 on this machine's CPU; empty where nothing does."""
    return "" if why_not() else kernels().bfloat16


def _flags() -> list[str]:
    """Return the compiler's flags for this machine."""
    isa = os.environ.get(ISA, "native")
    if isa not in _MACHINES:
        raise CannotBuild(f"environment variable {ISA}: got {isa!r}, allowed: {', '.join(_MACHINES)}")
    machine, flags = platform.machine().lower(), list(_FLAGS)
    if machine in ("x86_64", "amd64"):
        missing = sorted(_NEEDS.get(isa, set()) - set(_cpu().split()))
        if missing and Path("/proc/cpuinfo").exists():
            raise CannotBuild(f"environment variable {ISA}: got {isa!r}, and this CPU has no {', '.join(missing)}")
        flags += [f"-march={_MACHINES[isa]}", "-mprefer-vector-width=512"]
    elif isa != "native":
        raise CannotBuild(f"environment variable {ISA}: got {isa!r} on {machine}, allowed: native")
    elif machine in ("arm64", "aarch64"):
        flags.append("-mcpu=native")
    return flags + os.environ.get(FLAGS, "").split()


def _load(flags: Sequence[str]) -> Kernels:
    compiler = _compiler()
    version = _output([*compiler, "--version"]).splitlines()[0]
    path = _folder() / f"kernels-{_key([*compiler, version, *flags])}.so"
    if not path.exists():
        _build(compiler, flags, path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as e:
        raise CannotBuild(f"the compiled kernels do not load: {e}; {CACHE} names another folder for them") from e
    library.cpu_bfloat16.restype = ctypes.c_char_p
    library.cpu_width.restype = ctypes.c_long
    library.cpu_tape.restype = ctypes.c_void_p
    for name in ("cpu_run", "cpu_tape_add", "cpu_tape_run"):
        getattr(library, name).restype = ctypes.c_char_p
    team = _parallel()
    library.cpu_threads(ctypes.cast(team, ctypes.c_void_p))
    return Kernels(library, path, library.cpu_bfloat16().decode(), library.cpu_width(), team is not None, version)


def _compiler() -> list[str]:
    """Return the words that a call of the compiler begins with."""
    named = os.environ.get("CXX")
    for name in (named,) if named else ("c++", "g++", "clang++"):
        try:
            words = shlex.split(name)
        except ValueError as e:
            raise CannotBuild(f"environment variable CXX: got {name!r}, {e}") from e
        if words and shutil.which(words[0]):
            return words
    wanted = f"the compiler {named!r} (environment variable CXX)" if named else "a C++ compiler (c++, g++ or clang++)"
    raise CannotBuild(f"{wanted} is not installed")


def _folder() -> Path:
    """Return the cache folder, which is there and can be written."""
    try:
        named, cache = os.environ.get(CACHE), os.environ.get("XDG_CACHE_HOME")
        folder = Path(named).expanduser() if named else Path(cache or Path.home() / ".cache") / "tdmpc2-fast"
    except RuntimeError as e:  # there is no home
        raise CannotBuild(f"there is no folder to keep compiled kernels in ({e}); {CACHE} names one") from e
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CannotBuild(_unwritable(folder, e)) from e
    return folder.resolve()


def _unwritable(folder: Path, e: OSError) -> str:
    return f"the cache for compiled kernels cannot be written ({folder}: {e.strerror or e}); {CACHE} names another"


def _key(how: Sequence[str]) -> str:
    """Return a name for what these sources give, compiled like this for this CPU."""
    told = hashlib.sha256("\0".join([*how, _cpu()]).encode())
    for source in sorted(SOURCES.iterdir()):
        told.update(source.name.encode() + source.read_bytes())
    return told.hexdigest()[:16]


def _cpu() -> str:
    """Return what tells CPUs of other instructions apart."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(
            next((x for x in lines if x.lower().startswith(k)), "") for k in ("flags", "features", "model name")
        )
    return platform.processor() + platform.machine()


def _build(compiler: Sequence[str], flags: Sequence[str], path: Path) -> None:
    """Compile all sources at once and put the library in its place whole; other processes wait."""
    try:
        with _alone(path), _new(path.with_suffix(".build")) as folder:
            if path.exists():
                return
            objects = [folder / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))]
            _run_all([[*compiler, *flags, "-c", str(SOURCES / f"{x.stem}.cpp"), "-o", str(x)] for x in objects])
            library = folder / path.name
            _run_all([[*compiler, "-shared", *_to_link(flags), *map(str, objects), "-o", str(library)]])
            if not library.exists():
                raise CannotBuild("the C++ compiler failed: it left no library, and no reason")
            library.replace(path)
    except OSError as e:
        raise CannotBuild(_unwritable(path.parent, e)) from e


def _to_link(flags: Sequence[str]) -> list[str]:
    # With the C++ runtime inside, that of another environment need not be as new as the compiler's.
    runtime = ["-static-libstdc++", "-static-libgcc"] if sys.platform == "linux" else []
    return [flag for flag in flags if flag.startswith("-fsanitize")] or runtime


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process after the other do what is within."""
    with path.with_suffix(".lock").open("w") as lock:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """Have an empty folder within, whatever a process that was killed has left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_all(commands: list[list[str]]) -> None:
    """Run commands side by side, as many as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in list(pool.map(_run, commands)):
            if done.returncode:
                lines = done.stderr.splitlines() or ["no reason"]
                first = next((line for line in lines if "error" in line.lower()), lines[0])
                raise CannotBuild(f"the C++ compiler failed: {first.strip()}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired as e:
        raise CannotBuild(f"the C++ compiler did not end within {_PATIENCE} seconds") from e


def _output(command: list[str]) -> str:
    try:
        done = _run(command)
        done.check_returncode()
    except (OSError, subprocess.CalledProcessError) as e:
        raise CannotBuild(f"the C++ compiler does not run: {e}") from e
    return done.stdout or "unknown\n"


def _parallel() -> Any:
    """Return the function by which torch's own OpenMP runtime runs a team of threads; None, and one thread, without."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            with contextlib.suppress(OSError, AttributeError):
                # Looked up in what torch's library was linked with, whatever that is called.
                return ctypes.CDLL(str(folder / name)).GOMP_parallel
    return None
