"""TD-MPC2 at the speed the hardware allows: same algorithm, same numbers.

from tdmpc2_fast import TDMPC2, WorldModel, Planner, ReplayBuffer, Config, accelerate, load

`tdmpc2_fast.train(env, steps=...)` trains on an environment.

What needs torch is imported when it is first asked for: a command line that prints its help does without.
"""

import os
from typing import TYPE_CHECKING

from . import moved  # noqa: F401
from .version import __version__

# torch's OpenMP threads spin for milliseconds between two small ops, so that a process beside
# them slows planning several times; threads that sleep at once wake too late instead. This
# many turns lie between: on two cores within 15% of the fastest when quiet, and 1.4 times
# faster than the default when not. Read once, when torch loads; who sets a policy keeps it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "6000")

if TYPE_CHECKING:
    from .agent import TDMPC2, load
    from .compat.accelerate import accelerate, deaccelerate
    from .compat.hub import pull, push
    from .config import Config
    from .learn.replay import ReplayBuffer
    from .model.world_model import WorldModel
    from .plan.planner import Planner
else:

    def __getattr__(name: str):
        """Return a name of `__all__`, or a module in this package, imported now."""
        from importlib import import_module
        from importlib.util import find_spec

        module = _HOMES.get(name, name)
        if name.startswith("_") or find_spec(f"{__name__}.{module}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = import_module(f".{module}", __name__)
        return getattr(found, name) if name in _HOMES else found


_HOMES = dict(
    TDMPC2="agent",
    load="agent",
    accelerate="compat.accelerate",
    deaccelerate="compat.accelerate",
    pull="compat.hub",
    push="compat.hub",
    Config="config",
    Planner="plan.planner",
    ReplayBuffer="learn.replay",
    WorldModel="model.world_model",
)
_MOVED = dict(
    backend="runtime.backend",
    checkpoint="model.checkpoint",
    planner="plan.planner",
    replay="learn.replay",
    update="learn.updater",
    world_model="model.world_model",
)

__all__ = [
    "TDMPC2",
    "Config",
    "Planner",
    "ReplayBuffer",
    "WorldModel",
    "__version__",
    "accelerate",
    "deaccelerate",
    "load",
    "pull",
    "push",
]


def __dir__() -> list[str]:
    """List what there is, imported yet or not."""
    return sorted({*globals(), *__all__})
