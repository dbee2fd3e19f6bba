"""DMControl: the 28 tasks of the suite that the paper trains on, the 11 that it adds, and the rest of the suite."""

from .names import MORE, TASKS
from .task import DMControl, Pixels, make

__all__ = ["MORE", "TASKS", "DMControl", "Pixels", "make"]
