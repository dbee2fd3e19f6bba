"""The directive that makes neighbours a cluster, and how Triton comes to compile it."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tdmpc2_fast.kernels.device import cluster, cluster_check

PTX = (
    ".visible .entry k(\n)\n.reqntid 128, 1, 1\n{\n\tbarrier.cluster.arrive.release.aligned; // cluster of 6, %r1\n}\n"
)


def test_a_kernel_that_asks_for_a_cluster_requires_it() -> None:
    found = cluster.with_directive(PTX)
    assert ".reqntid 128, 1, 1\n.explicitcluster\n.reqnctapercluster 6, 1, 1\n{" in found
    plain = PTX.replace("// cluster of 6", "//")
    assert cluster.with_directive(plain) == plain


def test_another_form_of_assembly_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"^assembly: got 0 entries .*allowed: 1"):
        cluster.with_directive(PTX.replace(".reqntid", ".maxntid"))


@pytest.mark.triton
def test_triton_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    assert cluster.can_cluster()
    stages = {"ptx": lambda source, metadata: PTX}

    def another(*compiling: object) -> tuple[str, str] | None:
        return None if compiling else ("another", "hash")

    for before in (None, another):
        monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", before)
        with cluster.clusters_compiled(1):
            assert knobs.runtime.add_stages_inspection_hook is before
        with cluster.clusters_compiled(6):
            hook = knobs.runtime.add_stages_inspection_hook
            key, hashed = hook()
            assert (("another" in key), len(hashed)) == (before is another, 64)
            made = dict(stages)
            hook(None, made, None, None, None)
            assert ".reqnctapercluster 6, 1, 1" in made["ptx"]("", {})
        assert knobs.runtime.add_stages_inspection_hook is before
    with pytest.raises(ZeroDivisionError), cluster.clusters_compiled(2):
        raise ZeroDivisionError
    assert knobs.runtime.add_stages_inspection_hook is another


def test_a_kernel_without_its_directive_is_refused() -> None:
    cluster.check_clustered(SimpleNamespace(asm={"ptx": cluster.with_directive(PTX)}))
    with pytest.raises(RuntimeError, match=r"^cluster: Triton compiled the kernel without it"):
        cluster.check_clustered(SimpleNamespace(asm={"ptx": PTX}))


def handed_on(kernel: object, grid: tuple[int], scratch: torch.Tensor, out: torch.Tensor, **given: Any) -> None:
    """Do what the programs of the check do."""
    x = torch.arange(out.numel(), dtype=torch.int32).view(-1, given["CLUSTER"], given["LANES"])
    for _ in range(given["ROUNDS"]):
        x = x.roll(-1, 1)
    out.copy_(x.view(out.shape))


def early(*given: Any, **options: Any) -> None:
    """Let one program read before its neighbour wrote."""
    handed_on(*given, **options)
    given[3][37] = -1


def refused(*given: Any, **options: Any) -> None:
    raise RuntimeError("CUDA error: invalid cluster size")


@pytest.mark.triton
@pytest.mark.parametrize(
    ("launch", "reason"),
    [(handed_on, None), (early, r"1 of 512 programs read something else"), (refused, r"RuntimeError: .*cluster size")],
)
def test_where_neighbours_do_not_wait_layers_take_a_second_launch(
    monkeypatch: pytest.MonkeyPatch, launch: Any, reason: str | None
) -> None:
    monkeypatch.setattr(cluster_check, "launch", launch)
    monkeypatch.setattr(cluster_check, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda d: nullcontext())
    cluster_check.clusters_work.cache_clear()
    try:
        with pytest.warns(match=f"clusters do not work on cpu, .*{reason}") if reason else warnings.catch_warnings():
            assert cluster_check.clusters_work(torch.device("cpu")) == (reason is None)
    finally:
        cluster_check.clusters_work.cache_clear()
