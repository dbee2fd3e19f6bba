"""Recorded cases and the implementations they are replayed through."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.compat import tdmpc2 as compat
from tdmpc2_fast.compat.common import math
from tdmpc2_fast.compat.draws import given
from tdmpc2_fast.compat.state_dict import CRITICS, TARGETS, add_official_entries, tensors_only
from tdmpc2_fast.config import Config
from tdmpc2_fast.learn.updater import Batch, UpdateTrace
from tdmpc2_fast.model.checkpoint import load_into
from tdmpc2_fast.plan.trace import PlanTrace
from tdmpc2_fast.reference import ReferenceAgent
from tdmpc2_fast.reference import model as ref
from tdmpc2_fast.rng import PlanNoise, UpdateNoise

TOLERANCE = 1e-5
NOISE_FACTOR = 4  # of the spread the official code itself shows under other arithmetic
CONDITIONING_RUNS = 6
CONSTANTS = ("_action_masks", "log_std_min", "log_std_dif")


@dataclass
class Deviation:
    """One compared array."""

    section: str
    name: str
    worst: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.worst <= self.limit


def as_tensor(x: np.ndarray) -> Tensor:
    """A recorded array: float16 as float32, integers as int64, images as they are."""
    if x.dtype == np.float16:
        x = x.astype(np.float32)
    elif x.dtype.kind == "i":
        x = x.astype(np.int64)
    return torch.from_numpy(np.array(x))


class Case:
    """One recorded case: config, weights, arrays and limits."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        with np.load(folder / f"{name}.npz", allow_pickle=False) as f:
            self.arrays = {k: f[k] for k in f.files}
        self.meta = json.loads((folder / f"{name}.json").read_text())
        config = {**self.meta["config"], "device": "cpu"}
        # The official agent adds to `iterations` in place; ours derives the sum.
        config["iterations"] = self.meta["iterations_effective"] - 2 * int(config["action_dim"] >= 20)
        self.cfg = Config.from_official(config)
        noise = folder / "noise.json"
        self.noise: dict[str, list[float | None]] = (
            json.loads(noise.read_text()).get(name, {}) if noise.exists() else {}
        )
        self.weights = self._weights(folder)

    def _weights(self, folder: Path) -> dict[str, Tensor]:
        keys = [(k, s) for k, s, kind in self.meta["state_dict_keys"] if kind.startswith("torch.")]
        stored = folder / f"{self.name}_weights.npz"
        if stored.exists():
            with np.load(stored, allow_pickle=False) as f:
                recorded = {k: torch.from_numpy(f[k]) for k in f.files}
        else:
            make = _load_formula(folder).make
            skip = (*CONSTANTS, "_detach_Qs_params.")
            recorded = {k: torch.from_numpy(make(k, s, self.name)) for k, s in keys if not k.startswith(skip)}
        constants = dict(
            log_std_min=torch.tensor(int(self.cfg.log_std_min)),
            log_std_dif=torch.tensor(int(self.cfg.log_std_max - self.cfg.log_std_min)),
        )
        if self.cfg.multitask:
            mask = torch.zeros(len(self.cfg.tasks), self.cfg.action_dim)  # type: ignore[arg-type]
            for i, n in enumerate(self.cfg.action_dims):
                mask[i, :n] = 1
            constants["_action_masks"] = mask
        return {**constants, **recorded}

    def nudged(self, seed: int) -> Case:
        """The same case with every weight about half an ulp away."""
        other, g = copy.copy(self), torch.Generator().manual_seed(seed)
        other.weights = {
            k: v * (1 + 2**-24 * torch.randn(v.shape, generator=g)) if v.is_floating_point() else v
            for k, v in self.weights.items()
        }
        return other

    def get(self, key: str) -> Tensor:
        """A recorded array."""
        return as_tensor(self.arrays[key])

    def maybe(self, key: str) -> Tensor | None:
        return self.get(key) if key in self.arrays else None

    def spread(self, key: str) -> float:
        """Largest deviation of the official code from itself under other arithmetic."""
        return max((v for v in self.noise.get(key, [0.0])[:2] if v is not None), default=0.0)

    def limit(self, key: str, want: Tensor) -> float:
        """1e-5, or more where the official code itself moves more under other arithmetic."""
        if key in self.noise:
            spread = [self.spread(key)]
            if key.startswith("upd"):  # an update starts from what the ones before it left
                number, name = key[3:].split("_", 1)
                spread += [self.spread(f"upd{u}_{name}") for u in range(int(number))]
            return max(TOLERANCE, NOISE_FACTOR * max(spread))
        magnitude = float(want.double().nan_to_num(0).abs().max()) if want.numel() else 0.0
        return TOLERANCE * max(1.0, magnitude)


def _load_formula(folder: Path) -> ModuleType:
    path = folder / "golden_weights.py"
    if not path.exists():
        path = Path(__file__).parents[1] / "golden" / "golden_weights.py"
    spec = importlib.util.spec_from_file_location("golden_weights", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Torch:
    """The product on the torch backend."""

    def __init__(self, case: Case, backend: str = "torch") -> None:
        self.agent = TDMPC2(case.cfg.replace(backend=backend))
        cpu = torch.device("cpu")
        load_into(self.agent.model, add_official_entries(case.weights, "", case.cfg.num_q, cpu))
        self.model, self.cfg = self.agent.model, self.agent.cfg

    def encode(self, obs: Tensor, task: Tensor | None, shift: Tensor | None) -> Tensor:
        return self.model.encode(obs, task, shift)

    def next(self, z: Tensor, a: Tensor, task: Tensor | None) -> Tensor:
        return self.model.next(z, a, task)

    def reward(self, z: Tensor, a: Tensor, task: Tensor | None) -> Tensor:
        return self.model.reward(z, a, task)

    def termination(self, z: Tensor) -> Tensor:
        return self.model.termination(z, unnormalized=True)

    def pi(self, z: Tensor, task: Tensor | None, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.pi(z, task, eps)

    def scalar(self, logits: Tensor) -> Tensor:
        return self.model.scalar(logits)

    def q_all(self, z: Tensor, a: Tensor, task: Tensor | None, target: bool) -> Tensor:
        return self.model.Q(z, a, task, "all", target=target)

    def q_pair(self, z: Tensor, a: Tensor, task: Tensor | None, how: str, members: Tensor, target: bool) -> Tensor:
        detach = how == "avg" and not target
        return self.model.Q(z, a, task, how, target=target, detach=detach, members=members[:2])

    def value(self, z: Tensor, actions: Tensor, task: Tensor | None, eps: Tensor, members: Tensor) -> Tensor:
        plan = self.agent.planner._plan
        index = None if task is None else task.view(-1)[:1]
        return plan.values(z.unsqueeze(0), actions.unsqueeze(0), index, eps.unsqueeze(0), members[:2]).T

    def td_target(self, next_z: Tensor, batch: Batch, eps: Tensor, members: Tensor) -> Tensor:
        return self.agent.updater.td_target(next_z, batch, eps, members[:2])

    def plan(
        self,
        obs: Tensor,
        t0: bool,
        eval_mode: bool,
        task: Tensor | None,
        noise: PlanNoise,
        trace: PlanTrace,
        prev_mean: Tensor,
    ) -> tuple[Tensor, Tensor]:
        self.agent.planner.prev_mean.copy_(prev_mean)
        action = self.agent.planner.plan(obs, t0, eval_mode, task, noise, trace)
        return action[0], self.agent.planner.prev_mean[0]

    def update(self, batch: Batch, noise: UpdateNoise, trace: UpdateTrace) -> dict[str, Tensor]:
        return self.agent.updater.step(batch, noise, trace)

    @property
    def params(self) -> Mapping[str, Tensor]:
        return tensors_only(self.model.state_dict())

    @property
    def task_grad(self) -> Tensor | None:
        return self.model._task_emb.weight.grad

    @property
    def scale(self) -> Tensor:
        return self.agent.updater.scale.value


class Compat(Torch):
    """The agent with the official face, its model asked as the official code asks: draws come from torch."""

    def __init__(self, case: Case) -> None:
        agent = compat.TDMPC2(case.cfg.replace(backend="torch"))
        agent.load(add_official_entries(case.weights, "", case.cfg.num_q, torch.device("cpu")))
        self.model, self.cfg, self.official = agent.model, case.cfg, agent
        self.agent = agent.acceleration  # has a planner and an updater

    def pi(self, z: Tensor, task: Tensor | None, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with given(iter([eps])):
            return self.model.pi(z, task)

    def q_all(self, z: Tensor, a: Tensor, task: Tensor | None, target: bool) -> Tensor:
        x = z if task is None else self.model.task_emb(z, task)
        return (self.model._target_Qs if target else self.model._Qs)(torch.cat([x, a], -1))

    def scalar(self, logits: Tensor) -> Tensor:
        return math.two_hot_inv(logits, self.cfg)

    def q_pair(self, z: Tensor, a: Tensor, task: Tensor | None, how: str, members: Tensor, target: bool) -> Tensor:
        with given(iter([members])):
            return self.model.Q(z, a, task, how, target=target, detach=how == "avg" and not target)

    def td_target(self, next_z: Tensor, batch: Batch, eps: Tensor, members: Tensor) -> Tensor:
        with given(iter([eps, members])):
            return self.official._td_target(next_z, batch.reward, batch.terminated, batch.task)

    def plan(
        self,
        obs: Tensor,
        t0: bool,
        eval_mode: bool,
        task: Tensor | None,
        noise: PlanNoise,
        trace: PlanTrace,
        prev_mean: Tensor,
    ) -> tuple[Tensor, Tensor]:
        self.official._prev_mean.copy_(prev_mean)
        action = self.agent.planner.plan(obs, t0, eval_mode, task, noise, trace)
        return action[0], self.official._prev_mean

    def update(self, batch: Batch, noise: UpdateNoise, trace: UpdateTrace) -> dict[str, Tensor]:
        return self.agent.learn(batch, noise, trace)

    @property
    def params(self) -> Mapping[str, Tensor]:
        return tensors_only(self.official.model.state_dict())

    @property
    def scale(self) -> Tensor:
        return self.official.scale.value


class Reference:
    """The plain reference."""

    def __init__(self, case: Case) -> None:
        self.agent, self.cfg = ReferenceAgent(case.cfg, case.weights), case.cfg
        self.p = self.agent.p

    def encode(self, obs: Tensor, task: Tensor | None, shift: Tensor | None) -> Tensor:
        return ref.encode(self.p, obs, task, self.cfg, shift)

    def next(self, z: Tensor, a: Tensor, task: Tensor | None) -> Tensor:
        return ref.next_latent(self.p, z, a, task, self.cfg)

    def reward(self, z: Tensor, a: Tensor, task: Tensor | None) -> Tensor:
        return ref.reward(self.p, z, a, task, self.cfg)

    def termination(self, z: Tensor) -> Tensor:
        return ref.termination(self.p, z, self.cfg)

    def pi(self, z: Tensor, task: Tensor | None, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return ref.policy(self.p, z, task, self.cfg, eps)

    def scalar(self, logits: Tensor) -> Tensor:
        return ref.two_hot_inv(logits, self.cfg)

    def q_all(self, z: Tensor, a: Tensor, task: Tensor | None, target: bool) -> Tensor:
        return ref.critics(self.p, z, a, task, self.cfg, (TARGETS if target else CRITICS).rstrip("."))

    def q_pair(self, z: Tensor, a: Tensor, task: Tensor | None, how: str, members: Tensor, target: bool) -> Tensor:
        return self.agent.q_value(z, a, task, how, members, target)

    def value(self, z: Tensor, actions: Tensor, task: Tensor | None, eps: Tensor, members: Tensor) -> Tensor:
        return self.agent.estimate_value(z, actions, task, eps, members)

    def td_target(self, next_z: Tensor, batch: Batch, eps: Tensor, members: Tensor) -> Tensor:
        return self.agent.td_target(next_z, batch, eps, members)

    def plan(
        self,
        obs: Tensor,
        t0: bool,
        eval_mode: bool,
        task: Tensor | None,
        noise: PlanNoise,
        trace: PlanTrace,
        prev_mean: Tensor,
    ) -> tuple[Tensor, Tensor]:
        self.agent.prev_mean.copy_(prev_mean)
        return self.agent.plan(obs, t0, eval_mode, task, noise, trace), self.agent.prev_mean

    def update(self, batch: Batch, noise: UpdateNoise, trace: UpdateTrace) -> dict[str, Tensor]:
        return self.agent.update(batch, noise, trace)

    @property
    def params(self) -> Mapping[str, Tensor]:
        return self.p

    @property
    def task_grad(self) -> Tensor | None:
        return self.p["_task_emb.weight"].grad

    @property
    def scale(self) -> Tensor:
        return self.agent.scale


Implementation = Torch | Compat | Reference


def build(name: str, case: Case) -> Implementation:
    """A fresh implementation with the recorded weights."""
    named = {"reference": Reference, "compat": Compat}
    return named[name](case) if name in named else Torch(case, backend=name)
