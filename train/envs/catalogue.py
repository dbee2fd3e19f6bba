"""What is known of tasks without making them: whose they are, what they lack here, which are worth a line in a list."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

_BOX2D = ("bipedal-walker", "lunarlander-continuous", "BipedalWalker", "LunarLander", "CarRacing")
# Of Gymnasium's own environments: discrete actions, or in JAX, or wrappers around something that is to be given.
_NOT_FOR_US = ("CartPole", "MountainCar", "Acrobot", "LunarLander", "GymV21Environment", "GymV26Environment")
_MODULES_NOT_FOR_US = tuple(f"gymnasium.envs.{name}." for name in ("toy_text", "tabular", "phys2d"))

_CUSTOM_DMCONTROL = """
walker-walk-backwards walker-run-backwards cheetah-run-backwards cheetah-run-front cheetah-run-back
cheetah-jump hopper-hop-backwards reacher-three-easy reacher-three-hard cup-spin pendulum-spin
"""
_META_WORLD = """
mw-assembly mw-basketball mw-bin-picking mw-box-close mw-button-press mw-button-press-topdown
mw-button-press-topdown-wall mw-button-press-wall mw-coffee-button mw-coffee-pull mw-coffee-push mw-dial-turn
mw-disassemble mw-door-close mw-door-lock mw-door-open mw-door-unlock mw-drawer-close mw-drawer-open
mw-faucet-close mw-faucet-open mw-hammer mw-hand-insert mw-handle-press mw-handle-press-side mw-handle-pull
mw-handle-pull-side mw-lever-pull mw-peg-insert-side mw-peg-unplug-side mw-pick-out-of-hole mw-pick-place
mw-pick-place-wall mw-plate-slide mw-plate-slide-back mw-plate-slide-back-side mw-plate-slide-side mw-push
mw-push-back mw-push-wall mw-reach mw-reach-wall mw-shelf-place mw-soccer mw-stick-pull mw-stick-push mw-sweep
mw-sweep-into mw-window-close mw-window-open
"""
_MANISKILL = """
lift-cube pick-cube stack-cube pick-ycb turn-faucet
"""
_MYOSUITE = """
myo-reach myo-reach-hard myo-pose myo-pose-hard myo-obj-hold myo-obj-hold-hard myo-key-turn myo-key-turn-hard
myo-pen-twirl myo-pen-twirl-hard
"""

PLANNED: dict[str, str] = {
    name: suite
    for suite, block in {
        "the custom DMControl tasks": _CUSTOM_DMCONTROL,
        "Meta-World": _META_WORLD,
        "ManiSkill": _MANISKILL,
        "MyoSuite": _MYOSUITE,
        "multi-task training": "mt30 mt80",
    }.items()
    for name in block.split()
}
"""Suite by task name."""


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
