"""DMControl on EnvPool (`env.engine=envpool`): the environments of a run, stepped by threads without Python.

Physics, rewards and observations are those of dm_control: from the same state, 24 of the standard
tasks agree to rounding (`tests/train/envs/dmcontrol/test_envpool_engine.py`; a dog to about 1e-6). First
states come from the same distributions by another generator, so that a seed plays other episodes;
rewards are float32. Left out are `cup-catch`, whose ball counts as caught before it is, and the
three of `finger`, which goes another way once it touches the spinner.

EnvPool fixes seeds when a pool is made and tells no state of its generators. An environment's
episodes depend on its seed and their number alone, so those two are its random state, and it is
restored by as many resets. A pool is made anew at most once, for that, since closed ones leak.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.runtime.cores import cores

from ..answers import EnvError, finite
from ..base import Actions, Array, Environments, EnvState, Failures, Step, env_seed

ENGINE = "envpool"
_AGREE = """
acrobot-swingup cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse cheetah-run
dog-run dog-stand dog-trot dog-walk fish-swim hopper-hop
hopper-stand humanoid-run humanoid-stand humanoid-walk pendulum-swingup quadruped-run quadruped-walk
reacher-easy reacher-hard walker-run walker-stand walker-walk
"""
TASKS = tuple(_AGREE.split())
_ACTION_REPEAT = 2
_DECISIONS = 500
_OBSERVED = {  # where EnvPool tells more, or in another order
    "dog": "joint_angles joint_velocites torso_pelvis_height z_projection torso_com_velocity inertial_sensors "
    "foot_forces touch_sensors actuator_state",
    "fish": "joint_angles upright target velocity",
    "humanoid": "joint_angles head_height extremities torso_vertical com_velocity velocity",
    "quadruped": "egocentric_state torso_velocity torso_upright imu force_torque",
}

_Seen = Mapping[str, NDArray[np.float64]]


def wanted(cfg: Config) -> bool:
    """Tell whether a config of a DMControl task asks for EnvPool."""
    return (cfg.env_kwargs or {}).get("engine") == ENGINE


def check(cfg: Config) -> None:
    """Raise `ConfigError` for what EnvPool cannot step as dm_control would: other tasks, pixels, other settings."""
    if cfg.task not in TASKS:
        raise ConfigError(
            f"config key 'env.engine': got {ENGINE!r}, allowed: with the {len(TASKS)} DMControl tasks on which it "
            f"agrees with dm_control, not with {cfg.task!r}"
        )
    if cfg.obs != "state":
        raise ConfigError(f"config key 'obs': got {cfg.obs!r}, allowed: 'state' with env.engine={ENGINE}")
    for key, value in (cfg.env_kwargs or {}).items():
        if key != "engine":
            raise ConfigError(f"config key 'env.{key}': got {value!r}, allowed: nothing with env.engine={ENGINE}")


def pool_of(task: str, seeds: Sequence[int], threads: int = 1) -> Any:
    """Make EnvPool's environments of a standard task, one for each seed, which end no episode themselves.

    Raises:
        ConfigError: EnvPool is not installed.
    """
    try:
        import envpool
    except ImportError as e:
        raise ConfigError(
            f"config key 'env.engine': {ENGINE!r} needs {e.name or e}; pip install 'tdmpc2-fast[envpool]'"
        ) from e
    return envpool.make(
        "".join(word.capitalize() for word in task.split("-")) + "-v1",
        env_type="gymnasium",
        num_envs=len(seeds),
        env_seed=[seed % 2**31 for seed in seeds],
        num_threads=threads,
        max_episode_steps=_ACTION_REPEAT * (_DECISIONS + 1),  # it would begin another one on its own
    )


def flattened(task: str, seen: _Seen) -> NDArray[np.float32]:
    """Return EnvPool's observations (E, ...) by name as dm_control's agents see them, (E, n)."""
    names = _OBSERVED.get(task, _OBSERVED.get(task.split("-")[0], "")).split() or list(seen)
    return np.concatenate([seen[name].reshape(len(seen[name]), -1) for name in names], axis=1).astype(np.float32)


class EnvPool(Environments):
    """The `num_envs` environments of a run in one pool of `env_workers` threads, or one per core.

    Args:
        cfg: a completed config.
        failures: what becomes of episodes that fail.
        restarts: of the run so far.

    Raises:
        ConfigError: as `check` and `pool_of`, or EnvPool's observations have another size than dm_control's.
    """

    def __init__(self, cfg: Config, failures: Failures, restarts: int = 0) -> None:
        check(cfg)
        self.cfg, self.failures, self.restarts = cfg, failures, restarts
        self._seeds = [env_seed(cfg.seed, i, restarts) for i in range(cfg.num_envs)]
        self._thread = ThreadPoolExecutor(1)  # two control steps are taken while the trainer learns
        self._pending: Future[list[Step | EnvError]] | None = None
        self._make()

    def _make(self) -> None:
        count, threads = self.cfg.num_envs, self.cfg.env_workers
        threads = cores() if threads is None else max(1, threads)
        self._pool = pool_of(self.cfg.task, self._seeds, min(count, threads))
        size = sum(int(np.prod(s.shape)) for s in self._pool.observation_space.spaces.values())
        if size < self.cfg.observation_shape[0]:
            raise ConfigError(
                f"config key 'env.engine': this EnvPool observes {size} numbers of {self.cfg.task}, "
                f"allowed: {self.cfg.observation_shape[0]}, as dm_control does"
            )
        self._episodes = [0] * count  # begun
        self._decisions = [0] * count
        self._origins: list[Any] = [None] * count

    @override
    def reset(self, which: Sequence[int]) -> dict[int, Array]:
        found: dict[int, Array] = {}
        while left := [i for i in which if i not in found]:
            for i, obs in self._begin(left).items():
                try:
                    finite(obs, "observation")
                    found[i] = obs
                except EnvError as e:
                    self.failures.take(i, e)
        return found

    def _begin(self, which: Sequence[int]) -> dict[int, NDArray[np.float32]]:
        """Start an episode in these environments, whose observations are not looked at."""
        for i in which:
            self._origins[i] = self._now(i)
            self._episodes[i] += 1
            self._decisions[i] = 0
        seen, info = self._pool.reset(np.array(which, np.int32))
        return dict(zip(info["env_id"].tolist(), flattened(self.cfg.task, seen), strict=True))

    @override
    def step_async(self, actions: NDArray[np.float32]) -> None:
        self._pending = self._thread.submit(self._decide, range(self.cfg.num_envs), actions.copy())

    @override
    def step_wait(self) -> list[Step | None]:
        assert self._pending is not None, "step_async comes first"
        found: list[Step | None] = []
        for i, step in enumerate(self._pending.result()):
            if isinstance(step, EnvError):  # a reset mends what diverged
                self.failures.take(i, step)
                found.append(None)
            else:
                found.append(step)
        self.failures.count(found)
        return found

    def _decide(self, which: Iterable[int], actions: NDArray[np.float32]) -> list[Step | EnvError]:
        """Make a decision, (len(which), A), in these environments, in ascending order, and return what came of each."""
        ids = np.fromiter(which, np.int32)
        actions, rewards = actions.astype(np.float64), np.zeros(len(ids))
        for _ in range(_ACTION_REPEAT):
            seen, reward, _, _, info = self._pool.step(actions, ids)
            order = np.argsort(info["env_id"])  # it may answer in another order
            rewards += reward[order]
        observations = flattened(self.cfg.task, seen)[order]
        return [self._judged(int(i), obs, float(r)) for i, obs, r in zip(ids, observations, rewards, strict=True)]

    def _judged(self, i: int, obs: NDArray[np.float32], reward: float) -> Step | EnvError:
        self._decisions[i] += 1
        try:
            finite(reward, "reward")
            finite(obs, "observation")
        except EnvError as e:
            return e
        return Step(obs, reward, False, self._decisions[i] >= _DECISIONS, 0.0)

    def _now(self, i: int) -> dict[str, int]:
        return {"seed": self._seeds[i], "episodes": self._episodes[i]}

    @override
    def states(self) -> list[EnvState | None]:
        return [EnvState(self._now(i), self._origins[i]) for i in range(self.cfg.num_envs)]

    @override
    def restore(self, states: Sequence[EnvState], actions: Mapping[int, Actions]) -> dict[int, list[Step]]:
        """Take environments just made to these states, as `Environments.restore`.

        Raises:
            ConfigError: the states are another engine's.
            EnvError: an episode that was fine fails when it is played again.
        """
        starts = [state.origin if i in actions else state.now for i, state in enumerate(states)]
        if not all(isinstance(start, dict) and {*start} == {"seed", "episodes"} for start in starts):
            raise ConfigError(f"config key 'env.engine': got {ENGINE!r}, allowed: what the run began with")
        if self._seeds != [start["seed"] for start in starts]:
            self._seeds = [start["seed"] for start in starts]
            self._pool.close()
            self._make()
        while behind := [i for i, start in enumerate(starts) if self._episodes[i] < start["episodes"]]:
            self._begin(behind)
        played: dict[int, list[Step]] = {}
        if actions:
            first = self._begin(sorted(actions))
            played = {i: [Step(first[i], 0.0, False, False, 0.0)] for i in actions}
        for t in range(max(map(len, actions.values()), default=0)):
            which = sorted(i for i in actions if t < len(actions[i]))
            for i, step in zip(which, self._decide(which, np.stack([actions[i][t] for i in which])), strict=True):
                if isinstance(step, EnvError):
                    raise step
                played[i].append(step)
        self._origins = [state.origin for state in states]
        return played

    @override
    def close(self) -> None:
        self._thread.shutdown()
        self._pool.close()
