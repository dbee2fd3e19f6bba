"""DMControl: the 28 tasks of the suite that the paper trains on, the 11 that it adds, and the rest of the suite."""

from .names import TASKS, accepts
from .task import DMControl, Pixels, make

__all__ = ["TASKS", "DMControl", "Pixels", "accepts", "make"]
