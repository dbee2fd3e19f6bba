"""An episode of a task with random actions: does it run here, and what does a decision take?"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from tdmpc2_fast.config import Config

from . import make_env
from .answers import NotHereError
from .base import FAILURES, Env, close_all, in_a_line, reset, step


class Checked(NamedTuple):
    """What came of it.

    decisions: that were made.
    microseconds: of a decision, the mean.
    problem: why the episode did not come to its end; empty where it did.
    needs: what it lacks here, in words; empty where an episode was begun.
    """

    obs_shape: tuple[int, ...] = ()
    action_dim: int = 0
    decisions: int = 0
    microseconds: float = 0.0
    problem: str = ""
    needs: str = ""


def check(task: str, seed: int = 1, obs: str = "state") -> Checked:
    """Play an episode of a task."""
    envs: list[Env] = []
    decisions, spent = 0, 0.0
    try:
        try:
            envs.append(make_env(Config(task=task, obs=obs), seed))
        except Exception as e:
            if obs != "state" or "set obs=rgb" not in str(e):
                raise
            return check(task, seed, "rgb")
        env, rng = envs[0], np.random.default_rng(seed)
        reset(env)
        over = False
        while not over:
            action = rng.uniform(-1, 1, env.action_dim).astype(np.float32)
            start = time.perf_counter()
            found = step(env, action)
            spent += time.perf_counter() - start
            decisions += 1
            over = found.terminated or found.truncated
        problem = ""
    except NotHereError as e:
        return Checked(needs=in_a_line(e).removeprefix("config key 'task': ").removeprefix(f"{task!r} "))
    except FAILURES as e:
        problem = f"FAILED: {in_a_line(e)}"
    finally:
        close_all(envs)
    shape, dim = (tuple(envs[0].obs_shape), envs[0].action_dim) if envs else ((), 0)
    return Checked(shape, dim, decisions, 1e6 * spent / max(decisions, 1), problem)
