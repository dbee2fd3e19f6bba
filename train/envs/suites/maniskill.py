"""The five ManiSkill tasks, official semantics, on ManiSkill 3.

One decision repeats the action for two control steps and sums the rewards; an episode is 100
decisions. It goes on after a success, as it did for the published curves; with `episodic=true`
a success terminates it, and a repetition stops there, as in today's official code. The success
of a decision is that of its last step. Settings (`env.KEY=VALUE`) are keyword arguments of the
task, such as `env.reward_mode=sparse`.

The official code uses ManiSkill 2, which today's Python cannot install. Robots, models and
rewards were revised since, so returns compare only with others of ManiSkill 3. `lift-cube`,
which it no longer has, is defined here. It has no dense reward for `turn-faucet`, whose
reward is therefore 1 for a step in success, else 0.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError

from .. import random_state
from ..answers import NotHereError
from ..base import Array, Env, RenderError, in_a_line

# Official name: ManiSkill's id, control mode
_TASKS = {
    "lift-cube": ("LiftCube-v1", "pd_ee_delta_pos"),
    "pick-cube": ("PickCube-v1", "pd_ee_delta_pos"),
    "stack-cube": ("StackCube-v1", "pd_ee_delta_pos"),
    "pick-ycb": ("PickSingleYCB-v1", "pd_ee_delta_pose"),
    "turn-faucet": ("TurnFaucet-v1", "pd_ee_delta_pose"),
}
TASKS = tuple(_TASKS)

REQUIREMENTS = (
    "torch==2.13.0",  # in whose tensors it answers
    "mani_skill==3.0.1",  # the tasks
    "sapien==3.0.3",  # the simulator: another release, other numbers
    "gymnasium==1.4.0",  # whose `make` and TimeLimit the tasks go through
    "numpy==2.4.6",  # whose RandomState draws the scenes
)
"""What is installed into the suite's interpreter, Python 3.11."""

SYSTEM = (
    "even states need a GPU's driver, or on a CPU Mesa's lavapipe of version 25: "
    "apt-get install -y -t bookworm-backports mesa-vulkan-drivers on Debian 12 (docs/tasks.md has all)"
)
"""What the machine must have."""

_DRIVERS = ("/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d")


def lacks() -> str:
    """Say what the machine lacks beside packages, as far as a look tells; empty where it lacks nothing."""
    named = os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES")
    there = named or any(list(Path(folder).glob("*.json")) for folder in _DRIVERS)
    return "" if there or sys.platform != "linux" else f"needs a Vulkan device: {SYSTEM}"


_ACTION_REPEAT = 2
_DECISIONS = 100
_SIDE = 384  # pixels of a picture, as in the official code
_OURS = ("num_envs", "obs_mode", "control_mode", "render_mode", "sim_backend", "max_episode_steps")
_LIFTED = 0.2  # metres above the table


class ManiSkill(Env):
    """A ManiSkill task, observed by its state.

    Args:
        task: one of `TASKS`.
        seed: of the generator that draws a seed for every episode.
        episodic: whether a success terminates an episode.
        settings: keyword arguments of the task.

    Raises:
        ConfigError: nothing to render with, objects that were not downloaded, or a setting that the task does not have.
    """

    action_repeat = _ACTION_REPEAT
    max_episode_steps = _DECISIONS

    def __init__(self, task: str, seed: int, episodic: bool = False, settings: Mapping[str, Any] | None = None) -> None:
        self.task, self._episodic = task, episodic
        self._random = np.random.RandomState(seed)
        self.env = _made(task, dict(settings or {}))
        self.obs_shape: tuple[int, ...] = tuple(self.env.observation_space.shape[1:])
        self.action_dim = int(self.env.action_space.shape[0])
        self.frames_per_second = self.env.unwrapped.control_freq / _ACTION_REPEAT
        self._decisions = 0

    @override
    def reset(self) -> Array:
        self._decisions = 0
        # The scene is built anew: in an old one the contacts of the last episode go on to count, for a hand that
        # seems to hold the cube before it has moved and, in some, for the last digits of what follows.
        obs, _ = self.env.reset(seed=int(self._random.randint(2**31)), options={"reconfigure": True})
        return _observed(obs)

    @override
    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        reward, done = 0.0, False
        for _ in range(_ACTION_REPEAT):
            obs, r, terminated, _, info = self.env.step(action)
            reward += float(r)
            done = self._episodic and bool(terminated)
            if done:
                break
        self._decisions += 1
        over = self._decisions >= self.max_episode_steps
        return _observed(obs), reward, done, over, {"success": float(info["success"])}

    @override
    def render(self, width: int = _SIDE, height: int = _SIDE) -> NDArray[np.uint8]:
        """Draw what the task's camera for people sees, fitted into this shape, as `Env.render`."""
        from ...pictures.frames import fitted, rgb

        try:
            picture = rgb(self.env.render())
        except RuntimeError as e:  # of Vulkan
            raise RenderError(f"{self.task}: no pictures: {in_a_line(e)}") from e
        return picture if picture.shape[:2] == (height, width) else fitted(picture, width, height)

    @override
    def overrides(self, cfg: Config) -> Config:
        return cfg

    @override
    def random_state(self) -> Any:
        return random_state.told(self._random)

    @override
    def set_random_state(self, state: Any) -> None:
        random_state.take(self._random, state)

    @override
    def close(self) -> None:
        self.env.close()


def make(cfg: Config, seed: int) -> Env:
    """Make the task of `cfg.task`, seeded.

    Raises:
        ConfigError: as `ManiSkill`; or `obs` is not `state`.
    """
    if cfg.obs != "state":
        raise ConfigError(f"config key 'obs': got {cfg.obs!r}, allowed: 'state' for {cfg.task!r}")
    return ManiSkill(cfg.task, seed, cfg.episodic, cfg.env_kwargs)


def _observed(obs: Any) -> NDArray[np.float32]:
    """Return the state of the one environment of a batch, (n,), in memory of its own."""
    return np.array(obs[0].numpy(), np.float32)


def _made(task: str, settings: dict[str, Any]) -> Any:
    """Return ManiSkill's environment of a task."""
    import gymnasium
    import mani_skill.envs  # noqa: F401 - which registers the tasks
    from mani_skill.utils.registration import REGISTERED_ENVS

    for key in _OURS:
        if key in settings:
            raise ConfigError(
                f"config key 'env.{key}': got {settings[key]!r}, allowed: nothing, since the task {task!r} defines it"
            )
    name, control_mode = _TASKS[task]
    if task == "lift-cube":
        _register_lift_cube()
    spec = REGISTERED_ENVS[name]
    _check_assets(task, spec.asset_download_ids)
    dense = "dense" in spec.cls.SUPPORTED_REWARD_MODES
    chosen = {
        "reward_mode": "dense" if dense else "sparse",
        "human_render_camera_configs": {"width": _SIDE, "height": _SIDE},
        **({} if "render_backend" in settings else {"render_backend": _renderer()}),
        **copy.deepcopy(settings),
    }
    try:
        return gymnasium.make(
            name,
            num_envs=1,
            obs_mode="state",
            control_mode=control_mode,
            render_mode="rgb_array",
            sim_backend="physx_cpu",  # the GPU's is made for hundreds of environments
            max_episode_steps=_ACTION_REPEAT * _DECISIONS + 1,  # ours ends the episode
            **chosen,
        )
    except Exception as e:  # of the task, or of the simulator
        if not settings:
            raise
        raise ConfigError(f"config key 'env': {task!r} cannot be made with these settings: {in_a_line(e)}") from e


@functools.cache
def _renderer() -> str:
    """Return the device to render on, a GPU if it can; raises `ConfigError` where none can."""
    import sapien

    why = []
    for name in ("cuda", "cpu"):
        try:
            sapien.render.RenderSystem(sapien.Device(name))
            return name
        except RuntimeError as e:
            why.append(f"{name}: {in_a_line(e)}")
    raise NotHereError(f"config key 'task': no Vulkan device can be used ({'; '.join(why)}). {SYSTEM}")


def _check_assets(task: str, names: list[str]) -> None:
    """Raise `ConfigError` where objects were not downloaded; ManiSkill would ask on standard input."""
    from mani_skill import ASSET_DIR
    from mani_skill.utils import assets

    for name in names:
        parts = [name]
        if name in assets.DATA_GROUPS:
            parts = assets.expand_data_group_into_individual_data_source_ids(name)
        missing = sum(not assets.is_data_source_downloaded(part) for part in parts)
        if missing:
            raise NotHereError(
                f"config key 'task': {task!r} needs ManiSkill's {name!r}, of which {missing} of {len(parts)} are "
                f"missing in {ASSET_DIR} (MS_ASSET_DIR chooses another folder); download them with "
                f"{sys.executable} -m mani_skill.utils.download_asset {name} -y"
            )


@functools.cache
def _register_lift_cube() -> None:
    """Register `LiftCube-v1`: PickCube without a goal in space; the cube is to be held still 0.2 m up.

    The reward is that of ManiSkill 2, at most 2.25 a step: 1 - tanh(5 d) for a hand at distance d
    from the cube, 0.25 for holding it, and the share of the way up while it is held; a success
    has it all. The state tells of no goal, since the height is always the same.
    """
    import torch
    from mani_skill.envs.tasks.tabletop.pick_cube import PickCubeEnv
    from mani_skill.utils.registration import register_env
    from mani_skill.utils.structs.pose import Pose

    most = 2.25

    @register_env("LiftCube-v1", max_episode_steps=200)
    class LiftCube(PickCubeEnv):  # type: ignore[misc]
        def _initialize_episode(self, env_idx: Any, options: Any) -> None:
            super()._initialize_episode(env_idx, options)
            place = self.cube.pose.p.clone()
            place[:, 2] = self.cube_half_size + _LIFTED
            self.goal_site.set_pose(Pose.create_from_pq(place))  # of pictures alone

        def evaluate(self) -> dict[str, Any]:
            is_lifted, is_still = self._height() >= _LIFTED, self.agent.is_static(0.2)
            return {
                "success": is_lifted & is_still,
                "is_obj_lifted": is_lifted,
                "is_robot_static": is_still,
                "is_grasped": self.agent.is_grasping(self.cube),
            }

        def _height(self) -> Any:
            return self.cube.pose.p[:, 2] - self.cube_half_size

        def _get_obs_extra(self, info: dict[str, Any]) -> dict[str, Any]:
            hand, cube = self.agent.tcp_pose, self.cube.pose
            return {
                "is_grasped": info["is_grasped"],
                "tcp_pose": hand.raw_pose,
                "obj_pose": cube.raw_pose,
                "tcp_to_obj_pos": cube.p - hand.p,
            }

        def compute_dense_reward(self, obs: Any, action: Any, info: dict[str, Any]) -> Any:
            distance = torch.linalg.norm(self.cube.pose.p - self.agent.tcp_pose.p, dim=1)
            lifted = (self._height() / _LIFTED).clamp(0, 1)
            reward = 1 - torch.tanh(5 * distance) + info["is_grasped"] * (0.25 + lifted)
            return torch.where(info["success"], most, reward)

        def compute_normalized_dense_reward(self, obs: Any, action: Any, info: dict[str, Any]) -> Any:
            return self.compute_dense_reward(obs, action, info) / most
