"""What is exported: the whole plan of one environment, and the policy prior alone, as pure functions.

Everything random is an input, so that a graph gives the numbers of `Planner` draw by draw, and
so is what a planner keeps between plans, the previous mean.
"""

from __future__ import annotations

import copy
import json
from dataclasses import fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from typing_extensions import override

from tdmpc2_fast.kernels.layers.policy_head import policy_head
from tdmpc2_fast.kernels.layers.sizes import SHIFT_PAD

from ..inputs import whole
from ..model.world_model import WorldModel, join
from ..plan.torch_plan import TorchPlan
from ..rng import PlanNoise
from ..version import __version__

FORMAT = "tdmpc2-fast-graph/1"
_NAMES = dict(action="action_noise")  # the noise of the action; an output is called `action`


class Port(NamedTuple):
    """An input or output of a graph."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as numpy has it
    law: str = ""  # of a draw: normal, exponential, pairs:Q or integers:LOW:HIGH; empty for what is no draw


class Graph(nn.Module):
    """A function of the inputs that `inputs` names, given by keyword, that returns `outputs` as a tuple.

    It has its own copy of the parameters it needs, in float32 on the CPU.
    """

    kind: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    model: WorldModel

    def __init__(self, model: WorldModel, without: tuple[str, ...]) -> None:
        super().__init__()
        self.model = copy.deepcopy(getattr(model, "_orig_mod", model)).cpu().float().eval().requires_grad_(False)
        self.cfg = cfg = model.cfg
        for name in without:
            self.model._modules[name] = None
        if cfg.multitask:  # a lookup shortens rows in place to norm 1, and a graph writes nothing
            with torch.no_grad():
                self.model.embed(torch.arange(len(cfg.tasks)))
            self.model._task_emb.max_norm = None

    @cached_property
    def program(self) -> ExportedProgram:
        """The graph as `torch.export` has it, with the inputs by keyword; traced once."""
        with torch.no_grad():
            program = torch.export.export(self, (), kwargs=self.example(), strict=False)
        for node in program.graph.nodes:  # where its lines of Python lie is nobody's concern
            node.meta.pop("stack_trace", None)
        return program

    def example(self) -> dict[str, Tensor]:
        """Return inputs of the right shapes and types, all zero."""
        return {p.name: torch.zeros(p.shape, dtype=getattr(torch, p.dtype)) for p in self.inputs}

    def metadata(self) -> dict[str, str]:
        """Return what a program that runs the graph may want to know; texts, or JSON."""
        cfg = self.cfg
        multitask = dict(tasks=json.dumps(list(cfg.tasks))) if cfg.multitask else {}
        return dict(
            format=FORMAT,
            graph=self.kind,
            version=__version__,
            task=cfg.task,
            obs=cfg.obs,
            horizon=str(cfg.horizon),
            iterations=str(cfg.effective_iterations),
            discount=json.dumps(list(cfg.discounts)),
            draws=json.dumps({p.name: p.law for p in self.inputs if p.law}),
            **multitask,
        )


class PlanGraph(Graph):
    """The whole plan: observation, previous mean and noise in, action and mean out.

    A previous mean of zeros is that of the first step of an episode, and an action noise of zeros that of
    an evaluation.
    """

    kind = "plan"

    def __init__(self, model: WorldModel) -> None:
        super().__init__(model, without=("_target_Qs_params",))
        cfg = self.cfg
        generator = torch.Generator().manual_seed(0)
        self._plan = TorchPlan(self.model, 1, generator)
        noise = _draws(PlanNoise.draw(cfg, 1, generator, torch.float32))
        laws = dict.fromkeys(noise, "normal")
        laws |= dict(members=f"pairs:{cfg.num_q}", elite="exponential", shift=_SHIFT)
        mean = _floats("prev_mean", *self._plan.prev_mean.shape)
        draws = [_port(name, x, laws[name]) for name, x in noise.items()]
        self.inputs = (*_given(model), mean, *draws)
        self.outputs = (_floats("action", 1, cfg.need("action_dim")), mean._replace(name="mean"))

    @override
    def forward(
        self,
        obs: Tensor,
        prev_mean: Tensor,
        samples: Tensor,
        value_eps: Tensor,
        members: Tensor,
        elite: Tensor,
        action_noise: Tensor,
        pi_eps: Tensor | None = None,
        shift: Tensor | None = None,
        task: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the action (1, A) and the mean (1, H, A), the next plan's `prev_mean`."""
        never = torch.zeros(1, dtype=torch.bool)
        pi_eps = obs.new_empty(0) if pi_eps is None else pi_eps
        noise = PlanNoise(pi_eps, samples, value_eps, members, elite, action_noise, shift)
        return self._plan.step(prev_mean, obs, never, never, task, noise)

    def given(self, obs: Tensor, prev_mean: Tensor, noise: PlanNoise, task: int | None = None) -> dict[str, Tensor]:
        """Return the inputs by name: obs (1, *obs_shape), prev_mean (1, H, A), the draws of `Planner`, a task index."""
        found = dict(obs=obs, prev_mean=prev_mean, **_draws(noise))
        found |= {} if task is None else dict(task=torch.tensor([whole(task, "task", 0)]))
        return {name: x.contiguous() for name, x in found.items()}  # as compiled code takes for granted


class PriorGraph(Graph):
    """The policy prior alone: observation and noise in, the sampled action and tanh of the mean out."""

    kind = "prior"

    def __init__(self, model: WorldModel) -> None:
        super().__init__(model, without=("_target_Qs_params", "_Qs", "_dynamics", "_reward", "_termination"))
        a = self.cfg.need("action_dim")
        shift = [Port("shift", (1, 1, 1, 2), "int64", _SHIFT)] if self.cfg.obs == "rgb" else []
        self.inputs = (*_given(model), _floats("eps", 1, a)._replace(law="normal"), *shift)
        self.outputs = (_floats("action", 1, a), _floats("mean", 1, a))

    @override
    def forward(
        self, obs: Tensor, eps: Tensor, shift: Tensor | None = None, task: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the action (1, A) that eps (1, A) samples, and the action without noise (1, A)."""
        model = self.model
        e = model.embed(task)
        logits = model._pi(*join(model.encode_parts(obs, e, shift), e))
        found = policy_head(logits, eps, *model.log_std_range, model.action_mask(task))
        return found.action, found.mean


_SHIFT = f"integers:0:{2 * SHIFT_PAD}"


def _given(model: WorldModel) -> list[Port]:
    """Return what is no draw in both graphs: the observation and, in a multi-task model, the task."""
    cfg = model.cfg
    obs = Port("obs", (1, *cfg.observation_shape), "uint8" if cfg.obs == "rgb" else "float32")
    return [obs, Port("task", (1,), "int64")] if cfg.multitask else [obs]


def _draws(noise: PlanNoise) -> dict[str, Tensor]:
    """Return the draws of a plan by the names of inputs, without those that the model has none of."""
    found: dict[str, Any] = {_NAMES.get(f.name, f.name): getattr(noise, f.name) for f in fields(noise)}
    return {name: x for name, x in found.items() if x is not None and x.numel()}


def _port(name: str, x: Tensor, law: str) -> Port:
    return Port(name, tuple(x.shape), str(x.dtype).removeprefix("torch."), law)


def _floats(name: str, *shape: int) -> Port:
    return Port(name, tuple(shape), "float32")
