"""`freeze`: a part that does not learn keeps its bits, and the rest learns as if it were a constant."""

from __future__ import annotations

import pytest
import torch
from conftest import filled_buffer, tiny_config, tiny_multitask
from oracle import KERNELS, QUIET
from update_oracle import Liven

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.kernels.device.launch import why_not
from tdmpc2_fast.rng import UpdateNoise, generator

WHY_NOT = why_not(torch.device("cpu"))
BACKENDS = ["torch", pytest.param(KERNELS, marks=[pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)), QUIET])]


@pytest.mark.parametrize("freeze", ["encoder", "encoder+dynamics"])
@pytest.mark.parametrize("multitask", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_part_keeps_its_bits_and_the_rest_learns(
    backend: str, multitask: bool, freeze: str, livened: Liven
) -> None:
    cfg = (tiny_multitask if multitask else tiny_config)(backend=backend, freeze=freeze, horizon=2, num_bins=21)
    agent = livened(TDMPC2(cfg))
    before = {k: v.clone() for k, v in tensors_only(agent.model.state_dict()).items()}
    buffer = filled_buffer(cfg)
    for _ in range(3):
        agent.update(buffer)
    parts = tuple(f"_{part}." for part in freeze.split("+"))
    after = tensors_only(agent.model.state_dict())
    assert agent.updater.backend.name == backend
    for name, x in after.items():
        if name.startswith(parts):
            assert torch.equal(x, before[name]), name
        elif name.endswith("weight"):
            assert not torch.equal(x, before[name]), name
    kept = agent.updater.state()
    again = livened(TDMPC2(cfg))
    again.updater.load_state({k: v.clone() for k, v in kept.items()})
    assert again.updater.steps == 3


@pytest.mark.parametrize("multitask", [False, True])
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@QUIET
def test_the_gradient_norm_leaves_frozen_parts_out_on_every_backend(multitask: bool, livened: Liven) -> None:
    def norms(**changes: object) -> list[float]:
        cfg: Config = (tiny_multitask if multitask else tiny_config)(horizon=2, num_bins=21, **changes)
        agent, buffer, g = livened(TDMPC2(cfg)), filled_buffer(cfg), generator(5, "test", torch.device("cpu"))
        return [float(agent.updater.step(buffer.sample(), UpdateNoise.draw(cfg, g))["grad_norm"]) for _ in range(2)]

    plain, fused = (norms(backend=backend, freeze="encoder+dynamics") for backend in ("torch", KERNELS))
    assert fused == pytest.approx(plain, rel=1e-3)
    assert plain[0] < 0.9 * norms(backend="torch")[0]
