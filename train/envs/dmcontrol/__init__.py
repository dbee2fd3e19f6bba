"""DMControl: the 28 tasks of the suite that the paper trains on, the 11 that it adds, and the rest of the suite."""

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError

from ..base import Env, RenderError
from ..pixels import SIZE
from .names import MORE, TASKS
from .seen import Pixels
from .task import DMControl

__all__ = ["MORE", "TASKS", "DMControl", "Pixels", "make"]


def make(cfg: Config, seed: int) -> Env:
    """Make a task, from states or (`obs=rgb`) pixels.

    Raises:
        ConfigError: pixels, and nothing here draws any.
    """
    if cfg.obs == "state":
        return DMControl(cfg.task, seed, cfg.env_kwargs)
    env = Pixels(cfg.task, seed, cfg.env_kwargs)
    try:
        env.render(SIZE, SIZE)
    except RenderError as e:
        raise ConfigError(f"config key 'obs': 'rgb' needs a renderer; {e}") from e
    return env
