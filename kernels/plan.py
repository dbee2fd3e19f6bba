"""A whole plan as a chain of fused launches: encoder, policy prior, MPPI iterations, choice.

    encode obs                                   one launch a layer
    first layers' share of z0, once a plan       dynamics, policy and reward in one launch
    each iteration, each step t                  3 launches: first and second layers of dynamics and
                                                 reward together, then the next latent
    terminal value                               policy 3, the two drawn critics 2 launches
    all rewards and both critics to scalars      1 launch
    elites, mean, std, next samples              1 launch

The policy-prior sequences are rolled out in the first iteration, beside the sampled ones; their
rewards and last latents stay where they are (their actions never change). Everything lives in
buffers allocated once, so the chain can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from .grouped_layer import activate_rows, grouped_layer
from .launch import Precision, log_launches
from .mppi_begin import mppi_begin
from .mppi_update import Choice, mppi_update
from .noise import draw_plan_noise
from .persistent import PersistentRollout
from .policy_layer import policy_layer
from .rows import EACH, Layer, Rows, Slabs
from .scalar_head import scalar_head
from .tiles import activates_once, layer_tile

# Slabs of the packed first and second layers; critic q is slab CRITICS + q.
DYNAMICS, POLICY, REWARD, CRITICS = 0, 1, 2, 3


@dataclass(frozen=True)
class PlanSizes:
    """What a plan is made of; names as in the config, `envs` environments at once."""

    envs: int
    obs_dim: int  # 0: latents come from outside (pixels)
    action_dim: int
    latent_dim: int
    mlp_dim: int
    enc_dim: int
    num_enc_layers: int
    num_q: int
    num_bins: int = 101
    vmin: float = -10.0
    vmax: float = 10.0
    simnorm_dim: int = 8
    task_dim: int = 0
    episodic: bool = False
    horizon: int = 3
    iterations: int = 6
    num_samples: int = 512
    num_pi_trajs: int = 24
    num_elites: int = 64
    temperature: float = 0.5
    min_std: float = 0.05
    max_std: float = 2.0
    log_std_min: float = -10.0
    log_std_max: float = 2.0


@dataclass(frozen=True)
class PlanWeights:
    """Packed weights of all networks a plan evaluates."""

    encoder: tuple[Layer, ...]  # empty for pixels
    first: Layer  # (3 + Q, D, L), side (3 + Q, D, A); the policy's side is never read
    second: Layer  # (3 + Q, D, D)
    third: Layer  # (1, L, D), dynamics, SimNorm
    scalars: Layer  # (1 + Q, max(K, 1), D): reward, critics
    policy: Layer  # (1, 2A, D), rows interleaved
    task: Layer | None = None  # side (3 + Q, D, T): share of the task embedding in the first layers
    termination: tuple[Layer, Layer, Layer] | None = None

    @classmethod
    def empty(cls, s: PlanSizes, precision: Precision, device: torch.device) -> PlanWeights:
        """Room for all weights."""

        def layer(slabs: int, d: int, k: int, side: int = 0, norm: bool = True, simnorm_dim: int = 0) -> Layer:
            def vector() -> Tensor:
                return torch.empty(slabs, d, device=device)

            weight = torch.empty(slabs, d, k, dtype=precision.dtype, device=device)
            narrow = torch.empty(slabs, d, side, dtype=precision.dtype, device=device) if side else None
            gamma, beta = (vector(), vector()) if norm else (None, None)
            return Layer(weight, vector(), gamma, beta, narrow, simnorm_dim)

        d, z, heads = s.mlp_dim, s.latent_dim, CRITICS + s.num_q
        encoder = []
        if s.obs_dim:
            widths = [s.obs_dim, *max(s.num_enc_layers - 1, 1) * [s.enc_dim], z]
            for i, (k, out) in enumerate(pairwise(widths)):
                last = i == len(widths) - 2
                encoder.append(layer(1, out, k, 0 if i else s.task_dim, simnorm_dim=s.simnorm_dim if last else 0))
        return cls(
            encoder=tuple(encoder),
            first=layer(heads, d, z, s.action_dim),
            second=layer(heads, d, d),
            third=layer(1, z, d, simnorm_dim=s.simnorm_dim),
            scalars=layer(1 + s.num_q, max(s.num_bins, 1), d, norm=False),
            policy=layer(1, 2 * s.action_dim, d, norm=False),
            task=layer(heads, d, 0, s.task_dim, norm=False) if s.task_dim else None,
            termination=(layer(1, d, z), layer(1, d, d), layer(1, 1, d, norm=False)) if s.episodic else None,
        )


@dataclass
class PlanInputs:
    """Buffers a plan reads; their addresses stay, their contents change from plan to plan."""

    obs: Tensor  # (E, obs_dim), empty for pixels
    z0: Tensor | None  # (E, L), only for pixels
    task_embedding: Tensor | None  # (E, T)
    mask: Tensor | None  # (E, A)
    discount: Tensor  # (E,)
    t0: Tensor  # (E,) bool
    eval_mode: Tensor  # (E,) bool
    prev_mean: Tensor  # (E, H, A)
    rng: Tensor  # (2,) int64: seed, number of plans so far

    @classmethod
    def empty(cls, s: PlanSizes, device: torch.device) -> PlanInputs:
        """Room for all inputs; previous mean and random state at zero."""
        e = s.envs

        def floats(*size: int) -> Tensor:
            return torch.zeros(size, device=device)

        return cls(
            obs=floats(e, s.obs_dim),
            z0=None if s.obs_dim else floats(e, s.latent_dim),
            task_embedding=floats(e, s.task_dim) if s.task_dim else None,
            mask=floats(e, s.action_dim) if s.task_dim else None,
            discount=floats(e),
            t0=torch.zeros(e, dtype=torch.bool, device=device),
            eval_mode=torch.zeros(e, dtype=torch.bool, device=device),
            prev_mean=floats(e, s.horizon, s.action_dim),
            rng=torch.zeros(2, dtype=torch.int64, device=device),
        )


@dataclass
class PlanDraws:
    """Buffers of a plan's random draws, filled by `draw_plan_noise` or from outside."""

    pi_eps: Tensor  # (E, H, P, A) normal
    samples: Tensor  # (I, E, H, N-P, A) normal
    value_eps: Tensor  # (I, E, N, A) normal
    slabs: Tensor  # (I, H + 2) int64: -1 for each reward, then the two critics of the iteration
    elite: Tensor  # (E, num_elites) Exp(1)
    action: Tensor  # (E, A) normal
    shift: Tensor | None  # (E, 1, 1, 2) int64, only for pixels

    @property
    def members(self) -> Tensor:
        """(I, 2), a view: the critics drawn."""
        return self.slabs[:, -2:]

    @classmethod
    def empty(cls, s: PlanSizes, device: torch.device) -> PlanDraws:
        """Room for all draws."""
        e, i, h, a, n, p = s.envs, s.iterations, s.horizon, s.action_dim, s.num_samples, s.num_pi_trajs

        def floats(*size: int) -> Tensor:
            return torch.zeros(size, device=device)

        slabs = torch.full((i, h + 2), -1, dtype=torch.int64, device=device)
        slabs[:, h + 1] = 1
        slabs[:, h] = 0
        return cls(
            pi_eps=floats(e, h, p, a),
            samples=floats(i, e, h, n - p, a),
            value_eps=floats(i, e, n, a),
            slabs=slabs,
            elite=torch.ones(e, s.num_elites, device=device),
            action=floats(e, a),
            shift=None if s.obs_dim else torch.zeros(e, 1, 1, 2, dtype=torch.int64, device=device),
        )


class PlanState:
    """Buffers a plan works in and writes its results to."""

    def __init__(self, s: PlanSizes, precision: Precision, device: torch.device) -> None:
        e, n, h, a, d = s.envs, s.num_samples, s.horizon, s.action_dim, s.mlp_dim

        def rows(groups: int, n: int, width: int, dtype: torch.dtype = precision.dtype) -> Rows:
            return Rows.empty(groups, e, n, width, dtype, device)

        def floats(*size: int) -> Tensor:
            return torch.empty(size, device=device)

        self.encoded = [rows(1, 1, width) for width in _encoder_widths(s)]
        self.task_share = rows(CRITICS + s.num_q, 1, d, torch.float32) if s.task_dim else None
        self.shared = rows(3, 1, d, torch.float32)  # z0's share of the first layers
        self.first = rows(2, n, d)
        # Dynamics, then the reward of each step, then two critics: inputs of the third layer and
        # of all scalar heads.
        self.second = rows(1 + h + 2, n, d)
        self.policy = rows(1, n, d)
        self.z = rows(h, n, s.latent_dim)  # z[t] is the latent after step t
        self.termination_first = rows(h, n, d) if s.episodic else None
        self.termination_second = rows(h, n, d) if s.episodic else None
        self.termination = floats(h, e, n) if s.episodic else None
        self.actions = floats(e, h, n, a)
        self.terminal_action = floats(e, n, a)
        self.scalars = floats(h + 2, e, n)
        self.values = floats(e, n)
        self.elites = torch.empty(e, s.num_elites, dtype=torch.int64, device=device)
        self.scores = floats(e, s.num_elites)
        self.mean = floats(e, h, a)
        self.std = floats(e, h, a)
        self.action = floats(e, a)
        self.chosen = floats(e, h, a)
        self.picked = torch.empty(e, dtype=torch.int64, device=device)


def _encoder_widths(s: PlanSizes) -> list[int]:
    return [*max(s.num_enc_layers - 1, 1) * [s.enc_dim], s.latent_dim] if s.obs_dim else []


Observer = Callable[[str], None]
"""Called after "prior", before each update ("values"), after it ("update"): for traces and tests."""

_PAIR = Slabs(DYNAMICS, REWARD - DYNAMICS)
_SHARED = Slabs(0, 0)


class FusedPlan:
    """The chain of launches for one set of sizes, and the buffers it works in.

    Args:
        sizes: of everything.
        weights: packed; read in place by every run.
        precision: of the products.
        device: of `weights`.
        pdl: programmatic dependent launch.
        throughput: whether an activation gets a launch of its own; None lets the table decide.
        persistent: multiprocessors to use for one launch an iteration in place of a chain of
            small ones (persistent.py); 0: the chain.
        annotate: makes a named range for profilers.
    """

    def __init__(
        self,
        sizes: PlanSizes,
        weights: PlanWeights,
        precision: Precision,
        device: torch.device,
        pdl: bool = False,
        throughput: bool | None = None,
        persistent: int = 0,
        annotate: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.sizes, self.weights, self.precision, self.pdl = sizes, weights, precision, pdl
        self._annotate = annotate
        self.inputs, self.draws = PlanInputs.empty(sizes, device), PlanDraws.empty(sizes, device)
        self.state = PlanState(sizes, precision, device)
        rows = sizes.envs * sizes.num_samples
        self.throughput = activates_once(rows) if throughput is None else throughput
        # Sampled and prior rows of one buffer are written by different launches and read by one,
        # so their tiles must be of one width: that of all rows together.
        d, z = sizes.mlp_dim, sizes.latent_dim
        self._second_tile = layer_tile(rows, 2, d, d, precision.name)
        self._third_tile = layer_tile(rows, 1, z, d, precision.name)
        third = (None, 0) if self.throughput else (weights.third, self._third_tile.BN)
        self.z = Rows(self.state.z.x, self.state.z.stats, third[0], _SHARED, third[1])
        self._persistent = self._one_launch(persistent) if persistent and sizes.iterations > 1 else None

    def run(self, draw: bool = True, observe: Observer | None = None) -> None:
        """One plan from `inputs` to `state.action`; `draw`: fresh random numbers first."""
        if draw:
            self.draw()
        with self._annotate("encode"):
            shared = self.share(self.encode())
        with self._annotate("prior"):
            if self.sizes.num_pi_trajs:
                self.first_prior_action(shared)
            self.begin()
        for i in range(self.sizes.iterations):
            with self._annotate("iteration"):
                if self._persistent and i:
                    self._persistent.run(i - 1)
                else:
                    self.rollout(None, shared, 0 if i == 0 else self.sizes.num_pi_trajs, act=i == 0)
                    self.terminal_value(i)
            if observe:
                if i == 0:
                    observe("prior")
                observe("values")
            last = i == self.sizes.iterations - 1
            with self._annotate("select"):
                self.update(None if last else self.draws.samples[i + 1], choose=last)
            if observe:
                observe("update")

    def _one_launch(self, processors: int) -> PersistentRollout:
        """All iterations but the first, which draws the prior's actions, as one launch each."""
        if self.throughput or self.sizes.episodic:
            what = "the throughput regime" if self.throughput else "an episodic model"
            raise ValueError(f"persistent: got {what}, allowed: few environments, without termination")
        iterations = []
        for i in range(1, self.sizes.iterations):
            with log_launches(dry=True) as log:
                self.rollout(None, self.state.shared)
                self.terminal_value(i)
            iterations.append(log)
        # A kernel that holds every kind of phase has no registers to spare for deep blocks.
        tile = replace(self._second_tile, BK=min(self._second_tile.BK, 32))
        return PersistentRollout(iterations, self.precision, processors, tile)

    def draw(self) -> None:
        """Fill `draws` from the counter RNG."""
        d = self.draws
        draw_plan_noise(
            self.inputs.rng,
            pi_eps=d.pi_eps,
            samples=d.samples,
            value_eps=d.value_eps,
            elite=d.elite,
            action=d.action,
            members=d.members,
            num_q=self.sizes.num_q,
            shift=d.shift,
            pdl=self.pdl,
        )

    def encode(self) -> Rows:
        """Latent of the observation, (1, E, 1, L), its SimNorm due."""
        inputs = self.inputs
        if inputs.z0 is not None:
            return Rows(inputs.z0[None, :, None])
        x = Rows(inputs.obs[None, :, None])
        side = None if inputs.task_embedding is None else inputs.task_embedding.unsqueeze(1)
        for layer, out in zip(self.weights.encoder, self.state.encoded, strict=True):
            x = self._layer(x, side, layer, out, _SHARED)
            side = None
        return x

    def share(self, z0: Rows | None) -> Rows:
        """What z0 and the task embedding add to the first layers of dynamics, policy and reward.

        It is the same for all samples, (3, E, 1, D). z0 None: the task embedding alone.
        """
        task, share = self.inputs.task_embedding, self.state.task_share
        if share is not None:
            assert self.weights.task is not None
            assert task is not None
            self._layer(None, task.unsqueeze(1), self.weights.task, share, EACH)
        if z0 is None:
            return self.state.shared
        return self._layer(z0, None, self.weights.first, self.state.shared, EACH, self._task_bias)

    @property
    def _task_bias(self) -> Tensor | None:
        share = self.state.task_share
        return None if share is None else share.x[:, :, 0]

    def first_prior_action(self, shared: Rows) -> None:
        """Policy actions at z0 for the prior sequences: one latent, P samples of its policy."""
        s, p = self.state, self.sizes.num_pi_trajs
        first = shared[POLICY : POLICY + 1, :]
        x = self._layer(first, None, self.weights.second, s.policy[:, :1], Slabs(POLICY))
        self._act(x.expand(p), self.draws.pi_eps[:, 0], s.actions[:, 0, :p])

    def begin(self) -> None:
        """Warm start and the first samples."""
        s = self.state
        mppi_begin(
            self.inputs.prev_mean,
            self.inputs.t0,
            self.draws.samples[0],
            self.inputs.mask,
            self.sizes.max_std,
            actions=s.actions,
            mean=s.mean,
            std=s.std,
            pdl=self.pdl,
        )

    def rollout(self, z0: Rows | None, shared: Rows, start: int = 0, act: bool = False) -> None:
        """Latents of all steps, and the reward's second layer, of sequences from `start` on.

        z0: latents (1, E, N, L) to start from; None: the one of `share`. act: draw the actions
        of the prior sequences on the way, after the first step's.
        """
        s, w, p = self.state, self.weights, self.sizes.num_pi_trajs
        rows = slice(start, self.sizes.num_samples)
        if rows.start == rows.stop:
            return
        for t in range(self.sizes.horizon):
            before = self.z[t - 1 : t, rows] if t else z0
            if act and p and t:
                self._act(self._policy(self.z[t - 1 : t, :p]), self.draws.pi_eps[:, t], s.actions[:, t, :p])
            bias = shared.x[:, :, 0] if before is None else self._task_bias
            h = self._layer(before, s.actions[:, t, rows], w.first, s.first[:, rows], _PAIR, bias)
            h = self._layer(self._activated(h), None, w.second, s.second[: 2 + t : 1 + t, rows], _PAIR)
            z = self._layer(self._activated(h[:1, :]), None, w.third, s.z[t : t + 1, rows], _SHARED)
            self._activated(z)

    def terminal_value(self, iteration: int) -> None:
        """Scalars of all sequences: rewards, two critics at a policy action after the last step."""
        s, w, h, members = self.state, self.weights, self.sizes.horizon, self.draws.members[iteration]
        last = self.z[h - 1 : h, :]
        self._act(self._policy(last), self.draws.value_eps[iteration], s.terminal_action)
        critics = Slabs(CRITICS, members=members)
        x = self._layer(last, s.terminal_action, w.first, s.first, critics, self._task_bias)
        x = self._layer(self._activated(x), None, w.second, s.second[h + 1 :, :], critics)
        # Slab -1 of the draws is the reward, below the critics in every packed layer.
        slabs = self.draws.slabs[iteration]
        hidden = s.second[1:, :]
        hidden = Rows(hidden.x, hidden.stats, w.second, Slabs(CRITICS, members=slabs), self._second_tile.BN)
        self._scalars(hidden, w.scalars, s.scalars, Slabs(1, members=slabs), self.sizes.num_bins)
        if w.termination is not None:
            assert s.termination_first is not None
            assert s.termination_second is not None
            assert s.termination is not None
            x = self._layer(self.z, None, w.termination[0], s.termination_first, _SHARED)
            x = self._layer(self._activated(x), None, w.termination[1], s.termination_second, _SHARED)
            self._scalars(x, w.termination[2], s.termination, _SHARED, 0)

    def update(self, next_noise: Tensor | None = None, choose: bool = False) -> None:
        """Values, elites, mean and std; then the next samples, or the choice of the action."""
        s, d, inputs, sizes = self.state, self.draws, self.inputs, self.sizes
        choice = Choice(
            elite_noise=d.elite,
            action_noise=d.action,
            eval_mode=inputs.eval_mode,
            action=s.action,
            prev_mean=inputs.prev_mean,
            picked=s.picked,
            chosen=s.chosen,
            counter=inputs.rng,
        )
        mppi_update(
            s.scalars,
            inputs.discount,
            s.termination,
            s.actions,
            inputs.mask,
            sizes.num_elites,
            sizes.temperature,
            sizes.min_std,
            sizes.max_std,
            values=s.values,
            elites=s.elites,
            scores=s.scores,
            mean=s.mean,
            std=s.std,
            next_noise=next_noise,
            choice=choice if choose else None,
            pdl=self.pdl,
        )

    def _layer(
        self, x: Rows | None, a: Tensor | None, layer: Layer, out: Rows, slabs: Slabs, bias: Tensor | None = None
    ) -> Rows:
        tile = None
        if layer is self.weights.second and out.x.shape[0] == 2:
            tile = self._second_tile
        elif layer is self.weights.third:
            tile = self._third_tile
        return grouped_layer(
            x, a, layer, out, precision=self.precision, slabs=slabs, bias=bias, tile=tile, pdl=self.pdl
        )

    def _activated(self, x: Rows) -> Rows:
        return activate_rows(x, x.x, self.pdl) if self.throughput else x

    def _policy(self, z: Rows) -> Rows:
        """The policy's second layer at latents (1, E, n, L)."""
        slab, n = Slabs(POLICY), z.x.shape[2]
        x = self._layer(z, None, self.weights.first, self.state.first[:1, :n], slab, self._task_bias)
        return self._layer(self._activated(x), None, self.weights.second, self.state.policy[:, :n], slab)

    def _act(self, x: Rows, eps: Tensor, out: Tensor) -> None:
        policy_layer(
            x,
            self.weights.policy,
            eps,
            out,
            precision=self.precision,
            low=self.sizes.log_std_min,
            high=self.sizes.log_std_max,
            mask=self.inputs.mask,
            pdl=self.pdl,
        )

    def _scalars(self, x: Rows, layer: Layer, out: Tensor, slabs: Slabs, num_bins: int) -> None:
        scalar_head(
            x,
            layer,
            out,
            precision=self.precision,
            num_bins=num_bins,
            vmin=self.sizes.vmin,
            vmax=self.sizes.vmax,
            slabs=slabs,
            pdl=self.pdl,
        )
