"""The TD-MPC2 world model: encoder, dynamics, reward, termination, policy prior, critics.

`WorldModel` has the official methods and the official state dict. Methods of the public
face take what the official ones take; those below them read inputs in parts and leave the
task embedding to the caller, so that a planner looks it up once.
"""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdmpc2_fast.kernels.layers.policy_head import PolicyOutput, policy_head
from tdmpc2_fast.kernels.layers.two_hot import two_hot_inv

from ..compat.state_dict import add_official_entries, from_official_entries
from ..config import Config
from ..errors import InputError, kind_of
from ..inputs import indices
from ..runtime.surroundings import undisturbed
from .layers import (
    MLP,
    Ensemble,
    PixelEncoder,
    draw_shift,
    ensemble_members,
    init_weights,
    member_forward,
    multipliers,
    stacked_mlp,
)


class WorldModel(nn.Module):
    """A decoder-free latent world model (paper, section 3.1).

    Args:
        cfg: a `Config` (or the official `cfg` object) with `obs_shape` and `action_dim` set.
    """

    _action_masks: Tensor
    log_std_min: Tensor
    log_std_dif: Tensor

    @torch.inference_mode(False)  # parameters made in it could not be trained later
    def __init__(self, cfg: Config | Any) -> None:
        super().__init__()
        cfg = Config.from_official(cfg)
        self.cfg = cfg
        obs_shape = cfg.observation_shape
        a, z, t, hidden = cfg.need("action_dim"), cfg.latent_dim, cfg.task_dim, 2 * [cfg.mlp_dim]
        if cfg.multitask:
            self._task_emb = nn.Embedding(len(cfg.tasks), t, max_norm=1)
            mask = torch.zeros(len(cfg.tasks), a)
            for i, live in enumerate(cfg.action_dims):
                mask[i, :live] = 1
            self.register_buffer("_action_masks", mask)
        self._encoder = nn.ModuleDict({cfg.obs: _encoder(cfg, obs_shape)})
        self._dynamics = MLP(z + t + a, hidden, z, cfg.simnorm_dim)
        self._reward = MLP(z + t + a, hidden, cfg.num_logits)
        self._termination = MLP(z + t, hidden, 1) if cfg.episodic else None
        self._pi = MLP(z + t, hidden, 2 * a)
        self._Qs = Ensemble(cfg.num_q, z + t + a, hidden, cfg.num_logits, cfg.dropout)
        self.apply(init_weights)
        nn.init.zeros_(self._reward[-1].weight)  # type: ignore[arg-type]
        self._target_Qs_params = stacked_mlp(cfg.num_q, z + t + a, hidden, cfg.num_logits)
        self._target_Qs_params.requires_grad_(False)
        self._target_Qs_params.load_state_dict(self._Qs.params.state_dict())
        low, high = (int(v) if v == int(v) else v for v in (cfg.log_std_min, cfg.log_std_max))
        self.register_buffer("log_std_min", torch.tensor(low))
        self.register_buffer("log_std_dif", torch.tensor(high) - self.log_std_min)
        self.register_state_dict_post_hook(_state_dict_hook)
        self.register_load_state_dict_pre_hook(_load_hook)

    @undisturbed
    def __deepcopy__(self, memo: dict[int, Any]) -> WorldModel:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        if all(p.untyped_storage().nbytes() == p.nbytes for p in self.parameters()):
            return self.__dict__
        # Views into the buffers of an update, all of which a pickle would take along with each.
        modules: Any = copy.deepcopy(self._modules)
        if self.device.type == "cpu":  # by value: a process they go to would find the copies gone
            modules = pickle.dumps(modules)
        return {**self.__dict__, "_modules": modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = state["_modules"]
        if isinstance(modules, bytes):
            state = {**state, "_modules": pickle.loads(modules)}
        super().__setstate__(state)
        if next(self.parameters()).is_inference():
            with torch.inference_mode(False):  # unpickled in it, they could not be trained later
                self._modules, self._buffers = copy.deepcopy((self._modules, self._buffers))

    @property
    def device(self) -> torch.device:
        """The device that the parameters are on."""
        return self._last_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type: float32, unless the model was cast."""
        return self._last_weight.dtype

    @property
    def _last_weight(self) -> Tensor:
        # Each plan asks: attributes of modules, and their indices from the end, take five times as long.
        policy: Any = self._modules["_pi"]
        return policy._modules["2"].weight  # type: ignore[no-any-return]

    @property
    def total_params(self) -> int:
        """The number of learnable parameters; targets do not count."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def world_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the named parameters that the world-model loss trains: all learnable ones but the policy's."""
        for name, p in self.named_parameters():
            if p.requires_grad and not name.startswith("_pi."):
                yield name, p

    def frozen(self) -> list[str]:
        """Return the names of the parameters that no update moves, since `freeze` names their part."""
        parts = tuple(f"_{part}." for part in (self.cfg.freeze or "").split("+") if part)
        return [name for name, _ in self.named_parameters() if name.startswith(parts)] if parts else []

    def places(self) -> Iterator[tuple[str, dict[str, nn.Parameter | None], str]]:
        """Yield each parameter's name, and the dict and key where its module keeps it.

        `load_state_dict(assign=True)` replaces parameters there; to look each up by its name takes as long as a plan.
        """
        for prefix, module in self.named_modules():
            for key in module._parameters:
                yield f"{prefix}.{key}", module._parameters, key

    # ---- task embedding and action masks

    def embed(self, task: Tensor | None) -> Tensor | None:
        """Return the task embedding (..., T) of task indices (...), or None in a single-task model.

        As in the official code a lookup renormalises the looked-up rows of the weight in
        place to norm 1 at most, in planning too; other rows keep their norm.
        """
        if not self.cfg.multitask:
            return None
        if task is None:
            raise InputError("task: got None, allowed: task indices, this is a multi-task model")
        return self._task_emb(task)  # type: ignore[no-any-return]

    def action_mask(self, task: Tensor | None) -> Tensor | None:
        """Return the live action dims (..., A) of task indices (...), or None in a single-task model."""
        return self._action_masks[task] if self.cfg.multitask and task is not None else None

    def task_index(self, task: int | Tensor | None) -> Tensor | None:
        """Return task indices as a checked int64 tensor on the model's device; None if single-task."""
        index = self.task_given(task)
        return None if index is None else index.to(self.device, non_blocking=True)

    def task_given(self, task: int | Tensor | None) -> Tensor | None:
        """Return task indices as a checked int64 tensor, on the device they come from; None if single-task."""
        if not self.cfg.multitask:
            return None
        if task is None:
            raise InputError("task: got None, allowed: task indices, this is a multi-task model")
        return indices(task, "task", len(self.cfg.tasks))

    # ---- the official face

    def task_emb(self, x: Tensor, task: int | Tensor) -> Tensor:
        """Return x with the task embedding appended: (B, .) or (H, B, .) -> (..., . + T)."""
        e = self.embed(self.task_index(task))
        if e is None:
            raise InputError("task_emb: this is a single-task model, it has no task embedding")
        return torch.cat([x, e.expand(*x.shape[:-1], -1)], dim=-1)

    def encode(self, obs: Tensor, task: int | Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Return the latent of observations: (B, *obs_shape) or (H, B, *obs_shape) -> (..., L).

        shift: pixel shifts (..., 1, 1, 2) for `obs=rgb`; drawn where not given.
        """
        return self.encode_parts(obs, self.embed(self.task_index(task)), shift)

    def next(self, z: Tensor, a: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Return the next latent: z (..., L), a (..., A) -> (..., L)."""
        return self._dynamics(*self.parts(z, task, a))  # type: ignore[no-any-return]

    def reward(self, z: Tensor, a: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Return reward logits: z (..., L), a (..., A) -> (..., K)."""
        return self._reward(*self.parts(z, task, a))  # type: ignore[no-any-return]

    def termination(self, z: Tensor, task: int | Tensor | None = None, unnormalized: bool = False) -> Tensor:
        """Return the probability (or logit, if `unnormalized`) that z (..., L) is terminal: (..., 1)."""
        if self._termination is None:
            raise InputError("termination: this model has no termination head (episodic=false)")
        logit = self._termination(z)
        return logit if unnormalized else torch.sigmoid(logit)

    def pi(
        self, z: Tensor, task: int | Tensor | None = None, eps: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sample the policy prior: z (..., L) -> action (..., A) and what belongs to it.

        eps: standard normal (..., A); drawn where not given. The dict has the official
        entries mean, log_std, action_prob, entropy, scaled_entropy.
        """
        out = self.policy(z, task, eps)
        info = dict(
            mean=out.mean,
            log_std=out.log_std,
            action_prob=torch.ones_like(out.log_prob),
            entropy=-out.log_prob,
            scaled_entropy=out.scaled_entropy,
        )
        return out.action, info

    def Q(
        self,
        z: Tensor,
        a: Tensor,
        task: int | Tensor | None = None,
        return_type: str = "min",
        target: bool = False,
        detach: bool = False,
        members: Tensor | None = None,
    ) -> Tensor:
        """Return the state-action values of z (..., L), a (..., A).

        return_type: "all" gives logits of all critics (Q, ..., K); "min" and "avg" evaluate
        two critics and give scalars (..., 1). members: these two, (2,) int64; drawn at
        random where not given. Dropout is active in training mode, never in the targets.
        """
        if return_type not in ("min", "avg", "all"):
            raise InputError(f"return_type: got {return_type!r}, allowed: 'min', 'avg', 'all'")
        if return_type != "all" and members is None:
            members = torch.randperm(self.cfg.num_q, device=z.device)[:2]
        logits = self.critic_logits(
            self.parts(z, task, a),
            members=None if return_type == "all" else members,
            target=target,
            detach=detach,
            dropout=self.cfg.dropout if self.training and not target else 0.0,
        )
        if return_type == "all":
            return torch.stack(logits)
        q0, q1 = (self.scalar(x) for x in logits)
        return torch.minimum(q0, q1) if return_type == "min" else (q0 + q1) / 2

    @torch.no_grad()
    def soft_update_target_Q(self) -> None:
        """Move the target critics a step `tau` towards the critics (Polyak averaging)."""
        torch._foreach_lerp_(list(self._target_Qs_params.parameters()), list(self._Qs.parameters()), self.cfg.tau)

    # ---- below the face: inputs in parts

    def parts(self, z: Tensor, task: int | Tensor | None, a: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the input parts (z, e, a) of a head, in the column order of its first layer."""
        return join(z, self.embed(self.task_index(task)), a)

    def encode_parts(self, obs: Tensor, e: Tensor | None, shift: Tensor | None = None) -> Tensor:
        """Do what `encode` does with the task embedding already looked up."""
        encoder = self._encoder[self.cfg.obs]
        if self.cfg.obs == "state":
            return encoder(*join(obs, e))  # type: ignore[no-any-return]
        images = obs.flatten(0, -4)
        if shift is None:
            generator = torch.Generator(obs.device)
            generator.manual_seed(int(torch.randint(2**62, ())))
            shift = draw_shift((images.shape[0],), generator, obs.device)
        return encoder(images, shift.view(-1, 1, 1, 2)).view(*obs.shape[:-3], -1)  # type: ignore[no-any-return]

    def policy(self, z: Tensor, task: int | Tensor | None = None, eps: Tensor | None = None) -> PolicyOutput:
        """Return everything of the policy prior at z (..., L)."""
        index = self.task_index(task)
        logits = self._pi(*join(z, self.embed(index)))
        if eps is None:
            eps = torch.randn_like(logits[..., : self.cfg.action_dim])
        return policy_head(logits, eps, *self.log_std_range, self.action_mask(index))

    @property
    def log_std_range(self) -> tuple[float, float]:
        """The range of the policy's log std, as plain numbers."""
        return self.cfg.log_std_min, self.cfg.log_std_max

    def critic_logits(
        self,
        parts: Sequence[Tensor],
        members: Tensor | None,
        *,
        target: bool = False,
        detach: bool = False,
        dropout: float | Tensor = 0.0,
    ) -> list[Tensor]:
        """Return logits (..., K) of the given critics, or of all where `members` is None.

        dropout: a probability, or multipliers (M, ..., D) for the M critics evaluated.
        """
        layers = self._target_Qs_params if target else self._Qs.params
        out = []
        for i, params in enumerate(ensemble_members(layers, members, detach)):
            if isinstance(dropout, Tensor):
                multiplier: Tensor | None = dropout[i]
            else:
                multiplier = multipliers(dropout, parts, self.cfg.mlp_dim)
            out.append(member_forward(params, parts, multiplier))
        return out

    def scalar(self, logits: Tensor) -> Tensor:
        """Return the scalar that reward or value logits (..., K) stand for: (..., 1)."""
        return two_hot_inv(logits, self.cfg.num_bins, self.cfg.vmin, self.cfg.vmax)

    def __repr__(self) -> str:
        modules = dict(
            Encoder=self._encoder,
            Dynamics=self._dynamics,
            Reward=self._reward,
            Termination=self._termination,
            Policy=self._pi,
            Critics=self._Qs,
        )
        lines = ["TD-MPC2 world model"]
        lines += [f"{name}: {module}" for name, module in modules.items() if module is not None]
        lines.append(f"Learnable parameters: {self.total_params:,}")
        return "\n".join(lines)


def model_checked(model: WorldModel) -> WorldModel:
    """Return the model that was given, compiled or not, or raise an `InputError`."""
    if isinstance(getattr(model, "_orig_mod", model), WorldModel):
        return model
    hint = "; its .model is one" if isinstance(getattr(model, "model", None), WorldModel) else ""
    raise InputError(f"model: got {kind_of(model)}, allowed: a WorldModel{hint}")


def join(z: Tensor, e: Tensor | None, a: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return (z, e, a) without the missing ones."""
    return tuple(x for x in (z, e, a) if x is not None)


def _encoder(cfg: Config, shape: tuple[int, ...]) -> nn.Module:
    if cfg.obs == "rgb":
        return PixelEncoder(shape[0], cfg.num_channels, cfg.simnorm_dim)
    hidden = max(cfg.num_enc_layers - 1, 1) * [cfg.enc_dim]
    return MLP(shape[0] + cfg.task_dim, hidden, cfg.latent_dim, cfg.simnorm_dim)


def _state_dict_hook(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    assert isinstance(module, WorldModel)
    ordered = add_official_entries(state, prefix, module.cfg.num_q, module.device)
    state.clear()
    state.update(ordered)


def _load_hook(module: nn.Module, state: OrderedDict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, WorldModel)
    own = dict(module.named_buffers(prefix=prefix.rstrip("."), recurse=False))
    from_official_entries(state, prefix, own)
