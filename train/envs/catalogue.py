"""What is known of tasks without making them: whose they are, what they lack here, which are worth a line in a list."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

_BOX2D = ("bipedal-walker", "lunarlander-continuous", "BipedalWalker", "LunarLander", "CarRacing")
# Of Gymnasium's own environments: discrete actions, or in JAX, or wrappers around something that is to be given.
_NOT_FOR_US = ("CartPole", "MountainCar", "Acrobot", "LunarLander", "GymV21Environment", "GymV26Environment")
_MODULES_NOT_FOR_US = tuple(f"gymnasium.envs.{name}." for name in ("toy_text", "tabular", "phys2d"))


def lacks(task: str) -> str:
    """Advise what to install for a task of Gymnasium; the text is empty where nothing is known to be missing."""
    if task.startswith(_BOX2D) and importlib.util.find_spec("Box2D") is None:
        return "needs pip install 'tdmpc2-fast[box2d]'"
    return ""


def with_continuous_actions(registry: Mapping[str, Any]) -> list[str]:
    """List the newest version of each environment in Gymnasium's registry that may have continuous actions."""
    newest: dict[tuple[str | None, str], Any] = {}
    for spec in registry.values():
        before = newest.setdefault((spec.namespace, spec.name), spec)
        if (spec.version or 0) > (before.version or 0):
            newest[spec.namespace, spec.name] = spec
    return [
        spec.id
        for spec in newest.values()
        if spec.name not in _NOT_FOR_US and not str(spec.entry_point).startswith(_MODULES_NOT_FOR_US)
    ]
