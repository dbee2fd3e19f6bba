"""Environments of other people, in whatever form Gymnasium makes them: each trains, or is refused with a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PYTHONPATH
from foreign_runs import (
    SMALL,
    begun,
    made,
    refused,
    task_of,
    train_here,  # noqa: F401
)

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError, NonFiniteError
from tdmpc2_fast.train.cli import keys
from tdmpc2_fast.train.envs import base as envs_base
from tdmpc2_fast.train.envs import complete, gymnasium_tasks, make_env, tried
from tdmpc2_fast.train.envs.gymnasium_tasks import GymnasiumTask
from tdmpc2_fast.train.run import lifecycle as runs

gymnasium = pytest.importorskip("gymnasium")

FORMS = [
    "Plain",
    "ModesWithoutArgument",
    "SwallowsArguments",
    "WithoutModes",
    "Function",
    "Lambda",
    "Limited",
    "OldRandom",
]
FORMS += ["OtherBits", "PythonsRandom", "Untold", "InArrays", "InTensors", "InLists", "Column", "Batch", "OneBuffer"]
FORMS += ["Parts", "CannotClose", "OwnGenerator", "Secret", "Timed"]


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_environments_are_trained_to_the_end(name: str, train: Any, tmp_path: Path) -> None:
    # The random state is asked for after every step.
    status, said = train(name, checkpoint_minutes=0, seed_steps=25, steps=50, utd=0.5)
    assert status == 0
    assert "done: return" in said
    rows = (tmp_path / "run/train.csv").read_text().splitlines()
    assert len(rows) == 1 + 50 // (12 if name == "Limited" else 20)
    assert said.count("random state of its environments cannot be told") == (name in ("Untold", "Secret"))
    assert "Traceback" not in said
    assert "Warning" not in said


def test_of_what_is_given_in_other_forms_the_numbers_are_right() -> None:
    zero = np.zeros(1, np.float32)
    plain = envs_base.reset(made("Plain"))
    for name in ("InTensors", "InLists", "Column", "OneBuffer", "InArrays"):
        env = made(name)
        obs = envs_base.reset(env)
        assert (obs.dtype, obs.shape) == (np.float32, (3,))
        np.testing.assert_array_equal(obs, plain)
        first = obs.copy()
        found = envs_base.step(env, zero)
        np.testing.assert_array_equal(obs, first)  # of its own memory
        assert [type(x) for x in found[1:]] == [float, bool, bool, float]
        expected = {"InTensors": (-1, 1), "InArrays": (-1, 1), "InLists": (-1, 0)}.get(name)
        assert expected is None or (found.reward, found.success) == expected
        assert not found.terminated
    assert envs_base.step(begun("OneStep"), zero).terminated


def test_an_episode_ends_at_its_limit_and_a_return_may_be_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gymnasium_tasks._SUCCESS_RETURN, task_of("Slow"), 4000.0)  # the third reward of 1,500 passes it
    env = made("Slow")
    for _ in range(2):
        envs_base.reset(env)
        found = [envs_base.step(env, np.zeros(1, np.float32)) for _ in range(20)]
        assert [step.success for step in found] == [0.0] * 2 + [1.0] * 18
        assert [step.truncated for step in found] == [False] * 19 + [True]


def test_an_environment_that_draws_is_asked_to_and_others_are_not() -> None:
    picture = begun("Draws").render(30, 20)
    assert (picture == 255).all()  # the newest of its list
    assert made("Draws").frames_per_second == 30
    assert made("Function").env.render_mode is None
    for name in ("ModesWithoutArgument", "SwallowsArguments", "Plain", "Lambda"):
        with pytest.raises(envs_base.RenderError, match="no pictures"):
            begun(name).render()


@pytest.mark.parametrize("name", ["OldRandom", "OtherBits", "PythonsRandom", "Plain", "Secret"])
def test_random_state_of_every_kind_goes_on(name: str) -> None:
    env, again = begun(name), made(name)
    begun("OwnGenerator").set_random_state(made("OwnGenerator").random_state())
    state = json.loads(json.dumps(env.random_state()))
    again.set_random_state(state)
    for _ in range(2):
        np.testing.assert_array_equal(env.reset(), again.reset())
    untouched = made(name)  # of one that was never reset: its first episode is seeded
    late = made(name)
    late.set_random_state(json.loads(json.dumps(untouched.random_state())))
    np.testing.assert_array_equal(untouched.reset(), late.reset())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NoReward", "reward: got None, allowed: a number"),
        ("TwoRewards", "reward: got float64 of shape (2,), allowed: a number"),
        ("RewardInWords", "reward: got '1.0', allowed: a number"),
        ("NoFlag", "terminated: got None, allowed: true or false"),
        ("SuccessInWords", "info['success']: got 'yes', allowed: a number"),
        ("InfoInAList", "info: got ['success'], allowed: a dict"),
        ("FourValues", "got 4), allowed: observation, reward, terminated, truncated, info"),
        ("NoInfoAtReset", "reset: got float32 of shape (3,), allowed: an observation and an info"),
        ("Ragged", "observation: got [1.0, [2.0, 3.0]], allowed: numbers"),
        ("TooMany", "observation: got float64 of shape (4,), allowed: numbers of shape (3,)"),
        ("NoObservation", "observation: got None, allowed: numbers of shape (3,)"),
        ("TooLarge", "reward: got 1e+39, allowed: finite numbers (float32)"),
        ("NoNumber", "observation: got nan at [1], allowed: finite numbers (float32)"),
        ("MissingPart", "observation: got {'place': [[1, 2], [3, 4]], 'mode': 6}, allowed: one with the part 'more'"),
        ("WithoutOptions", "unexpected keyword argument 'options', allowed: reset(self, *, seed=None, options=None)"),
        ("WrongClass", "observation: got -1, allowed: one of Discrete(5)"),
        ("Ends", "config key 'episodic'"),
    ],
)
def test_other_answers_are_refused_before_the_run_by_task_and_field(name: str, words: str) -> None:
    said = refused(name)
    assert words in said
    assert f"Foreign{name}-v0" in said


# ---- a module of one's own, and settings


def test_a_module_in_the_working_directory_is_found(tmp_path: Path) -> None:
    program = (
        "import gymnasium\nfrom foreign_envs import Plain\ngymnasium.register('Mine-v0', Plain, max_episode_steps=9)"
    )
    (tmp_path / "of_ones_own.py").write_text(program)
    (tmp_path / "broken_module.py").write_text("import not_there_at_all")
    command = [
        sys.executable,
        "-P",
        "-c",
        "import sys; from tdmpc2_fast.train.cli import main; sys.exit(main(sys.argv[1:]))",
    ]
    keys_of_a_run = SMALL | dict(steps=20, seed_steps=10)
    words = [f"{k}={v}" for k, v in keys_of_a_run.items() if k != "display"]
    here = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    env = {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run([*command, "train", "task=of_ones_own:Mine-v0", *words], env=env, **here)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*command, "train", "task=broken_module:Mine-v0", *words], env=env, **here)  # type: ignore[call-overload]
    assert done.returncode == 2
    assert (
        "'broken_module' of 'broken_module:Mine-v0' cannot be imported: No module named 'not_there_at_all'"
        in done.stderr
    )


def test_an_id_without_version_and_one_without_limit() -> None:
    env = make_env(Config(task="foreign_envs:ForeignUnversioned"), 1)
    assert env.max_episode_steps == 20
    assert "has no time limit; set decisions per episode" in refused("Endless")
    assert (
        complete(Config(task=task_of("Endless"), episode_length=7), made("Endless", episode_length=7)).episode_length
        == 7
    )


def test_settings_reach_the_environment_and_stay_with_the_run(train: Any, tmp_path: Path) -> None:
    given = keys.parse(["env.gain=2", "env.ranges=[0.5,1]", "env.parts.inner=true", "env.parts.name=far"])
    assert given["env_kwargs"] == {"gain": 2, "ranges": [0.5, 1], "parts": {"inner": True, "name": "far"}}
    assert begun("Settings", **given).env.unwrapped.parts == {"inner": True, "name": "far"}
    status, _ = train("Settings", **given)
    assert status == 0
    rewards = {row.split(",")[3] for row in (tmp_path / "run/train.csv").read_text().splitlines()[1:]}
    assert rewards == {"40.0"}  # 20 decisions of 2
    kept = Config.from_dict(json.loads((tmp_path / "run/config.json").read_text()))
    assert kept.env_kwargs == given["env_kwargs"]
    with pytest.raises(ConfigError, match=r"'env_kwargs'.*makes it what it is"):
        runs.resume(tmp_path / "run", {"env_kwargs": {"gain": 3}, "steps": 120})
    assert runs.resume(tmp_path / "run", {"steps": 120, "env_kwargs": {"gain": 2}}).status == 0  # the others stay
    assert "config key 'env.gian': 'foreign_envs:ForeignSettings-v0' has no such setting" in refused(
        "Settings", env_kwargs={"gian": 2}
    )
    assert "config key 'env.max_episode_steps': got 5, allowed: episode_length=N" in refused(
        "Settings", env_kwargs={"max_episode_steps": 5}
    )


def test_a_constructor_that_changes_its_settings_changes_no_others(train: Any, tmp_path: Path) -> None:
    given = {"parts": {"gain": 3}}
    status, _ = train("ChangesSettings", env_kwargs=given)
    assert status == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["env_kwargs"] == given == {"parts": {"gain": 3}}
    assert "60.0" in (tmp_path / "run/train.csv").read_text()


def test_a_run_whose_environment_has_a_generator_of_its_own_goes_on(train: Any, tmp_path: Path) -> None:
    assert train("OwnGenerator", steps=70)[0] == 0  # in the middle of an episode
    assert runs.resume(tmp_path / "run", {"steps": 90}).status == 0


def test_a_finished_run_that_learned_nothing_says_so_when_asked_to_go_on(
    train: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("Plain", steps=40)[0] == 1
    assert runs.resume(tmp_path / "run", {}).status == 1
    said = (
        f"finished, and nothing was learned, at 40 decisions; to go on: tdmpc2-fast resume {tmp_path / 'run'} steps=80"
    )
    assert said in capfd.readouterr().out.splitlines()
    assert runs.resume(tmp_path / "run", {"steps": 80}).status == 0


def test_actions_that_are_none_are_the_agents_fault() -> None:
    with pytest.raises(NonFiniteError, match="got NaN from the agent, for observations of up to 1e"):
        envs_base.check_actions(np.array([[np.nan]]), np.array([[1e25]]))


def test_settings_of_dmcontrol() -> None:
    pytest.importorskip("dm_control")
    settings = {"task_kwargs": {"time_limit": 1}, "environment_kwargs": {"flat_observation": True}}
    env = make_env(Config(task="pendulum-swingup", env_kwargs=settings), 1)
    assert env.max_episode_steps == 25
    obs = env.reset()
    assert obs.shape == (3,)
    ends = [env.step(np.zeros(1, np.float32))[3] for _ in range(25)]
    assert ends == [False] * 24 + [True]
    for wrong, words in (
        ({"gain": 2}, "config key 'env.gain': got 2, allowed in DMControl: env.task_kwargs"),
        ({"task_kwargs": {"random": 3}}, "allowed: seed=N"),
        ({"task_kwargs": {"time_limt": 3}}, "cannot be made with these settings"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_env(Config(task="pendulum-swingup", env_kwargs=wrong), 1)


def test_a_length_the_task_does_not_have_is_refused() -> None:
    pytest.importorskip("dm_control")
    with pytest.raises(ConfigError, match="'episode_length': got 100, allowed: 500 for cheetah-run"):
        tried(Config(task="cheetah-run", episode_length=100))


def test_a_state_that_no_file_holds_is_none(monkeypatch: pytest.MonkeyPatch, train: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(GymnasiumTask, "random_state", lambda self: np.arange(3))
    status, said = train("Plain", steps=70)
    assert status == 0
    assert said.count("random state of its environments cannot be told") == 1
    assert runs.resume(tmp_path / "run", {"steps": 90}).status == 0


@pytest.mark.parametrize(
    ("name", "value"), [("action_repeat", None), ("max_episode_steps", np.int64(5)), ("action_dim", 2.0)]
)
def test_numbers_of_a_suite_are_judged(name: str, value: Any) -> None:
    env = made("Plain")
    object.__setattr__(env, name, value)
    with pytest.raises(ConfigError, match=f"Plain-v0: {name} is .*, allowed: an int of at least 1"):
        complete(Config(task=task_of("Plain")), env)
