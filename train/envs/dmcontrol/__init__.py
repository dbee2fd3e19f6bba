"""DMControl: the 28 tasks of the suite that the paper trains on, the 11 that it adds, and the rest of the suite."""

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError

from ..base import Env, RenderError
from ..pixels import SIZE
from . import envpool_engine
from .names import MORE, TASKS
from .seen import Pixels
from .task import DMControl

__all__ = ["MORE", "TASKS", "DMControl", "Pixels", "make"]


def make(cfg: Config, seed: int) -> Env:
    """Make a task, from states or (`obs=rgb`) pixels.

    `env.engine=envpool` is of the environments that a run trains in; those it is evaluated in are these.

    Raises:
        ConfigError: pixels, and nothing here draws any; or an engine that does not step this task.
    """
    settings = dict(cfg.env_kwargs or {})
    if envpool_engine.wanted(cfg):
        envpool_engine.check(cfg)
    elif "engine" in settings:
        raise ConfigError(f"config key 'env.engine': got {settings['engine']!r}, allowed: {envpool_engine.ENGINE}")
    settings.pop("engine", None)
    if cfg.obs == "state":
        return DMControl(cfg.task, seed, settings)
    env = Pixels(cfg.task, seed, settings)
    try:
        env.render(SIZE, SIZE)
    except RenderError as e:
        raise ConfigError(f"config key 'obs': 'rgb' needs a renderer; {e}") from e
    return env
