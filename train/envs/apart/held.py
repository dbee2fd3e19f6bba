"""Environments held by one process: the trainer's own, or a worker's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..base import Actions, Array, Env, EnvState, Step, close_all, reset, state_of, step


class Held:
    """Environments by index, and the random state that each one's episode began from."""

    def __init__(self, envs: Mapping[int, Env]) -> None:
        self.envs = dict(envs)
        self._origins: dict[int, Any] = dict.fromkeys(self.envs)

    def begin(self, i: int) -> Array:
        """Start an episode in environment i."""
        self._origins[i] = state_of(self.envs[i])
        return reset(self.envs[i])

    def states(self) -> dict[int, EnvState]:
        """Return where each stands between two steps."""
        return {i: EnvState(state_of(env), self._origins[i]) for i, env in self.envs.items()}

    def restore(self, states: Mapping[int, EnvState], actions: Mapping[int, Actions]) -> dict[int, list[Step]]:
        """Take environments just made to these states, as `Environments.restore` does."""
        played = {}
        for i, env in self.envs.items():
            start = states[i].origin if i in actions else states[i].now
            if start is not None:
                env.set_random_state(start)
            if i in actions:
                played[i] = [Step(reset(env), 0.0, False, False, 0.0), *(step(env, a) for a in actions[i])]
            self._origins[i] = states[i].origin
        return played

    def close(self) -> None:
        """Free the environments."""
        close_all(self.envs.values())
