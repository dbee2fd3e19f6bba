"""`TDMPC2`: the agent, with the official methods `act`, `plan`, `update`, `save`, `load`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .inputs import check_obs, flags, observation
from .learn.batch import Sampler
from .learn.updater import Updater
from .model import checkpoint
from .model.world_model import WorldModel
from .plan.planner import Planner
from .runtime.backend import Backend, matmul_precision, resolve_device
from .runtime.ranks import ALONE, Ranks
from .runtime.surroundings import undisturbed
from .seeds import stream_seed


class TDMPC2:
    """A TD-MPC2 agent: a world model, with a planner and an updater around it.

    Args:
        cfg: a `Config` or the official `cfg` object, completed by the environment's
            `obs_shape`, `action_dim` and `episode_length`.
        num_envs: environments acted in side by side by `act`.
        ranks: the processes that share its updates; default none but this one.
    """

    @undisturbed
    def __init__(self, cfg: Config | Any, num_envs: int | None = None, ranks: Ranks = ALONE) -> None:
        cfg = Config.from_official(cfg)
        self.cfg = cfg
        device = resolve_device(cfg.device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stream_seed(cfg.seed, "init"))
            self.model = WorldModel(cfg)
        self.model.to(device).eval()
        envs = max(1, cfg.num_envs // ranks.count) if num_envs is None else num_envs
        self.planner = Planner(self.model, envs, None if ranks.first else stream_seed(cfg.seed, f"plan of {ranks}"))
        self.updater = Updater(self.model, ranks)

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self.model.device

    @property
    def backend(self) -> Backend:
        """The backend that plans and learns, and why it is this one."""
        return self.planner.backend

    @undisturbed
    @torch.no_grad()
    def act(
        self,
        obs: Any,
        t0: bool | Tensor = False,
        eval_mode: bool | Tensor = False,
        task: int | Tensor | None = None,
        on_cpu: bool = True,
    ) -> Tensor:
        """Return the action for one observation (*obs_shape) -> (A,), or for a batch (E, *obs_shape) -> (E, A).

        It is planned, or where `mpc=false` drawn from the policy prior (whose mean it is in evaluation).

        obs: as `Planner.plan` takes it.
        on_cpu: whether it comes on the CPU, as in the official code; else on the agent's device, not waited for.
        """
        obs = observation(obs, self.cfg)
        shape = self.cfg.observation_shape
        single = obs.ndim == len(shape) and (self.planner.num_envs == 1 or not self.cfg.mpc)
        if single:
            obs = check_obs(obs, self.cfg, (), self.model.dtype).unsqueeze(0)
        action = self.plan(obs, t0, eval_mode, task) if self.cfg.mpc else self._prior(obs, eval_mode, task)
        action = action[0] if single else action
        return action.cpu() if on_cpu else action

    def plan(
        self, obs: Any, t0: bool | Tensor = False, eval_mode: bool | Tensor = False, task: int | Tensor | None = None
    ) -> Tensor:
        """Plan for a batch of observations: (E, *obs_shape) -> (E, A) on the agent's device."""
        return self.planner.plan(obs, t0, eval_mode, task)

    def _prior(self, obs: Tensor, eval_mode: bool | Tensor, task: int | Tensor | None) -> Tensor:
        obs = check_obs(obs, self.cfg, tuple(obs.shape[:1]), self.model.dtype).to(self.device)
        given = flags(eval_mode, "eval_mode", len(obs))
        everywhere = given if isinstance(given, bool) else bool(given.all())  # of a bool, no device is asked
        with matmul_precision(self.cfg, self.device):
            z = self.model.encode(obs, task)
            size = (z.shape[0], self.cfg.need("action_dim"))
            if everywhere:  # the mean is asked for: nothing is drawn, so evaluating changes no stream
                eps = torch.zeros(size, device=self.device, dtype=self.model.dtype)
            else:
                g = self.planner.generator
                eps = torch.randn(size, generator=g, device=self.device, dtype=self.model.dtype)
            out = self.model.policy(z, task, eps)
        if isinstance(given, bool):
            return out.mean if given else out.action
        return torch.where(given.to(self.device).view(-1, 1), out.mean, out.action)

    def update(self, buffer: Sampler) -> dict[str, Tensor]:
        """Take one training step on a batch from `buffer` and return the official metrics."""
        return self.updater.step_on(buffer)

    def save(self, fp: str | Path) -> None:
        """Save the weights: safetensors + JSON, or the official format for a name ending in `.pt`."""
        checkpoint.save(self.model, fp)

    @undisturbed
    def load(self, fp: str | Path | Mapping[str, Any]) -> None:
        """Load weights: a file of ours, a run's folder, an official file, one on the Hub, or a state dict.

        Whatever is wrapped around them is taken off, and a warning says so.

        Raises:
            CheckpointError: of another model (the message says what differs), not finite, or no model at all.
            InputError: neither a path nor a state dict.
        """
        checkpoint.load(self.model, fp)


@undisturbed
def load(fp: str | Path, **changes: Any) -> TDMPC2:
    """Return the agent of a checkpoint, ready to plan or to train on.

    fp: a file, the folder of a run, whose best weights it takes, or an address on the Hub, `hf://OWNER/NAME/FILE`.
    changes: config keys to change, e.g. `device="cuda"`. Others that belong to the machine of the
        checkpoint, such as its device, fall back where this one cannot serve them, with a warning.
        An official file has no config: its tensors tell most of it, and `task="dog-run"` the rest; a task that is
        none of the official ones needs `episode_length`, too, and mt30 and mt80 need nothing.

    Raises:
        CheckpointError: no such file, one that is not opened, or keys are missing that the file does not tell.
        ConfigError: a key that does not exist or a value that it may not have.
    """
    state, saved, cfg = checkpoint.read_with_config(fp, changes)
    agent = TDMPC2(cfg)
    checkpoint.load_into(agent.model, state, repr(str(fp)), saved=saved)
    return agent
