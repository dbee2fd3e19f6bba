"""Environments: official names and semantics, and straight answers to wrong names."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError, InputError
from tdmpc2_fast.train.envs import SUITES, complete, dmcontrol, gymnasium_tasks, make_env
from tdmpc2_fast.train.envs.base import Env, RenderError, step

pytest.importorskip("dm_control")
gymnasium = pytest.importorskip("gymnasium")
# observation and action widths of the official environments
SHAPES = {
    "acrobot-swingup": (6, 1),
    "cartpole-swingup": (5, 1),
    "cheetah-run": (17, 6),
    "cup-catch": (8, 2),
    "dog-run": (223, 38),
    "finger-spin": (9, 2),
    "finger-turn-hard": (12, 2),
    "fish-swim": (24, 5),
    "hopper-hop": (15, 4),
    "humanoid-run": (67, 21),
    "pendulum-swingup": (3, 1),
    "reacher-easy": (6, 2),
    "walker-walk": (24, 6),
}


@pytest.mark.parametrize("task", dmcontrol.TASKS)
def test_every_dmcontrol_task_runs(task: str) -> None:
    env = make_env(Config(task=task), 1)
    if task in SHAPES:
        assert (env.obs_shape[0], env.action_dim) == SHAPES[task]
    assert (env.max_episode_steps, env.action_repeat) == (500, 2)
    rng = np.random.default_rng(0)
    obs = env.reset()
    for _ in range(3):
        assert obs.shape == env.obs_shape
        assert obs.dtype == np.float32
        assert np.isfinite(obs).all()
        obs, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_dim).astype(np.float32))
        assert 0 <= reward <= 2
        assert not terminated
        assert not truncated
    env.close()


@pytest.mark.parametrize("task", ["finger-spin", "walker-stand"])  # other bounds than 1; a reward in every step
def test_one_decision_is_two_control_steps_of_the_suite(task: str) -> None:
    from dm_control import suite

    env = make_env(Config(task=task), 7)
    raw = suite.load(*task.split("-"), task_kwargs={"random": 7})
    spec = raw.action_spec()
    rng, obs, timestep = np.random.default_rng(0), env.reset(), raw.reset()
    for _ in range(20):
        flat = np.concatenate([np.ravel(v) for v in timestep.observation.values()])
        np.testing.assert_array_equal(obs, flat.astype(np.float32))
        action = rng.uniform(-1, 1, env.action_dim).astype(np.float32)
        scaled = spec.minimum + (action.astype(np.float64) + 1) / 2 * (spec.maximum - spec.minimum)
        rewards = []
        for _ in range(2):
            timestep = raw.step(scaled)
            rewards.append(timestep.reward)
        obs, reward, *_ = env.step(action)
        assert reward == sum(rewards)
        assert task == "finger-spin" or min(rewards) > 0


def test_episodes_end_after_500_decisions_and_seeds_repeat() -> None:
    a, b, c = (make_env(Config(task="pendulum-swingup"), seed) for seed in (3, 3, 4))
    first = a.reset()
    np.testing.assert_array_equal(first, b.reset())
    assert not np.array_equal(first, c.reset())
    ends = [a.step(np.zeros(1, np.float32))[3] for _ in range(500)]
    assert ends == [False] * 499 + [True]
    assert not np.array_equal(a.reset(), first)


def test_gymnasium_tasks_and_their_config() -> None:
    cfg = Config(task="Hopper-v5", episodic=True)
    env = make_env(cfg, 1)
    assert (env.obs_shape, env.action_dim, env.max_episode_steps, env.action_repeat) == ((11,), 3, 1000, 1)
    assert complete(cfg, env).rho == 0.5
    env.reset()
    done, steps = False, 0
    rng = np.random.default_rng(0)
    while not done:
        found = step(env, rng.uniform(-1, 1, 3).astype(np.float32))
        steps += 1
        done = found.terminated or found.truncated
    assert found.terminated
    assert steps < 1000
    assert found.obs.dtype == np.float32
    assert found.success == 0.0
    named = Config(task="mujoco-walker", episodic=True)
    done_cfg = complete(named, make_env(named, 1))
    assert (done_cfg.rho, done_cfg.discount_max) == (0.7, 0.99)
    assert done_cfg.seed_steps == 5000


def test_actions_are_rescaled_to_the_space() -> None:
    env = make_env(Config(task="Pendulum-v1"), 1)
    obs = env.reset()
    theta, speed = np.arctan2(obs[1], obs[0]), obs[2]
    _, reward, *_ = env.step(np.ones(1, np.float32))  # full torque is 2
    assert reward == pytest.approx(-(theta**2 + 0.1 * speed**2 + 0.001 * 4), rel=1e-4)
    assert env.max_episode_steps == 200


LEAVES_NOTHING = """
import os, sys, threading
from tdmpc2_fast import Config
from tdmpc2_fast.train.envs import complete, make_env
from tdmpc2_fast.train.envs.together import environments

def upset(physics):
    import mujoco
    physics.data.qvel[:] = 1e12  # an unstable state makes MuJoCo warn
    mujoco.mj_step(getattr(physics.model, "ptr", physics.model), getattr(physics.data, "ptr", physics.data))

def here(env):
    env.reset()
    physics = getattr(env.env, "physics", None) or env.env.unwrapped
    upset(physics)
    thread = threading.Thread(target=upset, args=(physics,))
    thread.start()
    thread.join()
    try:
        env.render()
    except Exception as e:
        print("no picture:", e)

if __name__ == "__main__":
    for task in ("HalfCheetah-v5", "walker-walk"):
        cfg = Config(task=task, episodic=task.endswith("-v5"), num_envs=2, env_workers=1)
        env = make_env(cfg, 1)
        if sys.argv[1] == "here":
            here(env)
            env.close()
        else:
            workers = environments(complete(cfg, env), env, print)
            workers.reset([0, 1])
            workers.close()
    print("left:", sorted(os.listdir()))
"""


@pytest.mark.parametrize("where", ["here", "worker"])
def test_mujoco_leaves_no_log_behind(tmp_path: Path, where: str) -> None:
    program, empty = tmp_path / "program.py", tmp_path / "empty"
    program.write_text(LEAVES_NOTHING)
    empty.mkdir()
    command = [sys.executable, str(program), where]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["left: []"], done.stdout + done.stderr
    assert list(empty.iterdir()) == []
    assert "unstable" in done.stderr or where == "worker"  # it is told instead


@pytest.mark.parametrize(
    ("task", "frames"),
    [("cartpole-swingup", 50), ("humanoid-run", 20), ("HalfCheetah-v5", 20), ("Hopper-v5", 125), ("Pendulum-v1", 20)],
)
def test_frames_per_second_are_decisions_of_simulated_time(task: str, frames: float) -> None:
    env = make_env(Config(task=task, episodic=True), 1)
    assert env.frames_per_second == pytest.approx(frames)
    if task in dmcontrol.TASKS:  # the physics' own clock agrees
        env.reset()
        for _ in range(10):
            env.step(np.zeros(env.action_dim, np.float32))
        assert env.env.physics.time() == pytest.approx(10 / frames)  # type: ignore[attr-defined]


def rendered(env: Env, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
    try:
        return env.render(width, height)
    except RenderError as e:
        pytest.skip(f"no renderer here: {e}")


@pytest.mark.parametrize("task", ["walker-walk", "HalfCheetah-v5"])
def test_pictures_change_no_number(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Config(task=task, episodic=True)
    seen = make_env(cfg, 3)
    monkeypatch.setattr(gymnasium_tasks, "_draws", lambda spec: False)
    unseen = make_env(cfg, 3)
    rng = np.random.default_rng(0)
    pictures = []
    np.testing.assert_array_equal(seen.reset(), unseen.reset())
    for _ in range(8):
        pictures.append(rendered(seen))
        action = rng.uniform(-1, 1, seen.action_dim).astype(np.float32)
        for a, b in zip(seen.step(action), unseen.step(action), strict=True):
            np.testing.assert_array_equal(a, b)
    assert all(p.shape == (384, 384, 3) and p.dtype == np.uint8 and p.std() > 1 for p in pictures)
    assert not np.array_equal(pictures[0], pictures[-1])
    assert rendered(seen, 64, 40).shape == (40, 64, 3)
    seen.close()


def test_a_picture_larger_than_its_buffer_is_refused() -> None:
    env = make_env(Config(task="walker-walk"), 1)
    env.reset()
    rendered(env)
    with pytest.raises(InputError, match="width, height: got 2000, 100"):
        env.render(2000, 100)


@pytest.mark.parametrize("task", ["walker-walk", "HalfCheetah-v5"])
def test_environments_drawn_in_turns_do_not_mix(task: str) -> None:
    cfg = Config(task=task, episodic=True)
    one, two = make_env(cfg, 1), make_env(cfg, 2)
    one.reset(), two.reset()
    for _ in range(10):
        two.step(np.ones(two.action_dim, np.float32))
    first, second = rendered(one), rendered(two)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(rendered(one), first)
    np.testing.assert_array_equal(rendered(two), second)
    two.close()
    np.testing.assert_array_equal(rendered(one), first)
    one.close()


class Ball(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Draws 100 wide and 50 high, white, where its modes have `rgb_array`."""

    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def __init__(self, render_mode: str | None = None, breaks: bool = False) -> None:
        assert render_mode in (None, *self.metadata["render_modes"])
        self.render_mode, self.breaks = render_mode, breaks

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        return np.zeros(2, np.float32), {}

    def render(self) -> Any:
        if self.breaks:
            raise gymnasium.error.DependencyNotInstalled("paint is not installed, run `pip install paint`")
        return np.full((50, 100, 3), 255, np.uint8)


class Seen(Ball):
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 12}


class Unseen(Ball):
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"]}


def test_pictures_of_any_gymnasium_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    gymnasium.register("Seen-v0", Seen, max_episode_steps=9)
    gymnasium.register("Broken-v0", Seen, max_episode_steps=9, kwargs={"breaks": True})
    gymnasium.register("Unseen-v0", Unseen, max_episode_steps=9)
    seen, broken, unseen = (make_env(Config(task=f"{n}-v0"), 1) for n in ("Seen", "Broken", "Unseen"))
    for env in (seen, broken, unseen):
        env.reset()
    assert seen.frames_per_second == 12
    picture = seen.render(80, 80)  # its shape is kept: 80x40 in the middle
    assert picture.shape == (80, 80, 3)
    assert (picture[22:58] == 255).all()
    assert (picture[:18] == 0).all()
    assert (picture[62:] == 0).all()
    with pytest.raises(RenderError, match=r"Broken-v0: no pictures.*pip install paint"):
        broken.render()
    with pytest.raises(RenderError, match=r"Unseen-v0.*\['ansi'\], not 'rgb_array'"):
        unseen.render()


WITHOUT = """
from tdmpc2_fast import Config
from tdmpc2_fast.train.envs import make_env
from tdmpc2_fast.train.envs.base import RenderError
for task in ("cartpole-balance", "HalfCheetah-v5"):
    try:
        env = make_env(Config(task=task, episodic=task[0] == "H"), 1)
        print("state", env.reset().shape)
        env.render()
    except RenderError as e:
        print("RenderError", e)
"""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        # the library without a driver, as in many containers
        ({"__EGL_VENDOR_LIBRARY_FILENAMES": "/nowhere"}, ["state", "RenderError"] * 2),
        ({"MUJOCO_GL": "disable"}, ["state", "RenderError"] * 2),
        # dm_control refuses to be imported with what is named and cannot be had; MuJoCo with what it does not know
        ({"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "egl"}, ["RenderError", "state", "RenderError"]),
        ({"MUJOCO_GL": "nonsense"}, ["RenderError"] * 2),
    ],
)
def test_without_a_renderer_states_go_on_and_pictures_say_why(variables: dict[str, str], said: list[str]) -> None:
    if ctypes.util.find_library("OSMesa") and "MUJOCO_GL" not in variables:
        pytest.skip("OSMesa draws here where EGL cannot")
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")} | variables
    command = [sys.executable, "-P", "-c", WITHOUT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == said, done.stdout + done.stderr
    for words in ("MUJOCO_GL=egl", "libegl1", "libosmesa6", "MUJOCO_GL=disable"):
        assert all(words in line for line in lines if line.startswith("RenderError"))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("walker-wlak", ["unknown task 'walker-wlak'", "walker-walk", "tdmpc2-fast tasks", "Gymnasium"]),
        ("hoper-hop", ["hopper-hop"]),
        ("mt40", ["unknown task 'mt40'"]),
        ("mw-raech", ["unknown task", "mw-reach"]),
        ("Hoper-v5", ["cannot make 'Hoper-v5'", "Hopper-v5"]),
    ],
)
def test_wrong_tasks_get_a_straight_answer(task: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        make_env(Config(task=task), 1)
    for word in words:
        assert word in str(e.value)


def test_every_suite_knows_its_own_names() -> None:
    for suite in SUITES.values():
        assert all(suite.accepts(name) for name in suite.names)


def test_pixels() -> None:
    try:
        env = make_env(Config(task="cartpole-balance", obs="rgb"), 1)
    except ConfigError as e:  # rendering needs a driver
        if "config key 'obs': 'rgb' needs a renderer" not in str(e):
            raise
        pytest.skip(str(e))
    obs = env.reset()
    assert obs.shape == env.obs_shape == (9, 64, 64)
    assert getattr(env, "frames", 1) == 3
    assert obs.dtype == np.uint8
    assert np.array_equal(obs[:3], obs[3:6])
    after, *_ = env.step(np.ones(1, np.float32))
    assert np.array_equal(after[:6], obs[3:])
    assert obs.std() > 1


def test_an_id_may_name_the_module_that_registers_it() -> None:
    env = make_env(Config(task="gymnasium.envs:Pendulum-v1"), 1)
    assert env.reset().shape == (3,)
    env.close()
    with pytest.raises(ConfigError, match="needs nowhere_at_all"):
        make_env(Config(task="nowhere_at_all:Pendulum-v1"), 1)
