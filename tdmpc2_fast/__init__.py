"""TD-MPC2 at the speed the hardware allows: same algorithm, same numbers.

from tdmpc2_fast import TDMPC2, WorldModel, Planner, ReplayBuffer, Config, load
"""

import os

# torch's OpenMP threads spin for milliseconds between two small ops, so that a process beside
# them slows planning several times; threads that sleep at once wake too late instead. This
# many turns lie between: on two cores within 15% of the fastest when quiet, and 1.4 times
# faster than the default when not. Read once, when torch loads; who sets a policy keeps it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "6000")

from .agent import TDMPC2, load
from .config import Config
from .planner import Planner
from .replay import ReplayBuffer
from .version import __version__
from .world_model import WorldModel

__all__ = ["TDMPC2", "Config", "Planner", "ReplayBuffer", "WorldModel", "__version__", "load"]
