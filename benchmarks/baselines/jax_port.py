"""The JAX port of TD-MPC2 as a baseline, imported from a checkout the user names.

It has one width for latents and hidden layers, so only sizes where ours are equal (5M) can be given to
it. It plans for all environments of a batch at once, averages all critics where the paper draws two, and
draws inside its compiled functions. So what is compared is the model: latents, rewards and values of all
critics at the same observations and actions, and of an update the losses that nothing random enters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.learn.updater import Batch

from ..harness.measure import CannotMeasureError, Gate, Variant

_LIMIT = 1e-3  # its LayerNorm adds 1e-6 where the official one adds 1e-5
_REDUCED_LIMIT = 2e-2  # on a GPU both multiply in tf32, each in an order of its own


def plan_variant(checkout: str, agent: TDMPC2, obs: Tensor) -> Variant:
    """Return its `act` for all environments, from observations on the host to actions there."""
    port = _Port(checkout, agent, agent.cfg.dropout)
    states = [None]

    def run() -> None:
        _, states[0] = port.agent.act(obs.numpy(), states[0], True, key=port.next_key())

    return Variant(run, gate=partial(_model_gate, checkout, agent, obs))


def update_variant(checkout: str, agent: TDMPC2, batch: Batch, ours: Mapping[str, float]) -> Variant:
    """Return its `update` on our batch; it goes on from its own last update."""
    port = _Port(checkout, agent, agent.cfg.dropout)
    np, jnp = port.numpy, port.jnp
    obs, action, reward = (jnp.asarray(x.cpu().numpy()) for x in (batch.obs, batch.action, batch.reward[..., 0]))
    never = jnp.asarray(np.zeros(reward.shape, bool))
    first: dict[str, float] = {}

    def run() -> None:
        port.agent, info = port.agent.update(obs[:-1], action, reward, obs[1:], never, never, key=port.next_key())
        found = {k: float(info[k]) for k in ("consistency_loss", "reward_loss")}  # waits for the device
        first.update({} if first else found)

    return Variant(run, gate=lambda: Gate.of_metrics(ours, first, _limit(agent)))


def _same(cfg: Config, *keys: str) -> dict[str, Any]:
    """Return the settings that have our names."""
    return {key: getattr(cfg, key) for key in keys}


def _limit(agent: TDMPC2) -> float:
    return _LIMIT if agent.device.type == "cpu" else _REDUCED_LIMIT


@contextmanager
def _imported(checkout: str) -> Iterator[None]:
    """Let the checkout's package be imported."""
    # JAX would take most of the GPU's memory for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.path.insert(0, checkout)
    try:
        yield
    except ImportError as e:
        raise CannotMeasureError(f"the JAX port needs {e.name}, which is not installed") from e
    finally:
        sys.path.remove(checkout)


class _Port:
    """An agent of the port with our weights."""

    def __init__(self, checkout: str, agent: TDMPC2, dropout: float) -> None:
        cfg = agent.cfg
        if cfg.mlp_dim != cfg.latent_dim:
            raise CannotMeasureError("the JAX port has one width for latents and hidden layers; size=5 has, too")
        with _imported(checkout):
            import flax.linen as nn
            import jax
            import jax.numpy as jnp
            import numpy
            import optax
            from flax.training.train_state import TrainState
            from tdmpc2_jax import TDMPC2 as Port
            from tdmpc2_jax import WorldModel
            from tdmpc2_jax.common.activations import mish, simnorm
            from tdmpc2_jax.networks import NormedLinear
        if jax.default_backend() == "cpu" and agent.device.type != "cpu":
            raise CannotMeasureError("this JAX was installed without GPU support")
        self.jnp, self.numpy, self._jax = jnp, numpy, jax
        self._key = jax.random.PRNGKey(cfg.seed)
        activation = partial(simnorm, simplex_dim=cfg.simnorm_dim)
        hidden = [NormedLinear(cfg.enc_dim, activation=mish) for _ in range(max(cfg.num_enc_layers - 1, 1))]
        module = nn.Sequential([*hidden, NormedLinear(cfg.latent_dim, activation=activation)])
        (obs_dim,) = cfg.observation_shape
        clip = optax.clip_by_global_norm(cfg.grad_clip_norm)
        encoder = TrainState.create(
            apply_fn=module.apply,
            params=module.init(self.next_key(), jnp.zeros(obs_dim))["params"],
            tx=optax.chain(optax.zero_nans(), clip, optax.adam(cfg.lr * cfg.enc_lr_scale)),
        )
        model = WorldModel.create(
            **_same(cfg, "action_dim", "latent_dim", "num_bins", "simnorm_dim"),
            encoder=encoder,
            value_dropout=dropout,
            num_value_nets=cfg.num_q,
            symlog_min=cfg.vmin,
            symlog_max=cfg.vmax,
            predict_continues=False,
            symlog_obs=False,
            learning_rate=cfg.lr,
            max_grad_norm=cfg.grad_clip_norm,
            key=self.next_key(),
        )
        self.agent: Any = Port.create(
            world_model=self._with_weights(model, tensors_only(agent.model.state_dict())),
            **_same(cfg, "horizon", "num_elites", "temperature", "batch_size", "rho", "tau"),
            **_same(cfg, "consistency_coef", "reward_coef", "value_coef", "entropy_coef"),
            mpc=True,
            mppi_iterations=cfg.effective_iterations,
            population_size=cfg.num_samples,
            policy_prior_samples=cfg.num_pi_trajs,
            min_plan_std=cfg.min_std,
            max_plan_std=cfg.max_std,
            discount=cfg.discounts[0],
            continue_coef=cfg.termination_coef,
        )

    def next_key(self) -> Any:
        """Return a fresh key."""
        self._key, key = self._jax.random.split(self._key)
        return key

    def _with_weights(self, model: Any, state: Mapping[str, Tensor]) -> Any:
        places = dict(
            encoder="_encoder.state.",
            dynamics_model="_dynamics.",
            reward_model="_reward.",
            policy_model="_pi.",
            value_model="_Qs.params.",
            target_value_model="_target_Qs_params.",
        )
        for part, prefix in places.items():
            trained = getattr(model, part)
            params = self._params(trained.params, state, prefix)
            model = model.replace(**{part: trained.replace(params=params)})
        return model

    def _params(self, tree: Any, state: Mapping[str, Tensor], prefix: str) -> Any:
        """Return the tree of a chain of layers, or of an ensemble around one, with our weights in it."""
        if "layers_0" not in tree:
            ((name, inner),) = tree.items()
            return {name: self._params(inner, state, prefix)}
        return {name: self._layer(layer, state, prefix + name.removeprefix("layers_")) for name, layer in tree.items()}

    def _layer(self, tree: Any, state: Mapping[str, Tensor], name: str) -> Any:
        if "kernel" in tree:
            return dict(kernel=self._of(state[f"{name}.weight"].mT), bias=self._of(state[f"{name}.bias"]))
        norm = dict(scale=self._of(state[f"{name}.ln.weight"]), bias=self._of(state[f"{name}.ln.bias"]))
        return dict(Dense_0=self._layer({"kernel": None}, state, name), LayerNorm_0=norm)

    def _of(self, x: Tensor) -> Any:
        return self.jnp.asarray(x.detach().cpu().numpy().copy())


def _model_gate(checkout: str, agent: TDMPC2, obs: Tensor) -> Gate:
    """Return the gate of latents, rewards and all critics' values, without dropout, at random actions."""
    port = _Port(checkout, agent, 0.0)
    model, cfg = port.agent.model, agent.cfg
    action = torch.rand(len(obs), cfg.need("action_dim"), generator=torch.Generator().manual_seed(cfg.seed)) * 2 - 1
    ours = agent.model
    with torch.no_grad():
        z = ours.encode(obs.to(agent.device), None)
        a = action.to(agent.device)
        heads = [ours.next(z, a, None), ours.scalar(ours.reward(z, a, None))[..., 0]]
        heads.append(ours.scalar(ours.Q(z, a, None, return_type="all"))[..., 0])
    theirs_z = model.encode(obs.numpy(), model.encoder.params, key=port.next_key())
    theirs_a = port.jnp.asarray(action.numpy())
    theirs = [
        model.next(theirs_z, theirs_a, model.dynamics_model.params),
        model.reward(theirs_z, theirs_a, model.reward_model.params)[0],
        model.Q(theirs_z, theirs_a, model.value_model.params, key=port.next_key())[0],
    ]
    errors = []
    for x, y in zip([z, *heads], [theirs_z, *theirs], strict=True):
        wanted = torch.tensor(port.numpy.asarray(y))
        errors.append(float((x.cpu() - wanted).abs().max() / wanted.abs().max()))
    return Gate.worst(*(Gate(e, _limit(agent)) for e in errors))
