"""Whatever an environment does wrong, here, in a worker, in another interpreter: bounded, named, nothing of it kept."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty_suite
import numpy as np
import pytest
from foreign_runs import SMALL

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.envs import SUITES, Suite, base, make_env, patience
from tdmpc2_fast.train.envs.answers import EnvError
from tdmpc2_fast.train.envs.apart import processes, workers
from tdmpc2_fast.train.envs.apart.remote import RemoteEnv
from tdmpc2_fast.train.run.stop import Stop
from tdmpc2_fast.train.run.trainer import OnlineTrainer

ELSEWHERE = faulty_suite.Elsewhere("faulty", "Faulty", "numpy")
PLACES = {
    "here": (None, dict(env_workers=0)),
    "a worker": (None, dict(env_workers=1)),
    "another interpreter": (ELSEWHERE, dict(env_workers=0)),
    "workers of another interpreter": (ELSEWHERE, dict(env_workers=1)),
}
SAID = {
    "raises": "ZeroDivisionError: the physics are broken",
    "hangs": "gave no answer in 1 s",
    "dies": "exit code 7",
    "nan observation": "observation: got nan",
    "infinite observation": "observation: got",
    "other shape": "observation: got float32 of shape (2,)",
    "no numbers": "observation: got",
    "no observation": "observation: got None",
    "nan reward": "reward: got nan",
    "two rewards": "reward: got float64 of shape (2,)",
    "no reward": "reward: got None",
    "no flag": "terminated: got None",
    "four answers": "step: ",
    "reset raises": "ZeroDivisionError: the physics are broken",
    "reset without info": "reset: got",
    "reset with nan": "observation: got nan",
}


@pytest.fixture(name="run")
def run_in_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OnlineTrainer]:
    """Run random actions in a place; the replay is that of the trainer returned."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(processes, "_PACKAGES", (*processes._PACKAGES, "faulty_suite"))
    monkeypatch.setattr(patience, "SECONDS", 1.0)
    monkeypatch.setattr(patience, "RESET_SECONDS", 1.0)
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 1.0)

    def run(place: str, fault: str, **changes: Any) -> OnlineTrainer:
        apart, keys = PLACES[place]
        make = faulty_suite.make_here if apart is None else apart.make
        suite = Suite(("faulty",), "numpy", "train", "faulty".__eq__, make, apart)
        monkeypatch.setitem(SUITES, "Faulty", suite)
        monkeypatch.setattr("tdmpc2_fast.train.envs.SUITES", {"Faulty": suite, **SUITES})
        wanted = dict(task="faulty", env_kwargs={"fault": fault, **changes.pop("env_kwargs", {})}, save_csv=False)
        more = dict(seed_steps=100_000, steps=32, on_env_error="drop", save_agent=False)
        cfg = Config.from_dict({**SMALL, **wanted, **more, **keys, **changes})
        (tmp_path / "run").mkdir()
        trainer = OnlineTrainer(cfg, tmp_path / "run", stop=Stop())
        trainer.run()
        return trainer

    return run


def steps(trainer: OnlineTrainer) -> dict[str, Any]:
    return {k: x.numpy() for k, x in trainer.buffer.steps(0, len(trainer.buffer)).items()}


def kept(trainer: OnlineTrainer) -> Any:
    return steps(trainer)["obs"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", SAID)
def test_an_episode_that_goes_wrong_is_named_and_dropped(
    fault: str, place: str, run: Callable[..., OnlineTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    if fault == "dies" and place == "here":
        pytest.skip("that is the trainer's own end")
    start = time.monotonic()
    trainer = run(place, fault)
    assert time.monotonic() - start < 30
    said = capsys.readouterr().err
    assert SAID[fault] in said, said
    assert "faulty, environment 0" in said
    rows = kept(trainer)
    assert np.isfinite(rows).all()
    assert len(rows) >= 18
    names = {(int(seed), int(episode)) for seed, episode, _ in rows}
    assert (1, 1) in names
    assert not {(1, episode) for episode in range(faulty_suite.EPISODE, 10)} & names
    assert any(seed != 1 for seed, _ in names)  # made anew, it went on
    assert trainer.envs.failures.dropped + trainer.envs.restarts == 1
    assert np.isfinite(steps(trainer)["reward"][rows[:, 2] > 0]).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("fault", "reward"),
    [("float64 reward", 1.5), ("integer reward", 1.0), ("reward in an array", 1.5), ("", 1.5)],
)
def test_rewards_of_any_kind_of_number_are_kept(
    fault: str, reward: float, place: str, run: Callable[..., OnlineTrainer]
) -> None:
    trainer = run(place, fault)
    rewards = steps(trainer)["reward"]
    assert set(rewards[np.isfinite(rewards)]) == {reward}
    assert trainer.envs.failures.dropped == 0


@pytest.mark.parametrize("place", PLACES)
def test_both_flags_at_once_are_a_termination(place: str, run: Callable[..., OnlineTrainer]) -> None:
    trainer = run(place, "both flags", episodic=True)
    assert (steps(trainer)["terminated"] == (kept(trainer)[:, 2] == 5)).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("length", [1, 2])
def test_episodes_shorter_than_the_horizon_are_no_reason_to_fail(
    length: int, place: str, run: Callable[..., OnlineTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run(place, "", env_kwargs={"length": length}, seed_steps=10)
    assert trainer.buffer.num_eps > 10
    assert trainer.buffer.num_sampleable == 0
    assert not trainer.agent.updater.steps
    assert "horizon" in capsys.readouterr().err


def test_where_failures_stop_a_run_the_place_does_not_matter(run: Callable[..., OnlineTrainer]) -> None:
    with pytest.raises(EnvError, match="faulty, environment 0"):
        run("another interpreter", "raises", on_env_error="stop")


def endless() -> None:
    while True:
        pass


class TestPatience:
    def test_computing_without_end_is_interrupted(self) -> None:
        with pytest.raises(EnvError, match=r"gave no answer in 0\.2 s and was interrupted"):
            patience.patiently(0.2, endless)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        assert patience.patiently(0.2, lambda x: x + 1, 2) == 3

    def test_an_environment_that_takes_it_for_an_error_of_its_own_is_interrupted_again(self) -> None:
        tries: list[int] = []

        def stubborn() -> None:
            while len(tries) < 3:
                try:
                    endless()
                except Exception:
                    tries.append(1)

        with pytest.raises(EnvError, match="gave no answer"):
            patience.patiently(0.2, stubborn)
        assert len(tries) == 3

    def test_calls_that_take_about_as_long_leave_the_watch_as_it_was(self) -> None:
        interrupted = 0
        for i in range(400):
            try:
                patience.patiently(0.002, time.sleep, 0.0015 + i % 10 * 1e-4)
            except EnvError:
                interrupted += 1
        assert interrupted > 0
        assert patience._left is None
        with pytest.raises(EnvError):
            patience.patiently(0.1, endless)

    def test_a_process_that_was_stopped_for_longer_goes_on(self) -> None:
        program = (
            "import time\nfrom tdmpc2_fast.train.envs import patience\nprint('begun', flush=True)\n"
            "end = time.process_time() + 0.3\n"
            "def step():\n    while time.process_time() < end: pass\n    return 5\n"
            "print(patience.patiently(2.0, step))"
        )
        command = [sys.executable, "-P", "-c", program]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            assert run.stdout.readline() == "begun\n"
            time.sleep(0.05)
            run.send_signal(signal.SIGSTOP)
            time.sleep(3)
            run.send_signal(signal.SIGCONT)
            assert run.stdout.read() == "5\n"

    def test_a_program_keeps_its_own_alarm(self) -> None:
        rung: list[int] = []
        before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
        try:
            assert patience.patiently(0.05, lambda: time.sleep(0.2) or 5) == 5
            assert rung == []
        finally:
            signal.signal(signal.SIGALRM, before)

    def test_other_threads_wait(self) -> None:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(patience.patiently(0.05, time.sleep, 0.2)))
        thread.start()
        thread.join()
        assert found == [None]

    def test_an_alarm_from_outside_ends_the_process_as_ever(self) -> None:
        program = (
            "import os, signal, time\nfrom tdmpc2_fast.train.envs import patience\n"
            "patience.patiently(9.0, int)\ntime.sleep(1.1)\nos.kill(os.getpid(), signal.SIGALRM)\nprint('alive')"
        )
        done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (-signal.SIGALRM, "")

    def test_a_reset_may_take_longer_than_a_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(patience, "SECONDS", 0.2)
        env = faulty_suite.make_here(Config(task="faulty"), 1)
        reset = env.reset
        monkeypatch.setattr(env, "reset", lambda: time.sleep(0.4) or reset())
        assert base.reset(env).shape == (3,)
        monkeypatch.setattr(env, "step", lambda action: time.sleep(0.4))
        with pytest.raises(EnvError, match="gave no answer"):
            base.step(env, np.zeros(1, np.float32))


class TestRemote:
    @pytest.fixture(autouse=True)
    def packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "_PACKAGES", (*processes._PACKAGES, "faulty_suite"))

    def make(self, **settings: Any) -> RemoteEnv:
        cfg = Config(task="faulty", env_kwargs=settings)
        return RemoteEnv(Path(sys.executable), faulty_suite.make_here, cfg, 3)

    def test_it_is_the_environment(self) -> None:
        ours, theirs = faulty_suite.make_here(Config(task="faulty"), 3), self.make()
        for name in ("obs_shape", "action_dim", "max_episode_steps", "action_repeat", "frames_per_second"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert theirs.overrides(Config()) == Config()
        assert ours.reset().tobytes() == theirs.reset().tobytes()
        for _ in range(7):
            x, y = (env.step(np.zeros(1, np.float32)) for env in (ours, theirs))
            assert x[0].tobytes() == y[0].tobytes()
            assert x[1:4] == y[1:4]
        assert theirs.random_state() == ours.random_state()
        theirs.close()
        theirs.close()
        with pytest.raises(EnvError, match="faulty: the environment is closed"):
            theirs.reset()

    def test_it_ends_with_its_owner(self) -> None:
        env = self.make()
        process = env._process
        del env
        assert not process.is_alive()

    def test_what_cannot_be_made_is_said_before_a_run(self) -> None:
        with pytest.raises(ConfigError, match="faulty cannot be made: TypeError"):
            self.make(nonsense=1)

    def test_an_interpreter_that_does_not_start_says_what_it_printed(self, tmp_path: Path) -> None:
        broken = tmp_path / "python"
        broken.write_text("#!/bin/sh\necho no such library >&2\nexit 3\n")
        broken.chmod(0o755)
        with pytest.raises(ConfigError, match=r"ended \(exit code 3\): no such library"):
            RemoteEnv(broken, faulty_suite.make_here, Config(task="faulty"), 1)

    def test_an_answer_that_nobody_waited_for_is_taken_for_no_other(self) -> None:
        env = self.make()
        with pytest.raises(EnvError, match="gave no answer"):
            patience.patiently(0.3, lambda: env._answer(20.0))
        with pytest.raises(EnvError, match="is closed"):
            env.random_state()
        assert not env._process.is_alive()

    def test_an_error_of_theirs_is_a_line_with_its_origin_in_a_note(self) -> None:
        cfg = Config(task="faulty", env_kwargs={"fault": "raises"})
        env = RemoteEnv(Path(sys.executable), faulty_suite.make_here, cfg, 1)
        for _ in range(faulty_suite.EPISODE):
            env.reset()
        for _ in range(faulty_suite.DECISION - 1):
            env.step(np.zeros(1, np.float32))
        with pytest.raises(EnvError) as e:
            env.step(np.zeros(1, np.float32))
        assert str(e.value) == "ZeroDivisionError: the physics are broken"
        assert "Traceback" in e.value.__notes__[0]

    def test_nothing_is_left_of_many(self) -> None:
        def held() -> tuple[int, int]:
            return len(os.listdir("/proc/self/fd")), len(os.listdir("/dev/shm"))

        def several() -> None:
            cfg = Config(task="faulty", num_envs=2).with_env({"state": (3,)}, 1, 5)
            there = workers.Workers(cfg, faulty_suite.make_here, 2, base.Failures(cfg, print), 0, Path(sys.executable))
            assert set(there.reset([0, 1])) == {0, 1}
            there.close()

        self.make().close()
        several()
        gc.collect()
        before = held()
        for _ in range(3):
            self.make().close()
            several()
        gc.collect()
        assert held() == before

    def test_an_interpreter_that_cannot_be_run_says_so(self, tmp_path: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ConfigError, match=r"faulty cannot be made: .*python cannot be run: No such file"):
            RemoteEnv(tmp_path / "python", faulty_suite.make_here, Config(task="faulty"), 1)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_suite_that_is_not_installed_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDMPC2_SUITES", str(tmp_path))
    with pytest.raises(
        ConfigError, match="Meta-World needs an interpreter of its own: tdmpc2-fast suites install metaworld"
    ):
        make_env(Config(task="mw-reach"), 1)
    (tmp_path / "metaworld").mkdir()
    (tmp_path / "metaworld/tdmpc2-fast.json").write_text('{"requirements": ["metaworld==1"]}')
    with pytest.raises(
        ConfigError, match="made by another version: tdmpc2-fast suites install metaworld makes it anew"
    ):
        make_env(Config(task="mw-reach"), 1)
