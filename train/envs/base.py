"""What the training loop asks of an environment."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import BackendError, ConfigError, NonFiniteError
from tdmpc2_fast.seeds import stream_seed

from . import patience
from .answers import EnvError, array, finite, flag, number, success
from .patience import patiently

_log = logging.getLogger(__name__)
_MOST_DROPPED = 10
FAILURES = (Exception, SystemExit)
"""What other people's code may raise without ending more than an episode."""
Array = NDArray[np.float32] | NDArray[np.uint8]
Actions = NDArray[np.float32]  # (A,), or more in front


class RenderError(BackendError):
    """A picture or video that cannot be made here; the message says what to install or set."""


class Env(Protocol):
    """One environment. Actions are in [-1, 1]; one step is one decision of the agent."""

    obs_shape: tuple[int, ...]
    action_dim: int
    max_episode_steps: int  # decisions
    action_repeat: int  # environment steps per decision
    frames_per_second: float  # decisions per second of simulated time

    def reset(self) -> Array:
        """Start an episode and return its observation, float32 (or uint8 pixels)."""
        ...

    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Make one decision; return observation, reward, terminated, truncated, info (with `success`, where told)."""
        ...

    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        """Draw an RGB picture (height, width, 3), uint8, which changes nothing in the environment.

        Raises:
            RenderError: the task has no pictures, or nothing here can draw them.
        """
        ...

    def overrides(self, cfg: Config) -> Config:
        """Return the config with the settings that the official code fixes for this task."""
        ...

    def random_state(self) -> Any:
        """Return all that the episodes to come are drawn from, JSON-ready; None where it cannot be told."""
        ...

    def set_random_state(self, state: Any) -> None:
        """Draw the episodes to come as the environment that told this `random_state` would have."""
        ...

    def close(self) -> None:
        """Free what the environment holds."""
        ...


class Step(NamedTuple):
    """What came of one decision in one environment."""

    obs: Array
    reward: float
    terminated: bool
    truncated: bool
    success: float


class EnvState(NamedTuple):
    """Where an environment stands, JSON-ready: its random state now, and when its episode began."""

    now: Any
    origin: Any


class Environments(Protocol):
    """The `num_envs` environments of a run, stepped together: in this process or in others.

    Equal seeds give equal trajectories wherever they run.
    """

    restarts: int
    """Times processes were started anew, over the whole run."""
    failures: Failures
    """Episodes dropped since their environment failed."""

    def reset(self, which: Sequence[int]) -> dict[int, Array]:
        """Start an episode in these environments and return observations by index.

        Others may be among them: those made anew meanwhile, whose episodes are lost.
        """
        ...

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Give every environment its action, (E, A); `step_wait` ends the step."""
        ...

    def step_wait(self) -> list[Step | None]:
        """Return what came of it; None where the environment had to be made anew and its episode is lost."""
        ...

    def tasks(self) -> Sequence[int]:
        """Return the task of each environment's episode, by index in `cfg.tasks`; of one task alone, none."""
        return ()

    def states(self) -> list[EnvState | None]:
        """Return where each stands between two steps; None where it was made anew and its episode is lost."""
        ...

    def restore(self, states: Sequence[EnvState], actions: Mapping[int, Actions]) -> dict[int, list[Step]]:
        """Take environments just made to where those stood that told `states`.

        actions: what has been done, (T, A), in the episodes under way, which are played again
            from their origin. What comes of it is returned by index, the reset (reward 0) first.
        """
        ...

    def close(self) -> None:
        """Free the environments."""
        ...


def reset(env: Env) -> Array:
    """Start an episode; an observation that is unusable, or does not come, raises `EnvError`."""
    return _observed(env, patiently(patience.RESET_SECONDS, env.reset))


def step(env: Env, action: Actions) -> Step:
    """Make one decision in one environment, and judge what it answers.

    Raises:
        EnvError: an answer in another form, one that no number can be learned from, or none in time.
    """
    answer: Any = patiently(patience.SECONDS, env.step, action)
    if not isinstance(answer, (tuple, list)) or len(answer) != 5:
        got = f"{len(answer)} values" if isinstance(answer, (tuple, list)) else type(answer).__name__
        raise EnvError(f"step: got {got}, allowed: observation, reward, terminated, truncated, info")
    obs, reward, terminated, truncated, info = answer
    found = number(reward, "reward")
    finite(found, "reward")
    ends = flag(terminated, "terminated"), flag(truncated, "truncated")
    return Step(_observed(env, obs), found, *ends, success(info))


def _observed(env: Env, obs: Any) -> Array:
    """Return an observation of its own memory: uint8 where `obs_shape` is an image's, else float32."""
    pixels = len(env.obs_shape) == 3
    found = array(obs, tuple(env.obs_shape), np.uint8 if pixels else np.float32, "observation")
    if not pixels:
        finite(found, "observation")
    return found


def check_actions(actions: NDArray[Any], obs: NDArray[Any]) -> None:
    """Raise `NonFiniteError` for actions of an agent that are NaN; no environment is to blame for them."""
    if not np.isfinite(actions).all():
        most = np.abs(obs.astype(np.float64)).max()
        raise NonFiniteError(f"action: got NaN from the agent, for observations of up to {most:.3g}; scale them down")


def whole_sizes(env: Env, task: str) -> None:
    """Raise `ConfigError` where sizes of an environment are no whole numbers: of numpy's, files hold none."""
    for name in ("action_dim", "max_episode_steps", "action_repeat"):
        value = getattr(env, name, None)
        if type(value) is not int or value < 1:
            raise ConfigError(f"config key 'task': {task}: {name} is {value!r}, allowed: an int of at least 1")


def state_of(env: Env) -> Any:
    """Return the random state of an environment; None where it cannot be told, or no file could hold it."""
    try:
        return json.loads(json.dumps(env.random_state()))
    except Exception:  # of somebody's own
        return None


def env_seed(seed: int, index: int, restart: int = 0) -> int:
    """Return the seed of environment `index` of a run; `restart` counts the times environments were made anew.

    The first environment has the run's own seed, as in the official code; every other one,
    and every one made anew, has a stream of its own.
    """
    if index == restart == 0:
        return seed
    return stream_seed(seed, f"env {index}" + (f" restart {restart}" if restart else "")) % 2**31


def close_all(envs: Iterable[Env]) -> None:
    """Close every environment; one that fails even at that is logged and left."""
    for env in envs:
        try:
            env.close()
        except FAILURES as e:  # what was learned from it is worth more than its last word
            _log.warning("an environment could not be closed: %s", in_a_line(e))


class Failures:
    """What becomes of the episodes of environments that fail, as `cfg.on_env_error` says.

    Args:
        cfg: a completed config.
        note: told in a line about episodes that are dropped.
        dropped: episodes of the run that were dropped so far.
    """

    def __init__(self, cfg: Config, note: Callable[[str], None], dropped: int = 0) -> None:
        self.cfg, self.note, self.dropped = cfg, note, dropped
        self.ended = 0
        """Episodes that came to their end."""

    def count(self, steps: Iterable[Step | None]) -> None:
        """Count the episodes that ended with these steps."""
        self.ended += sum(step is not None and (step.terminated or step.truncated) for step in steps)

    def replace(
        self, envs: list[Env] | dict[int, Env], index: int, error: BaseException, make: Callable[[int], Env]
    ) -> None:
        """Make environment `index` anew after an error; raises as `take` does."""
        self.take(index, error, name=getattr(envs[index], "name", None))
        close_all([envs[index]])
        envs[index] = make(index)

    def take(self, index: int, error: BaseException, trace: str = "", name: str | None = None) -> None:
        """Drop the episode of environment `index`, which must then be made anew.

        trace: where the error came from, if that was in another process.
        name: of the task that it plays; default `cfg.task`.

        Raises:
            EnvError: failures are to stop the run, or more were dropped than ten and a tenth of those that ended.
            Exception: where they stop it, an error of this process that is not ours, as it is.
        """
        where = f"{name or self.cfg.task}, environment {index}"
        if isinstance(error, SystemExit):
            error = EnvError(f"it called sys.exit({error.code!r})")
        if self.cfg.on_env_error == "stop":
            if isinstance(error, EnvError):
                raise EnvError(f"{where} raised\n{trace}" if trace else f"{where}: {error}")
            error.add_note(f"{where} raised it; on_env_error=drop goes on without such episodes")
            raise error
        most = _MOST_DROPPED + self.ended // 10
        if self.dropped >= most:
            raise EnvError(
                f"{where}: {in_a_line(error)}; got {self.dropped + 1} episodes that failed, allowed: {most} beside "
                f"{self.ended} that ended"
            )
        self.dropped += 1
        if self.dropped <= _MOST_DROPPED or self.dropped % 100 == 0:
            self.note(f"{where}: {in_a_line(error)}; the episode is dropped ({self.dropped} so far)")


def in_a_line(error: BaseException) -> str:
    """Return what an error says in a line; of others' errors, their kind, too."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (EnvError, ConfigError)) else f"{type(error).__name__}: {text}"
