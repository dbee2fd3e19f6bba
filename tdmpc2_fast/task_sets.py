"""What is known of the official tasks without making them, which their checkpoints do not tell.

Widths are those of the environments the official code makes, lengths count decisions. `tests/golden/README.md` says
where they were recorded. The order of a set's tasks is that of the rows of its models' task embedding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

_DMCONTROL = """
walker 24 6: stand walk run walk-backwards run-backwards
cheetah 17 6: run run-backwards run-front run-back jump
reacher 6 2: easy hard
reacher-three 8 3: easy hard
acrobot 6 1: swingup
pendulum 3 1: swingup spin
cartpole 5 1: balance balance-sparse swingup swingup-sparse
cup 8 2: catch spin
finger 9 2: spin
finger-turn 12 2: easy hard
fish 24 5: swim
hopper 15 4: stand hop hop-backwards
quadruped 78 12: walk run
humanoid 67 21: stand walk run
dog 223 38: stand walk trot run
"""
_MT30 = """
walker-stand walker-walk walker-run cheetah-run reacher-easy reacher-hard acrobot-swingup pendulum-swingup
cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse cup-catch finger-spin
finger-turn-easy finger-turn-hard fish-swim hopper-stand hopper-hop walker-walk-backwards walker-run-backwards
cheetah-run-backwards cheetah-run-front cheetah-run-back cheetah-jump hopper-hop-backwards reacher-three-easy
reacher-three-hard cup-spin pendulum-spin
"""
_META_WORLD = """
assembly basketball button-press-topdown button-press-topdown-wall button-press button-press-wall coffee-button
coffee-pull coffee-push dial-turn disassemble door-open door-close drawer-close drawer-open faucet-open faucet-close
hammer handle-press-side handle-press handle-pull-side handle-pull lever-pull peg-insert-side peg-unplug-side
pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-side plate-slide-back plate-slide-back-side
push-back push push-wall reach reach-wall shelf-place soccer stick-push stick-pull sweep-into sweep window-open
window-close bin-picking box-close door-lock door-unlock hand-insert
"""
_OTHERS_OF_100 = """
lift-cube pick-cube stack-cube pick-ycb turn-faucet myo-reach myo-reach-hard myo-pose myo-pose-hard myo-obj-hold
myo-obj-hold-hard myo-key-turn myo-key-turn-hard myo-pen-twirl myo-pen-twirl-hard
"""
_MUJOCO = {"mujoco-walker": 1000, "mujoco-halfcheetah": 1000, "bipedal-walker": 1600, "lunarlander-continuous": 500}
_WIDE_TASK_EMBEDDING = (1, 317)
_NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class OfficialTask:
    """A task of the official code: decisions per episode and, where they are known here, widths of state and action."""

    episode_length: int
    obs_dim: int | None = None
    action_dim: int | None = None


def _dmcontrol() -> dict[str, OfficialTask]:
    found: dict[str, OfficialTask] = {}
    for line in _DMCONTROL.split("\n")[1:-1]:
        head, _, names = line.partition(":")
        domain, obs_dim, action_dim = head.split()
        found |= {f"{domain}-{name}": OfficialTask(500, int(obs_dim), int(action_dim)) for name in names.split()}
    return found


_MT50 = tuple(f"mw-{name}" for name in _META_WORLD.split())
TASKS: dict[str, OfficialTask] = {
    **_dmcontrol(),
    **dict.fromkeys(_MT50, OfficialTask(100, 39, 4)),
    **dict.fromkeys(_OTHERS_OF_100.split(), OfficialTask(100)),
    **{name: OfficialTask(length) for name, length in _MUJOCO.items()},
}
"""The official single tasks by name."""

TASK_SETS: dict[str, tuple[str, ...]] = {"mt30": (*_MT30.split(),), "mt80": (*_MT30.split(), *_MT50)}
"""The tasks of the official multi-task models, in order."""


def own_set(tasks: Sequence[str], name: str | None) -> dict[str, Any]:
    """Return the config keys of one model for these tasks, by the name of the set.

    Raises:
        ConfigError: no name, or one that is taken or cannot be a folder's.
    """
    if name is None or not _NAME.fullmatch(name) or name in TASK_SETS or name in TASKS:
        taken = "other than those of tasks and sets there are"
        raise ConfigError(f"config key 'as': got {name!r}, allowed: a name of letters, digits and ._+-, {taken}")
    return dict(task=name, tasks=list(tasks))


def settings_of(task: str) -> dict[str, Any]:
    """Return the config keys that the official code sets by the task alone; none for a task it does not have."""
    if task not in TASKS:
        return {}
    found: dict[str, Any] = dict(episode_length=TASKS[task].episode_length)
    return found | dict(rho=0.7, discount_max=0.99) if task in _MUJOCO else found


def set_keys(task_set: str, model_size: int | None) -> dict[str, Any]:
    """Return the config keys of a multi-task model of a set: its tasks, their widths and lengths, the embedding's."""
    return keys_of(TASK_SETS[task_set], task_set, model_size)


def keys_of(names: tuple[str, ...], task_set: str, model_size: int | None) -> dict[str, Any]:
    """Return the config keys of a multi-task model of these tasks; none where the sizes of one are not known here.

    task_set: what the set is called.
    """
    tasks = [TASKS.get(name, OfficialTask(0)) for name in names]
    widths = [(t.obs_dim, t.action_dim) for t in tasks if t.obs_dim is not None and t.action_dim is not None]
    if len(widths) < len(names):
        return {}
    lengths = tuple(t.episode_length for t in tasks)
    return dict(
        multitask=True,
        tasks=names,
        action_dims=tuple(action for _, action in widths),
        episode_lengths=lengths,
        obs_shape={"state": (max(obs for obs, _ in widths),)},
        action_dim=max(action for _, action in widths),
        episode_length=max(lengths),
        task_dim=task_embedding_dim(task_set, model_size),
    )


def set_dims(task_set: str, model_size: int | None) -> dict[str, int]:
    """Return the dims in which a set's model of a size differs from other models of this size."""
    return dict(latent_dim=512) if (task_set, model_size) == ("mt30", 19) else {}


def task_embedding_dim(task_set: str, model_size: int | None) -> int:
    """Return the width of the task embedding that the official code uses for a task set and size."""
    return 96 if task_set == "mt80" or model_size in _WIDE_TASK_EMBEDDING else 64
