"""TD-MPC2 at the speed the hardware allows: same algorithm, same numbers.

from tdmpc2_fast import TDMPC2, WorldModel, Planner, ReplayBuffer, Config, load
"""

import os

# torch's OpenMP threads spin for milliseconds between two small ops; when another process
# wants the cores that slows planning several times. A short spin costs nothing on a quiet
# machine. Read once, when torch loads; whoever sets a policy of their own keeps it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from .agent import TDMPC2, load
from .config import Config
from .planner import Planner
from .replay import ReplayBuffer
from .version import __version__
from .world_model import WorldModel

__all__ = ["TDMPC2", "Config", "Planner", "ReplayBuffer", "WorldModel", "__version__", "load"]
