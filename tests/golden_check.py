"""Replay recorded official numbers through an implementation, draw by draw.

    python tests/golden_check.py DIR [--implementation reference|torch|triton] [--case NAME]

DIR holds `CASE.npz` (inputs, draws, outputs) and `CASE.json` (config, state-dict keys), the
layout described in tests/golden/README.md. Weights come from `CASE_weights.npz` where it
lies in DIR, else from the formula in `golden_weights.py`. Prints a line per section with
its worst deviation against its limit; exits 1 if any limit is exceeded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.checkpoint import load_into
from tdmpc2_fast.compat.state_dict import CRITICS, TARGETS, add_official_entries, tensors_only
from tdmpc2_fast.config import Config
from tdmpc2_fast.kernels import mish, simnorm, soft_cross_entropy, symexp, symlog, two_hot, two_hot_inv
from tdmpc2_fast.kernels.mppi import pick_elite
from tdmpc2_fast.kernels.normed_linear import normed_linear
from tdmpc2_fast.kernels.policy_head import policy_head
from tdmpc2_fast.layers import random_shift
from tdmpc2_fast.planner import PlanTrace
from tdmpc2_fast.reference import ReferenceAgent
from tdmpc2_fast.reference import model as ref
from tdmpc2_fast.rng import PlanNoise, UpdateNoise
from tdmpc2_fast.scale import RunningScale, percentiles
from tdmpc2_fast.update import Batch, UpdateTrace, termination_statistics
from tdmpc2_fast.world_model import join

TOLERANCE = 1e-5
NOISE_FACTOR = 4  # of the spread the official code itself shows under other arithmetic
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
        self.noise: dict[str, list[float | None]] = json.loads(noise.read_text()).get(name, {}) if noise.exists() else {}
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

    def get(self, key: str) -> Tensor:
        """A recorded array: float16 as float32, integers as int64, images as they are."""
        x = self.arrays[key]
        if x.dtype == np.float16:
            x = x.astype(np.float32)
        elif x.dtype.kind == "i":
            x = x.astype(np.int64)
        return torch.from_numpy(np.array(x))

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
        path = Path(__file__).parent / "golden" / "golden_weights.py"
    spec = importlib.util.spec_from_file_location("golden_weights", path)
    assert spec is not None and spec.loader is not None
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
        planner = self.agent.planner
        e = self.model.embed(task)
        e = None if e is None else e.unsqueeze(1)
        gamma = self.cfg.discount(self.cfg.episode_length or 0) if task is None else planner._discount_of(task)
        rollout = planner._rollout(z.unsqueeze(0), e, actions.unsqueeze(0), gamma)
        return planner._value(rollout, e, self.model.action_mask(task), eps.unsqueeze(0), members[:2]).T

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


Implementation = Torch | Reference


def build(name: str, case: Case) -> Implementation:
    """A fresh implementation with the recorded weights."""
    return Reference(case) if name == "reference" else Torch(case, backend=name)


class Checker:
    """Runs the sections of one case, each on a fresh implementation, and collects deviations."""

    def __init__(self, case: Case, implementation: str) -> None:
        self.case, self.name = case, implementation
        self.found: list[Deviation] = []

    def same(self, section: str, key: str, got: Tensor, limit: float | None = None) -> None:
        """Compare with the recorded array `key`; NaN must meet NaN."""
        want = self.case.get(key)
        got = got.detach().reshape(want.shape)
        limit = self.case.limit(key, want) if limit is None else limit
        if want.dtype == torch.int64:
            worst = float((got != want).sum())
            limit = 0.0
        else:
            delta = (got.double() - want.double()).abs()
            delta[got.isnan() & want.isnan()] = 0
            worst = float(delta.max()) if delta.numel() else 0.0
            worst = float("inf") if np.isnan(worst) else worst
        self.found.append(Deviation(section, key, worst, limit))

    def run(self) -> list[Deviation]:
        self.heads()
        for k in range(len(self.case.meta["plans"])):
            self.plan(k)
            self.plan_iterations(k)
        self.updates()
        return self.found

    @torch.no_grad()
    def heads(self) -> None:
        """Encoder, heads, edges, sequences, value estimate and TD target."""
        c, impl = self.case, build(self.name, self.case)
        task, z, a = c.maybe("heads_task"), c.get("heads_z"), c.get("heads_action")

        def policy(section: str, prefix: str, z: Tensor, task: Tensor | None) -> None:
            action, info = impl.pi(z, task, c.get(f"{prefix}_eps"))
            info = dict(info, action=action, log_prob=-info["entropy"])
            for key in ("action", "mean", "log_std", "entropy", "scaled_entropy", "log_prob"):
                if f"{prefix}_{key}" in c.arrays:
                    self.same(section, f"{prefix}_{key}", info[key])

        self.same("heads", "heads_z", impl.encode(c.get("heads_obs"), task, c.maybe("heads_shift")))
        self.same("heads", "heads_next", impl.next(z, a, task))
        self.same("heads", "heads_reward_logits", impl.reward(z, a, task))
        self.same("heads", "heads_reward", impl.scalar(impl.reward(z, a, task)))
        if "heads_term_logit" in c.arrays:
            self.same("heads", "heads_term_logit", impl.termination(z))
            self.same("heads", "heads_term_prob", impl.termination(z).sigmoid())
        policy("heads", "heads_pi", z, task)
        for group, target in (("q", False), ("qt", True)):
            logits = impl.q_all(z, a, task, target)
            self.same("heads", f"heads_{group}_all", logits)
            self.same("heads", f"heads_{group}_all_scalar", impl.scalar(logits))
            for how in ("min", "avg"):
                members = c.get(f"heads_{group}{how}_perm")
                self.same("heads", f"heads_{group}_{how}", impl.q_pair(z, a, task, how, members, target))
        policy("policy edges", "pi_edge", z, task)

        half = z.shape[0] // 2
        zs, actions, seq_task = z.view(2, half, -1), a.view(2, half, -1), c.maybe("seq_task")
        self.same("sequences", "seq_next", impl.next(zs, actions, seq_task))
        self.same("sequences", "seq_reward_logits", impl.reward(zs, actions, seq_task))
        policy("sequences", "seq_pi", zs, seq_task)
        self.same("sequences", "seq_q_all", impl.q_all(zs, actions, seq_task, False))
        members = c.get("seq_qavg_perm")
        self.same("sequences", "seq_q_avg", impl.q_pair(zs, actions, seq_task, "avg", members, False))

        rows = torch.arange(c.cfg.num_samples) % z.shape[0]
        value = impl.value(
            z[rows], c.get("value_actions"), c.maybe("value_task"), c.get("value_pi_eps"), c.get("value_qperm")
        )
        self.same("value", "value_value", value)

        batch = Batch(zs, actions, c.get("td_reward"), c.get("td_terminated"), c.maybe("td_task"))
        self.same("td target", "td_td_target", impl.td_target(zs, batch, c.get("td_pi_eps"), c.get("td_qperm")))

    def _plan_noise(self, k: int) -> PlanNoise:
        c, p = self.case, f"plan{k}_"
        final = c.maybe(p + "final_noise")
        return PlanNoise(
            pi_eps=c.get(p + "pi_eps").unsqueeze(0),
            samples=c.get(p + "noise").unsqueeze(1),
            value_eps=c.get(p + "value_pi_eps").unsqueeze(1),
            members=c.get(p + "qperm")[:, :2],
            elite=c.get(p + "gumbel_exp").unsqueeze(0),
            # Not drawn in evaluation; poisoned so that a use of it cannot hide.
            action=torch.full((1, c.cfg.action_dim or 0), 1e3) if final is None else final.unsqueeze(0),
            shift=c.maybe(p + "shift"),
        )

    def _plan_inputs(self, k: int) -> tuple[Tensor, bool, bool, Tensor | None]:
        meta = self.case.meta["plans"][k]
        task = None if meta["task"] is None else torch.tensor([meta["task"]])
        return self.case.get(f"plan{k}_obs"), meta["t0"], meta["eval_mode"], task

    def plan(self, k: int) -> None:
        """The whole plan k, and every iteration of it."""
        c, p, section = self.case, f"plan{k}_", f"plan {k}"
        trace = PlanTrace()
        obs, t0, evaluate, task = self._plan_inputs(k)
        impl = build(self.name, c)
        action, mean = impl.plan(obs, t0, evaluate, task, self._plan_noise(k), trace, c.get(p + "prev_mean_in"))
        self.same(section, p + "z", trace.z[0])
        self.same(section, p + "pi_actions", trace.pi_actions[0])
        want = c.get(p + "iter_elite_idx")
        got = torch.cat(trace.elites)
        differ = float((got.sort(-1).values != want.sort(-1).values).sum())
        self.found.append(Deviation(section, p + "iter_elite_idx (as sets)", differ, 0.0))
        # Near ties may swap places in the order, which moves no sum: scores are compared sorted.
        for name, key in (("values", "value"), ("scores", "score"), ("means", "mean"), ("stds", "std")):
            self.same(section, f"{p}iter_{key}", torch.cat(getattr(trace, name)))
        picked = want[-1][c.get(p + "rand_idx")]
        got_picked = got[-1][trace.picked[0].flatten()[0]]
        self.found.append(Deviation(section, p + "rand_idx (as sample)", float(got_picked != picked), 0.0))
        self.same(section, p + "chosen_actions", trace.chosen[0])
        self.same(section, p + "action", action)
        self.same(section, p + "prev_mean_out", mean)

    def plan_iterations(self, k: int) -> None:
        """Each iteration on its own, started from the recorded mean and std: rounding cannot grow."""
        c, p, section = self.case, f"plan{k}_", f"plan {k} steps"
        noise, impl = self._plan_noise(k), build(self.name, c)
        _, t0, _, task = self._plan_inputs(k)
        z = c.get(p + "z")
        mean = torch.zeros(c.cfg.horizon, c.cfg.action_dim or 0)
        if not t0:
            mean[:-1] = c.get(p + "prev_mean_in")[1:]
        std = torch.full_like(mean, c.cfg.max_std)
        mask = 1 if task is None else c.weights["_action_masks"][task]
        values = []
        for i in range(c.cfg.effective_iterations):
            sampled = (mean.unsqueeze(1) + std.unsqueeze(1) * noise.samples[i, 0]).clamp(-1, 1)
            actions = torch.cat([c.get(p + "pi_actions"), sampled], 1) * mask
            rows = z.expand(c.cfg.num_samples, -1)
            with torch.no_grad():
                values.append(impl.value(rows, actions, task, noise.value_eps[i, 0], noise.members[i]).T)
            mean, std = c.get(p + "iter_mean")[i], c.get(p + "iter_std")[i]
        want = c.get(p + "iter_value")
        # One value estimate from exact inputs: what `value_value` allows at this magnitude, no more.
        single = c.get("value_value")
        limit = c.limit("value_value", single) * max(1.0, float(want.abs().max() / single.abs().max()))
        self.same(section, p + "iter_value", torch.cat(values), limit=limit)

    def updates(self) -> None:
        """Updates in a row: losses, gradients before clipping, parameters, scale."""
        c, impl = self.case, build(self.name, self.case)
        for u in range(c.meta["n_updates"]):
            self._update(impl, u)

    def _update(self, impl: Implementation, u: int) -> None:
        c, p, section = self.case, f"upd{u}_", f"update {u}"
        batch = Batch(*(c.get(p + n) for n in ("obs", "action", "reward", "terminated")), c.maybe(p + "task"))
        noise = UpdateNoise(
            td_eps=c.get(p + "td_pi_eps"),
            td_members=c.get(p + "td_qperm")[:2],
            pi_eps=c.get(p + "pi_eps"),
            pi_members=c.get(p + "pi_qperm")[:2],
            shift_next=c.maybe(p + "shift_next"),
            shift_first=c.maybe(p + "shift_0"),
        )
        trace = UpdateTrace.empty()
        info = impl.update(batch, noise, trace)
        for key in c.arrays:
            if key.startswith(p + "info_"):
                self.same(section, key, info[key.removeprefix(p + "info_")])
        self.same(section, p + "td_target", trace.tensors["td_target"])
        self.same(section, p + "zs_head", trace.tensors["zs"][:, :4])

        names = [str(n) for n in c.arrays["param_names"]]
        grads = [trace.grads[n] for n in names]
        norms = torch.stack([g.double().norm() for g in grads])
        self.same(section, p + "grad_norm_per_param", norms)
        self.same(section, p + "grad_head", torch.stack([_head(g) for g in grads]))
        modules = [str(n) for n in c.arrays["module_names"]]
        owner = torch.tensor([modules.index(n.split(".", 1)[0]) for n in names])
        squares = torch.zeros(len(modules), dtype=torch.float64).index_add_(0, owner, norms.square())
        self.same(section, p + "grad_norm_per_module", squares.sqrt())

        params = impl.params
        state = [str(n) for n in c.arrays["state_names"]]
        self.same(section, p + "param_norm", torch.stack([params[n].detach().double().norm() for n in state]))
        self.same(section, p + "param_head", torch.stack([_head(params[n].detach()) for n in state]))
        self.same(section, p + "scale_value", impl.scale)
        if c.cfg.multitask:
            weight, zero = params["_task_emb.weight"].detach(), torch.zeros(len(c.cfg.tasks), c.cfg.task_dim)
            self.same(section, p + "task_emb_weight", weight)
            self.same(section, p + "task_emb_grad_before", trace.tensors.get("task_emb_grad_before", zero))
            self.same(section, p + "task_emb_grad_after", impl.task_grad if impl.task_grad is not None else zero)


def _head(x: Tensor) -> Tensor:
    """First 64 entries, NaN where there are fewer."""
    out = torch.full((64,), float("nan"))
    flat = x.flatten()[:64]
    out[: flat.numel()] = flat
    return out


def check_math(folder: Path, implementation: str) -> list[Deviation]:
    """Unit fixtures of the maths: two-hot edges, squashing, percentiles, activations, discount."""
    with np.load(folder / "math.npz", allow_pickle=False) as f:
        arrays = {k: f[k] for k in f.files}
    meta = json.loads((folder / "math.json").read_text())
    cfg = Config().with_env({"state": (4,)}, 2, 500)
    found: list[Deviation] = []

    def get(key: str) -> Tensor:
        x = arrays[key]
        return torch.from_numpy(np.array(x.astype(np.float32) if x.dtype == np.float16 else x))

    def same(section: str, key: str, got: Tensor, limit: float = TOLERANCE) -> None:
        want = get(key).double()
        got = got.detach().double().reshape(want.shape)
        delta = (got - want).abs() / want.abs().clamp(min=1)
        delta[got == want] = 0
        worst = float(delta.max())
        found.append(Deviation(section, key, float("inf") if np.isnan(worst) else worst, limit))

    bins = (meta["num_bins"], meta["vmin"], meta["vmax"])
    plain = implementation == "reference"
    x, pred, target = get("x").view(-1, 1), get("soft_ce_pred"), get("soft_ce_target").view(-1, 1)
    same("scalars", "symlog", (ref.symlog if plain else symlog)(x))
    same("scalars", "symexp", (ref.symexp if plain else symexp)(get("symexp_in")))
    same("scalars", "two_hot", ref.two_hot(x, cfg) if plain else two_hot(x, *bins))
    same("scalars", "two_hot_inv", ref.two_hot_inv(get("two_hot_inv_in"), cfg) if plain else two_hot_inv(get("two_hot_inv_in"), *bins))
    logits = pred.clone().requires_grad_()
    loss = ref.soft_ce(logits, target, cfg) if plain else soft_cross_entropy(logits, target, *bins)
    same("scalars", "soft_ce", loss)
    loss.mean().backward()
    assert logits.grad is not None
    same("scalars", "soft_ce_grad_of_mean", logits.grad)
    for i in range(sum(k.startswith("simnorm_in") for k in arrays)):
        z = get(f"simnorm_in{i}")
        same("layers", f"simnorm_out{i}", ref.simnorm(z, cfg) if plain else simnorm(z, meta["simnorm_dim"]))
    same("layers", "mish", torch.nn.functional.mish(get("mish_in")) if plain else mish(get("mish_in")))
    for n in sorted(k.removeprefix("pct_in_") for k in arrays if k.startswith("pct_in_")):
        values = get(f"pct_in_{n}").view(-1, 1)
        same("scale", f"pct_out_{n}", percentiles(values))
    scale, values = RunningScale(meta["tau"], torch.device("cpu")), []
    for q in get("scale_seq_in"):
        scale.update(q.view(-1, 1))
        values.append(scale.value.clone())
    same("scale", "scale_seq_value", torch.cat(values))
    discounts = [Config().discount(int(n)) for n in arrays["discount_len"]]
    same("discount", "discount", torch.tensor(discounts, dtype=torch.float64))
    discounts = [Config(discount_max=0.99).discount(int(n)) for n in arrays["discount_len"]]
    same("discount", "discount_max099", torch.tensor(discounts, dtype=torch.float64))
    return found


def cases(folder: Path) -> list[str]:
    """Names of the recorded cases in a folder."""
    return [f.stem for f in sorted(folder.glob("*.npz")) if f.with_suffix(".json").exists() and f.stem != "math"]


def check(folder: Path, implementation: str, only: str | None = None) -> Iterator[tuple[str, list[Deviation]]]:
    """Deviations per case."""
    names = cases(folder)
    has_math = (folder / "math.npz").exists()
    allowed = names + (["math"] if has_math else [])
    if not allowed:
        raise SystemExit(f"golden_check: no CASE.npz with CASE.json in {folder}")
    if only is not None and only not in allowed:
        raise SystemExit(f"golden_check: unknown case {only!r}, allowed: {', '.join(allowed)}")
    if has_math and only in (None, "math"):
        yield "math", check_math(folder, implementation)
    for name in names:
        if only in (None, name):
            yield name, Checker(Case(folder, name), implementation).run()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--implementation", choices=("reference", "torch", "triton"), default="torch")
    parser.add_argument("--case")
    parser.add_argument("--verbose", action="store_true", help="a line per array")
    args = parser.parse_args(argv)
    bad = 0
    for case, found in check(args.folder, args.implementation, args.case):
        for section in dict.fromkeys(d.section for d in found):
            rows = [d for d in found if d.section == section]
            worst = max(rows, key=lambda d: (not d.ok, d.worst / d.limit if d.limit else d.worst))
            for d in rows if args.verbose else [worst]:
                state = "ok  " if d.ok else "FAIL"
                print(f"{state} {case:14} {section:14} {d.worst:9.2e} of {d.limit:8.1e}  {d.name} ({len(rows)} arrays)")
        bad += sum(not d.ok for d in found)
    print(f"{bad} of the arrays exceed their limit" if bad else "all arrays within their limits")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
