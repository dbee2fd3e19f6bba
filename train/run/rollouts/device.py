"""Episodes of a simulator on the agent's device, kept there until they go into the replay.

What the host reads of a decision is one copy of flags: who ended, and whose numbers are none. Where an episode
ended it also reads the sums that the log has. Observations, actions and rewards stay where they are.
Memory: `num_envs` times (`episode_length` + 1) steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError

from ...envs import check_episodic
from ...envs.answers import EnvError
from ...envs.base import Actions, Failures, Step, check_actions
from ...envs.device.base import DeviceEnvironments, check_tensor, checked
from .base import CANNOT_TELL, Rollouts

_CHECKED = ("observation", "reward", "success")  # what a simulator answers in numbers
_NONE = -1
_TERMINATED = Step(np.empty(0, np.float32), 0.0, True, False, 0.0)


@dataclass(frozen=True)
class DeviceEpisode:
    """An episode that has ended; `steps` are its rows on the device: obs, action, reward, (T + 1, ...)."""

    steps: dict[str, Tensor]
    total: float
    peak: float
    success: float
    terminates: bool
    task: int | None = None  # these simulators step one alone

    def __len__(self) -> int:
        return len(self.steps["reward"]) - 1

    @property
    def rewards(self) -> NDArray[Any]:
        """The rewards (T,), which are waited for."""
        return self.steps["reward"][1:].cpu().numpy().astype(np.float64)

    def rows(self) -> dict[str, Any]:
        """Return the episode as `ReplayBuffer.add` takes it, on the device."""
        terminated = torch.zeros_like(self.steps["reward"])
        terminated[-1] = float(self.terminates)
        return self.steps | dict(terminated=terminated)


class _Report:
    """Flags of a decision on their way to the host, which waits for them and for nothing behind them."""

    def __init__(self, device: torch.device, count: int) -> None:
        there = device.type == "cuda"
        self._host = torch.zeros(3 + len(_CHECKED), count, dtype=torch.bool, pin_memory=there)
        self._event = torch.cuda.Event() if there else None

    def send(self, flags: Tensor) -> None:
        self._host.copy_(flags, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> NDArray[np.bool_]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


class DeviceRollouts(Rollouts):
    """The episodes under way in `DeviceEnvironments`.

    Args:
        envs: the simulator.
        cfg: a completed config.
        device: that of the agent.
        failures: what becomes of episodes with numbers that are none; their environments are reset.
        restarts: of the run so far.

    Raises:
        ConfigError: the simulator is on another device.
    """

    def __init__(
        self, envs: DeviceEnvironments, cfg: Config, device: torch.device, failures: Failures, restarts: int = 0
    ) -> None:
        if envs.device != device:
            raise ConfigError(f"config key 'device': got {device}, allowed: {envs.device}, where {cfg.task} simulates")
        self.envs, self.cfg, self.failures, self._restarts = envs, cfg, failures, restarts
        count, self._limit = cfg.num_envs, cfg.need("episode_length")
        size = (count, self._limit + 1)
        self._pixels = cfg.obs == "rgb"
        kind = torch.uint8 if self._pixels else torch.float32
        self._steps = dict(
            obs=torch.zeros(*size, *cfg.observation_shape, dtype=kind, device=device),
            # Those of row 0, which is the reset, stay NaN.
            action=torch.full((*size, cfg.need("action_dim")), torch.nan, device=device),
            reward=torch.full(size, torch.nan, device=device),
        )
        self._each = torch.arange(count, device=device)
        self._at = torch.zeros(count, dtype=torch.int64, device=device)  # the last row of each
        self._sums = {k: torch.zeros(count, dtype=torch.float64, device=device) for k in ("total", "peak", "success")}
        self._over = torch.ones(count, dtype=torch.bool, device=device)  # to be reset
        self._unusable = torch.zeros(count, dtype=torch.bool, device=device)  # first observations
        self._actions: Tensor | None = None
        self._shown = self._steps["obs"][:, 0]  # what the agent chose them by
        self._report = _Report(device, count)
        # What the host knows: the decisions of each so far, _NONE without an episode; those that ended, and whether
        # by termination.
        self._lengths = np.full(count, _NONE)
        self._ended: dict[int, bool] = {}

    @property
    def restarts(self) -> int:
        """Those of the run before it was gone on with."""
        return self._restarts

    @property
    def at_boundary(self) -> bool:
        """Whether an environment is between two episodes."""
        return self.any_ended or bool((self._lengths == _NONE).any())

    @property
    def any_ended(self) -> bool:
        """Whether `ended` has something to tell."""
        return bool(self._ended)

    @override
    def ended(self) -> Iterator[DeviceEpisode]:
        if not self._ended:
            return
        sums = dict(zip(self._sums, torch.stack(list(self._sums.values())).tolist(), strict=True))
        for i, terminates in sorted(self._ended.items()):
            steps = {k: x[i, : self._lengths[i] + 1] for k, x in self._steps.items()}
            del self._ended[i]
            self._lengths[i] = _NONE
            yield DeviceEpisode(steps, **{k: x[i] for k, x in sums.items()}, terminates=terminates)

    @override
    def begin(self) -> None:
        assert not self._ended, "what has ended is to be taken first"
        none = self._lengths == _NONE
        if not none.any():
            return
        obs = self.envs.reset(self._over)
        check_tensor("observation", obs, (self.cfg.num_envs, *self.cfg.observation_shape), self.envs.device)
        first = self._steps["obs"][:, 0]
        first.copy_(torch.where(_beside(self._over, obs), obs.to(first.dtype), first))
        self._at.masked_fill_(self._over, 0)
        for x in self._sums.values():
            x.masked_fill_(self._over, 0)
        # Told with the flags of the next decision: waiting now would be waiting twice.
        self._unusable = self._over & ~self._finite(first)
        self._lengths[none] = 0

    @override
    def take(self, actions: Actions) -> None:
        self._actions = torch.from_numpy(actions).to(self.envs.device)

    @override
    def act(self, agent: TDMPC2) -> None:
        obs = self._steps["obs"][self._each, self._at]
        self._shown = obs.masked_fill(_beside(self._unusable, obs), 0)  # of those that are to be dropped
        self._actions = agent.act(self._shown, self._at == 0, on_cpu=False).to(torch.float32)

    @override
    def step_async(self) -> None:
        assert self._actions is not None, "take or act comes first"
        found = checked(self.envs.step(self._actions), self.envs)
        self._at += 1
        kept = dict(obs=found.obs, action=self._actions, reward=found.reward)
        for name, x in kept.items():
            store = self._steps[name]
            store[self._each, self._at] = x.to(store.dtype)
        reward = found.reward.double()
        self._sums["total"] += reward
        self._sums["peak"] = torch.maximum(self._sums["peak"], reward.abs())
        self._sums["success"] = found.success.double()
        unusable = torch.stack(
            [
                ~self._finite(found.obs) | self._unusable,
                ~found.reward.float().isfinite(),
                ~found.success.float().isfinite(),
            ]
        )
        self._over = found.terminated | found.truncated | unusable.any(0)
        action = ~self._actions.isfinite().all(1)
        self._report.send(torch.stack([found.terminated, found.truncated, *unusable, action]))

    def _finite(self, obs: Tensor) -> Tensor:
        return obs.float().flatten(1).isfinite().all(1)

    @override
    def step_wait(self) -> None:
        terminated, truncated, *unusable, action = self._report.read()
        if action.any():
            assert self._actions is not None
            check_actions(self._actions.cpu().numpy(), self._shown.cpu().numpy())
        self._lengths += 1
        dropped = np.logical_or.reduce(unusable)
        for i in np.flatnonzero(dropped):
            name = next(name for name, flags in zip(_CHECKED, unusable, strict=True) if flags[i])
            self._lengths[i] = _NONE
            self.failures.take(int(i), EnvError(f"{name}: got NaN or infinity, allowed: finite numbers (float32)"))
        if (terminated & ~dropped).any():
            check_episodic(self.cfg, _TERMINATED)
        ended = (terminated | truncated) & ~dropped
        self._ended = {int(i): bool(terminated[i]) for i in np.flatnonzero(ended)}
        self.failures.ended += len(self._ended)
        endless = np.flatnonzero((self._lengths >= self._limit) & ~ended)
        if len(endless):
            raise EnvError(
                f"{self.cfg.task}, environment {endless[0]}: truncated: got false after {self._limit} decisions, "
                "allowed: true there, since it tells max_episode_steps of as many"
            )

    @override
    def state(self, warn: Callable[[str], None]) -> tuple[dict[str, Mapping[str, Tensor]], Any]:
        simulator, random_state = self.envs.state(), self.envs.random_state()
        if simulator is None or random_state is None:
            warn(CANNOT_TELL)
        rows = 1 + max(0, int(self._lengths.max()))
        parts: dict[str, Mapping[str, Tensor]] = dict(
            rollouts={k: x[:, :rows] for k, x in self._steps.items()} | self._sums,
        )
        if simulator is not None:
            parts["simulator"] = simulator
        return parts, dict(lengths=self._lengths.tolist(), ended=[*self._ended.items()], random_state=random_state)

    @override
    def restore(self, parts: Mapping[str, Mapping[str, Tensor]], rest: Any, warn: Callable[[str], None]) -> None:
        self._lengths, self._ended = np.asarray(rest["lengths"]), dict(rest["ended"])
        if rest["random_state"] is not None:
            self.envs.set_random_state(rest["random_state"])
        stood = parts.get("simulator")
        if stood is not None:
            try:
                self.envs.load_state(stood)
            except ValueError as e:
                warn(f"{self.cfg.task}: {e}; the episodes under way are dropped and new ones begun")
                stood = None
        over = np.isin(self._each.cpu().numpy(), [*self._ended])
        if stood is None:
            self._lengths[~over] = _NONE
        kept, device = parts["rollouts"], self._at.device
        for name, x in self._steps.items():
            x[:, : kept[name].shape[1]] = kept[name].to(device)
        self._sums = {k: kept[k].to(device) for k in self._sums}
        self._at = torch.from_numpy(np.maximum(self._lengths, 0)).to(device)
        self._over = torch.from_numpy(over | (self._lengths == _NONE)).to(device)


def _beside(flags: Tensor, x: Tensor) -> Tensor:
    """Return flags (E,) in a shape that broadcasts to x (E, ...)."""
    return flags.view(-1, *[1] * (x.ndim - 1))
