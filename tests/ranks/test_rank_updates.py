"""Updates that ranks share equal those of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ROOT
from rank_updates import BATCHES, UPDATES, agent_of, case, given, torchrun, updates
from small_configs import tiny_config
from torch import Tensor
from update_oracle import doubled

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError, RanksError
from tdmpc2_fast.kernels.cpu.build import why_not as why_not_built
from tdmpc2_fast.kernels.device.launch import triton
from tdmpc2_fast.learn.batch import UpdateTrace
from tdmpc2_fast.runtime.ranks import ALONE, Ranks, joined

BACKENDS = ["torch", *([] if why_not_built() else ["cpu"])]
NAMES = [f"{name}-{backend}" for backend in BACKENDS for name in ("plain", "episodic", "multitask")]
INTERPRETED = ["small-triton"] * (triton is not None)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return what each rank found, by the number of ranks; "2 again" is a second run of 2."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, count in {"2": 2, "2 again": 2, "4": 4}.items():
        out = tmp_path_factory.mktemp("ranks")
        cases = [*NAMES, *(INTERPRETED if name == "2" else [])]
        done = torchrun(count, ROOT / "tests/ranks/rank_updates.py", out, *cases, TRITON_INTERPRET="1")
        assert done.returncode == 0, done.stderr
        found[name] = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(count)]
    return found


def exact_gradients(cfg: Config, i: int) -> dict[str, Tensor]:
    """Return the gradients of a first update of one process in float64."""
    agent, trace = agent_of(cfg.replace(backend="torch")), UpdateTrace.empty()
    agent.model.double()
    agent.updater.step(*doubled(*given(cfg, i)), trace)
    return trace.grads


CASES_RUN = [(count, name) for count in ("2", "4") for name in NAMES] + [("2", name) for name in INTERPRETED]


@pytest.mark.parametrize(("count", "name"), CASES_RUN)
def test_ranks_equal_one_process_with_the_whole_batch(
    found: dict[str, list[dict[str, Any]]], count: str, name: str
) -> None:
    cfg, ranks = case(name), [rank[name] for rank in found[count]]
    one = updates(cfg.replace(backend="torch"))
    exact = [exact_gradients(cfg, i) for i in range(BATCHES)]
    # Errors of the first gradients, at most twice those of one process in float32.
    assert all(got.keys() == want.keys() for got, want in zip(ranks[0]["grads"], exact, strict=True))
    ours, allowed = (
        torch.cat(
            [
                ((got[n].double() - g) / g.abs().max()).flatten()
                for got, want in zip(x["grads"], exact, strict=True)
                for n, g in want.items()
                if g.any()
            ]
        )
        for x in (ranks[0], one)
    )
    assert ours.abs().max() <= 2 * allowed.abs().max() + 2**-24
    assert ours.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + 2**-26
    for ours_now, theirs in zip(ranks[0]["metrics"], one["metrics"], strict=True):
        assert ours_now.keys() == theirs.keys()
        for key, x in theirs.items():
            torch.testing.assert_close(ours_now[key], x, atol=1e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
    assert one["metrics"][-1]["pi_scale"] > 1  # else the Q values of the others would not count
    steps = UPDATES * cfg.lr
    for key, x in one["given"].items():
        # Adam can turn rounding of a vanishing gradient into a step of lr.
        torch.testing.assert_close(ranks[0]["given"][key], x, atol=2.5 * steps, rtol=0)
        assert torch.isclose(ranks[0]["given"][key], x, atol=2e-5, rtol=1e-3).float().mean() > 0.98, key


@pytest.mark.parametrize(("count", "name"), CASES_RUN)
def test_all_ranks_are_the_same_bit_for_bit(found: dict[str, list[dict[str, Any]]], count: str, name: str) -> None:
    first, *others = (rank[name] for rank in found[count])
    for other in others:
        for kind in ("params", "grads", "drawn"):
            ours, theirs = ([x] if isinstance(x, dict) else x for x in (first[kind], other[kind]))
            for one, two in zip(ours, theirs, strict=True):
                assert one.keys() == two.keys()
                assert all(torch.equal(x, two[key]) for key, x in one.items()), kind
        assert first["metrics"] == other["metrics"]


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_on_as_many_ranks_is_the_same_bit_for_bit(
    found: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for one, two in zip(found["2"], found["2 again"], strict=True):
        assert all(torch.equal(x, two[name]["params"][key]) for key, x in one[name]["params"].items())
        assert one[name]["drawn"] == two[name]["drawn"]


@pytest.mark.parametrize(("count", "name"), CASES_RUN)
def test_ranks_draw_noise_of_their_own(found: dict[str, list[dict[str, Any]]], count: str, name: str) -> None:
    noise = [rank[name]["noise"] for rank in found[count]]
    assert all(torch.equal(noise[0]["members"], x["members"]) for x in noise[1:])
    eps = torch.cat([x["td_eps"] for x in noise], 1).flatten(2)
    assert len(eps.flatten().unique()) == eps.numel()


@pytest.mark.parametrize(("count", "name"), CASES_RUN)
def test_what_is_not_finite_on_one_rank_ends_all_with_the_same_words(
    found: dict[str, list[dict[str, Any]]], count: str, name: str
) -> None:
    said = {rank[name]["said"] for rank in found[count]}
    assert len(said) == 1
    assert f"update {UPDATES + 1}: reward_loss, value_loss, total_loss is not finite" in said.pop()
    assert all(rank[name]["kept"] for rank in found[count])


def test_a_share_that_is_none_is_refused_before_anything_is_done() -> None:
    with pytest.raises(ConfigError, match=r"config key 'batch_size': got 8, .* on 3 ranks, allowed: a multiple of 3"):
        agent_of(tiny_config(), Ranks(1, 3))
    with pytest.raises(ConfigError, match=r"config key 'num_envs': got 4, .* on 8 ranks, allowed: a multiple of 8"):
        Ranks(0, 8).part(tiny_config(num_envs=4, batch_size=8))


def test_parts_are_all_of_it_with_seeds_of_their_own() -> None:
    cfg = tiny_config(num_envs=8, batch_size=12, buffer_size=100, steps=1000)
    parts = [Ranks(rank, 4).part(cfg) for rank in range(4)]
    assert {(x.num_envs, x.batch_size, x.buffer_size, x.steps) for x in parts} == {(2, 3, 25, 250)}
    assert len({x.seed for x in parts}) == 4
    assert [Ranks(rank, 4).share(10) for rank in range(4)] == [3, 3, 2, 2]


def test_a_process_without_others_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_config()
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    assert joined("auto", 1.0) is ALONE
    assert ALONE.part(cfg) is cfg
    assert (ALONE.most(3, 4), ALONE.told("x"), ALONE.of_first(5)) == ((3, 4), ["x"], 5)


@pytest.mark.parametrize(
    ("env", "device", "error", "said"),
    [
        (dict(WORLD_SIZE="2", RANK="0"), "cpu", RanksError, "WORLD_SIZE=2 is set without LOCAL_RANK"),
        (dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0"), "cuda:1", ConfigError, "got 'cuda:1' on several ranks"),
        (dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="999"), "cuda", ConfigError, "1000 or more processes"),
    ],
)
def test_what_torchrun_cannot_have_meant_is_refused(
    env: dict[str, str], device: str, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="1") | env).items():
        monkeypatch.setenv(key, value)
    if "LOCAL_RANK" not in env:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(error, match=said):
        joined(device, 1.0)
