"""Gradients of a whole update by the fused kernels, judged by those of torch in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from oracle import KERNELS
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.learn.batch import Batch, UpdateTrace
from tdmpc2_fast.rng import UpdateNoise, generator

# A maximum over the gradients of one small batch is luck.
_BATCHES = 3

Liven = Callable[[TDMPC2], TDMPC2]


def random_batch(cfg: Config, device: torch.device, seed: int = 0) -> Batch:
    """A batch of any config."""
    g = torch.Generator().manual_seed(seed)
    h, b, shape = cfg.horizon, cfg.batch_size, cfg.observation_shape
    size, pixels = (h + 1, b, *shape), cfg.obs == "rgb"
    batch = Batch(
        obs=torch.randint(256, size, generator=g, dtype=torch.uint8) if pixels else torch.randn(size, generator=g),
        action=2 * torch.rand(h, b, cfg.need("action_dim"), generator=g) - 1,
        reward=torch.rand(h, b, 1, generator=g),
        terminated=(torch.rand(h, b, 1, generator=g) < 0.2).float() if cfg.episodic else torch.zeros(h, b, 1),
        task=torch.randint(len(cfg.tasks), (b,), generator=g) if cfg.multitask else None,
    )
    return Batch(*(None if x is None else x.to(device) for x in batch))  # type: ignore[arg-type]


class BFloat16Products(TorchFunctionMode):
    """Products of torch as autocast computes them; everything between is float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return func(*(x.bfloat16() for x in args if x is not None)).float()
        return func(*args, **(kwargs or {}))


def gradients(agent: TDMPC2, batch: Batch, noise: UpdateNoise, reduced: bool = False) -> dict[str, Tensor]:
    """Of every parameter, before clipping, in a first update."""
    trace = UpdateTrace.empty()
    with BFloat16Products() if reduced else contextlib.nullcontext():
        agent.updater.step(batch, noise, trace)
    return trace.grads


def check_gradients(cfg: Config, precision: str, livened: Liven) -> None:
    """Errors of all gradients, relative to their size, at most twice those of plain torch, in max and RMS."""
    reduced = precision == "bfloat16"
    plain_cfg = cfg.replace(backend="torch", precision="tf32" if reduced else precision)
    ours, theirs = [], []
    for seed in range(_BATCHES):
        fused = livened(TDMPC2(cfg.replace(backend=KERNELS, precision=precision)))
        plain, exact = livened(TDMPC2(plain_cfg)), livened(TDMPC2(plain_cfg))
        exact.model.double()
        batch = random_batch(cfg, fused.device, seed)
        noise = UpdateNoise.draw(cfg, generator(seed, "test", fused.device))
        want = gradients(exact, *doubled(batch, noise))
        allowed, got = gradients(plain, batch, noise, reduced), gradients(fused, batch, noise)
        assert got.keys() == want.keys()
        for found, errors in ((got, ours), (allowed, theirs)):
            errors += [((found[n].double() - want[n]) / want[n].abs().max()).flatten() for n in want if want[n].any()]
    got_all, allowed_all = torch.cat(ours).abs(), torch.cat(theirs).abs()
    assert got_all.max() <= 2 * allowed_all.max() + 2**-24
    assert got_all.square().mean().sqrt() <= 2 * allowed_all.square().mean().sqrt() + 2**-26


def doubled(batch: Batch, noise: UpdateNoise) -> tuple[Batch, UpdateNoise]:
    """Return both in float64."""

    def double(x: Tensor | None) -> Tensor | None:
        return x.double() if x is not None and x.is_floating_point() else x

    return Batch(*map(double, batch)), UpdateNoise(**{k: double(v) for k, v in vars(noise).items()})  # type: ignore[arg-type]
