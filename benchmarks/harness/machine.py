"""The facts that numbers belong to: the machine, its clocks, the versions, the commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tdmpc2_fast

_QUERY = "name,driver_version,clocks.sm,clocks.max.sm"


@dataclass(frozen=True)
class Facts:
    """The machine's facts as columns of a row; clocks are in MHz, None where they are not known."""

    device: str
    gpu: str
    driver: str
    clock_mhz: int | None
    clock_max_mhz: int | None
    cpu: str
    threads: int
    python: str
    torch_version: str
    cuda: str
    triton_version: str
    version: str
    commit: str
    date: str

    @property
    def label(self) -> str:
        """The machine's name in a table."""
        return self.gpu or f"{self.cpu}, {self.threads} threads"


@dataclass(frozen=True)
class Machine(Facts):
    """The machine a run is on, and the device that is measured."""

    where: torch.device

    def facts(self) -> dict[str, Any]:
        """Return the facts alone, by column."""
        return {f.name: getattr(self, f.name) for f in fields(Facts)}

    def under_load(self) -> Machine:
        """Return the machine with the clock of now, when the device has just worked."""
        return replace(self, clock_mhz=_gpu(self.where)[2])


def this_machine(device: torch.device) -> Machine:
    """Return the facts as they are now."""
    gpu, driver, clock, most = _gpu(device)
    return Machine(
        where=device,
        device=device.type,
        gpu=gpu,
        driver=driver,
        clock_mhz=clock,
        clock_max_mhz=most,
        cpu=_cpu(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch_version=torch.__version__,
        cuda=torch.version.cuda or "",
        triton_version=_version("triton"),
        version=tdmpc2_fast.__version__,
        commit=_commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Return the code's commit, with `+` behind it if files differ; TDMPC2_COMMIT replaces it where there is no git."""
    if given := os.environ.get("TDMPC2_COMMIT"):
        return given
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short", "HEAD")
        return head + "+" * bool(head and git("status", "--porcelain", "--untracked-files=no"))
    except OSError:
        return ""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu(device: torch.device) -> tuple[str, str, int | None, int | None]:
    """Return the GPU's name, its driver, its clock now and its highest clock."""
    if device.type != "cuda":
        return "", "", None, None
    name = torch.cuda.get_device_name(device)
    words = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits", f"--id={device.index or 0}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
        _, driver, clock, most = (x.strip() for x in done.stdout.strip().split(","))
        return name, driver, _integer(clock), _integer(most)
    except (OSError, ValueError, subprocess.SubprocessError):
        return name, "", None, None


def _integer(text: str) -> int | None:
    return int(text) if text.isdigit() else None
