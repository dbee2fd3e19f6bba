"""A `gymnasium.vector.VectorEnv` as the environments of a run, whichever way it resets what has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.environment import length_of
from tdmpc2_fast.errors import ConfigError

from ..answers import EnvError, array, finite, flag, number, success
from ..base import Actions, Array, Environments, EnvState, Failures, Step
from ..spaces import ObservationSpace, action_space


class VectorEnvironments(Environments):
    """Steps all environments of a vector at once.

    Where the vector resets an environment in the step after its last one (Gymnasium's default), that step is no
    decision: its action is not looked at, and nothing of it is learned. Where it resets in the last step, the
    last observation is that of `info["final_obs"]`. Where it leaves that to us, it is asked by `reset_mask`.

    Episodes of environments without a time limit are cut after `cfg.episode_length` decisions. Its random state is
    not told: a run that is stopped goes on with other episodes.

    Args:
        env: the vector; it is left open.
        cfg: a completed config of as many environments.
        note: told of what fails.

    Raises:
        ConfigError: it has another number of environments, or its spaces cannot be used.
    """

    restarts = 0

    def __init__(self, env: Any, cfg: Config, note: Callable[[str], None]) -> None:
        from gymnasium.vector import AutoresetMode

        if env.num_envs != cfg.num_envs:
            raise ConfigError(f"config key 'num_envs': got {cfg.num_envs}, allowed: {env.num_envs}, as many as given")
        self.env, self.cfg = env, cfg
        self.failures = Failures(cfg, note)
        each = range(env.num_envs)
        self._actions = action_space(env.single_action_space, cfg.task)
        self._observations = [ObservationSpace(env.single_observation_space, cfg.obs, cfg.task) for _ in each]
        mode = (getattr(env, "metadata", None) or {}).get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self._mode = AutoresetMode(mode)
        self._modes = AutoresetMode
        self._limit = cfg.need("episode_length") if length_of(env) is None else None
        if self._limit and not self._can_reset_some:
            raise ConfigError(
                f"config key 'episode_length': {cfg.task} has environments without a time limit, and cannot reset one "
                "of them alone; allowed: environments in gymnasium.wrappers.TimeLimit"
            )
        self._lengths = [0] * env.num_envs
        self._last: list[Array] = []  # observation of each
        self._begun: dict[int, Array] = {}  # first observations of episodes that the vector began by itself
        self._ended: set[int] = set()  # those that it resets in the next step
        self._resetting: set[int] = set()  # those that it resets in this step

    @override
    def reset(self, which: Sequence[int]) -> dict[int, Array]:
        if not self._last:
            obs, _ = self.env.reset(seed=self.cfg.seed)
            self._last = self._seen(obs, [True] * self.cfg.num_envs)
            return {i: self._last[i] for i in which}
        found = {i: self._begun.pop(i) for i in which if i in self._begun}
        rest = [i for i in which if i not in found]
        if not rest:
            return found
        if len(rest) == self.cfg.num_envs:
            self._ended.clear()
            obs, _ = self.env.reset()
            self._last = self._seen(obs, [True] * self.cfg.num_envs)
        else:
            self._resetting |= {*rest} & self._ended
            if ours := sorted({*rest} - self._ended):
                mask = np.zeros(self.cfg.num_envs, np.bool_)
                mask[ours] = True
                obs, _ = self.env.reset(options={"reset_mask": mask})
                for i in ours:
                    self._last[i] = self._seen_one(obs, i, first=True)
        return found | {i: self._last[i] for i in rest}

    @override
    def step_async(self, actions: NDArray[np.float32]) -> None:
        each = np.stack([self._actions(a) for a in actions])
        self._answer = self.env.step(each.astype(self.env.single_action_space.dtype, copy=False))

    @override
    def step_wait(self) -> list[Step | None]:
        obs, rewards, terminated, truncated, info = self._answer
        found: list[Step | None] = []
        ended: set[int] = set()
        for i in range(self.cfg.num_envs):
            if i in self._resetting:
                self._last[i] = self._begun[i] = self._seen_one(obs, i, first=True)
                found.append(None)
                continue
            ends = flag(terminated[i], "terminated"), flag(truncated[i], "truncated")
            self._lengths[i] = 0 if any(ends) else self._lengths[i] + 1
            at_once = any(ends) and self._mode == self._modes.SAME_STEP
            seen = self._final(info, i) if at_once else self._seen_one(obs, i, first=False)
            reward = number(rewards[i], "reward")
            finite(reward, "reward")
            cut = self._limit is not None and self._lengths[i] >= self._limit
            self._lengths[i] = 0 if cut else self._lengths[i]
            found.append(Step(seen, reward, ends[0], ends[1] or cut, success(_info_of(info, i))))
            if any(ends) and self._mode == self._modes.NEXT_STEP:
                ended.add(i)
            self._last[i] = seen
            if at_once:
                self._begun[i] = self._seen_one(obs, i, first=True)
        self._ended, self._resetting = ended, set()
        self.failures.count(found)
        return found

    @override
    def states(self) -> list[EnvState | None]:
        return [EnvState(None, None)] * self.cfg.num_envs

    @override
    def restore(self, states: Sequence[EnvState], actions: Mapping[int, Actions]) -> dict[int, list[Step]]:
        return {}

    @override
    def close(self) -> None:
        return  # it is not ours

    @property
    def _can_reset_some(self) -> bool:
        """Tells whether the vector resets those of a mask: where it leaves it to us, and Gymnasium's own."""
        from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

        return self._mode == self._modes.DISABLED or isinstance(self.env.unwrapped, (AsyncVectorEnv, SyncVectorEnv))

    def _seen(self, obs: Any, first: Sequence[bool]) -> list[Array]:
        return [self._seen_one(obs, i, f) for i, f in enumerate(first)]

    def _seen_one(self, obs: Any, i: int, first: bool) -> Array:
        """Return the observation of environment i out of a batch."""
        return self._checked(i, _of(obs, i, self.env.single_observation_space), first)

    def _checked(self, i: int, obs: Any, first: bool) -> Array:
        found = self._observations[i](obs, first)
        if found.dtype != np.uint8:
            found = array(found, found.shape, np.float32, "observation")
            finite(found, "observation")
        return found

    def _final(self, info: Mapping[str, Any], i: int) -> Array:
        """Return the last observation of an episode of environment i, whose next one has begun in the same step."""
        final = info.get("final_obs", info.get("final_observation"))
        if final is None:
            raise EnvError("info: got no 'final_obs' where an episode ended, allowed: one, in autoreset mode SameStep")
        batched = isinstance(final, Mapping)  # as wrappers may leave it; Gymnasium has an array of observations
        return self._checked(i, _of(final, i, self.env.single_observation_space) if batched else final[i], first=False)


def _of(batch: Any, i: int, space: Any) -> Any:
    """Return entry i of a batch of observations of a space: of a Dict or Tuple, of each part."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return {k: _of(batch[k], i, part) for k, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_of(x, i, part) for x, part in zip(batch, space.spaces, strict=True))
    return batch[i]


def _info_of(info: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Return what a vector's info says of the success of environment i, also in the last step of an episode."""
    for of in (info.get("final_info"), info):
        for key in ("success", "is_success"):
            told = of.get(f"_{key}") if isinstance(of, Mapping) else None
            if isinstance(of, Mapping) and key in of and (told is None or told[i]):
                return {key: of[key][i]}
    return {}
