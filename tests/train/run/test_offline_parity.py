"""The official `OfflineTrainer` and ours: the same file of episodes, the same batches and draws, the same numbers.

What the official one did is recorded (`tests/golden/offline/record.py`); its file is converted here, and our trainer
runs. The last test says why the task embedding's gradient must leak.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import offline_case
import pytest
import torch
from oracle import KERNELS, QUIET
from torch import Tensor

from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.kernels.device.launch import why_not
from tdmpc2_fast.learn.batch import Batch
from tdmpc2_fast.rng import UpdateNoise
from tdmpc2_fast.train.data.draws import Draws
from tdmpc2_fast.train.run.evaluate import Evaluation
from tdmpc2_fast.train.run.loops.offline import OfflineTrainer

WHY_NOT = why_not(torch.device("cpu"))
BY_KERNELS = [pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)), QUIET, pytest.mark.slow]


@pytest.fixture
def recorded() -> dict[str, np.ndarray]:
    with np.load(offline_case.RECORDED, allow_pickle=False) as f:
        return {k: f[k] for k in f.files}


def trained(
    folder: Path, recorded: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[OfflineTrainer, list[dict[str, float]], np.ndarray]:
    """Train as the official code was; return the trainer, the metrics of each update and sums over each batch."""
    cfg = offline_case.config(num_threads=1, **changes)
    trainer = OfflineTrainer(cfg, Draws(offline_case.data_in(folder / "data"), cfg, "cpu"), folder)
    offline_case.with_given_weights(trainer.agent)
    step, metrics, sums = trainer.agent.updater.step, list[dict[str, float]](), []

    def given(batch: Batch) -> dict[str, Tensor]:
        draws = (torch.from_numpy(recorded[f"noise {k}"][len(metrics)]) for k in offline_case.NOISE)
        noise = UpdateNoise(**dict(zip(offline_case.NOISE, draws, strict=True)))
        sums.append([float(x.double().sum()) for x in batch if x is not None])
        found = step(batch, noise)
        metrics.append({k: float(v) for k, v in found.items()})
        return found

    monkeypatch.setattr(trainer.agent.updater, "step", given)
    monkeypatch.setattr(trainer, "_evaluate", lambda: Evaluation([0.0], [0.0], [1]))  # no environment is asked for
    trainer.run()
    trainer.log.close()
    return trainer, metrics, np.array(sums)


@pytest.mark.parametrize("backend", ["torch", pytest.param(KERNELS, marks=BY_KERNELS)])
def test_twenty_updates_are_the_official_ones(
    backend: str, recorded: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, metrics, sums = trained(tmp_path, recorded, monkeypatch, backend=backend)
    assert trainer.agent.updater.steps == offline_case.UPDATES
    np.testing.assert_allclose(sums, recorded["batch sums"], rtol=1e-12)  # the batches are the same
    for name in (k.removeprefix("metric ") for k in recorded if k.startswith("metric ")):
        got = np.array([m[name] for m in metrics])
        limit = 1e-3 if name == "pi_entropy" else 2e-5  # the official code's own moves, too, where tanh saturates
        np.testing.assert_allclose(got, recorded[f"metric {name}"], rtol=limit, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(trainer.agent.updater.scale.value.numpy(), recorded["scale"], rtol=1e-5)
    state = tensors_only(trainer.agent.model.state_dict())
    names = {k.removeprefix("weight ") for k in recorded if k.startswith("weight ")}
    assert names == {k for k, v in state.items() if v.ndim}
    for name in names:
        want = torch.from_numpy(recorded[f"weight {name}"])
        torch.testing.assert_close(state[name].detach(), want, atol=5e-6, rtol=1e-5, msg=lambda m, k=name: f"{k}: {m}")


def test_without_the_leaking_task_gradient_they_would_not_be(
    recorded: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, metrics, _ = trained(tmp_path, recorded, monkeypatch, backend="torch", task_grad_leak=False)
    got, want = np.array([m["grad_norm"] for m in metrics]), recorded["metric grad_norm"]
    assert got[0] == pytest.approx(want[0], rel=1e-3)
    assert abs(got[1:] / want[1:] - 1).max() > 0.01
