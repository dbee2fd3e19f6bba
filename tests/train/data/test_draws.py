"""Drawing: the official law, bit for bit resumed, shared among ranks, from more than fits into memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config
from data_episodes import TASKS, episode, made, multitask, parts
from scipy import stats

from tdmpc2_fast import TDMPC2, ReplayBuffer
from tdmpc2_fast.errors import DataError, InputError
from tdmpc2_fast.learn.batch import Batch
from tdmpc2_fast.train.data import draws as module
from tdmpc2_fast.train.data.dataset import DataSet
from tdmpc2_fast.train.data.draws import Draws
from tdmpc2_fast.train.data.maps import Maps
from tdmpc2_fast.train.data.rows import Kept, kept
from tdmpc2_fast.train.data.writer import write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """Episodes of 10, 7 and 3 decisions in several shards."""
    folder = tmp_path_factory.mktemp("set")
    made(folder, shard_bytes=1500)
    return DataSet.open(folder)


def same(x: Batch, y: Batch) -> bool:
    return all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in zip(x, y, strict=True))


def places(given: list[Kept]) -> dict[bytes, tuple[str, int, int]]:
    """Task, episode and row of every observation by its first number and width."""
    found = {}
    for part in given:
        for i in range(len(part.lengths)):
            for t, obs in enumerate(part.rows(i, i + 1).obs):
                found[obs.tobytes()] = part.task, i, t
    return found


def test_slices_are_those_of_the_episodes(data: DataSet) -> None:
    cfg = multitask(batch_size=64)
    draws, where = Draws(data, cfg, "cpu"), places(parts())
    by_task = {part.task: part for part in parts()}
    for _ in range(5):
        batch = draws.sample().checked(cfg)
        assert batch.task is not None
        for j in range(64):
            task = cfg.tasks[int(batch.task[j])]
            obs_dim, action_dim = TASKS[task]
            name, i, t = where[batch.obs[0, j, :obs_dim].numpy().tobytes()]
            assert name == task
            rows = by_task[task].rows(i, i + 1)
            h = cfg.horizon
            np.testing.assert_array_equal(batch.obs[:, j, :obs_dim], rows.obs[t : t + h + 1])
            np.testing.assert_array_equal(batch.action[:, j, :action_dim], rows.action[t + 1 : t + h + 1])
            np.testing.assert_array_equal(batch.reward[:, j, 0], rows.reward[t + 1 : t + h + 1])
            assert not batch.obs[:, j, obs_dim:].any()
            assert not batch.action[:, j, action_dim:].any()
    draws.close()


def test_ends_are_drawn_with_their_steps(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ended = [episode(rng, 10, 5, 2, ends=True) for _ in range(3)]
    write(tmp_path, [kept("a", ended, "made")])
    draws = Draws(DataSet.open(tmp_path), tiny_config(task="a", batch_size=200, episodic=True), "cpu")
    batch = draws.sample()
    assert batch.task is None
    assert batch.terminated.dtype == torch.float32
    last = {e["obs"][-1].tobytes() for e in ended}
    expected = [[float(o.numpy().tobytes() in last) for o in row] for row in batch.obs[1:]]
    assert batch.terminated[..., 0].tolist() == expected
    assert 0 < batch.terminated.sum() < 200
    draws.close()


def test_the_law_is_the_official_one(tmp_path: Path) -> None:
    """An episode uniformly among all those long enough, then a start uniformly in it; as the replay draws."""
    given = parts(6, lengths=(10, 7, 3, 2))  # the last is too short for a slice of 4 rows
    write(tmp_path, given)
    cfg, where = multitask(batch_size=500), places(given)
    draws = Draws(DataSet.open(tmp_path), cfg, "cpu")
    counts: Counter[tuple[str, int, int]] = Counter()
    for _ in range(40):
        batch = draws.sample()
        assert batch.task is not None
        for o, task in zip(batch.obs[0].numpy(), batch.task.tolist(), strict=True):
            counts[where[o[: TASKS[cfg.tasks[task]][0]].tobytes()]] += 1
    draws.close()
    long = [(p.task, i, int(n)) for p in given for i, n in enumerate(p.lengths) if n >= 4]
    assert draws.num_sampleable == len(long) == 15
    law = {(task, i, t): 1 / len(long) / (n - 3) for task, i, n in long for t in range(n - 3)}
    assert counts.keys() <= law.keys()
    observed, expected = [counts[k] for k in law], [20_000 * p for p in law.values()]
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    uniform = [20_000 / len(law)] * len(law)  # the law over all slices, which this is not
    assert stats.chisquare(observed, uniform).pvalue < 1e-12


def test_the_replay_draws_by_the_same_law(tmp_path: Path) -> None:
    """The same random numbers give the same slices as `ReplayBuffer` of the same episodes."""
    rng = np.random.default_rng(0)
    episodes = [episode(rng, n, 5, 2) for n in (10, 7, 3, 12)]
    cfg = tiny_config(task="a", batch_size=32, steps=100)
    buffer = ReplayBuffer(cfg)
    for e in episodes:
        buffer.add(e)
    write(tmp_path, [kept("a", episodes, "made")])
    draws = Draws(DataSet.open(tmp_path), cfg, "cpu")
    drawn = torch.from_numpy(draws._random(0, 32).T.copy())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *a, **k: drawn)
        expected = buffer.sample()
    assert same(draws.batch(0), expected)
    draws.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_it_goes_on_bit_for_bit(threads: int, data: DataSet) -> None:
    cfg = multitask()
    whole = Draws(data, cfg, "cpu")
    expected = [whole.sample() for _ in range(9)]
    first = Draws(data, cfg, "cpu", threads=threads)
    assert all(same(first.sample(), e) for e in expected[:4])  # others are in flight now
    state = {k: x.clone() for k, x in first.state().items()}
    assert same(first.sample(), expected[4])
    second = Draws(data, cfg, "cpu", threads=threads)
    second.sample()
    second.load_state(state)
    assert all(same(second.sample(), e) for e in expected[4:])
    first.load_state(state)
    assert all(same(first.sample(), e) for e in expected[4:])
    assert not same(expected[0], expected[1])
    for draws in (whole, first, second):
        draws.close()


def test_another_seed_draws_others(data: DataSet) -> None:
    found = [Draws(data, multitask(seed=seed), "cpu") for seed in (1, 2)]
    assert not same(found[0].sample(), found[1].sample())
    for draws in found:
        draws.close()


@pytest.mark.parametrize("size", [2, 7, 16])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_draw_together_what_one_draws_alone(size: int, ranks: int, data: DataSet) -> None:
    alone = Draws(data, multitask(batch_size=ranks * size), "cpu")
    together = [Draws(data, multitask(batch_size=size), "cpu", rank, ranks) for rank in range(ranks)]
    for _ in range(3):
        expected, found = alone.sample(), [d.sample() for d in together]
        assert expected.task is not None
        for name in ("obs", "action", "reward", "terminated"):
            x = torch.cat([getattr(b, name) for b in found], 1)
            assert torch.equal(x, getattr(expected, name))
        assert torch.equal(torch.cat([b.task for b in found if b.task is not None]), expected.task)
    for draws in (alone, *together):
        draws.close()


def test_other_data_is_not_gone_on_with(data: DataSet, tmp_path: Path) -> None:
    made(tmp_path, seed=5)
    one, other = Draws(data, multitask(), "cpu"), Draws(DataSet.open(tmp_path), multitask(), "cpu")
    with pytest.raises(DataError, match="is not what the run has drawn from"):
        other.load_state(one.state())
    one.close()
    other.close()


def test_what_was_appended_since_is_left_out(tmp_path: Path) -> None:
    made(tmp_path / "set")
    before = Draws(DataSet.open(tmp_path / "set"), multitask(), "cpu")
    before.sample()
    state, expected = before.state(), before.sample()
    made(tmp_path / "set", seed=5)
    after = Draws(DataSet.open(tmp_path / "set"), multitask(), "cpu")
    assert after.num_episodes == 30
    after.load_state(state)
    assert (after.num_episodes, after.num_steps) == (before.num_episodes, before.num_steps) == (15, 111)
    assert same(after.sample(), expected)
    assert all(torch.equal(x, before.state()[k]) for k, x in after.state().items())
    before.load_state(after.state())
    before.close()
    after.close()


def test_other_tasks_of_a_set_may_change(tmp_path: Path) -> None:
    keys: dict[str, Any] = dict(tasks=("cup-catch",), action_dims=(2,), episode_lengths=(10,))
    write(tmp_path / "a", parts())
    write(tmp_path / "b", [*parts(seed=5)[:1], *parts()[1:]])
    one, other = (Draws(DataSet.open(tmp_path / x), multitask(**keys), "cpu") for x in "ab")
    other.load_state(one.state())
    assert same(one.sample(), other.sample())
    one.close()
    other.close()


def test_a_task_of_short_episodes_alone_is_named(tmp_path: Path) -> None:
    short = parts(lengths=(2,))[1]
    write(tmp_path, [*parts()[::2], short])
    with pytest.raises(DataError, match="'cup-catch' has 5 episodes, none with a slice of 4 rows"):
        Draws(DataSet.open(tmp_path), multitask(), "cpu")


def test_a_closed_one_draws_no_more(data: DataSet) -> None:
    draws = Draws(data, multitask(), "cpu")
    draws.close()
    with pytest.raises(InputError, match="after close"):
        draws.sample()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (dict(tasks=("a", "walker-walk", "b")), "no episodes of 'a', allowed: tasks cup-catch, pendulum-swingup"),
        (dict(action_dims=(1, 5, 2)), "'walker-walk' has .* of 24 and 6 numbers, allowed: 24 and 5"),
        (dict(horizon=20), "none with a slice of 21 rows"),
    ],
)
def test_a_config_that_does_not_fit(keys: dict[str, Any], reason: str, data: DataSet) -> None:
    with pytest.raises(DataError, match=reason):
        Draws(data, multitask(**keys), "cpu")


def test_a_single_task_is_drawn_alone(data: DataSet) -> None:
    cfg = tiny_config(8, 2, task="cup-catch")
    draws = Draws(data, cfg, "cpu")
    batch = draws.sample().checked(cfg)
    assert batch.task is None
    assert draws.num_sampleable == 5
    with pytest.raises(DataError, match="'cup-catch' has observations and actions of 8 and 2 numbers, allowed: 9"):
        Draws(data, tiny_config(9, 2, task="cup-catch"), "cpu")
    with pytest.raises(DataError, match="no episodes of 'dog-run'"):
        Draws(data, tiny_config(9, 2, task="dog-run"), "cpu")
    draws.close()


def test_some_tasks_of_a_set_are_drawn(data: DataSet) -> None:
    cfg = multitask(tasks=("cup-catch",), action_dims=(2,), episode_lengths=(10,), batch_size=64)
    draws = Draws(data, cfg, "cpu")
    batch = draws.sample()
    assert batch.task is not None
    assert batch.task.unique().tolist() == [0]
    assert not batch.obs[..., 8:].any()
    assert batch.obs[..., 7].all()
    draws.close()


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0)])
def test_ranks_that_are_none(rank: int, ranks: int, data: DataSet) -> None:
    with pytest.raises(DataError, match="rank: got"):
        Draws(data, multitask(), "cpu", rank, ranks)


def test_an_agent_learns_from_it(data: DataSet) -> None:
    agent, draws = TDMPC2(multitask()), Draws(data, multitask(), "cpu")
    before = [p.clone() for p in agent.model.parameters()]
    metrics = [agent.update(draws) for _ in range(3)]
    assert all(torch.isfinite(m["total_loss"]) for m in metrics)
    assert not all(map(torch.equal, agent.model.parameters(), before))
    draws.close()


def test_batches_are_made_ahead(data: DataSet) -> None:
    draws = Draws(data, multitask(), "cpu")
    draws.sample()
    end = time.monotonic() + 10
    while not all(f.done() for f in draws._ahead) and time.monotonic() < end:
        time.sleep(0.01)
    assert [f.done() for f in draws._ahead] == [True, True]
    before = draws.waited
    draws.sample()
    assert draws.waited - before < 0.05
    draws.close()


def test_an_error_of_a_thread_is_told_and_told_again(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    draws, lost = Draws(data, multitask(), "cpu"), data.maps

    class Broken(Maps):
        def __getitem__(self, i: int) -> Any:
            raise DataError("gone")

    monkeypatch.setattr(data, "maps", Broken(data.files))
    for _ in range(2):
        with pytest.raises(DataError, match="gone"):
            draws.sample()
    monkeypatch.setattr(data, "maps", lost)
    state = draws.state()
    draws.load_state(state)
    again = Draws(data, multitask(), "cpu")
    assert same(draws.sample(), again.sample())
    draws.close()
    again.close()


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from data_episodes import multitask
from tdmpc2_fast.train.data.dataset import DataSet
from tdmpc2_fast.train.data.draws import Draws

def status(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) << 10

limit = status("VmSize") + (120 << 20)  # for threads, batches and maps, where the set has 137 MB
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
data = DataSet.open(Path(sys.argv[1]))
data.maps._resident = status("RssFile") + (64 << 20)
draws = Draws(data, multitask(batch_size=256), "cpu")
resident = []
for i in range(600):
    batch = draws.sample()
    resident.append(status("VmRSS"))
print(json.dumps(dict(resident=resident, size=sum(f.shard.bytes for f in data.files))))
draws.close()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what is resident")
def test_more_than_fits_is_drawn_at_a_flat_size(tmp_path: Path) -> None:
    """With `ulimit -v`: the set is larger than the address space that is left."""
    rng = np.random.default_rng(0)
    given = []
    for task, widths in TASKS.items():
        one = kept(task, [episode(rng, 500, *widths) for _ in range(40)], "made")
        given += [one] * (50 if task == "walker-walk" else 10)
    write(tmp_path, given, shard_bytes=24 << 20)
    command = [sys.executable, "-P", "-c", LIMITED, str(tmp_path), str(ROOT / "tests" / "support" / "data")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    resident = found["resident"]
    assert found["size"] > 120 << 20
    early, late = max(resident[50:200]), max(resident[400:])
    assert late - early < 8 << 20, (early, late)
    assert late < resident[0] + (150 << 20)


def test_a_shard_larger_than_the_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    monkeypatch.setattr("tdmpc2_fast.train.data.maps._address_space", lambda: 1000)
    with pytest.raises(DataError, match=r"half of the address space .* leaves \(ulimit -v\)"):
        Draws(DataSet.open(tmp_path), multitask(), "cpu").batch(0)


def test_a_file_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    """Mapped, reading behind its end would kill the process."""
    index = made(tmp_path)
    data = DataSet.open(tmp_path)
    with (tmp_path / index.shards[0].file).open("r+b") as f:
        f.truncate(100)
    with pytest.raises(DataError, match="has 100 bytes now"):
        Draws(data, multitask(), "cpu").batch(0)


def test_few_random_numbers_are_made_for_a_rank(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the last of many ranks: the generator is put where its part begins."""
    drawn: list[int] = []

    class Counting(np.random.Generator):
        def random(self, size: Any = None, *args: Any, **keys: Any) -> Any:
            drawn.append(size)
            return super().random(size, *args, **keys)

    monkeypatch.setattr(module.np.random, "Generator", Counting)
    Draws(data, multitask(batch_size=7), "cpu", 511, 512).batch(0)
    assert drawn[0] < 14 + 4
