"""What it takes to train: environments, the online loop, evaluation, logs, the command line.

The module can be called: `tdmpc2_fast.train(env, steps=...)` is `tdmpc2_fast.train.api.train`.
"""

import sys
from types import ModuleType
from typing import Any

_MOVED = dict(
    curves="pictures.curves",
    online="run.trainer",
    plan_picture="pictures.plan_picture",
    plots="pictures.plots",
    runs="run.lifecycle",
    video="pictures.video",
)


class _Callable(ModuleType):
    def __call__(self, *args: Any, **keys: Any) -> Any:
        """Train an agent; see `tdmpc2_fast.train.api.train`."""
        from .api import train

        return train(*args, **keys)


sys.modules[__name__].__class__ = _Callable
