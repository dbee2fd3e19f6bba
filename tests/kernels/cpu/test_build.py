"""How the C++ kernels are built and found, and what is said where that fails; what a call refuses."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PYTHONPATH

from tdmpc2_fast.kernels.cpu import build
from tdmpc2_fast.kernels.cpu.build import CannotBuild, why_not
from tdmpc2_fast.kernels.cpu.call import run
from tdmpc2_fast.kernels.device.launch import natively
from tdmpc2_fast.kernels.losses.running_scale import running_scale, running_scale_kernel

needs_kernels = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Build again, into a cache of the test's own."""
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def reason() -> str:
    with pytest.raises(CannotBuild) as caught:
        build._load(build._flags())
    return str(caught.value)


class TestWhatCannotBe:
    @pytest.mark.parametrize("compiler", ["no-such-compiler", ""])
    def test_no_compiler(self, compiler: str, anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setenv("PATH", str(anew))
        assert "is not installed" in reason()

    def test_a_compiler_that_fails(self, anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "c++").write_text(
            '#!/bin/sh\n[ "$1" = --version ] && echo c++ 1 && exit\necho "error: bad flag" >&2\nexit 1\n'
        )
        (tmp_path / "c++").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "c++"))
        assert reason() == "the C++ compiler failed: error: bad flag"
        assert not list(anew.glob("*.so"))

    def test_a_compiler_that_does_not_start(self, anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "c++").write_text("#!/no/such/shell\n")
        (tmp_path / "c++").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "c++"))
        assert reason().startswith("the C++ compiler does not run: ")

    def test_a_cache_that_cannot_be_written(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv(build.CACHE, str(tmp_path / "file" / "cache"))
        assert reason() == (
            f"the cache for compiled kernels cannot be written ({tmp_path}/file/cache: Not a directory); "
            "TDMPC2_CACHE names another"
        )

    def test_a_file_that_is_no_library(self, anew: Path) -> None:
        anew.mkdir()
        flags = build._flags()
        version = build._output([*build._compiler(), "--version"]).splitlines()[0]
        (anew / f"kernels-{build._key([*build._compiler(), version, *flags])}.so").write_text("nothing")
        assert "the compiled kernels do not load: " in reason()

    def test_a_compiler_that_says_and_leaves_nothing(
        self, anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "c++").write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / "c++").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "c++"))
        assert reason() == "the C++ compiler failed: it left no library, and no reason"

    def test_a_compiler_that_does_not_end(self, anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "c++").write_text("#!/bin/sh\nexec sleep 60\n")
        (tmp_path / "c++").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "c++"))
        monkeypatch.setattr(build, "_PATIENCE", 0.2)
        assert reason() == "the C++ compiler did not end within 0.2 seconds"

    def test_a_compiler_of_strange_letters(self, anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "c++").write_bytes(b"#!/bin/sh\necho 'error: \xff\xfe' >&2\nexit 1\n")
        (tmp_path / "c++").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "c++"))
        assert "the C++ compiler does not run" in reason()
        monkeypatch.setenv("CXX", 'c++ "')
        assert reason() == "environment variable CXX: got 'c++ \"', No closing quotation"

    def test_no_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv(build.CACHE, raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", homeless)
        assert "TDMPC2_CACHE names one" in reason()

    def test_instructions_that_this_cpu_has_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "_cpu", lambda: "flags: sse2 avx2 fma")
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        monkeypatch.setenv(build.ISA, "avx512")
        assert "got 'avx512', and this CPU has no avx512bw, avx512cd" in reason()
        monkeypatch.setenv(build.ISA, "avx2")
        assert "-march=x86-64-v3" in build._flags()

    def test_instructions_there_are_none_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(build.ISA, "sse9")
        assert reason() == "environment variable TDMPC2_CPU_ISA: got 'sse9', allowed: native, avx2, avx512"

    def test_an_arm_has_no_avx(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
        assert "-mcpu=native" in build._flags()
        monkeypatch.setenv(build.ISA, "avx2")
        assert reason() == "environment variable TDMPC2_CPU_ISA: got 'avx2' on aarch64, allowed: native"


def in_a_process(code: str, **env: str) -> str:
    env = {**os.environ, "PYTHONPATH": PYTHONPATH, **env}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_a_compiler_all_goes_on_with_torch_and_says_so(tmp_path: Path) -> None:
    code = """
from conftest import TDMPC2, filled_buffer, tiny_config
agent = TDMPC2(tiny_config())
agent.act([0.0] * 5)
agent.update(filled_buffer(agent.cfg))
print(*agent.backend, *agent.updater.backend)
"""
    said = "torch the compiler 'nothing' (environment variable CXX) is not installed"
    assert in_a_process(code, CXX="nothing", **{build.CACHE: str(tmp_path)}) == f"{said} {said}"


@needs_kernels
def test_there_is_one_openmp_runtime_and_it_is_torchs() -> None:
    code = """
import re
from conftest import TDMPC2, tiny_config
import torch
torch.set_num_threads(2)
TDMPC2(tiny_config(mlp_dim=512, latent_dim=512, num_samples=512)).act([0.0] * 5)
maps = open("/proc/self/maps").read()
print(len({x for x in re.findall(r"\\S*/lib\\w*omp\\S*", maps)}), len(re.findall(r"kernels-\\w+\\.so", maps)) > 0)
"""
    assert in_a_process(code) == "1 True"


@needs_kernels
def test_processes_that_begin_together_build_once(tmp_path: Path) -> None:
    code = "from tdmpc2_fast.kernels.cpu.build import kernels; print(kernels().path)"
    env = {**os.environ, build.CACHE: str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = {process.communicate()[0].strip() for process in started}
    (library,) = tmp_path.glob("*.so")
    assert said == {str(library)}
    assert not [x for x in tmp_path.iterdir() if x.is_dir()], "a folder was left behind"


@needs_kernels
def test_what_a_killed_build_left_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "kernels.so"
    left = library.with_suffix(".build")
    left.mkdir()
    (left / "tape.o").write_text("half of")
    monkeypatch.setattr(
        build, "_run_all", lambda commands: Path(commands[-1][-1]).touch() if "-shared" in commands[-1] else None
    )
    build._build(["c++"], [], library)
    assert library.exists()
    assert not left.exists()


@needs_kernels
@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="asks g++ for x86")
@pytest.mark.parametrize(
    ("machine", "instruction"),
    [("sapphirerapids", "tdpbf16ps"), ("cooperlake", "vdpbf16ps"), ("x86-64-v3", "vfmadd"), ("x86-64", "mulps")],
)
def test_other_cpus_than_this_get_their_instructions(machine: str, instruction: str, tmp_path: Path) -> None:
    flags = [*build._FLAGS, f"-march={machine}"]
    build._build(["g++"], flags, tmp_path / "kernels.so")
    code = subprocess.run(["objdump", "-d", tmp_path / "kernels.so"], capture_output=True, text=True, check=True).stdout
    assert instruction in code


@needs_kernels
class TestCalls:
    def args(self, **changes: Any) -> tuple[Any, ...]:
        given: dict[str, Any] = dict(q=torch.randn(8), value=torch.ones(1), out=torch.ones(1))
        given |= dict(q_group=8, q_stride=1, B=8, tau=0.5)
        places = (0, 1, 6, 7, 0.5, 0.5, 0.5, 0.5)
        return (*(given | changes).values(), *places)

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            (dict(q=torch.randn(8).double()), "tensor: got torch.float64 on cpu, allowed on a CPU: float32"),
            (dict(q=torch.ones(8, dtype=torch.int64)), "value 1 of the arguments .*: a tensor of another type"),
            (dict(B=8.0), "value 6 of the arguments is not what was expected: an integer"),
            (dict(tau=1), "value 7 of the arguments is not what was expected: a float"),
            (dict(q=(1, 2)), "value 1 of the arguments is not what was expected: a tensor"),
            (dict(q=b"x"), "argument: got bytes"),
        ],
    )
    def test_an_argument_of_another_kind_is_refused(self, changes: dict[str, Any], error: str) -> None:
        with pytest.raises((RuntimeError, ValueError, TypeError), match=error):
            run(running_scale_kernel, (1,), self.args(**changes), dict(GROUPS=1, BI=8, BJ=8))

    def test_a_constant_too_many_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="more than the kernel takes"):
            run(running_scale_kernel, (1,), (*self.args(), 1, 8, 8, 8), {})

    def test_a_kernel_without_a_twin_is_named(self) -> None:
        def ours(x):  # type: ignore[no-untyped-def]
            """Has no twin."""

        with pytest.raises(RuntimeError, match="no such kernel for a CPU: ours"):
            run(ours, (1,), (1,), {})

    def test_a_failure_in_a_team_of_threads_is_an_error_of_the_call(self, tmp_path: Path) -> None:
        code = """
import resource
import torch
from tdmpc2_fast.kernels.cpu.build import kernels
from tdmpc2_fast.kernels.device.launch import How, Precision, natively
from tdmpc2_fast.kernels.layers.grouped_layer import grouped_layer
from tdmpc2_fast.kernels.layers.rows import Layer, Rows
torch.set_num_threads(2)
wide = 2_000_000
layer = Layer(torch.zeros(1, 1, wide), torch.zeros(1, 1))
x, out = Rows(torch.zeros(1, 1, 1, wide).expand(1, 1, 512, wide)), Rows.empty(1, 1, 512, 1, torch.float32, "cpu")
kernels()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000,) * 2)
try:
    with natively():
        grouped_layer(x, None, layer, out, how=How(Precision("float32")))
except RuntimeError as e:
    print(e)
"""
        assert "grouped_layer_kernel on the CPU: std::bad_alloc" in in_a_process(code)

    def test_any_thread_may_launch(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        def moved(seed: int) -> float:
            value = torch.ones(1)
            with natively():
                running_scale(torch.arange(100.0) * (seed + 1), value, tau=1.0)
            return float(value)

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(moved, range(20))) == pytest.approx([89.1 * (seed + 1) for seed in range(20)])
