"""Online training: one loop for one environment and for many.

The official schedule, counted in decisions: random actions up to and including
`seed_steps` (and on, until an episode has ended: with many environments that can be later);
there, as many updates as seed steps; from then on `utd` updates per decision. Evaluation
at the first episode boundary after every `eval_freq` decisions, at the start, and at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.replay import ReplayBuffer
from tdmpc2_fast.rng import stream_seed

from .envs import complete, make_env
from .envs.base import Array, Env
from .evaluate import Evaluation, Evaluator, close_all
from .run_log import RunLog


class Episode:
    """The steps of one episode as they come; row 0 is the reset, with NaN action and reward."""

    def __init__(self, obs: Array, action_dim: int) -> None:
        self.obs = [obs]
        self.action = [np.full(action_dim, np.nan, dtype=np.float32)]
        self.reward, self.terminated = [np.nan], [np.nan]

    def __len__(self) -> int:
        return len(self.obs) - 1

    def append(self, obs: Array, action: NDArray[np.float32], reward: float, terminated: bool) -> None:
        """One decision and what came of it."""
        self.obs.append(obs)
        self.action.append(action)
        self.reward.append(reward)
        self.terminated.append(float(terminated))

    def rows(self) -> dict[str, Any]:
        """As `ReplayBuffer.add` takes it."""
        return dict(
            obs=np.stack(self.obs),
            action=np.stack(self.action),
            reward=np.asarray(self.reward, dtype=np.float32),
            terminated=np.asarray(self.terminated, dtype=np.float32),
        )


class OnlineTrainer:
    """Trains one agent on one task.

    Args:
        cfg: config without what the environment fills in.
        folder: where CSVs and checkpoints go.
    """

    def __init__(self, cfg: Config, folder: Path) -> None:
        seeds = [cfg.seed] + [stream_seed(cfg.seed, f"env {i}") % 2**31 for i in range(1, cfg.num_envs)]
        first = make_env(cfg, seeds[0])
        self.cfg = cfg = complete(cfg, first)
        self.envs: list[Env] = [first, *(make_env(cfg, s) for s in seeds[1:])]
        self.agent = TDMPC2(cfg)
        if cfg.checkpoint is not None:
            self.agent.load(cfg.checkpoint)
        self.buffer = ReplayBuffer(cfg, self.agent.device)
        self.evaluator = Evaluator(self.agent)
        self.folder = folder
        self.log = RunLog(cfg, folder, first.action_repeat)
        self._random = np.random.default_rng(stream_seed(cfg.seed, "random actions"))
        self._episodes: list[Episode | None] = [None] * cfg.num_envs
        self._metrics: dict[str, Tensor] = {}
        self._decisions = 0
        self._updates_due = 0.0
        self._seeded = False
        self._next_eval = 0
        self._best = -np.inf

    def run(self) -> Evaluation:
        """Train for `steps` decisions; returns the last evaluation."""
        try:
            while self._decisions < self.cfg.steps:
                self._evaluate_if_due()
                self.step()
            return self._evaluate()
        except BaseException:
            self._save("latest")
            raise
        finally:
            self.close()

    def step(self) -> None:
        """One decision in every environment, and the updates due after it."""
        for i, episode in enumerate(self._episodes):
            if episode is None:
                self._episodes[i] = Episode(self.envs[i].reset(), self.envs[i].action_dim)
        self._decide()
        self._learn()

    def close(self) -> None:
        """Free what the environments hold."""
        close_all(self.envs)
        self.evaluator.close()

    def _evaluate_if_due(self) -> None:
        if self._decisions >= self._next_eval and None in self._episodes:
            self._evaluate()
            self._next_eval = (self._decisions // self.cfg.eval_freq + 1) * self.cfg.eval_freq

    def _decide(self) -> None:
        """One decision in every environment."""
        episodes = [e for e in self._episodes if e is not None]
        if self._seeded:
            obs = torch.from_numpy(np.stack([e.obs[-1] for e in episodes]))
            t0 = torch.tensor([len(e) == 0 for e in episodes])
            actions = self.agent.act(obs, t0).numpy()
        else:
            actions = self._random.uniform(-1, 1, (len(episodes), self.envs[0].action_dim)).astype(np.float32)
        self._decisions += len(self.envs)
        for i, (env, episode, action) in enumerate(zip(self.envs, episodes, actions, strict=True)):
            obs_i, reward, terminated, truncated, info = env.step(action)
            if terminated and not self.cfg.episodic:
                raise ConfigError(f"config key 'episodic': {self.cfg.task} terminated an episode; set episodic=true")
            episode.append(obs_i, action, reward, terminated)
            if terminated or truncated:
                self._finish(i, episode, terminated, info)

    def _finish(self, i: int, episode: Episode, terminated: bool, info: dict[str, Any]) -> None:
        self.buffer.add(episode.rows())
        self._episodes[i] = None
        row = dict(
            episode=self.buffer.num_eps,
            episode_reward=round(float(np.sum(episode.reward[1:])), 2),
            episode_success=info["success"],
            episode_length=len(episode),
            episode_terminated=float(terminated),
        )
        names = _metric_names(self.cfg.episodic)
        metrics = {k: float(self._metrics[k]) if k in self._metrics else None for k in names}
        self.log.episode(self._decisions, row | metrics)

    def _learn(self) -> None:
        """The updates that are due."""
        seed_steps = self.cfg.seed_steps or 0
        if self._seeded:
            self._updates_due += self.cfg.utd * len(self.envs)
        elif self._decisions > seed_steps and self.buffer.num_sampleable > 0:
            self._seeded = True
            self.log.note(f"pretraining on the seed data: {seed_steps:,} updates")
            self._updates_due += seed_steps
        while self._updates_due >= 1:
            self._metrics = self.agent.update(self.buffer)
            self._updates_due -= 1

    def _evaluate(self) -> Evaluation:
        self._save("latest")
        found = self.evaluator.run()
        self.log.evaluation(self._decisions, found.mean_return, found.std_return, len(found.returns))
        if found.mean_return > self._best:
            self._best = found.mean_return
            self._save("best")
        return found

    def _save(self, name: str) -> None:
        """Write a checkpoint, unless switched off or the weights are not worth keeping."""
        finite = all(bool(p.isfinite().all()) for p in self.agent.model.parameters())
        if self.cfg.save_agent and finite:
            self.agent.save(self.folder / "checkpoints" / name)


def _metric_names(episodic: bool) -> list[str]:
    names = ["consistency_loss", "reward_loss", "value_loss", "termination_loss", "total_loss", "grad_norm"]
    names += ["termination_rate", "termination_f1"] if episodic else []
    return [*names, "pi_loss", "pi_grad_norm", "pi_entropy", "pi_scaled_entropy", "pi_scale"]
