"""Episodes kept on a device: what each holds, where it begins, and what becomes of numbers that are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from point_mass import LONGEST, Breaks, PointMass, PointMasses
from torch import Tensor

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.errors import NonFiniteError
from tdmpc2_fast.train.envs.answers import EnvError
from tdmpc2_fast.train.envs.base import Failures
from tdmpc2_fast.train.envs.device.base import DeviceStep, checked
from tdmpc2_fast.train.run.rollouts import DeviceRollouts
from tdmpc2_fast.train.run.rollouts.device import DeviceEpisode

CPU = torch.device("cpu")
SEEDS = [11, 907, 2**31 - 7]


def config(**changes: Any) -> Config:
    keys = dict(task="mass", num_envs=len(SEEDS), backend="torch", num_samples=16, iterations=1)
    return tiny_config(obs_dim=4, episode_length=LONGEST, **{**keys, **changes})


class Played:
    """Rollouts with random actions, and the episodes that came of them."""

    def __init__(self, envs: PointMasses, **changes: Any) -> None:
        self.cfg = config(num_envs=envs.num_envs, **changes)
        self.notes: list[str] = []
        self.rollouts = DeviceRollouts(envs, self.cfg, CPU, Failures(self.cfg, self.notes.append))
        self.random = [np.random.default_rng(i) for i in range(envs.num_envs)]
        self.episodes: list[DeviceEpisode] = []
        self.rows: list[dict[str, Tensor]] = []
        self.rewards: list[Any] = []

    def store(self) -> None:
        for episode in self.rollouts.ended():
            self.episodes.append(episode)
            self.rows.append({k: x.clone() for k, x in episode.rows().items()})  # the storage goes on to be used
            self.rewards.append(episode.rewards.copy())

    def go(self, decisions: int) -> Played:
        for _ in range(decisions):
            self.store()
            self.rollouts.begin()
            self.rollouts.take(np.stack([r.uniform(-1, 1, 2).astype(np.float32) for r in self.random]))
            self.rollouts.step_async()
            self.rollouts.step_wait()
        self.store()
        return self


def of_seed(rows: list[dict[str, Tensor]], seed: int) -> list[dict[str, Tensor]]:
    """Return the episodes that an environment of this seed began."""
    firsts = set()
    env = PointMass(seed)
    for _ in range(50):
        firsts.add(env.reset().tobytes())
    return [r for r in rows if r["obs"][0].numpy().tobytes() in firsts]


@pytest.mark.parametrize("deadly", [False, True])
def test_every_episode_is_the_one_that_numpy_plays_with_its_actions(deadly: bool) -> None:
    played = Played(PointMasses(SEEDS, CPU, deadly), episodic=deadly).go(60)
    ends = set()
    for seed in SEEDS:
        env, found = PointMass(seed, deadly), of_seed(played.rows, seed)
        assert len(found) >= 5
        for rows in found:
            assert rows["action"][0].isnan().all()
            assert rows["reward"][0].isnan()
            seen = [(env.reset(), np.nan, False, False)]
            seen += [env.step(a.numpy())[:4] for a in rows["action"][1:]]
            obs, reward, terminated, truncated = zip(*seen, strict=True)
            assert np.array_equal(rows["obs"].numpy(), np.stack(obs))
            assert np.array_equal(rows["reward"].numpy(), np.asarray(reward, np.float32), equal_nan=True)
            assert rows["terminated"].tolist() == list(map(float, terminated))
            assert terminated[-1] or truncated[-1]
            assert not any(terminated[:-1]) and not any(truncated[:-1])  # noqa: PT018
            ends.add(terminated[-1])
    assert ends == ({False, True} if deadly else {False})
    assert played.rollouts.failures.ended == len(played.episodes)


def test_what_the_log_has_of_an_episode_is_what_its_rows_say() -> None:
    played = Played(PointMasses(SEEDS, CPU, deadly=True), episodic=True).go(60)
    assert len({len(e) for e in played.episodes}) > 2
    for episode, rows, looked_at in zip(played.episodes, played.rows, played.rewards, strict=True):
        rewards = rows["reward"][1:].double()
        assert np.array_equal(looked_at, rewards.numpy())
        assert len(episode) == len(rewards)
        assert episode.total == pytest.approx(float(rewards.sum()), abs=1e-12)
        assert episode.peak == float(rewards.abs().max())
        assert episode.terminates == bool(rows["terminated"][-1])
        assert episode.success == float((rows["obs"][-1, :2].abs() <= 1).all())


def test_an_environment_plays_the_same_among_any_number_of_others() -> None:
    """The actions are its own, too: those of the first environment."""
    alone = Played(PointMasses(SEEDS[:1], CPU)).go(40).rows
    many = Played(PointMasses([*SEEDS[:1], *range(500, 563)], CPU)).go(40).rows
    again = of_seed(many, SEEDS[0])
    assert len(alone) == len(again) >= 4
    for one, other in zip(alone, again, strict=True):
        assert all(torch.equal(one[k].nan_to_num(7), other[k].nan_to_num(7)) for k in one)


@pytest.mark.parametrize(
    ("field", "decision", "named"),
    [
        ("obs", 0, "observation"),
        ("obs", 1, "observation"),
        ("obs", 5, "observation"),
        ("reward", 3, "reward"),
        ("success", 2, "success"),
    ],
)
def test_an_episode_with_numbers_that_are_none_never_gets_out(field: str, decision: int, named: str) -> None:
    envs = PointMasses(SEEDS, CPU)
    envs.breaks = Breaks(field, 1, 2, decision)
    words = f"mass, environment 1: {named}: got NaN or infinity, allowed: finite numbers (float32)"
    with pytest.raises(EnvError) as raised:
        Played(envs).go(60)
    assert str(raised.value) == words
    envs = PointMasses(SEEDS, CPU)
    envs.breaks = Breaks(field, 1, 2, decision)
    played = Played(envs, on_env_error="drop").go(60)
    assert played.notes == [f"{words}; the episode is dropped (1 so far)"]
    assert played.rollouts.failures.dropped == 1
    assert all(r["obs"].isfinite().all() and r["reward"][1:].isfinite().all() for r in played.rows)
    begun = [PointMass(SEEDS[1])]
    firsts = [begun[0].reset() for _ in range(5)]
    found = [r["obs"][0].numpy() for r in of_seed(played.rows, SEEDS[1])]
    assert [any(np.array_equal(f, x) for x in found) for f in firsts] == [True, False, True, True, True]
    # The others are as if nothing had been.
    sound = Played(PointMasses(SEEDS, CPU)).go(60)
    for seed in (SEEDS[0], SEEDS[2]):
        mine, theirs = of_seed(played.rows, seed), of_seed(sound.rows, seed)
        assert [torch.equal(a["obs"], b["obs"]) for a, b in zip(mine, theirs, strict=True)] == [True] * len(mine)


def test_a_simulator_that_breaks_ever_again_ends_the_run() -> None:
    class Broken(PointMasses):
        def reset(self, mask: Tensor) -> Tensor:
            return super().reset(mask) * torch.nan

    with pytest.raises(EnvError, match="got 11 episodes that failed, allowed: 10 beside 0 that ended"):
        Played(Broken(SEEDS, CPU), on_env_error="drop").go(60)


def test_an_agent_is_shown_nothing_that_is_no_number_and_blamed_for_what_it_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    envs = PointMasses(SEEDS, CPU)
    envs.breaks = Breaks("obs", 2, 1, 0)
    played = Played(envs, on_env_error="drop")
    agent, seen, nan = TDMPC2(played.cfg), [], False
    act = agent.act

    def watched(obs: Tensor, t0: Tensor, **keys: Any) -> Tensor:
        seen.append((obs, t0))
        return act(obs, t0, **keys) * (torch.nan if nan else 1)

    monkeypatch.setattr(agent, "act", watched)

    def decide() -> None:
        played.store()
        played.rollouts.begin()
        played.rollouts.act(agent)
        played.rollouts.step_async()
        played.rollouts.step_wait()

    for _ in range(3):
        decide()
    assert [t0.tolist() for _, t0 in seen] == [[True] * 3, [False, False, True], [False] * 3]
    assert all(obs.isfinite().all() for obs, _ in seen)
    assert seen[0][0][2].eq(0).all()
    envs = PointMass(SEEDS[2])
    envs.reset()
    assert np.array_equal(seen[1][0][2].numpy(), envs.reset())  # its next episode
    nan = True
    with pytest.raises(
        NonFiniteError, match=r"action: got NaN from the agent, for observations of up to [\d.]+; scale"
    ):
        decide()


def test_an_episode_longer_than_the_simulator_says_is_an_error() -> None:
    class Endless(PointMasses):
        def step(self, actions: Tensor) -> DeviceStep:
            found = super().step(actions)
            return found._replace(truncated=torch.zeros_like(found.truncated))

    with pytest.raises(EnvError, match="mass, environment 0: truncated: got false after 12 decisions, allowed: true"):
        Played(Endless(SEEDS, CPU)).go(20)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("obs", torch.zeros(3, 5), "observation: got torch.float32 of shape (3, 5) on cpu, allowed: numbers of shape"),
        ("reward", torch.zeros(3, 1), "reward: got torch.float32 of shape (3, 1) on cpu, allowed: numbers of shape (3"),
        ("reward", np.zeros(3), "reward: got ndarray, allowed: numbers of shape (3,) on cpu"),
        ("terminated", torch.zeros(3), "terminated: got torch.float32 of shape (3,) on cpu, allowed: bool of shape (3"),
        ("truncated", torch.zeros(3, dtype=torch.bool, device="meta"), "truncated: got torch.bool of shape (3,) on m"),
        ("success", torch.zeros(3, dtype=torch.bool), "success: got torch.bool of shape (3,) on cpu, allowed: numbers"),
    ],
)
def test_answers_of_another_form_are_refused_by_name(field: str, value: Any, words: str) -> None:
    envs = PointMasses(SEEDS, CPU)
    envs.reset(torch.ones(3, dtype=torch.bool))
    found = envs.step(torch.zeros(3, 2))
    assert checked(found, envs) is found
    with pytest.raises(EnvError) as raised:
        checked(found._replace(**{field: value}), envs)
    assert str(raised.value).startswith(words)
