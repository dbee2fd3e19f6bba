"""What is asked of torch beside the kernels: products as the config says, and everything else as before."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from conftest import tiny_config

from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.runtime.backend import (
    matmul_precision,
    on_this_machine,
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


def test_only_what_was_saved_and_cannot_be_had_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdmpc2_fast.runtime.backend.why_not_compiled", lambda device: "no compiler")
    notes: list[str] = []
    for compiled, given, kept in ((False, (), False), (True, ("compile",), True), (True, (), False)):
        assert on_this_machine(tiny_config(compile=compiled), given, notes.append).compile == kept
    assert ["no compiler" in note for note in notes] == [True]


@pytest.mark.parametrize("compiled", [False, True])
def test_what_has_no_effect_on_kernels_is_said(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdmpc2_fast.runtime.backend.why_not", lambda device: None)
    why = resolve_backend(tiny_config(backend="triton", compile=compiled), torch.device("cpu")).why
    assert why.endswith("; compile=true has no effect on kernels") == compiled
