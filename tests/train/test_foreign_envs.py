"""Environments of other people: each trains, with finite numbers and contained actions, or is refused with a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PYTHONPATH, TINY

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError, InputError, NonFiniteError
from tdmpc2_fast.train.cli import keys
from tdmpc2_fast.train.envs import base as envs_base
from tdmpc2_fast.train.envs import complete, make_env, tried
from tdmpc2_fast.train.envs.answers import EnvError
from tdmpc2_fast.train.envs.gymnasium_tasks import GymnasiumTask
from tdmpc2_fast.train.run import lifecycle as runs

gymnasium = pytest.importorskip("gymnasium")
import foreign_envs  # noqa: E402

SMALL = dict(
    TINY,
    num_samples=16,
    num_elites=4,
    num_pi_trajs=2,
    iterations=1,
    num_q=2,
    seed_steps=45,
    steps=80,
    eval_freq=1000,
    eval_episodes=1,
    device="cpu",
    num_threads=1,
    tensorboard=False,
    display="lines",
)


def task_of(name: str) -> str:
    return f"foreign_envs:Foreign{name}-v0"


def made(name: str, **changes: Any) -> GymnasiumTask:
    env = make_env(Config(task=task_of(name), **changes), 1)
    assert isinstance(env, GymnasiumTask)
    return env


@pytest.fixture
def train(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Trains for a few decisions in a folder of its own; the exit status and all that was said."""

    def run(name: str, **changes: Any) -> tuple[int, str]:
        task = name if ":" in name else task_of(name)
        status = runs.start({**SMALL, "task": task, "work_dir": str(tmp_path / "run"), **changes})
        said = capfd.readouterr()
        return status, said.out + said.err

    return run


def refused(name: str, **changes: Any) -> str:
    """What is said before a run of it begins."""
    with pytest.raises((ConfigError, InputError)) as e:
        tried(Config.from_dict({**SMALL, "task": task_of(name), **changes}))
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- whatever gymnasium.make makes

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
    status, said = train(name, checkpoint_minutes=0)  # the random state is asked for after every step
    assert status == 0
    assert "done: return" in said
    rows = (tmp_path / "run/train.csv").read_text().splitlines()
    assert len(rows) == 1 + 80 // (12 if name == "Limited" else 20)
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
    assert envs_base.step(_begun("OneStep"), zero).terminated


def _begun(name: str, **changes: Any) -> GymnasiumTask:
    env = made(name, **changes)
    env.reset()
    return env


def test_an_environment_that_draws_is_asked_to_and_others_are_not() -> None:
    picture = _begun("Draws").render(30, 20)
    assert (picture == 255).all()  # the newest of its list
    assert made("Draws").frames_per_second == 30
    assert made("Function").env.render_mode is None
    for name in ("ModesWithoutArgument", "SwallowsArguments", "Plain", "Lambda"):
        with pytest.raises(envs_base.RenderError, match="no pictures"):
            _begun(name).render()


@pytest.mark.parametrize("name", ["OldRandom", "OtherBits", "PythonsRandom", "Plain", "Secret"])
def test_random_state_of_every_kind_goes_on(name: str) -> None:
    env, again = _begun(name), made(name)
    _begun("OwnGenerator").set_random_state(made("OwnGenerator").random_state())
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
    words = [f"{k}={v}" for k, v in SMALL.items() if k != "display"]
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
    assert _begun("Settings", **given).env.unwrapped.parts == {"inner": True, "name": "far"}
    status, _ = train("Settings", **given)
    assert status == 0
    rewards = {row.split(",")[3] for row in (tmp_path / "run/train.csv").read_text().splitlines()[1:]}
    assert rewards == {"40.0"}  # 20 decisions of 2
    kept = Config.from_dict(json.loads((tmp_path / "run/config.json").read_text()))
    assert kept.env_kwargs == given["env_kwargs"]
    with pytest.raises(ConfigError, match=r"'env_kwargs'.*makes it what it is"):
        runs.resume(tmp_path / "run", {"env_kwargs": {"gain": 3}, "steps": 120})
    assert runs.resume(tmp_path / "run", {"steps": 120, "env_kwargs": {"gain": 2}}) == 0  # the others stay
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
    assert runs.resume(tmp_path / "run", {"steps": 90}) == 0


def test_a_finished_run_that_learned_nothing_says_so_when_asked_to_go_on(
    train: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("Plain", steps=40)[0] == 1
    assert runs.resume(tmp_path / "run", {}) == 1
    assert "finished, and nothing was learned, at 40 decisions" in capfd.readouterr().out
    assert runs.resume(tmp_path / "run", {"steps": 80}) == 0


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
        ({"task_kwargs": {"time_limt": 3}}, "takes none of these settings"),
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
    assert runs.resume(tmp_path / "run", {"steps": 90}) == 0


@pytest.mark.parametrize(
    ("name", "value"), [("action_repeat", None), ("max_episode_steps", np.int64(5)), ("action_dim", 2.0)]
)
def test_numbers_of_a_suite_are_judged(name: str, value: Any) -> None:
    env = made("Plain")
    object.__setattr__(env, name, value)
    with pytest.raises(ConfigError, match=f"Plain-v0: {name} is .*, allowed: an int of at least 1"):
        complete(Config(task=task_of("Plain")), env)


# ---- actions


@pytest.mark.parametrize("name", foreign_envs.ACTIONS)
def test_actions_are_exact_and_contained(name: str) -> None:
    env = _begun(name)
    space = env.env.action_space
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    middle = np.rint((low + high) / 2) if space.dtype.kind in "biu" else ((low + high) / 2)
    for value, expected in ((-1, low), (1, high), (0, middle)):
        env.step(np.full(env.action_dim, value, np.float32))
        np.testing.assert_array_equal(foreign_envs.Plain.seen[-1], expected.astype(space.dtype))
    for action in np.random.default_rng().uniform(-1.001, 1.001, (100, env.action_dim)).astype(np.float32):
        env.step(action)  # which asserts that it is contained


def test_a_space_of_the_official_bounds_changes_no_action() -> None:
    env = _begun("Plain")
    for action in np.random.default_rng().uniform(-1, 1, (50, 1)).astype(np.float32):
        env.step(action)
        assert foreign_envs.Plain.seen[-1].tobytes() == action.tobytes()


@pytest.mark.parametrize("name", ["Integers", "PartlyFixed", "Grid"])
def test_strange_action_spaces_are_trained(name: str, train: Any) -> None:
    status, said = train(name)
    assert status == 0
    assert ("low and high of these actions are equal, so they stay there: [1]" in said) == (name == "PartlyFixed")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Discrete", "allowed: a Box with finite bounds"),
        ("ActionsInParts", "allowed: a Box"),
        ("Unbounded", "allowed: finite bounds"),
        ("HalfBounded", "allowed: finite bounds"),
        ("Overflowing", "float32"),
        ("Countless", "2**53"),
        ("AllFixed", "fixed"),
        ("Empty", "at least one dimension"),
    ],
)
def test_actions_that_cannot_be_scaled_are_refused_at_the_start(name: str, words: str) -> None:
    said = refused(name)
    assert words in said
    assert f"'foreign_envs:Foreign{name}-v0' has the action space" in said


# ---- observations


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Picture", (9, 64, 64)),
        ("ChannelsFirst", (9, 64, 64)),
        ("Stacked", (4, 64, 64)),
        ("StackedColours", (6, 64, 64)),
        ("Grey", (3, 64, 64)),
        ("Shares", (9, 64, 64)),
        ("OnePart", (9, 64, 64)),
    ],
)
def test_images_become_stacks_of_64x64(name: str, shape: tuple[int, ...]) -> None:
    env = made(name, obs="rgb")
    obs = envs_base.reset(env)
    assert (env.obs_shape, obs.shape, obs.dtype) == (shape, shape, np.uint8)
    first = 51 if name == "Shares" else 40
    assert (obs == first).all()
    found = envs_base.step(env, np.zeros(1, np.float32)).obs
    newest = shape[0] // 3 if name not in ("Stacked", "StackedColours") else shape[0]
    assert (found[-newest:] == first + (name != "Shares")).all()
    assert (found[:-newest] == first).all()
    assert "set obs=rgb" in refused(name)


def test_an_image_keeps_its_place_in_whatever_order_its_axes_are() -> None:
    rng = np.random.default_rng()
    image = rng.integers(0, 256, (3, 64, 64), np.uint8)
    seen = []
    for name, given in (("Picture", image.transpose(1, 2, 0)), ("ChannelsFirst", image.repeat(2, 2).repeat(2, 1))):
        env = made(name, obs="rgb")
        if name == "ChannelsFirst":
            box = gymnasium.spaces.Box(0, 255, (3, 128, 128), np.uint8)
            env = make_env_with(box)
        env.env.unwrapped.observe = lambda given=given: given
        seen.append(env.reset()[-3:])
    assert np.array_equal(seen[0], image)
    assert np.array_equal(seen[1], image)  # the mean of four equal pixels


def make_env_with(box: Any) -> GymnasiumTask:
    kind = type("Sized", (foreign_envs.Picture,), {"observation_space": box})
    gymnasium.register("ForeignSized-v0", entry_point=kind, max_episode_steps=20)
    return made("Sized", obs="rgb")


def test_images_are_trained_from_pixels(train: Any) -> None:
    status, _ = train("ChannelsFirst", obs="rgb", num_channels=1, latent_dim=16, steps=60, seed_steps=40)
    assert status == 0


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("CameraAndNumbers", {}, "its part 'camera' is an image beside its part 'speed'"),
        ("CameraAndNumbers", dict(obs="rgb", latent_dim=512), "FilterObservation"),
        ("Plain", dict(obs="rgb", latent_dim=512), "got 'rgb', allowed: obs=state, or images"),
        ("WordsInParts", {}, "its part 'inner/log' (Sequence"),
    ],
)
def test_observations_that_cannot_be_used_are_refused_by_part(name: str, changes: Any, words: str) -> None:
    said = refused(name, **changes)
    assert words in said
    assert "has the observation space" in said


def test_parts_are_flattened_in_gymnasiums_order() -> None:
    env = made("Parts")
    space = env.env.observation_space
    value = {"place": np.array([[1, 2], [3, 4]], np.float32), "mode": 6, "more": (np.array([0, 1]), np.array([1, 2]))}
    expected = gymnasium.spaces.flatten(space, value)
    np.testing.assert_array_equal(env.reset(), expected.astype(np.float32))


def test_a_replay_that_does_not_fit_is_refused_before_the_run_and_the_advice_works(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tdmpc2_fast.learn import replay

    monkeypatch.setattr(replay, "_host_memory", lambda: 2**20)
    with pytest.raises(InputError) as e:
        train("Plain", steps=100_000, buffer_size=90_000)
    assert not (tmp_path / "run").exists()
    fits = int(str(e.value).rpartition("smaller, ")[2].split()[0])
    assert 1_000 < fits < 90_000
    status, _ = train("Plain", steps=80, buffer_size=fits)
    assert status == 0


# ---- whether it learns


@pytest.mark.parametrize(
    ("name", "changes", "early", "late"),
    [
        ("OneStep", dict(episodic=True), "no episode was as long as horizon=3", "no episode was as long as horizon=3"),
        ("Plain", dict(steps=40), "the first update comes after seed_steps=45", "nothing was learned: steps=40"),
        ("Plain", dict(steps=20, seed_steps=10), "the end of an episode, 20 decisions", "allowed: steps above 20"),
        ("Ends", dict(episodic=True, horizon=8), "horizon=7 fits the longest one", "horizon=8 decisions"),
    ],
)
def test_a_run_that_learns_nothing_says_so_and_fails(
    name: str, changes: Any, early: str, late: str, train: Any
) -> None:
    status, said = train(name, **changes)
    assert status == 1
    _, _, end = said.partition("done, but nothing was learned")
    assert end
    warnings = [line for line in said.splitlines() if line.startswith("warning: ") and "learned" in line]
    assert len(warnings) == 1
    assert early in warnings[0]
    assert late in "nothing was learned" + end.splitlines()[0]


def test_what_is_advised_learns(train: Any) -> None:
    assert train("OneStep", episodic=True, horizon=1)[0] == 0


def test_more_steps_than_the_least_learn(train: Any) -> None:
    assert train("Plain", steps=21, seed_steps=10)[0] == 0


def test_several_environments_count_their_decisions_together(train: Any) -> None:
    status, said = train("Plain", num_envs=2, env_workers=0, steps=40, seed_steps=10)
    assert status == 1
    assert "allowed: steps above 40" in said


def test_a_horizon_longer_than_all_episodes_is_refused() -> None:
    assert "config key 'horizon': got 21, allowed: at most 20" in refused("Plain", horizon=21)


@pytest.mark.parametrize(
    ("name", "words"),
    [("Huge", "a reward of 1e+06"), ("Piling", "a discounted return of "), ("Slow", "return of 30,000")],
)
def test_rewards_beyond_the_bins_are_said_once_with_a_remedy_that_works(
    name: str, words: str, train: Any, tmp_path: Path
) -> None:
    status, said = train(name)
    assert status == 0
    warnings = [line for line in said.splitlines() if "beyond the bins" in line]
    assert len(warnings) == 1
    assert words in warnings[0]
    assert "-22,025 and 22,025" in warnings[0]
    vmax = int(warnings[0].rpartition("vmax=")[2].split()[0])
    _, said = train(name, vmax=vmax, work_dir=str(tmp_path / "again"))
    assert "beyond the bins" not in said


# ---- failures


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Diverges", "FloatingPointError: the simulation diverged"),
        ("DivergesSilently", "reward: got nan"),
        ("FailsAtReset", "OSError: no scene"),
        ("Exits", "it called sys.exit(0)"),
    ],
)
def test_episodes_that_fail_are_dropped_and_counted(
    name: str, why: str, workers: int, train: Any, tmp_path: Path
) -> None:
    if workers and name != "Diverges":
        pytest.skip("each takes seconds to start")
    status, said = train(name, on_env_error="drop", env_workers=workers, steps=120)
    assert status == 0, said
    assert f"Foreign{name}-v0, environment 0: {why}" in said
    dropped = int(said.partition(" training episodes were dropped")[0].rpartition(" ")[2])
    assert 1 <= dropped <= 4
    rewards = [float(row.split(",")[3]) for row in (tmp_path / "run/train.csv").read_text().splitlines()[1:]]
    assert np.isfinite(rewards).all()
    saved = json.loads(max((tmp_path / "run/checkpoints").glob("0*/manifest.json")).read_text())
    assert saved["values"]["dropped"] == dropped


def test_failures_stop_a_run_unless_they_are_to_be_dropped(train: Any) -> None:
    foreign_envs.Diverges.steps = 0
    with pytest.raises(FloatingPointError, match="the simulation diverged") as e:
        train("Diverges", seed_steps=1000, steps=1000)
    assert any("on_env_error=drop" in note for note in e.value.__notes__)


def test_dropped_episodes_are_bounded(train: Any) -> None:
    with pytest.raises(EnvError, match="got 11 episodes that failed, allowed: 10 beside 0 that ended"):
        train("AlwaysFails", on_env_error="drop")
