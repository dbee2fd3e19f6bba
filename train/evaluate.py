"""Evaluation: whole episodes, planning without exploration noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.planner import Planner
from tdmpc2_fast.rng import stream_seed

from .envs import make_env
from .envs.base import Env

_MOST_SIDE_BY_SIDE = 16


@dataclass(frozen=True)
class Evaluation:
    """Returns, successes and lengths (in decisions) of the episodes, in order."""

    returns: list[float]
    successes: list[float]
    lengths: list[int]

    @property
    def mean_return(self) -> float:
        """Mean over the episodes."""
        return float(np.mean(self.returns))

    @property
    def std_return(self) -> float:
        """Standard deviation over the episodes."""
        return float(np.std(self.returns))


class Evaluator:
    """Plays `eval_episodes` episodes side by side, with environments and planner of its own.

    Training environments and the training planner's warm start are left alone.
    """

    def __init__(self, agent: TDMPC2) -> None:
        cfg = agent.cfg
        self.agent, self.cfg = agent, cfg
        rounds = -(-cfg.eval_episodes // _MOST_SIDE_BY_SIDE)
        width = -(-cfg.eval_episodes // rounds)
        seeds = [stream_seed(cfg.seed, f"eval env {i}") % 2**31 for i in range(width)]
        self.envs: list[Env] = [make_env(cfg, s) for s in seeds]
        self.planner = Planner(agent.model, width, seed=stream_seed(cfg.seed, "eval"))

    def run(self) -> Evaluation:
        """Play the episodes; more than fit side by side are played in rounds."""
        found: list[tuple[float, float, int]] = []
        while len(found) < self.cfg.eval_episodes:
            found += self._round()
        kept = found[: self.cfg.eval_episodes]
        returns, successes, lengths = (list(x) for x in zip(*kept, strict=True))
        return Evaluation(returns, successes, lengths)

    def _round(self) -> list[tuple[float, float, int]]:
        count = len(self.envs)
        obs = [env.reset() for env in self.envs]
        total, success, length = [0.0] * count, [0.0] * count, [0] * count
        running, t0 = [True] * count, True
        while any(running):
            actions = self._act(np.stack(obs), t0)
            t0 = False
            for i in (i for i in range(count) if running[i]):
                obs[i], reward, terminated, truncated, info = self.envs[i].step(actions[i])
                total[i] += reward
                length[i] += 1
                success[i] = info["success"]
                running[i] = not (terminated or truncated)
        return list(zip(total, success, length, strict=True))

    def _act(self, obs: np.ndarray, t0: bool) -> np.ndarray:
        batch = torch.from_numpy(obs)
        if not self.cfg.mpc:
            return np.asarray(self.agent.act(batch, eval_mode=True))
        return self.planner.plan(batch, t0=t0, eval_mode=True).cpu().numpy()

    def close(self) -> None:
        """Free the environments."""
        close_all(self.envs)


def close_all(envs: Sequence[Env]) -> None:
    """Close every environment."""
    for env in envs:
        env.close()
