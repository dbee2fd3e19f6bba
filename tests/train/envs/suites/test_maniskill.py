"""ManiSkill, in the interpreter that has it: episodes, states, pictures, and what is said where it cannot run.

Nothing here needs what other tests share: `python -m pytest --noconftest THIS_FILE`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.envs.base import reset, state_of, step
from tdmpc2_fast.train.envs.suites import maniskill

pytest.importorskip("mani_skill")

SIZES = {"lift-cube": (36, 4), "pick-cube": (42, 4), "stack-cube": (48, 4)}


def made(task: str, seed: int = 1, **values: Any) -> maniskill.ManiSkill:
    env = maniskill.make(Config(task=task, model_size=1, **values), seed)
    assert isinstance(env, maniskill.ManiSkill)
    return env


def hand_to_cube(env: maniskill.ManiSkill) -> np.ndarray:
    world = env.env.unwrapped
    return (world.cube.pose.p - world.agent.tcp_pose.p)[0].numpy()


def grasping(env: maniskill.ManiSkill) -> bool:
    world = env.env.unwrapped
    return bool(world.agent.is_grasping(world.cube)[0])


def grasp(env: maniskill.ManiSkill, rise: float, decisions: int) -> tuple[list[Any], list[np.ndarray]]:
    """Play an episode that goes to the cube, closes the hand and moves up at `rise` in [-1, 1]."""
    steps, actions, closed = [reset(env)], [], False
    for _ in range(decisions):
        way = hand_to_cube(env)
        closed = closed or bool(np.abs(way).max() < 0.01)
        if closed:
            action = np.array([0, 0, rise if grasping(env) else 0, -1])
        else:
            far = np.abs(way[:2]).max() > 0.01
            action = np.array([*np.clip(8 * way[:2], -1, 1), 0 if far else np.clip(8 * way[2], -1, 1), 1])
        actions.append(action.astype(np.float32))
        steps.append(step(env, actions[-1]))
        if steps[-1].terminated or steps[-1].truncated:
            break
    return steps, actions


@pytest.mark.parametrize("task", SIZES)
def test_an_episode(task: str) -> None:
    env = made(task)
    assert (env.obs_shape, env.action_dim) == ((SIZES[task][0],), SIZES[task][1])
    assert (env.max_episode_steps, env.action_repeat, env.frames_per_second) == (100, 2, 10.0)
    rng = np.random.default_rng(0)
    first = env.reset()
    assert first.dtype == np.float32
    for i in range(100):
        kept = first.copy()
        found = step(env, rng.uniform(-1, 1, 4).astype(np.float32))
        assert not found.terminated
        assert found.truncated == (i == 99)
    assert np.array_equal(first, kept)
    env.close()


def test_a_decision_is_two_steps_of_the_suite() -> None:
    import gymnasium

    env = made("pick-cube")
    theirs = gymnasium.make(
        "PickCube-v1", obs_mode="state", control_mode="pd_ee_delta_pos", reward_mode="dense", sim_backend="physx_cpu"
    )
    state = env.random_state()
    first = env.reset()
    generator = np.random.RandomState()
    maniskill.random_state.take(generator, state)
    obs, _ = theirs.reset(seed=int(generator.randint(2**31)), options={"reconfigure": True})
    assert np.array_equal(first, obs[0].numpy())
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = rng.uniform(-1, 1, 4).astype(np.float32)
        rewards = []
        for _ in range(2):
            obs, reward, *_ = theirs.step(action)
            rewards.append(float(reward))
        found = step(env, action)
        assert found.reward == sum(rewards)
        assert np.array_equal(found.obs, obs[0].numpy())


@pytest.mark.parametrize("task", ["lift-cube", "pick-cube"])
def test_episodes_repeat_to_the_bit_whatever_was_before(task: str) -> None:
    """An episode that ends with the cube in hand is followed by one that begins with an empty hand."""
    env = made(task, 1)
    env.reset()
    state = state_of(env)
    once, actions = grasp(env, 0.1, 40)
    assert grasping(env)
    grasp(env, 0.2, 40)
    assert grasping(env)
    other = made(task, seed=7)
    for again in env, other:
        again.set_random_state(state)
        assert np.array_equal(reset(again), once[0])
        for action, want in zip(actions, once[1:], strict=True):
            found = step(again, action)
            assert np.array_equal(found.obs, want.obs)
            assert found[1:] == want[1:]
    assert state_of(env) == state_of(other) != state


def test_seeds_make_scenes() -> None:
    a, b, c = (made("lift-cube", seed) for seed in (1, 1, 2))
    first = a.reset()
    assert np.array_equal(first, b.reset())
    assert not np.array_equal(first, c.reset())
    assert not np.array_equal(first, a.reset())


def test_the_cube_is_lifted() -> None:
    """Success is a cube held still 0.2 m up; it has the whole reward, and the episode goes on."""
    env = made("lift-cube")
    steps, _ = grasp(env, 0.5, 100)
    heights = [s.obs[-8] for s in steps[1:]]  # of obj_pose: x, y, z and a quaternion, before tcp_to_obj_pos
    while not steps[-1].truncated:
        steps.append(step(env, np.array([0, 0, 0, -1], np.float32)))
    rewards = np.array([s.reward for s in steps[1:]])
    assert max(heights) > 0.21
    assert len(steps) == 101
    assert not any(s.terminated for s in steps[1:])
    assert 0 < rewards[0] < 2
    assert rewards.max() <= 4.5


def test_success_ends_an_episode_where_it_is_asked_to() -> None:
    """The hand stops at 0.2 m; with `episodic` that step is the last, and the repetition is left with it."""

    def lift(env: maniskill.ManiSkill) -> list[Any]:
        steps, closed = [reset(env)], False
        while len(steps) < 101:
            way, height = hand_to_cube(env), float(env.env.unwrapped.cube.pose.p[0, 2])
            closed = closed or bool(np.abs(way).max() < 0.01)
            far = np.abs(way[:2]).max() > 0.01
            if closed:
                action = [0, 0, np.clip(8 * (0.235 - height), -1, 1) if grasping(env) else 0, -1]
            else:
                action = [*np.clip(8 * way[:2], -1, 1), 0 if far else np.clip(8 * way[2], -1, 1), 1]
            steps.append(step(env, np.array(action, np.float32)))
            if steps[-1].terminated or steps[-1].truncated:
                break
        return steps[1:]

    going, ending = lift(made("lift-cube")), lift(made("lift-cube", episodic=True))
    assert len(going) == 100
    assert going[-1].success == 1
    assert going[-1].reward == pytest.approx(4.5)
    assert not any(s.terminated for s in going)
    assert len(ending) < 100
    assert ending[-1].terminated
    assert ending[-1].success == 1
    assert not any(s.success for s in ending[:-1])


def test_pictures_change_nothing() -> None:
    env, other = made("pick-cube"), made("pick-cube")
    env.reset()
    other.reset()
    picture = env.render()
    assert picture.shape == (384, 384, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 10
    assert env.render(64, 48).shape == (48, 64, 3)
    for action in np.random.default_rng(0).uniform(-1, 1, (5, 4)).astype(np.float32):
        a, b = step(env, action), step(other, action)
        assert np.array_equal(a.obs, b.obs)
        assert a[1:] == b[1:]
        env.render()


def test_settings() -> None:
    env = made("pick-cube", env_kwargs={"reward_mode": "sparse"})
    env.reset()
    assert step(env, np.zeros(4, np.float32)).reward == 0
    with pytest.raises(ConfigError, match=r"'env\.obs_mode': got 'rgb', allowed: nothing"):
        made("pick-cube", env_kwargs={"obs_mode": "rgb"})
    with pytest.raises(ConfigError, match=r"'pick-cube' cannot be made with these settings.*'colour'"):
        made("pick-cube", env_kwargs={"colour": "red"})
    with pytest.raises(ConfigError, match="config key 'obs': got 'rgb', allowed: 'state'"):
        made("pick-cube", obs="rgb")


MAKE = """
from tdmpc2_fast.config import Config
from tdmpc2_fast.train.envs.suites import maniskill
env = maniskill.make(Config(task={!r}, model_size=1), 1)
"""
PLAY = """
import numpy as np
from tdmpc2_fast.train.envs.base import reset, step
actions = np.random.default_rng(0).uniform(-1, 1, (4, env.action_dim)).astype(np.float32)
reset(env)
state = env.random_state()
for _ in range(2):
    first, steps = reset(env), [step(env, a) for a in actions]
    print(env.action_dim, *first, *(x for s in steps for x in (*s.obs, *s[1:])))
    reset(env)
    env.set_random_state(state)
"""


def run(program: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, whose standard input is closed."""
    return subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def refused(task: str, **environ: str) -> str:
    """Return the error that making a task ends with."""
    ended = run(MAKE.format(task), **environ)
    assert ended.returncode == 1
    assert "EOFError" not in ended.stderr
    return ended.stderr[ended.stderr.rindex("NotHereError") :]


@pytest.mark.parametrize(("task", "assets"), [("pick-ycb", "ycb"), ("turn-faucet", "partnet_mobility_faucet")])
def test_what_must_be_downloaded_is_named(task: str, assets: str, tmp_path: Path) -> None:
    text = refused(task, MS_ASSET_DIR=str(tmp_path))
    assert f"-m mani_skill.utils.download_asset {assets} -y" in text
    assert str(tmp_path / "data") in text


def test_without_a_vulkan_device(tmp_path: Path) -> None:
    none = str(tmp_path / "none.json")
    text = refused("pick-cube", VK_DRIVER_FILES=none, VK_ICD_FILENAMES=none)
    assert "no Vulkan device" in text
    assert "apt-get install -y -t bookworm-backports mesa-vulkan-drivers" in text


def boxes_for_objects(folder: Path) -> None:
    """Write two boxes where the objects of YCB would lie."""
    import trimesh

    sizes = {"box": (0.04, 0.04, 0.06), "flat": (0.05, 0.04, 0.03)}
    bounds = {k: {"max": [x / 2 for x in v], "min": [-x / 2 for x in v]} for k, v in sizes.items()}
    for name, size in sizes.items():
        (folder / "models" / name).mkdir(parents=True)
        # In ASCII: reading a small binary file crashes SAPIEN now and then.
        trimesh.creation.box(size).export(folder / "models" / name / "collision.ply", encoding="ascii")
        trimesh.creation.box(size).export(folder / "models" / name / "textured.obj")
    (folder / "info_pick_v0.json").write_text(json.dumps({k: {"bbox": v} for k, v in bounds.items()}))


def boxes_for_faucets(folder: Path) -> None:
    """Write a box with a lever for every switch where PartNet's faucets would lie."""
    from mani_skill.envs.tasks.tabletop.turn_faucet import TurnFaucetEnv

    box = "<geometry><box size='{0} 0.05 0.05'/></geometry>"
    body = "<link name='{0}'><visual>{1}</visual><collision>{1}</collision></link>"
    for model, told in json.loads(Path(TurnFaucetEnv.TRAIN_JSON).read_text()).items():
        parts = ["<link name='base'/>"]
        for i, (link, _, role) in enumerate(told["semantics"]):
            turns = "revolute" if role == "switch" else "fixed"
            parts.append(body.format(link, box.format(0.3 if role == "switch" else 0.1)))
            parts.append(
                f"<joint name='j{i}' type='{turns}'><parent link='base'/><child link='{link}'/><axis xyz='0 0 1'/>"
                f"<origin xyz='0 0 {0.1 * i}'/><limit lower='0' upper='1.5' effort='10' velocity='10'/></joint>"
            )
        (folder / model).mkdir(parents=True)
        (folder / model / "mobility_cvx.urdf").write_text(f"<robot name='f'>{''.join(parts)}</robot>")


@pytest.mark.parametrize("task", ["pick-ycb", "turn-faucet"])
def test_tasks_with_objects_of_their_own(task: str, tmp_path: Path) -> None:
    """Boxes lie where the objects would; other scenes have others, and an episode repeats."""
    data = tmp_path / "data"
    if task == "pick-ycb":
        boxes_for_objects(data / "assets" / "mani_skill2_ycb")
    else:
        boxes_for_faucets(data / "partnet_mobility" / "dataset")
    ended = run(MAKE.format(task) + PLAY, MS_ASSET_DIR=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    once, again = ended.stdout.splitlines()[-2:]
    assert once == again
    assert once.startswith("7 ")
    assert len(once.split()) > 4 * 30
