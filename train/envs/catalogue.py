"""Official task names of suites this version does not have, so that asking for one gets a straight answer."""

from __future__ import annotations

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
