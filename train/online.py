"""Online training: one loop for one environment and for many.

The official schedule, counted in decisions: random actions up to and including
`seed_steps` (and on, until an episode has ended: with many environments that can be later);
there, as many updates as seed steps; from then on `utd` updates per decision. Evaluation
at the first episode boundary after every `eval_freq` decisions, at the start, and at the end.

The order within a decision is official, too: episodes that ended in the last one enter the
replay, their environments are reset, the agent acts, the environments step, the agent learns.
An update therefore never sees the step of its own decision, and runs beside it where `overlap`
says so; otherwise the host waits for it first. Nothing else differs, and no number does.
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
from .envs.base import Array, Step, env_seed
from .envs.together import environments
from .evaluate import Evaluation, Evaluator
from .overlap import updates_on
from .run_log import RunLog


class Episode:
    """The steps of one episode as they come; row 0 is the reset, with NaN action and reward."""

    def __init__(self, obs: Array, action_dim: int) -> None:
        self.obs = [obs]
        self.action = [np.full(action_dim, np.nan, dtype=np.float32)]
        self.reward, self.terminated = [np.nan], [np.nan]
        self.ended = False
        self.success = 0.0

    def __len__(self) -> int:
        return len(self.obs) - 1

    def append(self, action: NDArray[np.float32], step: Step) -> None:
        """One decision and what came of it."""
        self.obs.append(step.obs)
        self.action.append(action)
        self.reward.append(step.reward)
        self.terminated.append(float(step.terminated))
        self.ended = step.terminated or step.truncated
        self.success = step.success

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
        first = make_env(cfg, env_seed(cfg.seed, 0))
        self.cfg = cfg = complete(cfg, first)
        self.agent = TDMPC2(cfg)
        if cfg.checkpoint is not None:
            self.agent.load(cfg.checkpoint)
        self.buffer = ReplayBuffer(cfg, self.agent.device)
        self.evaluator = Evaluator(self.agent)
        self.folder = folder
        self.log = RunLog(cfg, folder, first.action_repeat)
        # Updates on the CPU and environments want the same cores, and an update takes far longer than a step.
        self.overlap = self.agent.device.type == "cuda" if cfg.overlap is None else cfg.overlap
        self._updates = updates_on(self.agent.updater, self.overlap)
        self._random = np.random.default_rng(stream_seed(cfg.seed, "random actions"))
        self._episodes: list[Episode | None] = [None] * cfg.num_envs  # None: to be reset
        self._metrics: dict[str, Tensor] = {}
        self._decisions = 0
        self._updates_due = 0.0
        self._seeded = False
        self._next_eval = 0
        self._best = -np.inf
        self.envs = environments(cfg, first, self.log.note)  # last: what fails before it leaves no process behind

    def run(self) -> Evaluation:
        """Train for `steps` decisions; returns the last evaluation."""
        try:
            while self._decisions < self.cfg.steps:
                if self._decisions >= self._next_eval and any(e is None or e.ended for e in self._episodes):
                    self._evaluate()
                self.step()
            return self._evaluate()
        except BaseException:
            self._updates.close()  # those under way end, so that the weights saved are of whole updates
            self._save("latest")
            raise
        finally:
            self.close()

    def step(self) -> None:
        """One decision in every environment, and the updates due with it."""
        self._take_in()
        self._reset()
        actions = self._act()
        self.envs.step_async(actions)
        self._learn()
        self._observe(actions)

    def close(self) -> None:
        """Free what the updates and the environments hold."""
        self._updates.close()
        self.envs.close()
        self.evaluator.close()

    def _take_in(self) -> None:
        """What follows comes after the updates launched; episodes that ended enter replay and log."""
        self._updates.join()
        ended = [i for i, e in enumerate(self._episodes) if e is not None and e.ended]
        if ended:
            self._updates.wait()  # they read the replay
        for i in ended:
            episode, self._episodes[i] = self._episodes[i], None
            assert episode is not None
            self.buffer.add(episode.rows())
            self._record(episode)

    def _reset(self) -> None:
        """Start an episode in every environment that has none."""
        which = [i for i, e in enumerate(self._episodes) if e is None]
        if which:
            for i, obs in self.envs.reset(which).items():
                self._episodes[i] = Episode(obs, self.cfg._require("action_dim"))

    def _act(self) -> NDArray[np.float32]:
        """An action for every environment (E, A): random at first, then the agent's."""
        self._decisions += self.cfg.num_envs
        if not self._seeded:
            size = (self.cfg.num_envs, self.cfg._require("action_dim"))
            return self._random.uniform(-1, 1, size).astype(np.float32)
        episodes = self._running()
        obs = torch.from_numpy(np.stack([e.obs[-1] for e in episodes]))
        t0 = torch.tensor([len(e) == 0 for e in episodes])
        return self.agent.act(obs, t0).numpy()

    def _learn(self) -> None:
        """Launch the updates that are due."""
        seed_steps = self.cfg.seed_steps or 0
        if self._seeded:
            self._updates_due += self.cfg.utd * self.cfg.num_envs
        elif self._decisions > seed_steps and self.buffer.num_sampleable > 0:
            self._seeded = True
            self.log.note(f"pretraining on the seed data: {seed_steps:,} updates")
            self._updates_due += seed_steps
        while self._updates_due >= 1:
            self._updates.launch(self._update)
            self._updates_due -= 1
        if not self.overlap:
            self._updates.wait()

    def _update(self) -> None:
        self._metrics = self.agent.update(self.buffer)

    def _observe(self, actions: NDArray[np.float32]) -> None:
        """Wait for the environments; note what came of the actions."""
        for i, (episode, step) in enumerate(zip(self._running(), self.envs.step_wait(), strict=True)):
            if step is None:
                self._episodes[i] = None
                continue
            if step.terminated and not self.cfg.episodic:
                raise ConfigError(f"config key 'episodic': {self.cfg.task} terminated an episode; set episodic=true")
            episode.append(actions[i], step)

    def _running(self) -> list[Episode]:
        return [e for e in self._episodes if e is not None]

    def _record(self, episode: Episode) -> None:
        row = dict(
            episode=self.buffer.num_eps,
            episode_reward=round(float(np.sum(episode.reward[1:])), 2),
            episode_success=episode.success,
            episode_length=len(episode),
            episode_terminated=episode.terminated[-1],
        )
        names = _metric_names(self.cfg.episodic)
        metrics = {k: float(self._metrics[k]) if k in self._metrics else None for k in names}
        self.log.episode(self._decisions, row | metrics)

    def _evaluate(self) -> Evaluation:
        self._take_in()
        self._next_eval = (self._decisions // self.cfg.eval_freq + 1) * self.cfg.eval_freq
        self._save("latest")
        found = self.evaluator.run()
        self.log.evaluation(self._decisions, found.mean_return, found.std_return, len(found.returns))
        if found.mean_return > self._best:
            self._best = found.mean_return
            self._save("best")
        return found

    def _save(self, name: str) -> None:
        """Write a checkpoint, unless switched off or the weights are not worth keeping."""
        self._updates.wait()
        finite = all(bool(p.isfinite().all()) for p in self.agent.model.parameters())
        if self.cfg.save_agent and finite:
            self.agent.save(self.folder / "checkpoints" / name)


def _metric_names(episodic: bool) -> list[str]:
    names = ["consistency_loss", "reward_loss", "value_loss", "termination_loss", "total_loss", "grad_norm"]
    names += ["termination_rate", "termination_f1"] if episodic else []
    return [*names, "pi_loss", "pi_grad_norm", "pi_entropy", "pi_scaled_entropy", "pi_scale"]
