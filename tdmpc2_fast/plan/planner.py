"""`Planner`: MPPI planning in latent space for E environments at once (paper, section 3.2)."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..inputs import check_obs, flags, whole
from ..model import checkpoint
from ..model.world_model import WorldModel, model_checked
from ..rng import COUNTER, PlanNoise, generator, generator_state, set_generator
from ..runtime.backend import resolve_device
from ..runtime.by_value import by_value, from_values
from ..runtime.chosen import Chosen
from ..runtime.surroundings import undisturbed
from .backend import PlanBackend, PlanRequest
from .torch_plan import TorchPlan
from .trace import PlanTrace

_KEPT_TIMES = 10_000


def _carry(before: PlanBackend, after: PlanBackend) -> None:
    after.prev_mean.copy_(before.prev_mean)


class PlanStats(NamedTuple):
    """Wall-clock of the last calls of `plan`, in milliseconds; NaN before the first."""

    calls: int  # so far
    median: float
    p99: float


class Planner:
    """Plans actions for `num_envs` environments with one world model.

    Reads the model's parameters in place, so updates and loads take effect at once. Keeps
    the previous mean of each environment for warm starts (`prev_mean`, (E, H, A)). By
    kernels everything is allocated here and captured in a CUDA graph, on a CPU recorded on a
    tape; a call then copies its inputs, replays, and on a GPU returns without waiting for it, unless the host is
    more than a dozen plans ahead.

    One planner serves one thread: a call while another runs is refused. Planners of their own
    may run in threads and on streams of their own, on one model. A copy or a pickle takes warm start and random
    streams along, and builds the rest anew around its model.

    Args:
        model: the world model.
        num_envs: environments planned for in each call.
        seed: seed of the planner's random stream; default `cfg.seed`.
    """

    @undisturbed
    def __init__(self, model: WorldModel, num_envs: int = 1, seed: int | None = None) -> None:
        cfg = model_checked(model).cfg
        self.model, self.cfg = model, cfg
        self.num_envs = num_envs = whole(num_envs, "num_envs", 1)
        self.seed = cfg.seed if seed is None else whole(seed, "seed", 0)
        self.generator = generator(self.seed, "plan", model.device)
        self._busy = threading.Lock()
        self._times: deque[float] = deque(maxlen=_KEPT_TIMES)
        self._calls = 0
        by_torch = partial(TorchPlan, model, num_envs, self.generator)
        chosen = Chosen[PlanBackend](model, "Planner: planning", by_torch, self._by_kernels, _carry)
        self._plan = chosen.run(lambda plan: plan)
        self.backend = chosen.backend

    def _by_kernels(self) -> PlanBackend:
        from .kernel_plan import KernelPlan

        return KernelPlan(self.model, self.num_envs, self.seed)

    @classmethod
    @undisturbed
    def from_checkpoint(cls, fp: str | Path, num_envs: int = 1, seed: int | None = None, **changes: object) -> Planner:
        """Return a planner for the model of a checkpoint.

        fp, changes: as for `load`.
        """
        state, saved, cfg = checkpoint.read_with_config(fp, changes)
        model = WorldModel(cfg)
        checkpoint.load_into(model, state, repr(str(fp)), saved=saved)
        return cls(model.to(resolve_device(cfg.device)).eval(), num_envs, seed)

    @property
    def prev_mean(self) -> Tensor:
        """The mean of each environment's last plan (E, H, A), from which the next one starts."""
        return self._plan.prev_mean

    @undisturbed
    def plan(
        self,
        obs: Any,
        t0: bool | Tensor = False,
        eval_mode: bool | Tensor = False,
        task: int | Tensor | None = None,
        noise: PlanNoise | None = None,
        trace: PlanTrace | None = None,
    ) -> Tensor:
        """Plan one action for each environment.

        Args:
            obs: (E, *obs_shape), a tensor on any device, array or list, or a dict with it under
                `cfg.obs`; states must be finite, pixels 0..255. Pixels in pinned memory are
                copied while the call returns: change them after the action was read.
            t0: whether this is the first observation of an episode; bool or (E,) bool.
            eval_mode: leave out exploration noise; bool or (E,) bool. The choice of the
                elite stays random, as in the official code.
            task: task index, int or (E,), multi-task only.
            noise: the draws to use; fresh ones where not given.
            trace: filled with what happened inside, if given (slow: not captured).

        Returns:
            (E, A) actions in [-1, 1] on the model's device.

        Raises:
            InputError: an argument of the wrong shape or value, or a second thread.
        """
        start = time.perf_counter()
        obs = check_obs(obs, self.cfg, (self.num_envs,), self.model.dtype)
        index = self.model.task_given(task)
        if index is not None:
            if index.ndim > 1 or index.numel() not in (1, self.num_envs):
                raise InputError(f"task: got shape {tuple(index.shape)}, allowed: an int or ({self.num_envs},)")
            index = index.expand(self.num_envs)
        first, evaluate = flags(t0, "t0", self.num_envs), flags(eval_mode, "eval_mode", self.num_envs)
        if not self._busy.acquire(blocking=False):
            raise InputError("plan: got a call while another thread's runs, allowed: one planner per thread")
        try:
            action = self._plan.plan(PlanRequest(obs, first, evaluate, index, noise, trace))
        finally:
            self._busy.release()
        self._calls += 1
        self._times.append(time.perf_counter() - start)
        return action

    def state(self) -> dict[str, Tensor]:
        """Return warm start and random streams, to go on from; the tensors are those at work: copy them."""
        found = dict(prev_mean=self.prev_mean, **generator_state(self.generator))
        return found if self._plan.counter is None else {**found, COUNTER: self._plan.counter}

    @undisturbed
    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned; on another backend or device the random stream begins anew."""
        self.prev_mean.copy_(state["prev_mean"])
        set_generator(self.generator, state)
        if self._plan.counter is not None and COUNTER in state:
            self._plan.counter.copy_(state[COUNTER])

    @undisturbed
    def __getstate__(self) -> dict[str, Any]:
        return dict(model=self.model, num_envs=self.num_envs, seed=self.seed, state=by_value(self.state()))

    @undisturbed
    def __setstate__(self, kept: dict[str, Any]) -> None:
        type(self).__init__(self, kept["model"], kept["num_envs"], kept["seed"])
        self.load_state(from_values(kept["state"]))

    def stats(self) -> PlanStats:
        """Return median and 99th percentile of the last 10,000 calls of `plan`, in milliseconds.

        On a GPU a call returns when the plan is queued; its time includes the plan only where
        the caller waits for the action before planning again, as a control loop does.
        """
        if not self._times:
            return PlanStats(0, float("nan"), float("nan"))
        ordered = sorted(self._times)
        last = len(ordered) - 1
        return PlanStats(self._calls, 1e3 * ordered[last // 2], 1e3 * ordered[round(0.99 * last)])
