"""Replay recorded official numbers through an implementation, draw by draw; the command is tests/golden_check.py.

DIR holds `CASE.npz` (inputs, draws, outputs) and `CASE.json` (config, state-dict keys), the
layout described in tests/golden/README.md. Weights come from `CASE_weights.npz` where it
lies in DIR, else from the formula in `golden_weights.py`. Prints a line per section with
its worst deviation against its limit; exits 1 if any limit is exceeded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import arithmetic  # noqa: F401
import numpy as np
import torch
from golden_cases import CONDITIONING_RUNS, NOISE_FACTOR, Case, Deviation, Implementation, build
from golden_math import check_math
from torch import Tensor

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import BackendError
from tdmpc2_fast.learn.updater import Batch, UpdateTrace
from tdmpc2_fast.plan.trace import PlanTrace
from tdmpc2_fast.rng import PlanNoise, UpdateNoise
from tdmpc2_fast.runtime.backend import resolve_backend


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
        """The whole plan k, and every iteration of it; each iteration amplifies the one before."""
        self._conditioned(lambda checker: checker._plan(k))

    def _plan(self, k: int) -> None:
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
        """Updates in a row: losses, gradients before clipping, parameters, scale.

        Adam's first steps divide small gradients by their own size, so rounding of the
        gradient can decide the sign of a parameter's step, and everything after feels it.
        """
        self._conditioned(Checker._updates)

    def _updates(self) -> None:
        impl = build(self.name, self.case)
        for u in range(self.case.meta["n_updates"]):
            self._update(impl, u)

    def _conditioned(self, section: Callable[[Checker], None]) -> None:
        """Run a section in which rounding is amplified, judged by how much the case amplifies it.

        Where a plain limit is exceeded, the reference is run with weights half an ulp away,
        and the limit is taken from its spread: a property of the case.
        """
        start = len(self.found)
        section(self)
        found = self.found[start:]
        if all(d.ok for d in found):
            return
        spread: dict[str, float] = {}
        for seed in range(CONDITIONING_RUNS):
            other = Checker(self.case.nudged(seed), "reference")
            section(other)
            for d in other.found:
                spread[d.name] = max(spread.get(d.name, 0.0), d.worst)
        for d in found:
            # Choices (which elites, which sample) are equal or not.
            if d.limit:
                d.limit = max(d.limit, NOISE_FACTOR * spread[d.name])

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
    parser.add_argument("--implementation", choices=("reference", "torch", "compat", "triton", "cpu"), default="torch")
    parser.add_argument("--case")
    parser.add_argument("--verbose", action="store_true", help="a line per array")
    args = parser.parse_args(argv)
    bad = 0
    if args.implementation not in ("reference", "compat"):
        try:
            resolve_backend(Config(backend=args.implementation), torch.device("cpu"))
        except BackendError as e:
            print(f"golden_check: {e}", file=sys.stderr)
            return 2
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
