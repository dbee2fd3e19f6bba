"""What the training loop asks of the episodes under way, wherever they are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from tdmpc2_fast.agent import TDMPC2

from ...envs.base import Actions, Failures
from ..episode import Played

CANNOT_TELL = "the random state of its environments cannot be told: a run that is stopped goes on with other episodes"


class Rollouts(Protocol):
    """The episodes of `num_envs` environments, in the order of a decision: begin, act, step, and what has ended."""

    failures: Failures
    """Episodes dropped since their environment failed."""

    @property
    def restarts(self) -> int:
        """Times environments were made anew by other means than a failure, over the whole run."""
        ...

    @property
    def at_boundary(self) -> bool:
        """Whether an environment is between two episodes."""
        ...

    @property
    def any_ended(self) -> bool:
        """Whether `ended` has something to tell."""
        ...

    def ended(self) -> Iterator[Played]:
        """Yield the episodes that have ended and leave each; their rows are read before the next `begin`."""
        ...

    def begin(self) -> None:
        """Start an episode in every environment that has none."""
        ...

    def take(self, actions: Actions) -> None:
        """Let these actions (E, A), float32 of the host, be done in the next step."""
        ...

    def act(self, agent: TDMPC2) -> None:
        """Let the agent choose the actions of the next step.

        Raises:
            NonFiniteError: they are NaN; told here or in `step_wait`.
        """
        ...

    def step_async(self) -> None:
        """Give every environment its action; `step_wait` ends the step."""
        ...

    def step_wait(self) -> None:
        """Wait for the environments and note what came of the actions.

        Raises:
            ConfigError: an episode terminated and `episodic` is not set.
            EnvError: an environment failed, and that is to stop the run.
        """
        ...

    def state(self, warn: Callable[[str], None]) -> tuple[dict[str, Mapping[str, Tensor]], Any]:
        """Return where all stands between two steps: tensors in named parts, and the rest, JSON-ready.

        warn: told of what a resumed run will not have.
        """
        ...

    def restore(self, parts: Mapping[str, Mapping[str, Tensor]], rest: Any, warn: Callable[[str], None]) -> None:
        """Go on, in environments just made, where those stood that told this `state`.

        warn: told of episodes that cannot be gone on with; new ones are begun.
        """
        ...
