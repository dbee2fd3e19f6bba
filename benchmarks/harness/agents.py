"""Product and baselines of planning and learning: equal weights, equal inputs, equal draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.learn.kernel_update import KernelUpdate
from tdmpc2_fast.learn.updater import Batch
from tdmpc2_fast.plan.kernel_plan import KernelPlan
from tdmpc2_fast.plan.trace import PlanTrace
from tdmpc2_fast.reference import ReferenceAgent
from tdmpc2_fast.rng import PlanNoise, UpdateNoise, generator
from tdmpc2_fast.runtime.backend import matmul_precision
from tdmpc2_fast.train.envs import make_env
from tdmpc2_fast.train.envs.base import close_all, reset

from .compiled import why_not_compiled
from .measure import CannotMeasureError


def agent_of(cfg: Config, num_envs: int = 1) -> TDMPC2:
    """Return an agent with weights of a trained model's size: zero last layers would make all values equal."""
    agent = TDMPC2(cfg, num_envs)
    as_trained(agent.model, cfg.seed)
    return agent


@torch.no_grad()
def as_trained(model: nn.Module, seed: int) -> None:
    """Draw weights of a trained model's size."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim > 1:
            p.copy_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)


def reference_of(agent: TDMPC2) -> ReferenceAgent:
    """Return the reference with the same weights on the same device."""
    return ReferenceAgent(agent.cfg, tensors_only(agent.model.state_dict()))


def trained_agent(cfg: Config, state: Mapping[str, Any], num_envs: int) -> TDMPC2:
    """Return an agent with weights of a checkpoint."""
    agent = TDMPC2(cfg, num_envs)
    agent.load(state)
    return agent


def first_observations(cfg: Config, num_envs: int) -> Tensor:
    """Return the first observations of episodes of the config's task (E, obs_dim), on the host."""
    envs = [make_env(cfg, cfg.seed + n) for n in range(num_envs)]
    try:
        return torch.stack([torch.as_tensor(reset(env)) for env in envs])
    finally:
        close_all(envs)


def observations(cfg: Config, num_envs: int) -> Tensor:
    """Return observations (E, obs_dim) on the host, where a control loop has them."""
    shape = cfg.observation_shape
    return torch.randn(num_envs, *shape, generator=torch.Generator().manual_seed(cfg.seed + 1))


def batch_of(cfg: Config, device: torch.device) -> Batch:
    """Return a batch to learn from."""
    g = torch.Generator().manual_seed(cfg.seed + 2)
    h, b, (obs,) = cfg.horizon, cfg.batch_size, cfg.observation_shape
    return Batch(
        obs=torch.randn(h + 1, b, obs, generator=g).to(device),
        action=2 * torch.rand(h, b, cfg.need("action_dim"), generator=g).to(device) - 1,
        reward=torch.rand(h, b, 1, generator=g).to(device),
        terminated=torch.zeros(h, b, 1, device=device),
        task=None,
    )


def episode_of(cfg: Config, decisions: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return a random episode; it ends with a termination if the config is episodic."""
    steps, (obs,) = decisions + 1, cfg.observation_shape
    action = rng.uniform(-1, 1, (steps, cfg.need("action_dim"))).astype(np.float32)
    reward = rng.uniform(0, 2, steps).astype(np.float32)
    action[0] = reward[0] = np.nan
    terminated = np.zeros(steps, np.float32)
    terminated[-1] = cfg.episodic
    return dict(
        obs=rng.standard_normal((steps, obs)).astype(np.float32), action=action, reward=reward, terminated=terminated
    )


def plan_draws(cfg: Config, num_envs: int, device: torch.device) -> PlanNoise:
    """Return the draws of a plan that results are compared by."""
    return PlanNoise.draw(cfg, num_envs, generator(cfg.seed, "benchmark", device))


def update_draws(cfg: Config, device: torch.device) -> UpdateNoise:
    """Return the draws of an update that results are compared by."""
    return UpdateNoise.draw(cfg, generator(cfg.seed, "benchmark", device))


def check_captured(made: object, device: torch.device) -> None:
    """Raise `RuntimeError` where the kernels of a plan or an update are not replayed, on a GPU."""
    if device.type == "cuda" and isinstance(made, KernelPlan | KernelUpdate) and made.why_eager:
        raise RuntimeError(f"launches are no graph, and their time is not what it would be: {made.why_eager}")


def numbers(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Return metrics as floats, read before a graph's next replay overwrites them."""
    return {k: float(v.detach().float().mean()) for k, v in metrics.items()}


def within(cfg: Config, device: torch.device, run: Callable[[], object]) -> Callable[[], object]:
    """Return `run` with torch's products at the config's precision, as the product's are."""
    if device.type != "cuda":
        return run

    def inside() -> object:
        with matmul_precision(cfg, device):
            return run()

    return inside


class CompiledReference:
    """A reference under `torch.compile(mode="reduce-overhead")`; each method is compiled when first called.

    On a GPU a whole plan is compiled into a CUDA graph. On a CPU only its value estimate is compiled, where the
    time goes: for the whole unrolled plan the compiler makes the same loops in five times the minutes.

    Raises:
        CannotMeasureError: where torch.compile gives no fair baseline.
    """

    num_envs = 1

    def __init__(self, agent: TDMPC2) -> None:
        if why := why_not_compiled(agent.device):
            raise CannotMeasureError(why)
        torch._dynamo.reset()  # what another case compiled counts towards its limits
        self._reference = it = reference_of(agent)
        self.prev_mean, self.p = it.prev_mean, it.p
        self._update = torch.compile(it.update, mode="reduce-overhead")
        self._plan = self._traced_plan
        if agent.device.type == "cpu":
            it.estimate_value = torch.compile(it.estimate_value, mode="reduce-overhead")  # type: ignore[method-assign]
            return
        # Without this a graph copies all weights into buffers of its own before each replay, and
        # refuses to write those it changes.
        for x in [*it.p.values(), it.prev_mean, it.scale]:
            torch._dynamo.mark_static_address(x)
        self._plan = torch.compile(self._traced_plan, mode="reduce-overhead")

    def update(self, batch: Batch, noise: UpdateNoise) -> dict[str, Tensor]:
        """Update as the reference does; metrics last until the next update."""
        torch.compiler.cudagraph_mark_step_begin()
        return self._update(batch, noise)

    def _traced_plan(self, obs: Tensor, noise: PlanNoise) -> tuple[Tensor, Tensor]:
        trace = PlanTrace()
        return self._reference.plan(obs, False, False, None, noise, trace), trace.values[0]

    def plan(
        self, obs: Tensor, t0: bool, eval_mode: bool, task: None, noise: PlanNoise, trace: PlanTrace | None = None
    ) -> Tensor:
        """Plan as the reference does; the flags are compiled in."""
        assert not t0
        assert not eval_mode
        assert task is None
        torch.compiler.cudagraph_mark_step_begin()
        action, values = self._plan(obs, noise)
        if trace is not None:
            trace.record(values=values)
        return action
