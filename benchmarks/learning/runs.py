"""The learning runs whose results the project shows, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tdmpc2_fast.errors import ConfigError, did_you_mean

OFFICIAL = "official"


@dataclass(frozen=True)
class Run:
    """A run to its end: 100,000 environment steps of most suites, where published curves have their first point.

    precision: of products; `official` has the official code make the run, in float32 on a CPU.
    keys: config keys that the task needs beside.
    """

    task: str
    seed: int = 1
    size: int = 5
    precision: str = "bfloat16"
    steps: int = 50_000
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.task}-{self.size}m-{self.precision}-seed{self.seed}"

    @property
    def by_official(self) -> bool:
        """Tells whether the official code makes it."""
        return self.precision == OFFICIAL

    def values(self) -> dict[str, Any]:
        """Return its config keys; those of the algorithm are the official defaults."""
        own: dict[str, Any] = dict(task=self.task, seed=self.seed, model_size=self.size, steps=self.steps)
        own |= {} if self.by_official else dict(precision=self.precision)
        return {**own, "eval_freq": 5_000, "eval_episodes": 10, **self.keys}


# A fifth of a run again, in float32 and by the official code, shows what bfloat16 and our code change, if anything.
_AGAIN: dict[str, Any] = dict(eval_freq=10_000)
RUNS = (
    Run("walker-walk"),
    Run("cheetah-run"),
    Run("cup-catch"),
    Run("finger-spin"),
    Run("walker-walk", precision="float32", steps=10_000, keys=_AGAIN),
    Run("walker-walk", precision=OFFICIAL, steps=10_000, keys=_AGAIN),
    Run("cartpole-swingup"),
    Run("reacher-easy"),
    Run("pendulum-swingup"),
    Run("mujoco-walker", keys=dict(episodic=True)),
    Run("mw-plate-slide"),
)


def named(words: Sequence[str]) -> list[Run]:
    """Return the runs that names mean, in the order of the list: a folder's name, a task, a pattern as `c*`, or all.

    A task means its run in bfloat16.

    Raises:
        ConfigError: a word that means none.
    """
    wanted: set[str] = set()
    for word in words:
        found = {r.name for r in RUNS if word in (r.name, "all") or fnmatch.fnmatchcase(r.name, word)}
        found |= {r.name for r in RUNS if word == r.task and r.precision == "bfloat16"}
        if not found:
            known = [*dict.fromkeys(r.task for r in RUNS), *(r.name for r in RUNS)]
            raise ConfigError(f"unknown learning run {word!r}.{did_you_mean(word, known)} The list: no argument")
        wanted |= found
    return [r for r in RUNS if r.name in wanted]
