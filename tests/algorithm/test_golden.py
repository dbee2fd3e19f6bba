"""Parity with the official implementation, draw by draw, and that the check can fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import golden_runner
import numpy as np
import pytest
from conftest import GOLDEN
from golden_cases import Case

CASES = ["math", *golden_runner.cases(GOLDEN)]


@pytest.mark.parametrize("implementation", ["reference", "torch", "compat"])
@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case: str, implementation: str) -> None:
    ((_, found),) = golden_runner.check(GOLDEN, implementation, case)
    bad = [f"{d.section}: {d.name} off by {d.worst:.2e}, limit {d.limit:.1e}" for d in found if not d.ok]
    assert not bad, "\n".join(bad)
    assert len(found) > 20


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    for name in ("episodic.npz", "episodic.json", "noise.json", "golden_weights.py"):
        shutil.copy(GOLDEN / name, tmp_path)
    return tmp_path


def test_a_wrong_recorded_number_fails_the_run(small_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load(small_folder / "episodic.npz") as f:
        arrays = dict(f)
    arrays["heads_reward"] = arrays["heads_reward"] + np.float32(1e-3)
    np.savez(small_folder / "episodic.npz", **arrays)
    assert golden_runner.main([str(small_folder)]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "heads_reward" in out


def test_weights_come_from_the_folder_where_it_has_them(small_folder: Path) -> None:
    case = Case(small_folder, "episodic")
    weights = {k: v.numpy() for k, v in case.weights.items()}
    np.savez(small_folder / "episodic_weights.npz", **weights)
    (small_folder / "golden_weights.py").unlink()
    assert golden_runner.main([str(small_folder)]) == 0
    weights["_pi.2.bias"] = weights["_pi.2.bias"] + 0.1
    np.savez(small_folder / "episodic_weights.npz", **weights)
    assert golden_runner.main([str(small_folder)]) == 1


def test_unknown_case_and_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no CASE\.npz"):
        golden_runner.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="unknown case 'nope'"):
        golden_runner.main([str(GOLDEN), "--case", "nope"])


def test_an_implementation_that_cannot_run_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert golden_runner.main([str(GOLDEN), "--implementation", "triton", "--case", "episodic"]) == 2
    assert "Triton needs a CUDA device" in capsys.readouterr().err
