"""Environments in worker processes: the same trajectories, and an orderly answer to whatever goes wrong in one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scripted_env
from conftest import PYTHONPATH, tiny_config
from scripted_env import DIE, HANG, NORMAL, RAISE, SYSTEM_EXIT, config

from tdmpc2_fast.benchmarks.harness import stand_in
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.envs.apart import workers
from tdmpc2_fast.train.envs.apart.workers import EnvError, Workers
from tdmpc2_fast.train.envs.base import Environments, Failures, env_seed
from tdmpc2_fast.train.envs.together import InProcess, environments

LONG = 60.0  # what happens happens at once; this is for a machine that is stuck


def gone(pid: int) -> bool:
    """Whether a process has ended; one whose parent does not fetch it has, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + LONG
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def shared_files() -> set[str]:
    return set(os.listdir("/dev/shm"))


class Made:
    """Workers of a test, with the lines they logged."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.made: list[Workers] = []

    def __call__(self, count: int, processes: int, make: Any = scripted_env.make, **changes: Any) -> Workers:
        cfg = config(count, **changes)
        self.made.append(Workers(cfg, make, processes, Failures(cfg, self.notes.append)))
        return self.made[-1]


@pytest.fixture
def made() -> Iterator[Made]:
    """Every test leaves no process behind."""
    made = Made()
    yield made
    pids = [w.process.pid for x in made.made for w in x._workers]
    for x in made.made:
        x.close()
        x.close()
    assert all(gone(pid) for pid in pids if pid is not None)


def pids_of(envs: Environments) -> list[int]:
    assert isinstance(envs, Workers)
    return [w.process.pid or 0 for w in envs._workers]


def act(envs: Environments, *what: float) -> list[Any]:
    """One decision, each environment told what to do."""
    envs.step_async(np.array([[x, 0.5] for x in what], np.float32))
    return envs.step_wait()


def test_trajectories_are_those_of_one_process(made: Made) -> None:
    cfg = config(3, seed=int(np.random.default_rng().integers(2**31)))
    here: Environments = InProcess(cfg, scripted_env.make, Failures(cfg, print))
    there = made(3, 2, seed=cfg.seed)
    # More than one environment a process.
    assert [w.indices for w in there._workers] == [[0, 1], [2]]
    rng, which = np.random.default_rng(), [0, 1, 2]
    ends = 0
    for _ in range(40):
        if which:
            a, b = (x.reset(which) for x in (here, there))
            assert list(a) == list(b) == which
            assert all(np.array_equal(a[i], b[i]) and a[i].dtype == b[i].dtype for i in which)
        actions = np.stack([np.zeros(3), rng.uniform(-1, 1, 3)], 1).astype(np.float32)
        found = []
        for envs in (here, there):
            envs.step_async(actions)
            found.append(envs.step_wait())
        for x, y in zip(*found, strict=True):
            assert x is not None
            assert y is not None
            assert x.obs.tobytes() == y.obs.tobytes()
            assert x[1:] == y[1:]
            assert [type(v) for v in x[1:]] == [type(v) for v in y[1:]] == [float, bool, bool, float]
        which = [i for i, x in enumerate(found[0]) if x.terminated or x.truncated]  # type: ignore[union-attr]
        ends += len(which)
    assert ends > 10


@pytest.fixture(scope="module")
def healthy() -> Iterator[tuple[Workers, list[str]]]:
    """Two processes with an environment each, for tests that leave them as they are, and what was noted of them."""
    notes: list[str] = []
    cfg = config(2)
    envs = Workers(cfg, scripted_env.make, 2, Failures(cfg, notes.append))
    yield envs, notes
    envs.close()


def test_what_was_returned_is_not_overwritten(healthy: tuple[Workers, list[str]]) -> None:
    envs, _ = healthy
    first = envs.reset([0, 1])[0]
    kept = first.copy()
    step = act(envs, NORMAL, NORMAL)[0]
    obs = step.obs.copy()
    act(envs, NORMAL, NORMAL)
    assert np.array_equal(first, kept)
    assert np.array_equal(step.obs, obs)


def test_a_process_that_dies_is_replaced_and_the_others_go_on(made: Made) -> None:
    envs = made(3, 2)
    envs.reset([0, 1, 2])
    names = [act(envs, NORMAL, NORMAL, NORMAL)[2].obs[0]]
    for deaths, (what, code) in enumerate([(DIE, 7), (SYSTEM_EXIT, 3), (NORMAL, -9)], 1):
        pids = pids_of(envs)
        if code == -signal.SIGKILL:
            os.kill(pids[1], signal.SIGKILL)
            assert wait_until(lambda: gone(pids[1]))  # noqa: B023
        steps = act(envs, NORMAL, NORMAL, what)
        assert steps[2] is None
        assert [s.obs[2] for s in steps[:2]] == [2, 2]
        assert pids_of(envs)[0] == pids[0]
        assert wait_until(lambda: gone(pids[1]))  # noqa: B023
        assert len(made.notes) == deaths
        for word in ("walker-walk, environment 2:", "died", f"exit code {code}", f"restart {deaths} of at most 10"):
            assert word in made.notes[-1]
        new = envs.reset([2])
        assert list(new) == [2]
        # a stream of its own, by the law of restarts
        names.append(new[2][0])
        assert names[-1] == np.float32(env_seed(1, 2, restart=deaths) % 1000)
        assert [s.obs[2] for s in act(envs, NORMAL, NORMAL, NORMAL)] == [3, 3, 1]
        envs.reset([0, 1, 2])
        act(envs, NORMAL, NORMAL, NORMAL)
    assert len({*names}) == len(names)


def test_a_process_that_hangs_is_replaced(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    envs = made(2, 2)
    envs.reset([0, 1])
    pids = pids_of(envs)
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 1.0)
    steps = act(envs, HANG, NORMAL)
    assert steps[0] is None
    assert steps[1].obs[2] == 1
    assert gone(pids[0])
    assert "environment 0: the process gave no answer in 1 s and was killed (exit code -9)" in made.notes[0]
    # its first answer has the time of a start again
    assert envs.reset([0])[0][1] == 1


def test_a_death_during_a_reset_loses_every_episode_of_the_process(made: Made) -> None:
    envs = made(3, 1)
    envs.reset([0, 1, 2])
    act(envs, NORMAL, NORMAL, NORMAL)
    os.kill(pids_of(envs)[0], signal.SIGKILL)
    found = envs.reset([1])
    assert sorted(found) == [0, 1, 2]
    assert all(obs[1] == 1 and obs[2] == 0 for obs in found.values())
    assert len(made.notes) == 1


def test_restarts_are_bounded(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MOST_RESTARTS", 1)
    envs = made(2, 2, make=scripted_env.make_dying)
    with pytest.raises(EnvError) as e:
        envs.reset([0, 1])
    for word in ("walker-walk, environment", "died", "exit code 9", "allowed: 1 restarts a run"):
        assert word in str(e.value)
    assert len(made.notes) == 1
    envs.close()


def test_an_exception_is_raised_with_its_traceback(made: Made, healthy: tuple[Workers, list[str]]) -> None:
    envs, notes = healthy
    envs.reset([0, 1])
    with pytest.raises(EnvError) as e:
        act(envs, NORMAL, RAISE)
    for word in ("environment 1 raised", "ZeroDivisionError: the physics are broken", "scripted_env.py"):
        assert word in str(e.value)
    broken = made(1, 1, make=scripted_env.make_raising)
    with pytest.raises(EnvError, match="FileNotFoundError: no such scene"):
        broken.reset([0])
    assert notes == made.notes == []


def test_close_does_not_wait_for_a_process_that_hangs(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CLOSE_SECONDS", 0.5)
    envs = made(2, 2)
    envs.reset([0, 1])
    pids = pids_of(envs)
    envs.step_async(np.array([[HANG, 0], [NORMAL, 0]], np.float32))
    envs.close()
    assert all(gone(pid) for pid in pids)


def test_a_signal_to_all_processes_is_the_trainers_to_answer(healthy: tuple[Workers, list[str]]) -> None:
    envs, notes = healthy
    envs.reset([0, 1])
    for decision, number in enumerate([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], 1):
        for pid in pids_of(envs):
            os.kill(pid, number)
        assert [s.obs[2] for s in act(envs, NORMAL, NORMAL)] == [decision, decision]
    assert notes == []


def test_a_process_has_torch_only_if_an_environment_has_and_then_one_thread(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    envs = made(2, 1)
    envs.reset([0, 1])
    (pid,) = pids_of(envs)
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    found = made(2, 1, scripted_env.make_computing).reset([0, 1])
    assert [x[0] for x in found.values()] == [1, 1]


ORPHANS = """
import signal, sys
import numpy as np, scripted_env
from tdmpc2_fast.train.envs.base import Failures
from tdmpc2_fast.train.envs.apart.workers import Workers
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    cfg = scripted_env.config(2)
    envs = Workers(cfg, scripted_env.make, int(sys.argv[2]), Failures(cfg, print))
    envs.reset([0, 1])
    envs.step_async(np.array([[scripted_env.HANG, 0], [scripted_env.NORMAL, 0]], np.float32))
    print(*(w.process.pid for w in envs._workers), flush=True)
    if sys.argv[1] == "exception":
        raise ValueError
    envs.step_wait()
"""


@pytest.mark.parametrize(("end", "processes"), [("SIGTERM", 1), ("SIGINT", 2), ("exception", 1)])
def test_workers_leave_with_their_trainer(end: str, processes: int, tmp_path: Path) -> None:
    before = shared_files()
    script = tmp_path / "trains.py"
    script.write_text(ORPHANS)
    paths = os.pathsep.join(p for p in [PYTHONPATH, *sys.path] if p)
    run = subprocess.Popen(
        [sys.executable, "-P", str(script), end, str(processes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,
    )
    assert run.stdout is not None
    pids = [int(x) for x in run.stdout.readline().split()]
    assert len(pids) == processes
    if end == "SIGINT":
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all of them
    elif end != "exception":
        os.kill(run.pid, getattr(signal, end))
    _, errors = run.communicate(timeout=LONG)
    assert wait_until(lambda: all(gone(pid) for pid in pids))
    assert errors.count("Traceback") == {"SIGINT": 1, "exception": 1}.get(end, 0), errors
    assert "leaked" not in errors
    assert shared_files() <= before


@pytest.mark.parametrize(
    ("count", "env_workers", "processes"),
    [(1, None, 0), (2, None, 2), (9, None, 4), (9, 0, 0), (1, 1, 1), (9, 7, 7), (9, 20, 9)],
)
def test_where_environments_run(
    count: int, env_workers: int | None, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.install(2)
    monkeypatch.setattr(Workers, "_start", lambda self, indices: indices)
    monkeypatch.setattr(Workers, "begin", lambda self: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    cfg = tiny_config(obs_dim=24, task=stand_in.NAME, num_envs=count, env_workers=env_workers)
    first = stand_in.StandIn(2, 5, 0)
    envs = environments(cfg, first, print)
    if processes == 0:
        assert isinstance(envs, InProcess)
        assert len(envs.envs) == count
        assert envs.envs[0] is first
    else:
        assert isinstance(envs, Workers)
        parts: Any = envs._workers
        assert len(parts) == processes
        assert [i for part in parts for i in part] == list(range(count))
        parts.clear()  # they are no processes that could be ended


def test_processes_end_by_themselves_when_they_are_told(made: Made) -> None:
    envs = made(3, 2)
    envs.reset([0, 1, 2])
    processes = [worker.process for worker in envs._workers]
    envs.close()
    assert [process.exitcode for process in processes] == [0, 0]  # and were not killed


def test_processes_that_cannot_begin_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    suite = SimpleNamespace(make=scripted_env.make_raising, apart=None, together=None)
    monkeypatch.setattr("tdmpc2_fast.train.envs.together.suite_of", lambda task: suite)
    with pytest.raises(EnvError, match="no such scene") as error:
        environments(config(2, env_workers=2), scripted_env.Scripted(1), print)
    # While the error is held, so is what it was raised in: the processes do not end for want of an owner.
    assert error.traceback
    assert {child.pid for child in multiprocessing.active_children()} <= before


def test_a_process_lost_while_its_state_is_asked_is_started_anew(made: Made) -> None:
    there = made(3, 2)
    before = there.reset([0, 1, 2])
    there.step_async(np.zeros((3, 2), np.float32))
    there.step_wait()
    os.kill(pids_of(there)[1], signal.SIGKILL)
    states = there.states()
    assert [state is None for state in states] == [False, False, True]
    assert there.restarts == 1
    assert "died" in made.notes[0]
    again = there.reset([2])
    assert again[2][1] == 1  # its first episode
    assert set(again) == {2}
    assert before.keys() == {0, 1, 2}


def test_a_function_that_no_process_can_import_is_refused(made: Made) -> None:
    with pytest.raises(ConfigError, match="cannot be made in another process"):
        made(1, 1, make=lambda cfg, seed: None)


def test_of_environments_that_fail_in_a_process_the_others_go_on(made: Made) -> None:
    envs = made(3, 2, on_env_error="drop")
    envs.reset([0, 1, 2])
    act(envs, NORMAL, NORMAL, NORMAL)
    found = act(envs, RAISE, NORMAL, NORMAL)
    assert [step is None for step in found] == [True, False, False]
    assert [s.obs[2] for s in found[1:]] == [2, 2]
    assert envs.failures.dropped == 1
    assert (
        "walker-walk, environment 0: ZeroDivisionError: the physics are broken; the episode is dropped" in made.notes[0]
    )
    new = envs.reset([0])
    assert list(new) == [0]
    assert new[0][0] == np.float32(env_seed(1, 0, restart=1) % 1000)  # a stream of its own
    assert [s.obs[2] for s in act(envs, NORMAL, NORMAL, NORMAL)] == [1, 3, 3]
    assert envs.restarts == 0  # no process was lost
