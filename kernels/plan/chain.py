"""A whole plan as a chain of fused launches: encoder, policy prior, MPPI iterations, choice.

    encode obs                                   one launch a layer
    first layers' share of z0, once a plan       dynamics, policy and reward in one launch
    each iteration, each step t                  3 launches: the first layers of dynamics and reward
                                                 together, then the dynamics to the next latent
    terminal value                               policy 2 launches, the two drawn critics' first layer 1
    all rewards and both critics to scalars      1 launch
    elites, mean, std, next samples              1 launch

The policy-prior sequences are rolled out in the first iteration, beside the sampled ones; their
rewards and last latents stay where they are (their actions never change). Everything lives in
buffers allocated once, so the chain can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..device.draw import draw
from ..device.launch import How, by_sample, native
from ..layers.ending import End, room_for_parts
from ..layers.grouped_layer import grouped_layer
from ..layers.policy_layer import PolicyEnd
from ..layers.rows import EACH, PLAIN, Layer, Rows, Slabs
from ..layers.scalar_head import ScalarEnd
from ..layers.tiles import Tile, layer_tile
from ..layers.two_hot import Code
from .buffers import CRITICS, DYNAMICS, POLICY, REWARD, PlanDraws, PlanInputs, PlanSizes, PlanState, PlanWeights
from .mppi_begin import mppi_begin
from .mppi_refine import Choice, mppi_refine
from .noise import plan_runs

Observer = Callable[[str], None]
"""Called in each iteration with the values known ("values") and after refining ("refined"): for traces and tests."""

_PAIR = Slabs(DYNAMICS, REWARD - DYNAMICS)
_SHARED = Slabs(0, 0)


class PlanChain:
    """The chain of launches for one set of sizes, and the buffers it works in.

    Args:
        sizes: of everything.
        weights: packed; read in place by every run.
        how: precision of the products, and what the device can.
        device: where the buffers are.
        once: whether layers finish, or leave their activation to each reader; None: on a GPU they finish.
        early: whether kernels start early where the device can. On an H200 a plan then takes 906 us instead of 697:
            programs of the kernels to come wait in the room that those at work could use.
        annotate: makes a named range for profilers.
    """

    def __init__(
        self,
        sizes: PlanSizes,
        weights: PlanWeights,
        how: How,
        device: torch.device,
        once: bool | None = None,
        early: bool = False,
        annotate: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.sizes, self.weights, self._annotate = sizes, weights, annotate
        self.how = how._replace(pdl=how.pdl and early)
        self.inputs, self.draws = PlanInputs.empty(sizes, device), PlanDraws.empty(sizes, device)
        self.state = PlanState(sizes, how.precision, device)
        rows = sizes.envs * sizes.num_samples
        # A CPU has a row's activation in its cache, and every reader takes its rows once.
        self.once = not native() if once is None else once
        # Sampled and prior rows of one buffer are written by different launches and read by one. If an activation
        # is still due on them, their tiles must be of one width: that of all rows together.
        d, z = sizes.mlp_dim, sizes.latent_dim
        self._first_tile = layer_tile(rows, 2, d, z, how.precision.name)
        self._third_tile = layer_tile(rows, 1, z, d, how.precision.name)
        self.z = self._rows(self.state.z, weights.third, _SHARED, self._third_tile)

    def _rows(self, buffer: Rows, layer: Layer, slabs: Slabs, tile: Tile) -> Rows:
        """Return the rows of a buffer as its readers take them, whatever launches wrote them."""
        return Rows(buffer.x, operand=True) if self.once else Rows(buffer.x, buffer.stats, layer, slabs, tile.BN)

    def run(self, draw: bool = True, observe: Observer | None = None) -> None:
        """Make one plan from `inputs` to `state.action`; `draw`: fresh random numbers first."""
        if draw:
            self.draw()
        with self._annotate("encode"):
            shared = self.share(self.encode())
        with self._annotate("prior"):
            if self.sizes.num_pi_trajs:
                self.first_prior_action(shared)
            self.begin()
        for i in range(self.sizes.iterations):
            with self._annotate("iteration"), by_sample(self.sizes.num_samples):
                self.rollout(None, shared, 0 if i == 0 else self.sizes.num_pi_trajs, act=i == 0)
                self.terminal_value(i)
            if observe:
                observe("values")
            last = i == self.sizes.iterations - 1
            with self._annotate("select"):
                self.refine(None if last else self.draws.samples[i + 1], choose=last)
            if observe:
                observe("refined")

    def draw(self) -> None:
        """Fill `draws` from the counter RNG."""
        draw(self.inputs.rng, plan_runs(self.draws, self.sizes.num_q), pdl=self.how.pdl)

    def encode(self) -> Rows:
        """Encode the observation: (1, E, 1, L), its SimNorm due."""
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
        """Compute what z0 and the task embedding add to the first layers of dynamics, policy and reward.

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
        """Draw the policy's actions at z0 for the prior sequences: one latent, P samples of its policy."""
        s, p = self.state, self.sizes.num_pi_trajs
        first = shared[POLICY : POLICY + 1, :]
        x = self._layer(first, None, self.weights.second, s.policy[:, :1], Slabs(POLICY))
        self._policy(self.draws.pi_eps[:, 0], s.actions[:, 0, :p]).alone(x.expand(p), self.how)

    def begin(self) -> None:
        """Write the warm start and the first samples."""
        inputs, noise, max_std = self.inputs, self.draws.samples[0], self.sizes.max_std
        mppi_begin(inputs.prev_mean, inputs.t0, noise, inputs.mask, max_std, self.state.samples, pdl=self.how.pdl)

    def rollout(self, z0: Rows | None, shared: Rows, start: int = 0, act: bool = False) -> None:
        """Roll sequences from `start` on out: latents of all steps, and the rewards' first layer.

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
                self._act(self.z[t - 1 : t, :p], self.draws.pi_eps[:, t], s.actions[:, t, :p])
            bias = shared.x[:, :, 0] if before is None else self._task_bias
            x = self._layer(before, s.actions[:, t, rows], w.first, s.first[: 2 + t : 1 + t, rows], _PAIR, bias)
            x = self._layer(x[:1, :], None, w.second, s.second[:1, rows], _SHARED)
            self._layer(x, None, w.third, s.z[t : t + 1, rows], _SHARED)

    def terminal_value(self, iteration: int) -> None:
        """Compute the scalars of all sequences: rewards, and two critics at a policy action after the last step."""
        s, w, h, members = self.state, self.weights, self.sizes.horizon, self.draws.members[iteration]
        last = self.z[h - 1 : h, :]
        self._act(last, self.draws.value_eps[iteration], s.terminal_action)
        critics = Slabs(CRITICS, members=members)
        self._layer(last, s.terminal_action, w.first, s.first[h + 1 :, :], critics, self._task_bias)
        # Slab -1 of the draws is the reward, below the critics in every packed layer.
        drawn = self.draws.slabs[iteration]
        slabs = Slabs(CRITICS, members=drawn)
        x = self._rows(s.first[1:, :], w.first, slabs, self._first_tile)
        end = self._scalars(w.scalars, s.scalars, Slabs(1, members=drawn), self.sizes.num_bins)
        self._layer(x, None, w.second, s.second[1:, :], slabs, end=end)
        if w.termination is not None:
            assert s.termination_first is not None
            assert s.termination_second is not None
            assert s.termination is not None
            x = self._layer(self.z, None, w.termination[0], s.termination_first, _SHARED)
            end = self._scalars(w.termination[2], s.termination, _SHARED, 0)
            self._layer(x, None, w.termination[1], s.termination_second, _SHARED, end=end)

    def refine(self, next_noise: Tensor | None = None, choose: bool = False) -> None:
        """Write values, elites, mean and std; then the next samples, or the choice of the action."""
        s, d, inputs = self.state, self.draws, self.inputs
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
        mppi_refine(
            s.scalars,
            inputs.discount,
            s.termination,
            s.samples,
            inputs.mask,
            self.sizes.rule,
            s.ranked,
            next_noise=next_noise,
            choice=choice if choose else None,
            pdl=self.how.pdl,
        )

    def _layer(
        self,
        x: Rows | None,
        a: Tensor | None,
        layer: Layer,
        out: Rows,
        slabs: Slabs,
        bias: Tensor | None = None,
        end: End | None = None,
    ) -> Rows:
        # The first layers' share of z0 has neither: more is added to it.
        finish = self.once and layer.activation != PLAIN and out is not self.state.shared
        tile = None
        if not self.once:
            if layer is self.weights.first and out is not self.state.shared:
                tile = self._first_tile
            elif layer is self.weights.third:
                tile = self._third_tile
        given: Any = dict(how=self.how, slabs=slabs, bias=bias, finish=finish, end=end, tile=tile)
        return grouped_layer(x, a, layer, out, **given)

    def _act(self, z: Rows, eps: Tensor, out: Tensor) -> None:
        """Draw the policy's actions at latents (1, E, n, L)."""
        slab, n = Slabs(POLICY), z.x.shape[2]
        x = self._layer(z, None, self.weights.first, self.state.first[:1, :n], slab, self._task_bias)
        self._layer(x, None, self.weights.second, self.state.policy[:, :n], slab, end=self._policy(eps, out))

    def _policy(self, eps: Tensor, out: Tensor) -> PolicyEnd:
        s, mask = self.sizes, self.inputs.mask
        given = out, eps, s.log_std_min, s.log_std_max, mask
        return PolicyEnd(self.weights.policy, self._parts(1, 2 * s.action_dim), *given)

    def _scalars(self, layer: Layer, out: Tensor, slabs: Slabs, num_bins: int) -> ScalarEnd:
        code = Code(num_bins, self.sizes.vmin, self.sizes.vmax)
        return ScalarEnd(layer, self._parts(len(out), layer.width), out, code, slabs)

    def _parts(self, groups: int, outputs: int) -> Tensor | None:
        """Return the room for parts of a last layer's sums, if it may end the layer before."""
        rows = self.sizes.envs * self.sizes.num_samples
        return self.state.parts if room_for_parts(rows, groups, outputs, self.how.precision) else None
