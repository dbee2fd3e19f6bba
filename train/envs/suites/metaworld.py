"""The 50 Meta-World tasks, official semantics.

One decision repeats the action for two steps and sums the rewards; the observation is the one
after the second. An episode lasts 100 decisions, which the suite's own end flags do not change.
Right after a reset, one step with a zero action is taken that nobody sees: the observation
returned is that of the reset. The goal is observed, and drawn anew for each episode. Success
is kept: once reached, it stays 1 until the episode ends. Settings (`env.KEY=VALUE`) are
`reward_function_version`, v2 (as officially) or v1.

The official code has version 2 of these tasks, in an older simulator; what can be installed is
version 3. Its rewards are the same formulas, but for handle-pull (a bonus is given sooner) and
button-press-topdown-wall (an open gripper counts, not a closed one); the two
button-press-topdown tasks are solved at 24 mm, not at 20; and how far the gripper is open is
measured between other points.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config

from ..answers import number
from ..base import Env
from ..mujoco_setup import keep_log_out_of_the_way, prepare_rendering
from .mujoco_task import Camera, MujocoTask, check_task, settings_of

REQUIREMENTS: tuple[str, ...] = (
    "metaworld==3.1.1",  # takes mujoco 3.3.0 and no other: of newer ones, the welds of its models have another form
    "gymnasium==1.4.0",  # of which it inherits; its own bound is 1.1
    "numpy==2.4.6",  # computes rewards and draws goals
    "scipy==1.17.1",  # computes the rotations of objects that are observed
    "packaging",  # which gymnasium's renderer imports, and nobody declares
    "typing_extensions",  # of this package
)
"""What is installed into the suite's interpreter."""

_NAMES = """
assembly basketball bin-picking box-close button-press button-press-topdown button-press-topdown-wall
button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock door-open
door-unlock drawer-close drawer-open faucet-close faucet-open hammer hand-insert handle-press handle-press-side
handle-pull handle-pull-side lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place
pick-place-wall plate-slide plate-slide-back plate-slide-back-side plate-slide-side push push-back push-wall reach
reach-wall shelf-place soccer stick-pull stick-push sweep sweep-into window-close window-open
"""
TASKS: tuple[str, ...] = tuple(f"mw-{name}" for name in _NAMES.split())
_ACTION_REPEAT = 2
_SETTINGS: dict[str, tuple[Any, ...] | None] = {"reward_function_version": ("v1", "v2")}


class MetaWorld(MujocoTask):
    """A Meta-World task; `seed` seeds the generator that draws its goals and objects."""

    action_repeat = _ACTION_REPEAT

    def __init__(self, cfg: Config, seed: int) -> None:
        super().__init__(cfg)
        settings = settings_of(cfg, _SETTINGS)
        prepare_rendering()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

        keep_log_out_of_the_way()
        self.env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{cfg.task.removeprefix('mw-')}-v3-goal-observable"](seed=seed)
        # Else every episode has the goal of the first, or draws one from numpy's global generator.
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True
        self.env.reward_function_version = settings.get("reward_function_version", "v2")
        self.env.model.cam_pos[2] = [0.75, 0.075, 0.7]  # of corner2, from where the official videos are taken
        self.action_dim = int(self.env.action_space.shape[0])
        self.frames_per_second = 1 / (_ACTION_REPEAT * float(self.env.dt))
        self._success = 0.0
        # Upside down: it was made for a renderer whose pictures were.
        camera = Camera(self.env.model, self.env.data, "corner2", upside_down=True)
        self.sees(camera, int(self.env.observation_space.shape[0]))

    @property
    @override
    def generator(self) -> np.random.Generator:
        found: np.random.Generator = self.env.np_random
        return found

    @override
    def begin(self) -> NDArray[Any]:
        self._success = 0.0
        obs: NDArray[Any] = self.env.reset()[0]
        self.env.step(np.zeros(self.action_dim, np.float32))
        return obs

    @override
    def decide(self, action: NDArray[np.float32]) -> tuple[NDArray[Any], float, float]:
        total = 0.0
        for _ in range(_ACTION_REPEAT):
            obs, reward, _, _, info = self.env.step(action.copy())
            total += float(reward)
            self._success = max(self._success, number(info["success"], "info['success']"))
        return obs, total, self._success


def make(cfg: Config, seed: int) -> Env:
    """Make the task, from states or (`obs=rgb`) pixels.

    Raises:
        ConfigError: a task or a setting that the suite does not have, or pixels where nothing draws.
    """
    check_task(cfg, TASKS, "Meta-World")
    return MetaWorld(cfg, seed)
