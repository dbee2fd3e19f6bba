"""Updates: equal to the reference with dropout on, quirks and their switches, failure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import filled_buffer, tiny_config, tiny_multitask

from tdmpc2_fast import TDMPC2, Config, ReplayBuffer
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.errors import InputError, NonFiniteError
from tdmpc2_fast.learn.metrics import termination_statistics
from tdmpc2_fast.reference import ReferenceAgent
from tdmpc2_fast.rng import UpdateNoise, generator

Liven = Callable[[TDMPC2], TDMPC2]

CONFIGS = dict(
    plain=tiny_config(dropout=0.2),
    episodic=tiny_config(episodic=True),
    multitask=tiny_multitask(dropout=0.2),
    horizon_1=tiny_config(horizon=1),
    two_critics=tiny_config(num_q=2),
    clipped=tiny_config(grad_clip_norm=0.01),
)


@pytest.mark.parametrize("name", CONFIGS)
def test_updates_equal_the_reference(name: str, livened: Liven) -> None:
    cfg = CONFIGS[name]
    agent = livened(TDMPC2(cfg))
    reference = ReferenceAgent(cfg, tensors_only(agent.model.state_dict()))
    buffer, g = filled_buffer(cfg), generator(5, "test", torch.device("cpu"))
    for _ in range(3):
        batch, noise = buffer.sample(), UpdateNoise.draw(cfg, g)
        got, want = agent.updater.step(batch, noise), reference.update(batch, noise)
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], atol=1e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
    for key, value in tensors_only(agent.model.state_dict()).items():
        # Adam can turn rounding of a vanishing gradient into a step of lr
        close = torch.isclose(value, reference.p[key], atol=2e-6, rtol=1e-4)
        assert close.float().mean() > 0.99, key
        torch.testing.assert_close(value, reference.p[key], atol=2.5 * 3 * cfg.lr, rtol=0)


def task_gradient_after_update(leak: bool, livened: Liven) -> torch.Tensor | None:
    cfg = tiny_multitask(task_grad_leak=leak)
    agent = livened(TDMPC2(cfg))
    agent.update(filled_buffer(cfg))
    return agent.model._task_emb.weight.grad


def test_task_gradient_leaks_by_default_and_can_be_stopped(livened: Liven) -> None:
    leaked = task_gradient_after_update(True, livened)
    assert leaked is not None
    assert leaked.abs().max() > 0
    assert task_gradient_after_update(False, livened) is None


def test_training_learns_and_moves_targets_slowly() -> None:
    cfg = tiny_config(lr=3e-3)
    agent = TDMPC2(cfg)
    buffer = filled_buffer(cfg)
    target = agent.model._target_Qs_params[0].weight.clone()  # type: ignore[union-attr, operator]
    losses = [float(agent.update(buffer)["reward_loss"]) for _ in range(80)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    moved = (agent.model._target_Qs_params[0].weight - target).abs().max()  # type: ignore[union-attr, operator]
    gap = (agent.model._Qs.params[0].weight - target).abs().max()  # type: ignore[union-attr, operator]
    assert 0 < moved < gap
    assert not agent.model.training


def test_same_seed_same_parameters(cfg: Config) -> None:
    states = []
    for _ in range(2):
        agent, buffer = TDMPC2(cfg), filled_buffer(cfg)
        for _ in range(5):
            agent.update(buffer)
        states.append(tensors_only(agent.model.state_dict()))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("module", ["_encoder", "_pi", "_target_Qs_params", "_dynamics"])
def test_a_nan_anywhere_is_named_and_not_an_index_error(cfg: Config, module: str) -> None:
    agent, buffer = TDMPC2(cfg), filled_buffer(cfg)
    with torch.no_grad():
        next(iter(getattr(agent.model, module).parameters())).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="update 0"):
        agent.update(buffer)
    assert agent.updater.scale.value.isfinite()


@pytest.mark.parametrize(("part", "words"), [("_reward", "reward_loss"), ("_pi", "pi_loss")])
def test_a_nan_stops_before_parameters_are_touched(cfg: Config, part: str, words: str) -> None:
    agent, buffer = TDMPC2(cfg), filled_buffer(cfg)
    agent.update(buffer)
    with torch.no_grad():
        if part == "_reward":
            agent.model._reward[-1].bias[0] = torch.nan  # type: ignore[union-attr, index, operator]
        else:
            # only the policy loss: targets stay finite
            agent.updater.scale.value.fill_(torch.nan)
    before = {k: v.clone() for k, v in agent.model.named_parameters() if k.startswith(part)}
    with pytest.raises(NonFiniteError, match=f"update 1.*{words}"):
        agent.update(buffer)
    for key, value in before.items():
        assert torch.equal(value.nan_to_num(7), agent.model.get_parameter(key).nan_to_num(7)), key
    assert not agent.model.training


def test_terminations_are_counted_as_by_hand() -> None:
    prob = torch.tensor([0.9, 0.8, 0.6, 0.5, 0.2, 0.7, 0.1])[:, None]
    target = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0])[:, None]
    found = termination_statistics(prob, target)  # 2 of 4 are found, and 2 of the 4 that are predicted are true
    assert found.keys() == {"termination_rate", "termination_f1"}
    assert float(found["termination_rate"]) == pytest.approx(4 / 7)
    assert float(found["termination_f1"]) == pytest.approx(0.5)
    # 2 of 3 that are predicted, and 2 of 4 that are there.
    better = termination_statistics(torch.where(target == 0, prob - 0.15, prob), target)
    assert float(better["termination_f1"]) == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert float(termination_statistics(prob, torch.zeros(7, 1))["termination_f1"]) == 0


def test_wrong_batches_are_named(cfg: Config) -> None:
    agent = TDMPC2(cfg)
    batch = filled_buffer(cfg).sample()
    with pytest.raises(InputError, match=r"batch\.action: got shape \(3, 8, 1\), allowed: \(3, 8, 2\)"):
        agent.updater.step(batch._replace(action=batch.action[..., :1]))
    multi = TDMPC2(tiny_multitask())
    with pytest.raises(InputError, match=r"batch\.task: got None"):
        multi.updater.step(filled_buffer(multi.cfg).sample()._replace(task=None))


def test_pixels_train() -> None:
    cfg = Config.from_dict(dict(obs="rgb", mlp_dim=16, batch_size=2, buffer_size=100, device="cpu")).with_env(
        {"rgb": (9, 64, 64)}, 2, 500
    )
    agent = TDMPC2(cfg)
    buffer = ReplayBuffer(cfg)
    obs = torch.randint(0, 256, (12, 9, 64, 64), dtype=torch.uint8)
    buffer.add(dict(obs=obs, action=torch.rand(12, 2), reward=torch.rand(12)))
    assert buffer.sample().obs.dtype == torch.uint8
    assert all(v.isfinite() for v in agent.update(buffer).values())
