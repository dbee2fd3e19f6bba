"""What reaches the driver at a launch, by Triton's own launcher and a driver that needs no GPU (stub_driver.c)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).parents[2] / "support"
PROGRAMMATIC = "6"  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the stub needs gcc"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a `libcuda.so.1` that notes launches."""
    spec = find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    folder, header = tmp_path_factory.mktemp("driver"), Path(spec.origin).parent / "backends/nvidia/include"
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, SUPPORT / "stub_driver.c", "-I", header], check=True)
    return folder


def launched(driver: Path, log: Path, precision: str, what: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what launches should have been, and what came."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TDMPC2_NATIVE")}
    env |= dict(TRITON_LIBCUDA_PATH=str(driver), LD_LIBRARY_PATH=str(driver), STUB_LOG=str(log))
    command = [sys.executable, SUPPORT / "stub_launches.py", precision, what]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize(("precision", "what"), [("bfloat16", "plan"), ("tf32", "plan"), ("bfloat16", "update")])
def test_every_argument_of_every_launch_arrives(driver: Path, tmp_path: Path, precision: str, what: str) -> None:
    wanted, got = launched(driver, tmp_path / "log", precision, what)
    assert len(wanted) == len(got) > 30
    assert any(launch["cluster"] > 1 for launch in wanted)
    for want, came in zip(wanted, got, strict=True):
        assert [came[key] for key in ("name", "grid", "threads")] == [want[key] for key in ("name", "grid", "threads")]
        assert want["early"] == (came["attributes"].get(PROGRAMMATIC) == 1), want["name"]
        # A cluster is required by the kernel itself; Triton asks for none.
        assert set(came["attributes"]) <= {PROGRAMMATIC}
        ours = len(want["params"])
        assert came["params"][:ours] == want["params"], want["name"]
        assert all(value == 0 for _, value in came["params"][ours:]), "scratch that no kernel asks for"
