"""Gymnasium-Robotics: its ids (`FetchReach-v4`, `AntMaze_UMaze-v5`, ...) are there once it has been imported."""

from __future__ import annotations

import re
import types
from typing import Any

import numpy as np

from tdmpc2_fast.errors import ConfigError

_OF_ROBOTICS = re.compile(
    r"(Fetch(Reach|Push|Slide|PickAndPlace)|Hand(Reach|Manipulate)|AdroitHand|(Ant|Point)Maze_|FrankaKitchen)\w*-v\d+"
)


def register(name: str) -> None:
    """Register the ids of Gymnasium-Robotics, if `name` looks like one of them.

    Raises:
        ConfigError: the package is not installed.
    """
    if not _OF_ROBOTICS.fullmatch(name):
        return
    try:
        import gymnasium_robotics  # noqa: F401 - which registers them
        from gymnasium_robotics.utils import mujoco_utils
    except ImportError as e:
        raise ConfigError(
            f"config key 'task': {name!r} needs {e.name or e}; pip install 'tdmpc2-fast[robotics]'"
        ) from e
    _let_joint_types_be_found(mujoco_utils)


def _let_joint_types_be_found(module: Any) -> None:
    """Let this module see MuJoCo's kinds of joints as numbers.

    It looks for numpy's numbers in tuples of them, which newer releases of MuJoCo (3.12, not 3.8)
    call unequal, and fails to make the arms and hands.
    """
    kinds = module.mujoco.mjtJoint
    if np.int32(kinds.mjJNT_HINGE) in (kinds.mjJNT_HINGE,):
        return
    seen = types.ModuleType("mujoco")
    seen.__dict__.update(vars(module.mujoco))
    seen.mjtJoint = types.SimpleNamespace(**{k: int(v) for k, v in kinds.__members__.items()})  # type: ignore[attr-defined]
    module.mujoco = seen
