"""Where the environments of a run come from: a name, a factory, or objects that already are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.environment import length_of
from tdmpc2_fast.errors import ConfigError, kind_of

from .. import make_env
from ..base import Env, Environments
from ..device.base import DeviceEnvironments
from ..gymnasium_tasks import GymnasiumTask
from ..together import environments
from .vector import VectorEnvironments

_ALLOWED = "a task's name, a Gymnasium id, a gymnasium.Env, a function that makes one, or a gymnasium.vector.VectorEnv"
_OF_VECTORS = ("num_envs", "vectorization_mode", "max_episode_steps", "vector_kwargs", "wrappers")


class Source:
    """Makes the environments of a run by their task's name; default `cfg.task`.

    keys: of the config, which follow from what was given.
    shared: whether all are one environment, of which one episode at a time can be played.
    by_name: whether a command, and a worker process, can make them by `cfg.task`.
    tried: whether to try it before the run.
    """

    shared = False
    by_name = True
    tried = True

    def __init__(self, task: str | None = None) -> None:
        self.keys: dict[str, Any] = {} if task is None else dict(task=task)

    def make(self, cfg: Config, seed: int) -> Env:
        """Make an environment of a config, seeded.

        Raises:
            ConfigError: it cannot be made or used.
        """
        return make_env(cfg.replace(**self.keys), seed)

    def form(self, cfg: Config) -> Env:
        """Return an environment of which only what it tells of itself is wanted: sizes, spaces, length."""
        return self.make(cfg, cfg.seed)

    def first(self, cfg: Config, seed: int) -> Env:
        """Return the first environment of a run, which `together` is given."""
        return self.make(cfg, seed)

    def together(
        self, cfg: Config, first: Env, note: Callable[[str], None], restarts: int = 0, dropped: int = 0
    ) -> Environments | DeviceEnvironments:
        """Return the `num_envs` environments of a run; arguments as for `envs.together.environments`."""
        return environments(cfg, first, note, restarts, dropped, None if self.by_name else self.make)


class _Factory(Source):
    """Makes environments by a function without arguments, which worker processes get by cloudpickle."""

    by_name = False

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self.function = function
        self._made: list[weakref.ref[Any]] = []  # no set: whether two are equal is for their class to say
        self.keys = dict(task=getattr(function, "__name__", type(function).__name__).strip("<>"))

    @override
    def make(self, cfg: Config, seed: int) -> Env:
        env = self.function()
        if not _is_env(env):
            raise ConfigError(f"env: the function made {kind_of(env)}, allowed: a gymnasium.Env")
        self._made = [made for made in self._made if made() is not None]
        if any(made() is env.unwrapped for made in self._made):
            raise ConfigError(
                "env: the function made the same environment twice, allowed: a new one for each call, or, to train in "
                "one alone, the environment itself"
            )
        self._made.append(weakref.ref(env.unwrapped))
        return _Handed(env, cfg, seed)

    def __getstate__(self) -> dict[str, Any]:
        import cloudpickle

        return dict(keys=self.keys, function=cloudpickle.dumps(self.function))

    def __setstate__(self, state: dict[str, Any]) -> None:
        import cloudpickle

        self.__init__(cloudpickle.loads(state["function"]))  # type: ignore[misc]


class _One(Source):
    """One environment, which is trained and evaluated in, one episode after another, and left open."""

    shared = True
    by_name = False
    tried = False  # what it records or counts is of the run

    def __init__(self, env: Any) -> None:
        super().__init__()
        self.env = env
        self.keys = dict(task=_name_of(env), num_envs=1, env_workers=0)

    @override
    def make(self, cfg: Config, seed: int) -> Env:
        return _Handed(self.env, cfg, seed, ours=False)


class _Vector(Source):
    """A vector of environments, trained in as it is; others of its kind are evaluated in."""

    by_name = tried = False

    def __init__(self, env: Any) -> None:
        super().__init__()
        self.env = env
        self.keys = dict(task=_name_of(env), num_envs=int(env.num_envs), env_workers=0)

    @override
    def form(self, cfg: Config) -> Env:
        env = self.env
        one = SimpleNamespace(
            observation_space=env.single_observation_space,
            action_space=env.single_action_space,
            unwrapped=env.unwrapped,
            metadata=env.metadata,
            close=lambda: None,
        )
        return GymnasiumTask(one, cfg, cfg.seed, length_of(env) or cfg.episode_length)

    @override
    def first(self, cfg: Config, seed: int) -> Env:
        return self.form(cfg)

    @override
    def make(self, cfg: Config, seed: int) -> Env:
        import gymnasium

        functions = getattr(self.env.unwrapped, "env_fns", None)
        if functions:
            return _Handed(functions[0](), cfg, seed)
        spec = getattr(self.env, "spec", None)
        if spec is None:
            raise ConfigError(
                f"eval_env: got None, and {_name_of(self.env)} does not tell how one of its environments is made; "
                f"allowed: {_ALLOWED}"
            )
        # Of a vector with an entry point of its own, the settings of the vector are among those of its environments.
        settings = {k: v for k, v in spec.kwargs.items() if k not in _OF_VECTORS}
        one = gymnasium.make(spec.id, max_episode_steps=spec.max_episode_steps, **settings)
        return _Handed(one, cfg, seed)

    @override
    def together(
        self, cfg: Config, first: Env, note: Callable[[str], None], restarts: int = 0, dropped: int = 0
    ) -> Environments:
        first.close()
        return VectorEnvironments(self.env, cfg, note)


class _Handed(GymnasiumTask):
    """An environment that somebody's program has made.

    ours: whether to close it at the end.
    """

    def __init__(self, env: Any, cfg: Config, seed: int, ours: bool = True) -> None:
        import gymnasium

        self._ours = ours
        limit = length_of(env)
        if limit is None and cfg.episode_length is not None:
            env = gymnasium.wrappers.TimeLimit(env, cfg.episode_length)
        super().__init__(env, cfg, seed, limit or cfg.episode_length)

    @override
    def close(self) -> None:
        if self._ours:
            super().close()

    @override
    def random_state(self) -> dict[str, Any] | None:
        # That of a shared environment is told by none of those who share it.
        return super().random_state() if self._ours else None


def source_of(env: Any) -> Source:
    """Return where the environments of a run come from.

    env: as `train` takes it; None and names are of tasks.

    Raises:
        ConfigError: something else, or an environment whose actions or observations are missing.
    """
    if isinstance(env, Source):
        return env
    if env is None or isinstance(env, str):
        return Source(env)
    import gymnasium

    if isinstance(env, gymnasium.vector.VectorEnv):
        return _Vector(env)
    if _is_env(env):
        return _One(env)
    if callable(env):
        return _Factory(env)
    hint = ""
    if hasattr(env, "reset") and hasattr(env, "step"):
        hint = "; an environment of another package needs a wrapper that makes it one, such as those of shimmy"
    if isinstance(env, Sequence):
        hint = "; of several, gymnasium.vector.SyncVectorEnv([make, make])"
    raise ConfigError(f"env: got {type(env).__module__}.{kind_of(env)}, allowed: {_ALLOWED}{hint}")


def _is_env(env: Any) -> bool:
    import gymnasium

    return isinstance(env, gymnasium.Env)


def _name_of(env: Any) -> str:
    spec = getattr(env, "spec", None)
    return str(spec.id) if spec is not None and spec.id else type(env.unwrapped).__name__
