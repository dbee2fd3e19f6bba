"""Unit fixtures of the maths: two-hot edges, squashing, layers, scale, Gumbel pick, discount."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from golden_cases import TOLERANCE, Deviation, as_tensor
from torch import Tensor

from tdmpc2_fast.config import Config
from tdmpc2_fast.kernels.layers.activations import mish, simnorm
from tdmpc2_fast.kernels.layers.normed_linear import normed_linear
from tdmpc2_fast.kernels.layers.policy_head import gaussian_log_prob, policy_head, squash_correction
from tdmpc2_fast.kernels.layers.two_hot import soft_cross_entropy, symexp, symlog, two_hot, two_hot_inv
from tdmpc2_fast.kernels.plan.mppi import pick_elite
from tdmpc2_fast.learn.metrics import termination_statistics
from tdmpc2_fast.learn.scale import RunningScale, percentiles
from tdmpc2_fast.model.layers import random_shift
from tdmpc2_fast.model.world_model import WorldModel
from tdmpc2_fast.reference import agent as ref_agent
from tdmpc2_fast.reference import model as ref


class MathFixtures:
    """The arrays of `math.npz` and what was compared with them."""

    def __init__(self, folder: Path) -> None:
        with np.load(folder / "math.npz", allow_pickle=False) as f:
            self.arrays = {k: f[k] for k in f.files}
        self.meta = json.loads((folder / "math.json").read_text())
        self.found: list[Deviation] = []

    def get(self, key: str) -> Tensor:
        return as_tensor(self.arrays[key])

    def same(self, section: str, key: str, got: Tensor, limit: float = TOLERANCE) -> None:
        """Relative above 1, absolute below."""
        want = self.get(key).double()
        got = got.detach().double().reshape(want.shape)
        delta = (got - want).abs() / want.abs().clamp(min=1)
        delta[got == want] = 0
        worst = float(delta.max())
        self.found.append(Deviation(section, key, float("inf") if np.isnan(worst) else worst, limit))

    def names(self, prefix: str) -> list[str]:
        return sorted(k.removeprefix(prefix) for k in self.arrays if k.startswith(prefix))


def check_math(folder: Path, implementation: str) -> list[Deviation]:
    """Deviations of an implementation's maths."""
    f = MathFixtures(folder)
    plain = implementation == "reference"
    _scalars(f, plain)
    _layers(f, plain)
    _scale_and_discount(f, plain)
    if not plain:  # in the reference these are lines of its agent, compared as part of it
        _policy(f)
        _agent_parts(f)
    return f.found


def _scalars(f: MathFixtures, plain: bool) -> None:
    cfg = Config()
    bins = (f.meta["num_bins"], f.meta["vmin"], f.meta["vmax"])
    x, logits, target = f.get("x").view(-1, 1), f.get("soft_ce_pred").requires_grad_(), f.get("soft_ce_target")
    target = target.view(-1, 1)
    ops: dict[str, Callable[[], Tensor]] = (
        dict(
            symlog=lambda: ref.symlog(x),
            symexp=lambda: ref.symexp(f.get("symexp_in")),
            two_hot=lambda: ref.two_hot(x, cfg),
            two_hot_inv=lambda: ref.two_hot_inv(f.get("two_hot_inv_in"), cfg),
            soft_ce=lambda: ref.soft_ce(logits, target, cfg),
        )
        if plain
        else dict(
            symlog=lambda: symlog(x),
            symexp=lambda: symexp(f.get("symexp_in")),
            two_hot=lambda: two_hot(x, *bins),
            two_hot_inv=lambda: two_hot_inv(f.get("two_hot_inv_in"), *bins),
            soft_ce=lambda: soft_cross_entropy(logits, target, *bins),
        )
    )
    for key, op in ops.items():
        f.same("scalars", key, op())
    ops["soft_ce"]().mean().backward()
    assert logits.grad is not None
    f.same("scalars", "soft_ce_grad_of_mean", logits.grad)


def _layers(f: MathFixtures, plain: bool) -> None:
    cfg = Config()
    for i in f.names("simnorm_in"):
        z = f.get(f"simnorm_in{i}")
        f.same("layers", f"simnorm_out{i}", ref.simnorm(z, cfg) if plain else simnorm(z, cfg.simnorm_dim))
    f.same("layers", "mish", F.mish(f.get("mish_in")) if plain else mish(f.get("mish_in")))
    # `nl_out` was recorded with a bias that the file holds only after it was set to zero; a
    # bias fitted to it explains it to 5e-7. `nl_out_zero_bias` can be compared as it is.
    weight, bias = f.get("nl_weight"), f.get("nl_bias")
    norm = {k: f.get(f"nl_ln_{k}") for k in ("weight", "bias")}
    if plain:
        p = {"n.weight": weight, "n.bias": bias, **{f"n.ln.{k}": v for k, v in norm.items()}}
        out = ref.normed_linear(p, "n", f.get("nl_in"), cfg)
    else:
        out = normed_linear((f.get("nl_in"),), weight, bias, norm["weight"], norm["bias"])
    f.same("layers", "nl_out_zero_bias", out)
    shifts = f.get("shift_vals").view(-1, 1, 1, 2)
    images = f.get("shift_in").expand(len(shifts), -1, -1, -1)
    shifted = (ref.shift_images if plain else random_shift)(images, shifts)
    f.same("layers", "shift_out", shifted[:, :1])


def _scale_and_discount(f: MathFixtures, plain: bool) -> None:
    for n in f.names("pct_in_"):
        x = f.get(f"pct_in_{n}").view(-1, 1)
        got = torch.stack([ref_agent._percentile(x, p) for p in (5, 95)]) if plain else percentiles(x)
        f.same("scale", f"pct_out_{n}", got)
    scale, seen = RunningScale(f.meta["tau"], torch.device("cpu")), []
    for q in f.get("scale_seq_in"):
        scale.update(q.view(-1, 1))
        seen.append(scale.value.clone())
    f.same("scale", "scale_seq_value", torch.cat(seen))
    scale = RunningScale(f.meta["tau"], torch.device("cpu"))
    scale.update(f.get("scale_const_in"))
    f.same("scale", "scale_const_value", scale.value)
    for key, cfg in (("discount", Config()), ("discount_max099", Config(discount_max=0.99))):
        f.same(
            "discount", key, torch.tensor([cfg.discount(int(n)) for n in f.arrays["discount_len"]], dtype=torch.float64)
        )


def _policy(f: MathFixtures) -> None:
    x = f.get("log_std_in").view(-1, 1)
    out = policy_head(torch.cat([torch.zeros_like(x), x], -1), torch.zeros_like(x), -10, 2)
    f.same("policy", "log_std", out.log_std)
    f.same("policy", "gaussian_logprob", gaussian_log_prob(f.get("glp_eps"), f.get("glp_log_std")))
    action = torch.tanh(f.get("squash_pi"))
    f.same("policy", "squash_pi_out", action)
    f.same("policy", "squash_mu_out", torch.tanh(f.get("squash_mu")))
    f.same("policy", "squash_logpi_out", f.get("squash_logpi") - squash_correction(action))


def _agent_parts(f: MathFixtures) -> None:
    f.same("agent parts", "gumbel_idx", pick_elite(f.get("gumbel_p"), f.get("gumbel_exp")), limit=0.0)
    stats = [termination_statistics(p, t) for p, t in zip(f.get("term_pred"), f.get("term_target"), strict=True)]
    f.same("agent parts", "term_rate", torch.stack([s["termination_rate"] for s in stats]))
    f.same("agent parts", "term_f1", torch.stack([s["termination_f1"] for s in stats]))

    before, index = f.get("emb_weight_before"), f.get("emb_idx")
    n, width = before.shape
    cfg = Config(
        multitask=True,
        tasks=tuple(f"t{i}" for i in range(n)),
        action_dims=(1,) * n,
        episode_lengths=(10,) * n,
        task_dim=width,
        latent_dim=8,
        mlp_dim=8,
        enc_dim=8,
    ).with_env({"state": (2,)}, 1, 10)
    model = WorldModel(cfg)
    model._task_emb.weight.data.copy_(before)
    with torch.no_grad():
        e = model.embed(index)
    assert e is not None
    f.same("agent parts", "emb_out", e)
    f.same("agent parts", "emb_weight_after", model._task_emb.weight)
