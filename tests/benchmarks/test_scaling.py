"""The model of shared updates: its counts against buffers that exist, its sums, and ranks of this machine beside it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from tdmpc2_fast.benchmarks import scaling, scaling_ranks
from tdmpc2_fast.kernels.cpu.build import why_not as why_not_built


def test_what_is_exchanged_is_what_chains_hold() -> None:
    x = scaling.counted(5, 256)
    parameters = scaling.memory(5, 256).optimiser / 12  # gradient and two moments of each
    assert x.world + x.policy == pytest.approx(4 * parameters, rel=1e-3)
    assert x.world > 5 * x.policy


def test_an_all_reduce_is_bytes_and_steps() -> None:
    free = replace(scaling.H100, start=0.0, hop=0.0, leap=0.0)
    assert scaling.all_reduce(1e9, 1) == 0
    assert scaling.all_reduce(450e9, 8, free) == pytest.approx(2 * 7 / 8)
    # Between machines each GPU sends its eighth, over a NIC of its own.
    assert scaling.all_reduce(400e9, 16, free) == pytest.approx(2 * 7 / 8 * 400 / 450 + 2 * 1 / 2 * 50 / 50)
    slow = replace(free, hop=1.0, leap=10.0)
    assert scaling.all_reduce(0, 64, slow) == pytest.approx(2 * 3 * 1 + 2 * 3 * 10)


def test_it_says_what_an_h200_was_measured_to_take() -> None:
    assert scaling.update(5, 256, 1) == pytest.approx(869e-6, rel=0.05)


def test_more_gpus_are_never_more_efficient() -> None:
    for size in scaling.SIZES:
        shares = [share for *_, share in scaling.weak(size)]
        assert shares[0] == 1
        assert shares == sorted(shares, reverse=True)
        ups = {n: up for n, _, _, up in scaling.strong(size)}
        assert all(up <= n for n, up in ups.items())
        assert scaling.stops(size) in (1, 2, 4, 8, 16)


def test_the_page_has_its_tables() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    for table in scaling.tables().split("\n\n"):
        assert table in page


@pytest.mark.skipif(why_not_built() is not None, reason=str(why_not_built()))
def test_ranks_are_measured_beside_their_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_ranks, "RANKS", (1, 2))
    torch.set_num_threads(1)
    small = dict(mlp_dim=32, enc_dim=32, latent_dim=32, batch_size=4)
    found = scaling_ranks.measured(2, **small)
    rows = [line for line in found.splitlines() if re.match(r"\| \d", line)]
    assert [re.findall(r"\d+", row)[:2] for row in rows] == [["1", "4"], ["2", "8"]]
    assert "1.00" in rows[0]
