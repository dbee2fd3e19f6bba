"""What is asked of torch beside the kernels: products as the config says, and everything else as before."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PYTHONPATH, filled_buffer, tiny_config

from tdmpc2_fast import TDMPC2
from tdmpc2_fast.errors import BackendError, ConfigError
from tdmpc2_fast.kernels.device.launch import _why_no_driver, triton
from tdmpc2_fast.runtime.backend import (
    matmul_precision,
    resolve_backend,
    resolve_device,
    torch_products,
)

BACKENDS: Any = torch.backends
OPS = (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn)

# Old and new ways to choose, as others may have mixed them before.
CHOICES: dict[str, Callable[[], Any]] = {
    **{name: partial(torch.set_float32_matmul_precision, name) for name in ("highest", "high", "medium")},
    **{f"allow={b}": partial(setattr, BACKENDS.cuda.matmul, "allow_tf32", b) for b in (True, False)},
    **{f"cudnn={b}": partial(setattr, BACKENDS.cudnn, "allow_tf32", b) for b in (True, False)},
    **{f"matmul={p}": partial(setattr, BACKENDS.cuda.matmul, "fp32_precision", p) for p in ("ieee", "tf32")},
    "conv=ieee": partial(setattr, BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = [op.fp32_precision for op in OPS]
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for op, precision in zip(OPS, before, strict=True):
        op.fp32_precision = precision


def readings() -> dict[str, Any]:
    """What torch says; None where it refuses, for its old and its new settings disagree."""
    found: dict[str, Any] = {str(i): op.fp32_precision for i, op in enumerate(OPS)}
    old = dict(
        named=torch.get_float32_matmul_precision,
        matmul=lambda: BACKENDS.cuda.matmul.allow_tf32,
        cudnn=lambda: BACKENDS.cudnn.allow_tf32,
    )
    for name, read in old.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = None
    return found


@pytest.mark.parametrize("tf32", [True, False])
def test_whatever_was_set_before_is_set_after(tf32: bool) -> None:
    refused = 0
    for names in itertools.product(CHOICES, repeat=3):
        for name in names:
            CHOICES[name]()
        before = readings()
        with torch_products(tf32):
            inside = readings()
        assert (inside["matmul"], inside["cudnn"]) == (tf32, tf32), names
        assert inside["named"] == ("high" if tf32 else "highest"), names
        after = readings()
        assert {k: v for k, v in after.items() if before[k] is not None} == {
            k: v for k, v in before.items() if v is not None
        }, names
        refused += None in before.values()
    assert refused, "no choices disagreed"


@pytest.mark.parametrize(("precision", "tf32"), [("float32", False), ("tf32", True), ("bfloat16", True)])
def test_products_on_a_gpu_are_those_of_the_config(precision: str, tf32: bool) -> None:
    cfg, before = tiny_config().replace(precision=precision), readings()
    with matmul_precision(cfg, torch.device("cuda")):
        assert BACKENDS.cuda.matmul.allow_tf32 is tf32
        assert BACKENDS.cudnn.deterministic
    assert readings() == before
    assert not BACKENDS.cudnn.deterministic


def test_products_on_a_cpu_are_left_alone() -> None:
    before = readings()
    with matmul_precision(tiny_config(), torch.device("cpu")):
        assert readings() == before


@pytest.mark.parametrize(("there", "kind"), [(True, "cuda"), (False, "cpu")])
def test_the_device_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool, kind: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert resolve_device("auto").type == kind


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device(name) for name in ("cuda", "cuda:1")] == [torch.device("cuda"), torch.device("cuda", 1)]
    with pytest.raises(ConfigError, match="got 'cuda:2', allowed: cpu or one of 2 CUDA devices"):
        resolve_device("cuda:2")
    for name in ("meta", "gpu"):
        with pytest.raises(ConfigError, match="allowed: auto, cpu, cuda, cuda:N"):
            resolve_device(name)


class TestBackend:
    cpu = torch.device("cpu")

    def test_auto_says_what_it_chose(self) -> None:
        name, why = resolve_backend(tiny_config(), self.cpu)
        assert name == "cpu"
        assert "the kernels run on this CPU with vectors of" in why
        assert resolve_backend(tiny_config(backend="cpu"), self.cpu).why == "backend=cpu was asked for"
        assert resolve_backend(tiny_config(backend="torch"), self.cpu).why == "backend=torch was asked for"

    def test_triton_without_interpreter_or_gpu_is_refused_with_the_reason(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(BackendError, match="backend='triton' cannot run: Triton needs a CUDA device"):
            TDMPC2(tiny_config(backend="triton"))

    def test_the_kernels_of_a_cpu_are_not_for_a_gpu(self) -> None:
        with pytest.raises(BackendError, match=r"backend='cpu' cannot run: C\+\+ kernels run on the CPU only"):
            resolve_backend(tiny_config(backend="cpu"), torch.device("cuda"))

    def test_an_old_gpu_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (7, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "Tesla V100")
        name, why = resolve_backend(tiny_config(), torch.device("cuda"))
        assert name == "torch"
        assert "Tesla V100 has compute capability 7.0, allowed: 8.0 and newer" in why

    def test_a_driver_that_does_not_start_is_a_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_compiler(self: Any) -> None:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (9, 0))
        driver = type("Driver", (), {"get_current_target": no_compiler})()
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        _why_no_driver.cache_clear()
        name, why = resolve_backend(tiny_config(), torch.device("cuda"))
        _why_no_driver.cache_clear()
        assert name == "torch"
        assert "Triton cannot launch kernels here: RuntimeError: Failed to find C compiler" in why

    def test_without_triton_the_kernels_of_the_cpu_plan(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tdmpc2_fast.kernels.device.launch.triton", None)
        assert resolve_backend(tiny_config(), self.cpu).name == "cpu"
        with pytest.raises(BackendError, match="the package triton is not installed"):
            resolve_backend(tiny_config(backend="triton"), self.cpu)

    @pytest.mark.parametrize("backend", ["triton", "cpu"])
    def test_a_group_the_kernels_cannot_tile_is_named(self, backend: str) -> None:
        cfg = tiny_config(latent_dim=18, simnorm_dim=3, backend=backend)
        with pytest.raises(BackendError, match="simnorm_dim is 3"):
            TDMPC2(cfg)
        assert TDMPC2(cfg.replace(backend="auto")).backend.name == "torch"

    def test_bfloat16_without_kernels_is_refused(self) -> None:
        with pytest.raises(BackendError, match="precision='bfloat16' needs kernels, and torch plans and learns here"):
            TDMPC2(tiny_config(precision="bfloat16", backend="torch"))

    def test_bfloat16_on_a_cpu_without_its_instructions_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tdmpc2_fast.runtime.backend.bfloat16", lambda: "")
        for backend in ("auto", "cpu"):
            with pytest.raises(BackendError, match="needs a CPU with AMX or AVX512-BF16, and this one has neither"):
                TDMPC2(tiny_config(precision="bfloat16", backend=backend))

    def test_a_cpu_that_cannot_have_the_kernels_plans_and_learns_with_torch(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tdmpc2_fast.kernels.device.launch.why_not_built", lambda: "no compiler")
        agent = TDMPC2(tiny_config())
        assert agent.backend == agent.updater.backend == ("torch", "no compiler")
        agent.update(filled_buffer(agent.cfg))
        with pytest.raises(BackendError, match="backend='cpu' cannot run: no compiler; use backend='torch' or 'auto'"):
            TDMPC2(tiny_config(backend="cpu"))


def test_a_folder_for_the_cache_of_torch_that_cannot_be_made_is_replaced(tmp_path: Path) -> None:
    """In a process of its own: torch looks once. Without it no optimiser could be built."""
    (tmp_path / "file").touch()
    code = """
from conftest import TDMPC2, filled_buffer, tiny_config
cfg = tiny_config(backend="torch")
print("loss", float(TDMPC2(cfg).update(filled_buffer(cfg))["total_loss"]))
"""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file"), "PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("loss "), done.stderr
    assert "TORCHINDUCTOR_CACHE_DIR: torch cannot make this folder (FileExistsError" in done.stderr
