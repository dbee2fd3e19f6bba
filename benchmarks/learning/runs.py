"""The learning runs whose results the project shows, by name."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError, did_you_mean
from tdmpc2_fast.train.run.lifecycle import CHANGEABLE

WHOLE = 50_000  # decisions: 100,000 environment steps of most suites, where published curves have their first point
_OF_TASK = ("obs_shape", "action_dim", "episode_length", "seed_steps", "discount_max", "rho", "tasks")
_OF_PLACE = ("work_dir", "resume", "exp_name", "save_agent", "save_csv")


@dataclass(frozen=True)
class Run:
    """A run to its end.

    precision: of products. by_official: whether the official code makes it, in float32 on a CPU.
    keys: further config keys; those of the algorithm are the official defaults otherwise.
    """

    task: str
    seed: int = 1
    model_size: int = 5
    precision: str = "bfloat16"
    steps: int = WHOLE
    by_official: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What computes it."""
        return "official" if self.by_official else self.precision

    @property
    def name(self) -> str:
        """The name of its folder."""
        length = "" if self.steps == WHOLE else f"-{self.steps / 1000:g}k"
        return f"{self.task}-{self.model_size}m-{self.label}-seed{self.seed}{length}"

    def values(self) -> dict[str, Any]:
        """Return its config keys."""
        own: dict[str, Any] = dict(task=self.task, seed=self.seed, model_size=self.model_size, steps=self.steps)
        own |= {} if self.by_official else dict(precision=self.precision)
        return {**own, "eval_freq": 5_000, "eval_episodes": 10, **self.keys}

    def differences(self, config: Mapping[str, Any]) -> list[str]:
        """Say in what a `config.json` is of another run: keys of the algorithm with other values."""
        wanted = json.loads(json.dumps(Config.from_dict(self.values()).to_dict()))
        fixed = [k for k in wanted if k in config and k not in (*CHANGEABLE, *_OF_TASK, *_OF_PLACE)]
        return [f"{k} is {config[k]} in it and {wanted[k]} here" for k in fixed if config[k] != wanted[k]]


# A fifth of a run again, in float32 and by the official code, shows what bfloat16 and our code change, if anything.
# On two cores the official code takes two hours for it, with these few evaluations.
_AGAIN: dict[str, Any] = dict(steps=10_000, keys=dict(eval_freq=10_000, eval_episodes=3))
RUNS = (
    Run("walker-walk"),
    Run("cheetah-run"),
    Run("cup-catch"),
    Run("finger-spin"),
    Run("walker-walk", precision="float32", **_AGAIN),
    Run("walker-walk", by_official=True, **_AGAIN),
    Run("cartpole-swingup"),
    Run("reacher-easy"),
    Run("pendulum-swingup"),
    Run("mujoco-walker", keys=dict(episodic=True)),
    Run("mw-plate-slide"),
)


def named(words: Sequence[str]) -> list[Run]:
    """Return the runs that names mean, in the order of the list: a folder's name, a task, a pattern as `c*`, or all.

    A task means its whole run.

    Raises:
        ConfigError: a word that means none.
    """
    wanted: set[str] = set()
    for word in words:
        found = {r.name for r in RUNS if word in (r.name, "all") or fnmatch.fnmatchcase(r.name, word)}
        found |= {r.name for r in RUNS if word == r.task and r.steps == WHOLE}
        if not found:
            known = [*dict.fromkeys(r.task for r in RUNS), *(r.name for r in RUNS)]
            close = did_you_mean(word, known)
            raise ConfigError(f"unknown learning run {word!r}.{close} Without an argument the list is printed.")
        wanted |= found
    return [r for r in RUNS if r.name in wanted]
