"""Whether an official agent plans and learns as ours does: judged by its own code, draw by draw.

Forks and subclasses change the algorithm, and no name tells. So its code plans and learns once from random weights
and given draws, beside our torch backend; whatever it wrote is put back.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..learn.batch import Batch
from ..learn.torch_update import MOMENTS
from ..learn.updater import Updater
from ..model.world_model import WorldModel
from ..plan.planner import Planner
from ..rng import PlanNoise, UpdateNoise, generator
from ..runtime.backend import torch_products
from .draws import given, plan_order, updated
from .sharing import SharedOptimisers, own_memory

_ROWS = 8  # of the batch
_TRIES = 3  # plans: a near tie of two sequences may fall differently
_MAX_STD = 0.3  # of actions: those that are clamped are equal, and so are the values of sequences that end with them
# How far results may lie apart: actions absolutely, losses relatively, parameters by a share of their step's norm.
_ACTION, _LOSS, _STEP = 1e-2, 1e-3, 0.05


class Judge:
    """Compares an official agent with ours.

    Args:
        agent: the official agent.
        model: our world model of its tensors, on which random weights are tried.
        optimisers: its optimisers.
        cfg: our config of it.
    """

    def __init__(self, agent: Any, model: WorldModel, optimisers: SharedOptimisers | None, cfg: Config) -> None:
        self.agent, self.model, self.optimisers = agent, model, optimisers
        std = dict(max_std=_MAX_STD, min_std=min(cfg.min_std, _MAX_STD))
        self.cfg = cfg.replace(backend="torch", precision="float32", dropout=0.0, batch_size=_ROWS, **std)
        self.random = generator(0, "judge", model.device)

    def why_not_plan(self) -> str | None:
        """Say how its plans differ from ours; None where they do not."""
        return self._judged(self._plan)

    def why_not_update(self) -> str | None:
        """Say how its updates differ from ours; None where they do not."""
        return self._judged(self._update)

    def _judged(self, compare: Callable[[], str | None]) -> str | None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch_products(tf32=False))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of official code about itself
            stack.enter_context(self._restored())
            stack.enter_context(self._as_written())
            try:
                return compare()
            except Exception as e:  # of somebody's own code
                return f"judging it failed: {type(e).__name__} {' '.join(str(e).split())[:200]}".strip()

    def _plan(self) -> str | None:
        cfg, agent = self.cfg, self.agent
        ours = Planner(self._twin(), 1)
        for _ in range(_TRIES):
            obs, task = self._observations(1), self._tasks(1)
            mean = 0.3 * self._normal(1, cfg.horizon, cfg.need("action_dim"))
            noise = PlanNoise.draw(cfg, 1, self.random)
            agent._prev_mean.copy_(mean[0])
            ours.prev_mean.copy_(mean)
            with torch.no_grad(), given(plan_order(noise)), _set(agent.cfg, max_std=_MAX_STD):
                wanted = agent._plan(obs, t0=False, eval_mode=False, task=task)
            got = ours.plan(obs, task=task, noise=noise)[0]
            apart = max(_apart(got, wanted), _apart(ours.prev_mean[0], agent._prev_mean))
            if apart <= _ACTION:
                return None
        return f"its _plan gives other actions than the official one, by {apart:.2g} from equal draws"

    def _update(self) -> str | None:
        assert self.optimisers is not None
        agent, model = self.agent, self.model
        twin = self._twin()
        ours = Updater(twin)
        ours.load_state(self.optimisers.state() | dict(scale=own_memory(agent.scale.value)))
        before = {n: own_memory(p) for n, p in twin.named_parameters()}
        batch = self._batch()
        noise = UpdateNoise.draw(self.cfg, self.random)
        with torch.enable_grad(), _set(agent.cfg, batch_size=_ROWS):
            wanted = updated(agent, batch, noise)
        got = ours.step(batch, noise)
        for name, value in got.items():
            if name in wanted and name.endswith(("_loss", "grad_norm", "_scale")):  # others only tell something
                theirs = float(torch.as_tensor(wanted[name]))
                if not abs(float(value) - theirs) <= _LOSS * (abs(theirs) + 1e-2):
                    return f"its update gives {name}={theirs:.6g}, the official one {float(value):.6g}"
        stepped = dict(twin.named_parameters())
        for name, p in model.named_parameters():
            step = torch.linalg.vector_norm(stepped[name] - before[name])
            apart = torch.linalg.vector_norm(p - stepped[name])
            if not apart <= _STEP * step + 1e-6:
                return f"its update moves {name} otherwise than the official one"
        return None

    # ---- inputs

    def _twin(self) -> WorldModel:
        """Return our model with the official one's weights of now."""
        twin = WorldModel(self.cfg).to(self.model.device).eval()
        twin.load_state_dict(self.model.state_dict())
        return twin

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.random, device=self.random.device)

    def _observations(self, *rows: int) -> Tensor:
        shape = (*rows, *self.cfg.observation_shape)
        if self.cfg.obs == "rgb":
            return torch.randint(0, 256, shape, generator=self.random, device=self.random.device, dtype=torch.uint8)
        return self._normal(*shape)

    def _tasks(self, rows: int) -> Tensor | None:
        if not self.cfg.multitask:
            return None
        return torch.randint(0, len(self.cfg.tasks), (rows,), generator=self.random, device=self.random.device)

    def _batch(self) -> Batch:
        h, b = self.cfg.horizon, _ROWS
        reward = self._normal(h, b, 1)
        terminated = (self._normal(h, b, 1) > 0.5).float() if self.cfg.episodic else torch.zeros_like(reward)
        action = self._normal(h, b, self.cfg.need("action_dim")).clamp(-1, 1)
        return Batch(self._observations(h + 1, b), action, reward, terminated, self._tasks(b))

    # ---- what is put back

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        """Try random weights within, since those of a new agent make all values equal; put everything back."""
        agent, model = self.agent, self.model
        tensors = [*model.parameters(), *model.buffers(), agent.scale.value, agent._prev_mean]
        grads = [(p, p.grad) for p in agent.model.parameters()]
        kept = [own_memory(x) for x in tensors]
        states = [] if self.optimisers is None else [agent.optim, agent.pi_optim]
        moments = [{p: {k: own_memory(x) for k, x in s.items()} for p, s in o.state.items()} for o in states]
        dropouts = [(m, m.p) for m in agent.model.modules() if isinstance(m, nn.Dropout)]
        modes = [(m, m.training) for m in agent.modules()]
        attributes = [(own, dict(own)) for own in (agent.__dict__, getattr(agent.cfg, "__dict__", {}))]
        try:
            for m, _ in dropouts:
                m.p = 0.0
            with torch.no_grad():
                for p in model.parameters():
                    if p.ndim > 1:
                        p.copy_(self._normal(*p.shape) / p.shape[-1] ** 0.5)
                for p, g in grads:
                    p.grad = None if g is None else own_memory(g)
            yield
        finally:
            for own, before in attributes:
                for name in own.keys() - before.keys():
                    del own[name]
                own.update(before)
            for m, rate in dropouts:
                m.p = rate
            for m, training in modes:
                m.training = training
            with torch.no_grad():
                for x, copy in zip(tensors, kept, strict=True):
                    x.copy_(copy)
            for p, g in grads:
                p.grad = g
            for optim, of_each in zip(states, moments, strict=True):
                for p in list(optim.state):
                    if p not in of_each:
                        del optim.state[p]
                        continue
                    for k in (*MOMENTS, "step"):
                        optim.state[p][k].copy_(of_each[p][k])

    @contextlib.contextmanager
    def _as_written(self) -> Iterator[None]:
        """Run its code as it is written, not as it was compiled."""
        own = self.agent.__dict__
        compiled = {k: own.pop(k) for k in list(own) if hasattr(own[k], "_torchdynamo_orig_callable")}
        try:
            yield
        finally:
            own.update(compiled)


@contextlib.contextmanager
def _set(cfg: Any, **values: Any) -> Iterator[None]:
    """Have a config of somebody's hold these values within."""
    before = {k: getattr(cfg, k) for k in values}
    try:
        for k, value in values.items():
            setattr(cfg, k, value)
        yield
    finally:
        for k, value in before.items():
            setattr(cfg, k, value)


def _apart(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max())
