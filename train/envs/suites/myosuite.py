"""The 10 MyoSuite tasks of a hand, official semantics.

One decision is one step of the suite. An episode lasts 100 decisions, which the suite's end
flags and its own time limits do not change. Success is that of the step (`solved`). Tasks
named `-hard` draw the goal, and some the object, anew for each episode. Settings
(`env.KEY=VALUE`) are those arguments of the suite's tasks that `_SETTINGS` names.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError

from ..answers import number
from ..base import Env, in_a_line
from ..mujoco_setup import keep_log_out_of_the_way, prepare_rendering
from .mujoco_task import Camera, MujocoTask, check_task, settings_of

REQUIREMENTS: tuple[str, ...] = (
    # The last that takes mujoco 3.1.2, gymnasium 0.29.1 and dm-control 1.0.16, which the official code names.
    # From 2.8.6 on the simulator is newer, and 3.0.0 has other tasks under the same names.
    "myosuite==2.8.5",
    "numpy==1.26.4",  # with numpy 2, this mujoco gives arrays that are wrong without a word
    "scipy==1.17.1",  # 2.0 is to end scipy.misc, which sk-video of its imports
    "typing_extensions",  # of this package
)
"""What is installed into the suite's interpreter."""

_IDS = {
    "reach": "Reach",
    "pose": "Pose",
    "obj-hold": "ObjHold",
    "key-turn": "KeyTurn",
    "pen-twirl": "PenTwirl",
}
_ID_OF = {
    f"myo-{name}{hard}": f"myoHand{part}{variant}-v0"
    for name, part in _IDS.items()
    for hard, variant in (("", "Fixed"), ("-hard", "Random"))
}
TASKS: tuple[str, ...] = tuple(_ID_OF)
_SETTINGS: dict[str, tuple[Any, ...] | None] = {
    "frame_skip": None,
    "muscle_condition": ("", "sarcopenia", "fatigue", "reafferentation"),
    "obs_keys": None,
    "weighted_reward_keys": None,
    "far_th": None,  # of reach
    "pose_thd": None,  # of pose
    "goal_th": None,  # of key-turn
}


class MyoSuite(MujocoTask):
    """A MyoSuite task; `seed` seeds the generator that draws its goals and objects."""

    def __init__(self, cfg: Config, seed: int) -> None:
        super().__init__(cfg)
        self.env = _made(cfg, seed)
        self.action_dim = int(self.env.action_space.shape[0])
        self.frames_per_second = 1 / float(self.env.dt)
        import mujoco

        sim = self.env.sim
        muscles = int(mujoco.mjtVisFlag.mjVIS_ACTUATOR), int(mujoco.mjtVisFlag.mjVIS_ACTIVATION)
        camera = Camera(sim.model.ptr, sim.data.ptr, "hand_side_inter", muscles)
        self.sees(camera, int(self.env.observation_space.shape[0]))

    @property
    @override
    def generator(self) -> np.random.Generator:
        found: np.random.Generator = self.env.np_random.np_random  # a wrapper's own
        return found

    @override
    def begin(self) -> NDArray[Any]:
        obs: NDArray[Any] = self.env.reset()[0]
        return obs

    @override
    def decide(self, action: NDArray[np.float32]) -> tuple[NDArray[Any], float, float]:
        obs, reward, _, _, info = self.env.step(action.copy())
        return obs, number(reward, "reward"), number(info["solved"], "info['solved']")


def make(cfg: Config, seed: int) -> Env:
    """Make the task, from states or (`obs=rgb`) pixels.

    Raises:
        ConfigError: a task or a setting that the suite does not have, or pixels where nothing draws.
    """
    check_task(cfg, TASKS, "MyoSuite")
    return MyoSuite(cfg, seed)


def _made(cfg: Config, seed: int) -> Any:
    """Return the suite's own environment, without the wrappers that end episodes."""
    prepare_rendering()
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # which it imports, and which refuses without a git program
    with contextlib.redirect_stdout(io.StringIO()):  # what it says of itself would come from every process
        import myosuite  # noqa: F401 - registers the tasks
    from gymnasium.envs.registration import load_env_creator, registry

    keep_log_out_of_the_way()
    spec: Any = registry[_ID_OF[cfg.task]]
    kind: Any = load_env_creator(spec.entry_point)
    settings = settings_of(cfg, {k: v for k, v in _SETTINGS.items() if k in _arguments(kind)})
    given = copy.deepcopy({**spec.kwargs, **settings})
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # credits
            return kind(**given, seed=seed)
    except Exception as e:
        if not settings:
            raise
        raise ConfigError(f"config key 'env': {cfg.task} cannot be made with these settings: {in_a_line(e)}") from e


def _arguments(kind: Any) -> set[str]:
    """Return what a task may be set up with; what it does not know, it would leave out without a word."""
    return {
        name for base in kind.__mro__ if "_setup" in vars(base) for name in inspect.signature(base._setup).parameters
    }
