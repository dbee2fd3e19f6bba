"""Launches and products of an update, counted."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from tdmpc2_fast.kernels.device.launch import How, Precision
from tdmpc2_fast.kernels.inspect.published import update_sizes
from tdmpc2_fast.kernels.inspect.update_work import dry_update, update_memory, update_work
from tdmpc2_fast.kernels.update.chain import UpdateChain

BFLOAT16 = Precision("bfloat16")


def test_an_update_of_the_5m_model_is_96_launches_of_ours_and_one_for_its_batch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = update_work(update_sizes(5, 6), BFLOAT16)
    with capsys.disabled():
        print(f"\n5M, batch 256: {work.launches} launches an update")
    ours = work.kernels
    assert work.launches == sum(v for k, v in ours.items() if k.endswith("_kernel")) == 96
    # encoder 2; policy 3 twice; rollout 9; critics 2 twice; heads 2
    assert ours["grouped_layer_kernel"] == 23
    # heads 3, rollout 9, encoder 1, critics 3, policy 2
    assert ours["input_gradient_kernel"] == 18
    # heads 3, dynamics 3, encoder 2, policy 3
    assert ours["weight_gradient_kernel"] == 11
    assert ours["adam_kernel"] == ours["squared_norm_kernel"] == 2


def test_the_page_of_updates_shows_what_is_counted() -> None:
    page = (ROOT / "docs" / "updates.md").read_text()
    rows = re.findall(r"^\| (\d+)M \| (\d+) \| (\d+) \| ([\d,.]+) \|", page, re.MULTILINE)
    assert len(rows) >= 8
    for size, batch, launches, gflop in rows:
        work = update_work(replace(update_sizes(int(size), 6), batch=int(batch)), BFLOAT16)
        assert (launches, gflop) == (str(work.launches), f"{work.flops / 1e9:,.1f}"), (size, batch)


@pytest.mark.parametrize("size", [5, 19])
def test_products_read_nothing_that_is_due(size: int) -> None:
    log, _ = dry_update(update_sizes(size, 6), BFLOAT16)
    arguments = [(launch.name, launch.arguments()) for launch in log]
    products = [a for name, a in arguments if name in ("grouped_layer_kernel", "weight_gradient_kernel")]
    assert all(a["IN_ACT"] == 0 for a in products)
    assert not any(a["NORM"] for name, a in arguments if name in ("weight_gradient_kernel", "input_gradient_kernel"))
    # All finish but the encoder's last layer, whose latents go two ways, and the policy's.
    finished = [a["ACT"] > 0 for name, a in arguments if name == "grouped_layer_kernel"]
    assert sum(finished) == len(finished) - 3
    # A LayerNorm each: heads 2, rollout 9, encoder, critics 2, policy 2.
    layers = 2 if size == 5 else 3
    assert sum(name == "norm_gradient_kernel" for name, _ in arguments) == 15 + layers
    # All but last layers have their bias from there: both operands of a product are loaded ahead.
    biases = [a["BIAS"] for name, a in arguments if name == "weight_gradient_kernel"]
    assert sum(biases) == 2


def test_products_of_a_small_update() -> None:
    # Batch 4, one step; widths that need no padding: obs 16, latent 16, width 32, action 16, one critic pair.
    narrow = dict(obs_dim=16, latent_dim=16, mlp_dim=32, enc_dim=16, num_enc_layers=2, num_q=2, num_bins=5)
    sizes = replace(update_sizes(1, 16), batch=4, horizon=1, **narrow)
    b, d, z, za, a = 4, 32, 16, 32, 16
    encoder = 2 * 16 * 16
    head = za * d + d * d + d * 5
    dynamics = za * d + d * d + d * z
    policy = z * d + d * d + d * 2 * a
    forward = 2 * b * encoder + b * (dynamics + 3 * head) + b * (policy + 2 * head)
    # Back: weights once more, inputs once more; of [z, a] only the latent.
    world = b * (3 * (head + head - za * d + z * d) + dynamics + dynamics - za * d + z * d) + b * (
        2 * 16 * 16 + 16 * 16
    )
    # Both latents; critics are constants, of their input only the action.
    loss = 2 * b * (policy + 2 * head) + 2 * b * 2 * (head - za * d + a * d) + 2 * b * (policy + policy - z * d)
    assert update_work(sizes, BFLOAT16).flops == 2 * (forward + world + loss)


@pytest.mark.parametrize("size", [1, 5])
def test_little_of_what_is_computed_is_padding(size: int) -> None:
    work = update_work(update_sizes(size, 6), BFLOAT16)
    assert work.flops < work.padded_flops < 1.15 * work.flops


def test_memory_is_what_the_buffers_take() -> None:
    sizes = update_sizes(5, 6)
    at = {name: update_memory(sizes, Precision(name)) for name in ("float32", "bfloat16")}
    update = UpdateChain(sizes, How(BFLOAT16), torch.device("cpu"))
    assert at["bfloat16"].optimiser == at["float32"].optimiser
    trained = update.world.param.numel() + update.policy.param.numel()
    assert at["float32"].parameters == 4 * (trained + update.target.param.numel())
    assert at["bfloat16"].parameters == 6 * (trained + update.target.param.numel())
    assert 12 * trained <= at["float32"].optimiser < 12.1 * trained
    # The largest: two layers of reward and five critics, and the gradients of these; three steps, 256 rows.
    heads = 4 * (6 * 3 * 256 * 512) * 2
    assert heads < at["bfloat16"].working < at["float32"].working
    assert update_memory(replace(sizes, batch=512), BFLOAT16).working > 1.9 * at["bfloat16"].working
