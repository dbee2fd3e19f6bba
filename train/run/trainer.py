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

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.config import Config
from tdmpc2_fast.learn.replay import ReplayBuffer
from tdmpc2_fast.model import checkpoint
from tdmpc2_fast.seeds import stream_seed

from ..envs import check_episodic, complete, make_env
from ..envs.base import Actions, EnvState, check_actions, env_seed
from ..envs.together import environments
from ..envs.workers import leave_if_imported_anew
from ..log.run_log import RunLog
from .checkpoints import Checkpoints, Saved
from .doubts import Doubts
from .episode import Episode
from .evaluate import Evaluation, Evaluator
from .overlap import updates_on
from .stop import Stop, Stopped

_LAUNCHED_AT_ONCE = 16  # updates of pretraining, between which a run can stop and show itself


class OnlineTrainer:
    """Trains one agent on one task.

    Args:
        cfg: config without what the environment fills in.
        folder: where CSVs and checkpoints go.
        saved: the checkpoint of this run to go on from.
        stop: looked at between steps.

    Raises:
        ConfigError: the task terminates and `episodic` is not set, among others.
    """

    def __init__(self, cfg: Config, folder: Path, saved: Saved | None = None, stop: Stop | None = None) -> None:
        leave_if_imported_anew()
        values: Mapping[str, Any] = {} if saved is None else saved.values
        # Where the environments' states are not known, others are made than those that led to it.
        restarts = values.get("restarts", 0) + (saved is not None and values["envs"] is None)
        dropped = values.get("dropped", 0)
        first = make_env(cfg, env_seed(cfg.seed, 0, restarts + dropped))
        self.cfg = cfg = complete(cfg, first)
        self.agent = TDMPC2(cfg)
        notes = list(getattr(first, "notes", ()))
        if cfg.checkpoint is not None and saved is None:
            path = checkpoint.find_checkpoint(cfg.checkpoint)
            state, made_with = checkpoint.read(path)
            checkpoint.load_into(self.agent.model, state, repr(str(path)), notes.append, made_with)
        self.buffer = ReplayBuffer(cfg, self.agent.device)
        self.buffer.check_memory()
        self.folder, self.stop = folder, stop or Stop()
        self.log = RunLog(cfg, folder, first.action_repeat, self._about(), values.get("log"))
        self.checkpoints = Checkpoints(folder, cfg.keep_checkpoints)
        # Updates on the CPU and environments want the same cores, and an update takes far longer than a step.
        self.overlap = self.agent.device.type == "cuda" if cfg.overlap is None else cfg.overlap
        self._updates = updates_on(self.agent.updater, self.overlap)
        self._random = np.random.default_rng(stream_seed(cfg.seed, "random actions"))
        self._episodes: list[Episode | None] = [None] * cfg.num_envs  # None: to be reset
        self._metrics: dict[str, Tensor] = {}
        self._decisions = 0
        self._updates_due = 0.0
        self._seeded = False
        self._evaluated_at = -1  # decisions
        self._evaluated: dict[str, Any] = {}  # what came of it
        self._evaluating = False
        self._best = -np.inf
        self._saved_at = time.monotonic()
        for note in notes:
            self.log.note(note)
        self.doubts = Doubts(cfg, self.log.warn)
        # Last: what fails before leaves no process.
        self.envs = environments(cfg, first, self.log.warn, restarts, dropped)
        if saved is not None:
            self._restore(saved)

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """Made when it is first needed."""
        return Evaluator(self.agent)

    def run(self) -> Evaluation:
        """Train for `steps` decisions; returns the last evaluation.

        Raises:
            Stopped: `stop` said so; the checkpoint to go on from is written.
        """
        try:
            self._launch(pretraining=True)  # what is left over where the run was stopped in it
            self._stop_or_save()
            while self._decisions < self.cfg.steps:
                if self._evaluation_due and any(e is None or e.ended for e in self._episodes):
                    self._evaluate()
                self.step()
                self._stop_or_save()
            found = self._evaluate()
            self._save()
            return found
        except Stopped:
            raise
        except BaseException as e:
            self._updates.close()  # those under way end, so that the weights saved are of whole updates
            in_a_hurry = isinstance(e, KeyboardInterrupt) and self.stop.asked
            if not in_a_hurry and not self._evaluating:  # an evaluation begins with a checkpoint
                self._save(whole=False)
            raise
        finally:
            self.close()

    def step(self) -> None:
        """One decision in every environment, and the updates due with it."""
        self._take_in()
        with self.log.clock.part("environment"):
            self._reset()
        with self.log.clock.part("plan"):
            actions = self._act()
        self.envs.step_async(actions)
        self._learn()
        with self.log.clock.part("environment"):
            self._observe(actions)
        self.log.step(self._decisions, len(self.buffer) / self.buffer.capacity)

    def close(self) -> None:
        """Free what the updates and the environments hold."""
        self._updates.close()
        self.envs.close()
        if "evaluator" in self.__dict__:
            self.evaluator.close()

    # ---- a decision, in its order

    def _take_in(self) -> None:
        """What follows comes after the updates launched; episodes that ended enter replay and log."""
        with self.log.clock.part("update"):
            self._updates.join()
            ended = [i for i, e in enumerate(self._episodes) if e is not None and e.ended]
            if ended:
                self._updates.wait()  # they read the replay
        for i in ended:
            episode, self._episodes[i] = self._episodes[i], None
            assert episode is not None
            self.buffer.add(episode.rows())
            self.doubts.episode(episode)
            self._record(episode)

    def _reset(self) -> None:
        """Start an episode in every environment that has none."""
        which = [i for i, e in enumerate(self._episodes) if e is None]
        if which:
            for i, obs in self.envs.reset(which).items():
                self._episodes[i] = Episode(obs, self.cfg._require("action_dim"))

    def _act(self) -> Actions:
        """An action for every environment (E, A): random at first, then the agent's."""
        self._decisions += self.cfg.num_envs
        if not self._seeded:
            size = (self.cfg.num_envs, self.cfg._require("action_dim"))
            return self._random.uniform(-1, 1, size).astype(np.float32)
        episodes = self._running()
        obs = torch.from_numpy(np.stack([e.obs[-1] for e in episodes]))
        t0 = torch.tensor([len(e) == 0 for e in episodes])
        actions = self.agent.act(obs, t0).numpy()
        check_actions(actions, obs.numpy())
        return actions

    def _learn(self) -> None:
        """Launch the updates that are due."""
        pretraining = not self._seeded and self._decisions > self._seed_steps and self.buffer.num_sampleable > 0
        if not (self._seeded or pretraining):
            self.doubts.seeded(self._decisions, self.buffer)
        if self._seeded:
            self._updates_due += self.cfg.utd * self.cfg.num_envs
        elif pretraining:
            self._seeded = True
            compiles = self.cfg.compile and self.agent.updater.backend.name == "torch"
            slow = "; before the first, torch compiles for a minute or more" if compiles else ""
            self.log.note(f"pretraining on the seed data: {self._seed_steps:,} updates{slow}")
            self._updates_due += self._seed_steps
        self._launch(pretraining)

    def _launch(self, pretraining: bool) -> None:
        """Launch updates until none is due; in pretraining, until the run is asked to stop."""
        with self.log.clock.part("update"):
            while self._updates_due >= 1 and not (pretraining and self.stop.asked):
                self._updates.launch(self._update)
                self._updates_due -= 1
                left = int(self._updates_due)
                if pretraining and left % _LAUNCHED_AT_ONCE == 0:
                    self._updates.wait()
                    self.log.busy("pretraining", self._seed_steps - left, self._seed_steps)
            if not self.overlap:
                self._updates.wait()

    def _update(self) -> None:
        self._metrics = self.agent.update(self.buffer)

    def _observe(self, actions: Actions) -> None:
        """Wait for the environments; note what came of the actions."""
        for i, (episode, step) in enumerate(zip(self._running(), self.envs.step_wait(), strict=True)):
            if step is None:
                self._episodes[i] = None
                continue
            check_episodic(self.cfg, step)
            episode.append(actions[i], step)

    def _running(self) -> list[Episode]:
        return [e for e in self._episodes if e is not None]

    @property
    def _seed_steps(self) -> int:
        return self.cfg.seed_steps or 0

    def _record(self, episode: Episode) -> None:
        row = dict(
            episode=self.buffer.num_eps,
            episode_reward=round(episode.total, 2),
            episode_success=episode.success,
            episode_length=len(episode),
            episode_terminated=episode.terminated[-1],
        )
        names = _metric_names(self.cfg.episodic)
        known = [k for k in names if k in self._metrics]
        # One copy from the device, not one a metric.
        read = torch.stack([self._metrics[k] for k in known]).tolist() if known else []
        self.log.episode(self._decisions, row | dict.fromkeys(names) | dict(zip(known, read, strict=True)))

    def _evaluate(self) -> Evaluation:
        self._take_in()
        saved = self._save()
        with self.log.clock.part("evaluation"):
            step = self._decisions * self.evaluator.envs[0].action_repeat
            video = self.folder / "videos" / f"{step}.mp4" if self.cfg.save_video else None
            busy = functools.partial(self.log.busy, "evaluating")
            self._evaluating = saved
            found = self.evaluator.run(self.stop, busy, video, self.log.warn_once)
            self._evaluating = False
        self._evaluated_at = self._decisions
        episodes = len(found.returns)
        self._evaluated = {"return": found.mean_return, "return_std": found.std_return, "episodes": episodes}
        success = float(np.mean(found.successes))
        self.log.evaluation(self._decisions, found.mean_return, found.std_return, episodes, success)
        if saved and found.mean_return > self._best:
            try:
                self.checkpoints.mark_best(self._about_weights())
                # What an agent returns that has learned nothing is no bar: a few lucky episodes would set it.
                if self.agent.updater.steps or self.cfg.checkpoint is not None:
                    self._best = found.mean_return
            except OSError as e:
                self.log.warn(f"checkpoints/best stays what it was: {e}")
        return found

    # ---- stopping and going on

    @property
    def _evaluation_due(self) -> bool:
        """Whether a multiple of `eval_freq` decisions was passed since the last evaluation."""
        period = self.cfg.eval_freq
        return self._evaluated_at < 0 or self._decisions // period > self._evaluated_at // period

    def _stop_or_save(self) -> None:
        """Between two steps: end if that is wished, write a checkpoint if it is time."""
        minutes = self.cfg.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        if self.stop.asked or due:
            self._save()
        self.stop.check()

    def _save(self, whole: bool = True) -> bool:
        """Write a checkpoint, unless switched off or the weights are not worth keeping; whether it was.

        whole: False leaves out environments and the episodes in them, after one has failed.
        """
        self._saved_at = time.monotonic()
        if not self.cfg.save_agent:
            return False
        try:
            if whole:
                self._updates.wait()
            if not all(bool(p.isfinite().all()) for p in self.agent.model.parameters()):
                self.log.warn("no checkpoint: weights are not finite; the last one stays")
                return False
            self.checkpoints.save(self.agent.model, *self._state(whole), self.buffer, self._about_weights())
            return True
        except OSError as e:
            self.log.warn(
                f"no checkpoint could be written: {e}. What was written before is whole. Make room or mend the disk; "
                "the next checkpoint is tried when it is due"
            )
        except Exception as e:
            if whole:
                raise
            self.log.warn(f"no checkpoint: {type(e).__name__}: {e}")  # what it follows from is told next
        return False

    def _about_weights(self) -> dict[str, Any]:
        """What `checkpoints.trained` tells of them."""
        step = self._decisions * self.log.action_repeat
        facts = dict(step=step, decisions=self._decisions, updates=self.agent.updater.steps)
        return facts | (self._evaluated if self._evaluated_at == self._decisions else {})

    def _state(self, whole: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything to go on from but weights and steps of the replay."""
        parts: dict[str, Mapping[str, Tensor]] = dict(
            planner=self.agent.planner.state(),
            updater=self.agent.updater.state(),
            replay=self.buffer.state(),
            metrics=self._metrics,
        )
        evaluating = "evaluator" in self.__dict__
        if evaluating:
            parts["evaluation"] = self.evaluator.planner.state()
        envs = self.envs.states() if whole else None
        for i, state in enumerate(envs or ()):
            if state is None:  # made anew just now
                self._episodes[i] = None
            elif state.now is None:
                self.doubts.say(
                    "random state",
                    "the random state of its environments cannot be told: a run that is "
                    "stopped goes on with other episodes",
                )
        for i, episode in enumerate(self._episodes):
            if episode is not None and whole:
                parts[f"episode {i}"] = episode.tensors()
        values = dict(
            decisions=self._decisions,
            updates_due=self._updates_due,
            seeded=self._seeded,
            evaluated_at=self._evaluated_at,
            best=self._best if np.isfinite(self._best) else None,
            random=self._random.bit_generator.state,
            envs=envs,
            restarts=self.envs.restarts,
            dropped=self.envs.failures.dropped,
            evaluation=self.evaluator.states() if evaluating else None,
            log=self.log.state(),
            made_by=self._made_by(),
        )
        return {f"{part}/{name}": x for part, found in parts.items() for name, x in found.items()}, values

    def _restore(self, saved: Saved) -> None:
        """Stand where the checkpoint was written."""
        values, parts = saved.values, _parts(saved.tensors)
        agent, device = self.agent, self.agent.device
        checkpoint.load_into(agent.model, saved.weights, repr(str(saved.folder)))
        agent.updater.load_state(parts.get("updater", {}))
        agent.planner.load_state(parts["planner"])
        self.buffer.restore(parts["replay"], self.checkpoints.replay.read(saved.chunks))
        self._metrics = {k: x.to(device) for k, x in parts.get("metrics", {}).items()}
        self._decisions, self._updates_due = values["decisions"], values["updates_due"]
        self._seeded, self._evaluated_at = values["seeded"], values["evaluated_at"]
        self._best = -np.inf if values["best"] is None else values["best"]
        self._random.bit_generator.state = values["random"]
        if values["evaluation"] is not None:
            self.evaluator.restore(values["evaluation"], parts["evaluation"])
        if values["envs"] is None:
            self.log.note("the episodes under way are not in the checkpoint: new ones are begun")
        else:
            self._restore_episodes([EnvState(*(state or (None, None))) for state in values["envs"]], parts)
        before, now = values["made_by"], self._made_by()
        changed = [f"{k} {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]]
        if changed:
            self.log.note(
                f"going on with {', '.join(changed)}: the same algorithm, but not bit for bit the same numbers"
            )

    def _restore_episodes(self, states: list[EnvState], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Play the episodes under way again; drop those of which something else comes."""
        kept = {i: parts[f"episode {i}"] for i in range(len(states)) if f"episode {i}" in parts}
        actions = {i: k["action"].numpy()[1:] for i, k in kept.items()}
        for i, steps in self.envs.restore(states, actions).items():
            self._episodes[i] = Episode.replayed(kept[i], steps)
            if self._episodes[i] is None:
                self.log.warn(
                    f"{self.cfg.task}, environment {i}: the same actions gave other observations, so the episode under "
                    "way is dropped and a new one begun; the run goes on, but not bit for bit"
                )

    def _made_by(self) -> dict[str, str]:
        """What the rounding of a run depends on."""
        agent = self.agent
        name = torch.cuda.get_device_name(agent.device) if agent.device.type == "cuda" else "cpu"
        return dict(
            device=name,
            backend=agent.backend.name,
            precision=self.cfg.precision,
            compile=str(self.cfg.compile).lower(),
            torch=torch.__version__,
            threads=str(torch.get_num_threads()),
        )

    def _about(self) -> dict[str, str]:
        agent = self.agent
        return dict(
            model=f"{agent.model.total_params:,} parameters",
            device=str(agent.device),
            backend=f"{agent.backend.name} ({agent.backend.why})",
            threads=str(torch.get_num_threads()),
        )


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By what stands before the stroke in their names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        part, _, rest = name.partition("/")
        found.setdefault(part, {})[rest] = x
    return found


def _metric_names(episodic: bool) -> list[str]:
    names = ["consistency_loss", "reward_loss", "value_loss", "termination_loss", "total_loss", "grad_norm"]
    names += ["termination_rate", "termination_f1"] if episodic else []
    return [*names, "pi_loss", "pi_grad_norm", "pi_entropy", "pi_scaled_entropy", "pi_scale"]
