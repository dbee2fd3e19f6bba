"""The world model as plain functions of a dict of tensors with official names.

Read beside section 3.1 of the paper. `p` is always that dict, `c` the config.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config

Params = dict[str, Tensor]


def simnorm(x: Tensor, c: Config) -> Tensor:
    """Apply softmax within groups of V."""
    shape = x.shape
    return F.softmax(x.view(*shape[:-1], -1, c.simnorm_dim), dim=-1).view(*shape)


def normed_linear(
    p: Params, name: str, x: Tensor, c: Config, last: bool = False, dropout: Tensor | None = None
) -> Tensor:
    """Apply linear, dropout, LayerNorm, then Mish or (`last`) SimNorm."""
    x = F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])
    if dropout is not None:
        x = x * dropout
    x = F.layer_norm(x, x.shape[-1:], p[f"{name}.ln.weight"], p[f"{name}.ln.bias"])
    return simnorm(x, c) if last else F.mish(x)


def mlp(p: Params, name: str, x: Tensor, c: Config, dropout: Tensor | None = None) -> Tensor:
    """Apply normed layers 0, 1, ..., then a plain linear layer, or a SimNorm layer if it has a LayerNorm."""
    depth = sum(k.startswith(f"{name}.") and k.endswith(".weight") and ".ln." not in k for k in p)
    for i in range(depth - 1):
        x = normed_linear(p, f"{name}.{i}", x, c, dropout=dropout if i == 0 else None)
    final = f"{name}.{depth - 1}"
    if f"{final}.ln.weight" in p:
        return normed_linear(p, final, x, c, last=True)
    return F.linear(x, p[f"{final}.weight"], p[f"{final}.bias"])


def with_task(p: Params, x: Tensor, task: Tensor | None, c: Config) -> Tensor:
    """Return [x, e], the task embedding appended; the lookup renormalises the weight in place."""
    if not c.multitask:
        return x
    assert task is not None
    e = F.embedding(task.long(), p["_task_emb.weight"], max_norm=1)
    if x.ndim == 3:
        e = e.unsqueeze(0).repeat(x.shape[0], 1, 1)
    elif e.shape[0] == 1:
        e = e.repeat(x.shape[0], 1)
    return torch.cat([x, e], dim=-1)


def shift_images(x: Tensor, shift: Tensor) -> Tensor:
    """Shift images as DrQ-v2: pad by 3, resample at whole-pixel offsets. shift: (B, 1, 1, 2), 0..6."""
    n, _, h, _ = x.shape
    x = F.pad(x.float(), (3, 3, 3, 3), "replicate")
    eps = 1.0 / (h + 6)
    axis = torch.linspace(-1.0 + eps, 1.0 - eps, h + 6, device=x.device)[:h]
    axis = axis.unsqueeze(0).repeat(h, 1).unsqueeze(2)
    grid = torch.cat([axis, axis.transpose(1, 0)], dim=2).unsqueeze(0).repeat(n, 1, 1, 1)
    grid = grid + shift.float() * (2.0 / (h + 6))
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)


def encode(p: Params, obs: Tensor, task: Tensor | None, c: Config, shift: Tensor | None = None) -> Tensor:
    """Return the latent of an observation; image sequences are encoded step by step."""
    if c.obs == "state":
        return mlp(p, "_encoder.state", with_task(p, obs, task, c), c)
    assert shift is not None
    if obs.ndim == 5:
        return torch.stack([encode(p, o, task, c, s) for o, s in zip(obs, shift, strict=True)])
    x = shift_images(obs, shift) / 255.0 - 0.5
    for i, stride in ((2, 2), (4, 2), (6, 2), (8, 1)):
        x = F.conv2d(x, p[f"_encoder.rgb.{i}.weight"], p[f"_encoder.rgb.{i}.bias"], stride=stride)
        x = F.relu(x) if i < 8 else x
    return simnorm(x.flatten(1), c)


def next_latent(p: Params, z: Tensor, a: Tensor, task: Tensor | None, c: Config) -> Tensor:
    """Apply the latent dynamics d(z, a, e)."""
    return mlp(p, "_dynamics", torch.cat([with_task(p, z, task, c), a], -1), c)


def reward(p: Params, z: Tensor, a: Tensor, task: Tensor | None, c: Config) -> Tensor:
    """Return the reward logits R(z, a, e)."""
    return mlp(p, "_reward", torch.cat([with_task(p, z, task, c), a], -1), c)


def termination(p: Params, z: Tensor, c: Config) -> Tensor:
    """Return the termination logit."""
    return mlp(p, "_termination", z, c)


def policy(p: Params, z: Tensor, task: Tensor | None, c: Config, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw from the policy prior p(z, e): squashed Gaussian sample with log-prob and scaled entropy."""
    mean, log_std = mlp(p, "_pi", with_task(p, z, task, c), c).chunk(2, dim=-1)
    log_std = c.log_std_min + 0.5 * (c.log_std_max - c.log_std_min) * (torch.tanh(log_std) + 1)
    size: Tensor | int = eps.shape[-1]
    if c.multitask:
        mask = p["_action_masks"][task]
        mean, log_std, eps = mean * mask, log_std * mask, eps * mask
        size = p["_action_masks"].sum(-1)[task].unsqueeze(-1)
    log_prob = (-0.5 * eps.pow(2) - log_std - 0.9189385175704956).sum(-1, keepdim=True)
    scaled_log_prob = log_prob * size
    action = torch.tanh(mean + eps * log_std.exp())
    mean = torch.tanh(mean)
    log_prob = log_prob - torch.log(F.relu(1 - action.pow(2)) + 1e-6).sum(-1, keepdim=True)
    entropy_scale = scaled_log_prob / (log_prob + 1e-8)
    info = dict(mean=mean, log_std=log_std, entropy=-log_prob, scaled_entropy=-log_prob * entropy_scale)
    return action, info


def critics(
    p: Params,
    z: Tensor,
    a: Tensor,
    task: Tensor | None,
    c: Config,
    group: str = "_Qs.params",
    dropout: Tensor | None = None,
) -> Tensor:
    """Return the logits of all critics, vectorised over the ensemble: (Q, ..., K)."""
    x = torch.cat([with_task(p, z, task, c), a], -1)
    stacked = {k[len(group) + 1 :]: v for k, v in p.items() if k.startswith(group + ".")}

    def one(params: Params, drop: Tensor | None) -> Tensor:
        return mlp({f"q.{k}": v for k, v in params.items()}, "q", x, c, drop)

    if dropout is None:
        return torch.vmap(lambda params: one(params, None))(stacked)
    return torch.vmap(one)(stacked, dropout)


def symlog(x: Tensor) -> Tensor:
    """Return sign(x) log(1 + |x|)."""
    return torch.sign(x) * torch.log(1 + torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Return sign(x) (exp(|x|) - 1)."""
    return torch.sign(x) * (torch.exp(torch.abs(x)) - 1)


def two_hot(x: Tensor, c: Config) -> Tensor:
    """Return scalars (B, 1) as weights on two neighbouring bins (B, K)."""
    x = torch.clamp(symlog(x), c.vmin, c.vmax).squeeze(1)
    index = torch.floor((x - c.vmin) / c.bin_size)
    offset = ((x - c.vmin) / c.bin_size - index).unsqueeze(-1)
    out = torch.zeros(x.shape[0], c.num_bins, dtype=x.dtype, device=x.device)
    lower = index.long().unsqueeze(1)
    return out.scatter(1, lower, 1 - offset).scatter(1, (lower + 1) % c.num_bins, offset)


def two_hot_inv(x: Tensor, c: Config) -> Tensor:
    """Return the expectation over the bins, back from symlog space."""
    bins = torch.linspace(c.vmin, c.vmax, c.num_bins, dtype=x.dtype, device=x.device)
    return symexp(torch.sum(F.softmax(x, dim=-1) * bins, dim=-1, keepdim=True))


def soft_ce(pred: Tensor, target: Tensor, c: Config) -> Tensor:
    """Return the cross-entropy of logits (B, K) against two-hot targets (B, 1)."""
    return -(two_hot(target, c) * F.log_softmax(pred, dim=-1)).sum(-1, keepdim=True)
