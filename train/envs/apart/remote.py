"""Environments of another interpreter, one process each, as if they were in this one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError

from .. import patience
from ..answers import EnvError, NotHereError
from ..base import Array, Env, Step, in_a_line, reset, step
from . import interpreters, workers
from .processes import GuestProcess
from .serve import BEGUN


def installed(package: str) -> bool:
    """Tell whether a package can be imported; a folder that is merely called like it cannot."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


@dataclass(frozen=True)
class Apart:
    """A suite that has an interpreter of its own.

    name: of the interpreter.
    title: of the suite, for people.
    package: that it needs, by the name it is imported by.
    """

    name: str
    title: str
    package: str

    @property
    def module(self) -> ModuleType:
        """Our module of the suite, which imports without its package: `TASKS`, `REQUIREMENTS`, `make`."""
        return importlib.import_module(f"tdmpc2_fast.train.envs.suites.{self.name}")

    @property
    def python(self) -> Path | None:
        """The interpreter to step it in; None for this one.

        Raises:
            NotHereError: there is none, with the command that makes it.
        """
        if why := self.needs():
            raise NotHereError(f"config key 'task': {self.title} {why}")
        own = interpreters.here(self.name) or interpreters.missing(self.name, self.module.REQUIREMENTS)
        return None if own else interpreters.python_of(self.name)

    @property
    def command(self) -> str:
        """What installs it."""
        return interpreters.command(self.name)

    def needs(self) -> str:
        """Say what is missing to step it; the text is empty where its interpreter is there, or else its package."""
        if interpreters.here(self.name):
            return ""
        why = interpreters.missing(self.name, self.module.REQUIREMENTS)
        if why and not installed(self.package):
            return why
        lacks: Callable[[], str] = getattr(self.module, "lacks", lambda: "")
        return lacks()

    def make(self, cfg: Config, seed: int) -> Env:
        """Make an environment, in a process of the suite's interpreter unless this is one."""
        python = self.python
        if python is None:
            found: Env = self.module.make(cfg, seed)
            return found
        return RemoteEnv(python, self.make, cfg, seed)


class Single:
    """What such a process serves: an environment, whose answers it judges."""

    def __init__(self, make: Callable[[Config, int], Env], cfg: Config, seed: int) -> None:
        self.env = make(cfg, seed)

    def facts(self) -> dict[str, Any]:
        """Return what the environment tells of itself."""
        names = ("obs_shape", "action_dim", "max_episode_steps", "action_repeat", "frames_per_second")
        found = {name: getattr(self.env, name) for name in names}
        return found | {"notes": list(getattr(self.env, "notes", ())), "frames": getattr(self.env, "frames", 1)}

    def reset(self) -> Array:
        """Start an episode."""
        return reset(self.env)

    def step(self, action: NDArray[np.float32]) -> tuple[Any, ...]:
        """Make a decision."""
        return tuple(step(self.env, action))

    def __getattr__(self, name: str) -> Any:
        """Return a method of the environment: `render`, `overrides`, `random_state`, ..."""
        return getattr(self.env, name)


class RemoteEnv(Env):
    """An environment in a process of another interpreter.

    Args:
        python: the interpreter.
        make: makes the environment there; pickled.
        cfg: a config.
        seed: of the environment.

    Raises:
        ConfigError: it cannot be made there.
    """

    def __init__(self, python: Path, make: Callable[[Config, int], Env], cfg: Config, seed: int) -> None:
        self.task = cfg.task
        self._lock = threading.Lock()  # of one question and its answer
        try:
            self._process = GuestProcess(python, functools.partial(Single, make, cfg, seed))
            # Also where nobody closes it, and when this interpreter ends.
            self._end = weakref.finalize(self, _end, self._process)
            if self._answer(workers.START_SECONDS) != BEGUN:
                raise EnvError("its process did not begin")
            facts = self._ask("facts", limit=workers.START_SECONDS)
        except ConfigError:
            self.close()
            raise
        except Exception as e:
            self.close()
            raise ConfigError(f"config key 'task': {cfg.task} cannot be made: {in_a_line(e)}") from e
        self.obs_shape: tuple[int, ...] = facts["obs_shape"]
        self.action_dim: int = facts["action_dim"]
        self.max_episode_steps: int = facts["max_episode_steps"]
        self.action_repeat: int = facts["action_repeat"]
        self.frames_per_second: float = facts["frames_per_second"]
        self.notes: list[str] = facts["notes"]
        self.frames: int = facts["frames"]

    def _ask(self, name: str, *args: Any, limit: float | None = None) -> Any:
        """Return what a method of `Single` returned there, or raise what it raised.

        Raises:
            EnvError: the process died, or gave no answer in time and was killed; or an error that is not ours.
        """
        with self._lock:
            if not self._end.alive:
                raise EnvError(f"{self.task}: the environment is closed")
            try:
                self._process.pipe.send((name, *args))
            except OSError as e:
                raise EnvError(self._process.ended()) from e
            error, answer = self._answer(limit or workers.ANSWER_SECONDS)
        if error is None:
            return answer
        ours, line, trace = error
        if ours is not None:
            raise ours
        unknown = EnvError(line)
        unknown.add_note(trace)
        raise unknown

    def _answer(self, limit: float) -> Any:
        process = self._process
        try:
            if process.pipe.poll(limit):
                return process.pipe.recv()
        except (EOFError, OSError) as e:
            process.join(1.0)
            raise EnvError(process.ended()) from e
        except BaseException:  # Ctrl-C, or the caller's patience: what comes later would be taken for another answer
            process.kill()
            self._end()
            raise
        process.kill()
        self._end()
        raise EnvError(f"gave no answer in {limit:g} s and was killed")

    @override
    def reset(self) -> Array:
        return self._ask("reset", limit=patience.RESET_SECONDS)  # type: ignore[no-any-return]

    @override
    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        found = Step(*self._ask("step", action))
        return (*found[:4], {"success": found.success})

    @override
    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        return self._ask("render", width, height)  # type: ignore[no-any-return]

    @override
    def overrides(self, cfg: Config) -> Config:
        return self._ask("overrides", cfg)  # type: ignore[no-any-return]

    @override
    def random_state(self) -> Any:
        return self._ask("random_state")

    @override
    def set_random_state(self, state: Any) -> None:
        self._ask("set_random_state", state)

    @override
    def close(self) -> None:
        if hasattr(self, "_end"):
            self._end()


def _end(process: GuestProcess) -> None:
    """End a process: by closing its pipe, and if that is not enough, by force."""
    process.pipe.close()
    process.join(workers.CLOSE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
