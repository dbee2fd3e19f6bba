"""Random streams and the draws of a plan and an update: which seed, which law, which shape."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import tiny_config

from tdmpc2_fast import Config
from tdmpc2_fast.rng import PlanNoise, UpdateNoise, dropout_multipliers, generator, generator_state, set_generator
from tdmpc2_fast.seeds import stream_seed


@pytest.mark.parametrize(
    ("seed", "name", "expected"),
    [
        (1, "replay", 1720080221256216027),
        (1, "plan", 730127369736083483),
        (2, "replay", 1725959795865937160),
        (0, "", 6375474604893067239),
    ],
)
def test_a_stream_has_the_seed_it_always_had(seed: int, name: str, expected: int) -> None:
    assert stream_seed(seed, name) == expected
    draws = torch.rand(3, generator=generator(seed, name, torch.device("cpu")))
    assert torch.equal(draws, torch.rand(3, generator=torch.Generator().manual_seed(expected)))


def test_a_stream_goes_on_from_its_own_kind_of_device_only() -> None:
    g = generator(1, "test", torch.device("cpu"))
    torch.rand(5, generator=g)
    kept, following = generator_state(g, "mine"), torch.rand(3, generator=g)
    other = generator(2, "test", torch.device("cpu"))
    set_generator(other, {"rng.cpu": kept["mine.cpu"]}, "mine")
    assert torch.equal(other.get_state(), generator(2, "test", torch.device("cpu")).get_state())
    set_generator(other, kept, "mine")
    assert torch.equal(torch.rand(3, generator=other), following)


def shapes(noise: PlanNoise | UpdateNoise) -> dict[str, tuple[int, ...]]:
    found = {f.name: getattr(noise, f.name) for f in dataclasses.fields(noise)}
    return {name: tuple(x.shape) for name, x in found.items() if x is not None}


def pixel_config() -> Config:
    return Config(obs="rgb", mlp_dim=16, batch_size=2, device="cpu").with_env({"rgb": (9, 64, 64)}, 2, 500)


def test_draws_of_a_plan() -> None:
    cfg = tiny_config(iterations=40, horizon=4)
    noise = PlanNoise.draw(cfg, 3, generator(1, "test", torch.device("cpu")), torch.float64)
    assert shapes(noise) == dict(
        pi_eps=(3, 4, 4, 2), samples=(40, 3, 4, 28, 2), value_eps=(40, 3, 32, 2), members=(40, 2), elite=(3, 8),
        action=(3, 2),
    )  # fmt: skip
    assert {x.dtype for x in vars(noise).values() if x is not None} == {torch.float64, torch.int64}
    for normal in (noise.samples, noise.value_eps):
        assert abs(normal.mean()) < 5 / normal.numel() ** 0.5
        assert abs(normal.std() - 1) < 5 / normal.numel() ** 0.5
    assert noise.elite.min() >= 0  # Exp(1)
    pairs = set(map(tuple, noise.members.tolist()))
    assert pairs == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_draws_of_an_update() -> None:
    cfg, g = tiny_config(dropout=0.25), generator(1, "test", torch.device("cpu"))
    noise = UpdateNoise.draw(cfg, g)
    assert shapes(noise) == dict(
        td_eps=(3, 8, 2), td_members=(2,), pi_eps=(4, 8, 2), pi_members=(2,),
        value_dropout=(3, 3, 8, 24), pi_dropout=(2, 4, 8, 24),
    )  # fmt: skip
    draws = [UpdateNoise.draw(cfg, g) for _ in range(40)]
    assert any(not torch.equal(n.td_members, n.pi_members) for n in draws)
    assert {tuple(n.td_members.tolist()) for n in draws} == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert set(noise.value_dropout.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}  # type: ignore[union-attr]
    assert not {"value_dropout", "pi_dropout"} & shapes(UpdateNoise.draw(tiny_config(dropout=0.0), g)).keys()


def test_pixels_are_shifted_by_0_to_6() -> None:
    cfg, g = pixel_config(), generator(1, "test", torch.device("cpu"))
    assert shapes(PlanNoise.draw(cfg, 3, g))["shift"] == (3, 1, 1, 2)
    update = shapes(UpdateNoise.draw(cfg, g))
    assert (update["shift_next"], update["shift_first"]) == ((3, 2, 1, 1, 2), (2, 1, 1, 2))
    many = PlanNoise.draw(cfg.replace(num_samples=32, num_elites=8, num_pi_trajs=4), 200, g).shift
    assert many is not None
    assert set(many.unique().tolist()) == set(range(7))


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_dropout_reaches_the_end(count: int) -> None:
    g = torch.Generator().manual_seed(0)
    last = torch.stack([dropout_multipliers((count,), 0.5, g)[-1] for _ in range(300)])
    assert set(last.tolist()) == {0.0, 2.0}
    assert abs((last == 0).float().mean() - 0.5) < 5 * 0.5 / 300**0.5
