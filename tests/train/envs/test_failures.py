"""How many episodes may fail, what is said of them, and which seed an environment has that is made anew."""

from __future__ import annotations

import numpy as np
import pytest
import scripted_env

from tdmpc2_fast.train.envs.base import EnvError, Failures, Step, close_all, env_seed

ERROR = ZeroDivisionError("the\nphysics are broken")


def steps(count: int) -> list[Step | None]:
    """So many episodes that end, one way or the other, beside one that goes on and one that failed."""
    step = Step(np.zeros(4, np.float32), 0.0, False, False, 0.0)
    return [step, None, *(step._replace(terminated=i % 2 == 0, truncated=i % 2 == 1) for i in range(count))]


@pytest.mark.parametrize(("ended", "allowed"), [(0, 10), (9, 10), (10, 11), (39, 13)])
def test_ten_and_a_tenth_of_those_that_end_may_fail(ended: int, allowed: int) -> None:
    notes: list[str] = []
    failures = Failures(scripted_env.config(1, task="mine", on_env_error="drop"), notes.append)
    failures.count(steps(ended - ended // 2))
    failures.count(steps(ended // 2))
    for _ in range(allowed):
        failures.take(3, ERROR)
    words = f"mine, environment 3: ZeroDivisionError: the physics are broken; got {allowed + 1} episodes that failed, "
    with pytest.raises(EnvError) as e:
        failures.take(3, ERROR)
    assert str(e.value) == f"{words}allowed: {allowed} beside {ended} that ended"
    assert failures.dropped == allowed
    said = "mine, environment 3: ZeroDivisionError: the physics are broken; the episode is dropped ({} so far)"
    assert notes == [said.format(n) for n in range(1, 11)]


def test_later_ones_are_said_by_the_hundred() -> None:
    notes: list[str] = []
    failures = Failures(scripted_env.config(1, task="mine", on_env_error="drop"), notes.append, dropped=98)
    failures.ended = 10_000
    for _ in range(103):
        failures.take(0, EnvError("reward: got nan"))
    assert [n.split("; ")[1] for n in notes] == [f"the episode is dropped ({n} so far)" for n in (100, 200)]


def test_where_failures_stop_a_run_the_error_is_raised_as_it_is() -> None:
    failures = Failures(scripted_env.config(1, task="mine", on_env_error="stop"), print)
    with pytest.raises(ZeroDivisionError) as raised:
        failures.take(2, ERROR)
    assert raised.value is ERROR
    assert ERROR.__notes__ == ["mine, environment 2 raised it; on_env_error=drop goes on without such episodes"]
    for error, trace, words in (
        (EnvError("reward: got nan"), "", "mine, environment 2: reward: got nan"),
        (EnvError("reward: got nan"), "Traceback", "mine, environment 2 raised\nTraceback"),
        (SystemExit(3), "", "mine, environment 2: it called sys.exit(3)"),
    ):
        with pytest.raises(EnvError) as found:
            failures.take(2, error, trace)
        assert str(found.value) == words
    assert failures.dropped == 0


def test_seeds_of_environments_are_what_they_always_were() -> None:
    assert env_seed(7, 0) == 7
    assert [env_seed(7, 1), env_seed(7, 0, 1), env_seed(7, 1, 2)] == [1152816290, 2075865962, 1359109436]
    many = [env_seed(7, i, n) for i in range(20) for n in range(20)]
    assert len(set(many)) == 400
    assert max(many) < 2**31


def test_every_environment_is_closed_whatever_another_does(caplog: pytest.LogCaptureFixture) -> None:
    closed: list[int] = []

    class Closing(scripted_env.Scripted):
        def close(self) -> None:
            closed.append(self._name)
            if self._name == 2:
                raise ERROR

    close_all([Closing(n) for n in (1, 2, 3)])
    assert closed == [1, 2, 3]
    assert [r.getMessage() for r in caplog.records] == [
        "an environment could not be closed: ZeroDivisionError: the physics are broken"
    ]
