"""A whole update as a chain of fused launches: targets, losses, gradients, optimisers (paper, eq. 3-5).

    encode all observations                      a launch a layer, two to store the latents
    TD target                                    policy 4, two target critics 3, target 1
    latent rollout                               4 a step: three layers, the next latent
    reward and all critics                       first, second layer, then last layer with loss and gradient
    their gradients                              2 a layer: input, weights
    back through the rollout                     3 a step; weights of all steps together, 1 a layer
    norm, clip, Adam, targets' average           2
    policy loss and its gradients                as above, the critics being constants
    metrics, the scale, the count                1

Where layers are wide, activations and gradients of LayerNorms have launches of their own beside.
Environments of the layers are time steps here, so that the H steps of a slice are one launch where
nothing depends on the step before. Everything lives in buffers allocated once; what is looked up or
encoded by torch (task embeddings, pixels) is written into them between the stages. What several
processes do together is in together.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backward.activation_gradient import activation_gradient
from ..backward.gradient_tile import Gradient
from ..backward.input_gradient import input_gradient
from ..backward.norm_gradient import add_up, norm_gradient
from ..backward.weight_gradient import LayerGradient, weight_gradient
from ..device.launch import How, native
from ..layers import tiles
from ..layers.grouped_layer import activate_rows, grouped_layer
from ..layers.rows import EACH, Dropout, Layer, Rows, Slabs
from ..layers.scalar_head import scalar_head
from ..layers.tiles import Tile, input_gradient_tile, ready_tile
from ..layers.two_hot import Code
from ..losses.latent_loss import consistency, td_target
from ..losses.policy_sample import Sample, policy_gradient, policy_sample
from ..losses.running_scale import running_scale
from ..losses.two_hot_loss import BINARY, two_hot_loss
from .buffers import FlatLayer, PolicyLayout, UpdateDraws, UpdateInputs, UpdateSizes, UpdateState, WorldLayout
from .metrics import UpdateLosses
from .noise import update_runs
from .optim import (
    POLICY_EPS,
    WORLD_EPS,
    FlatParameters,
    FlatTarget,
    Outcome,
    Rates,
    adam_step,
    new_shadow,
    squared_norm,
)
from .summary import Kept
from .together import Shared, Together

WORLD, POLICY = 1, 2
"""What `flag` says was not finite first."""


class _Net:
    """Layers of one network: packed, and where their gradients go."""

    def __init__(self, layers: tuple[FlatLayer, ...] | list[FlatLayer], flat: FlatParameters) -> None:
        operand = flat.param if flat.shadow is None else flat.shadow
        self.layers = [x.layer(flat.param, operand) for x in layers]
        self.grads = [x.gradient(flat.grad) for x in layers]


class UpdateChain:
    """The chain of launches for one set of sizes, its parameters and the buffers it works in.

    Args:
        sizes: of everything.
        how: precision of the products, and what the device can.
        device: where the buffers are.
        once: whether activations and gradients of LayerNorms get launches of their own; None
            lets the table decide.
        early: whether kernels start early where the device can. A plan is slower so (plan/chain.py); an update was not
            measured without.
        annotate: makes a named range for profilers.
        together: the ranks that share the update, `sizes.ranks` of them; None for one process.
    """

    def __init__(
        self,
        sizes: UpdateSizes,
        how: How,
        device: torch.device,
        once: bool | None = None,
        early: bool = True,
        annotate: Callable[[str], AbstractContextManager[object]] = nullcontext,
        together: Together | None = None,
    ) -> None:
        self.sizes, self._annotate = sizes, annotate
        self.how = how = how._replace(pdl=how.pdl and early)
        self._shared = Shared(sizes, together, device)
        self.layout, self.policy_layout = WorldLayout(sizes), PolicyLayout(sizes)
        layout, precision = self.layout, how.precision
        self.world = FlatParameters.zeros(layout.size, precision, device)
        self.policy = FlatParameters.zeros(self.policy_layout.size, precision, device)
        average = torch.zeros(layout.heads_end - layout.heads_start, device=device)
        shadow = new_shadow(average, precision)
        self.target = FlatTarget(average, layout.heads_start, sizes.tau, shadow)
        self.inputs, self.draws = UpdateInputs.empty(sizes, precision, device), UpdateDraws.empty(sizes, device)
        self._once = not native() if once is None else once
        self.state = UpdateState(sizes, precision, device, self._once)
        self._encoder, self._heads = _Net(layout.encoder, self.world), _Net(layout.heads, self.world)
        self._dynamics, self._policy = _Net(layout.dynamics, self.world), _Net(self.policy_layout.policy, self.policy)
        self._termination = None if layout.termination is None else _Net(layout.termination, self.world)
        operand = average if shadow is None else shadow
        self._targets = [x.moved(-layout.heads_start).layer(average, operand) for x in layout.heads]
        self.losses = UpdateLosses(sizes, device)
        # How last layers are read, with what every launch is given.
        self._code: dict[str, Any] = dict(how=how, code=Code(sizes.num_bins, sizes.vmin, sizes.vmax))

    def run(self) -> None:
        """Make one update from `inputs`, of a single task; pixels are encoded before, and their gradients left out."""
        self.draw()
        encoded = self.encode() if self.sizes.obs_dim else []
        self.td_target()
        gradient = self.world_losses(encoded)
        if encoded:
            self.encoder_gradients(encoded, gradient)
        self.step_world()
        self.policy_losses()
        self.step_policy()
        self.summarise()

    # ---- stages, in their order

    def draw(self) -> None:
        """Fill `draws` from the counter RNG."""
        self._shared.draw(self.inputs, update_runs(self.draws, self.sizes.num_q, self.sizes.dropout), self.how.pdl)

    def encode(self) -> list[Rows]:
        """Write latents of all observations, the first into `inputs.x`, the others into `next_x` and `next_latent`.

        Returns the input of the encoder and the rows of its layers.
        """
        encoded, inputs, z = [Rows(self.inputs.obs)], self.inputs, self.sizes.latent_dim
        for layer, out in zip(self._encoder.layers, self.state.encoded, strict=True):
            encoded.append(self._layer(encoded[-1], layer, out))
        first, others = encoded[-1].steps(slice(0, 1)), encoded[-1].steps(slice(1, None))
        activate_rows(first, inputs.x[:, :1, :, :z], how=self.how)
        activate_rows(others, inputs.next_x[..., :z], how=self.how, exact=inputs.next_latent[None])
        return encoded

    def td_target(self) -> None:
        """Write the TD targets of all steps, by the target critics at an action of the policy (no gradient)."""
        state, inputs, draws, h = self.state, self.inputs, self.draws, self.sizes.horizon
        with self._annotate("td_target"):
            self._act(inputs.next_x, slice(0, h), draws.td_eps)
            slabs = Slabs(1, members=draws.td_members)
            x = Rows(inputs.next_x)
            for layer, rows in zip(self._targets[:2], state.critics, strict=True):
                x = self._layer(x, layer, rows.steps(slice(0, h)), slabs)
            scalar_head(x.ready(), self._targets[2], state.target_q, slabs=slabs, **self._code)
            target = inputs.target
            td_target(state.target_q, target[0], inputs.terminated[0], inputs.discount, target[1], pdl=self.how.pdl)

    def world_losses(self, encoded: list[Rows]) -> Gradient:
        """Roll out, compute consistency, reward, values and termination, and go back to the first latent.

        encoded: as `encode` returns it; of no rows where torch encodes pixels. Returns the gradient of the
        encoder's last rows in the first step; of the latent itself, in `state.d_x`, where torch encodes.
        """
        with self._annotate("world"):
            rolled = self._roll_out()
            hidden = self._losses()
            self._back_through_heads(hidden)
            return self._back_through_rollout(rolled, encoded)

    def encoder_gradients(self, encoded: list[Rows], gradient: Gradient) -> None:
        """Go from the first latent to the encoder's parameters, and to the task embedding in its input."""
        net, first = self._encoder, slice(0, 1)
        for i in reversed(range(len(net.layers))):
            below = encoded[i].steps(first)
            gradient = self._finished(gradient, net.grads[i])
            self._weights(gradient, below, net.layers[i], net.grads[i])
            if i:
                gradient = self._inputs(gradient, net.layers[i], below, self.state.d_encoded[i - 1])
        if self.sizes.task_dim:
            self._inputs(gradient, net.layers[0], None, Gradient(self.state.d_obs), first=self.sizes.obs_dim)

    def step_world(self) -> None:
        """Clip the world model's gradient, take its step, and move the targets towards the new critics."""
        s = self.sizes
        rates = Rates(
            lr=s.lr,
            eps=WORLD_EPS,
            max_norm=s.grad_clip_norm,
            head=self.layout.encoder_end,
            head_lr=s.lr * s.enc_lr_scale,
        )
        self._step(self.world, rates, self.target, "grad_norm", WORLD)

    def policy_losses(self) -> None:
        """Compute the policy's value and entropy at all latents, the running scale, and the policy's gradients."""
        with self._annotate("policy"):
            s, state, inputs, draws = self.sizes, self.state, self.inputs, self.draws
            policy = self._act(inputs.x, slice(None), draws.pi_eps, (self.losses.log_prob, self.losses.entropy))
            slabs = Slabs(1, members=draws.pi_members)
            dropout = None if draws.pi_keep is None else self._dropout(draws.pi_keep, 0)
            first = self._layer(Rows(inputs.x), self._heads.layers[0], state.critics[0], slabs, dropout)
            second = self._layer(first, self._heads.layers[1], state.critics[1], slabs)
            layer, d = self._heads.layers[2], state.d_critics[2]
            scalar_head(second.ready(), layer, self.losses.q, slabs=slabs, gradient=d.x, **self._code)
            q = self._shared.values(self.losses.q[:, 0])
            running_scale(q, state.scale, tau=s.tau, out=state.new_scale, pdl=self.how.pdl)
            # Critics are constants: only what reaches [e, a] is of interest.
            back = self._finished(self._inputs(d, layer, second, state.d_critics[1], slabs))
            back = self._finished(self._inputs(back, self._heads.layers[1], first, state.d_critics[0], slabs))
            self._inputs(back, self._heads.layers[0], None, Gradient(state.d_action), slabs, first=s.latent_dim)
            self._back_through_policy(policy)

    def step_policy(self) -> None:
        """Clip the policy's gradient and take its step."""
        rates = Rates(lr=self.sizes.lr, eps=POLICY_EPS, max_norm=self.sizes.grad_clip_norm)
        self._step(self.policy, rates, None, "pi_grad_norm", POLICY)

    def summarise(self) -> None:
        """Make the metrics; unless a step failed, keep the new scale and count the update."""
        state, inputs = self.state, self.inputs
        self.losses.summarise(Kept(inputs.flag, state.scale, state.new_scale, inputs.rng[1:]), self.how.pdl)
        self._shared.finish(self.losses.told, inputs)

    # ---- parts of stages

    def _roll_out(self) -> list[Rows]:
        """Write the latents of all steps; returns the rows of the layers, of all steps together."""
        inputs, state, z = self.inputs, self.state, self.sizes.latent_dim
        rows: list[Rows] = []
        for t in range(self.sizes.horizon):
            now = slice(t, t + 1)
            rows = [Rows(inputs.x[:, now])]
            latent = replace(state.dynamics[2].steps(now), active=inputs.x[:, t + 1 : t + 2, :, :z])
            outs = state.dynamics[0].steps(now), state.dynamics[1].steps(now), latent
            for layer, out in zip(self._dynamics.layers, outs, strict=True):
                exact = inputs.latent[None, now] if out is latent else None
                rows.append(self._layer(rows[-1], layer, out, exact=exact))
        # The tiles of all steps are the same.
        return [replace(out, layer=x.layer, tile=x.tile) for x, out in zip(rows[1:], state.dynamics, strict=True)]

    def _losses(self) -> list[Rows]:
        """Compute reward and values; returns the hidden rows of reward and critics."""
        state, inputs, h = self.state, self.inputs, self.sizes.horizon
        dropout = None if self.draws.value_keep is None else self._dropout(self.draws.value_keep, 1)
        first = self._layer(Rows(inputs.x[:, :h]), self._heads.layers[0], state.heads[0], EACH, dropout)
        second = self._layer(first, self._heads.layers[1], state.heads[1])
        losses, d = self.losses, state.d_heads[2].x
        last = second.ready(), self._heads.layers[2]
        two_hot_loss(*last, inputs.target, losses.head_weight, losses.head_loss, d, **self._code)
        return [first, second]

    def _back_through_heads(self, hidden: list[Rows]) -> None:
        """Compute the gradients of reward and critics; then consistency, and the termination's loss and gradients."""
        state, h, net = self.state, self.sizes.horizon, self._heads
        back = self._back(net, Rows(self.inputs.x[:, :h]), hidden, state.d_heads)
        self._inputs(back, net.layers[0], None, Gradient(state.d_x[:, :h]))
        consistency(
            self.inputs.latent,
            self.inputs.next_latent,
            self.losses.consistency_weight,
            self.losses.consistency_loss,
            state.d_x[0, 1:, :, : self.sizes.latent_dim],
            added=h - 1,
            pdl=self.how.pdl,
        )
        if self._termination is None:
            return
        net = self._termination
        x = Rows(self.inputs.x[:, 1:, :, : self.sizes.latent_dim])
        first = self._layer(x, net.layers[0], state.termination[0])
        rows = [first, self._layer(first, net.layers[1], state.termination[1])]
        losses, d = self.losses, state.d_termination[2].x
        goal, weight = self.inputs.terminated, losses.termination_weight
        code = self._code | dict(code=self._code["code"]._replace(num_bins=BINARY))
        two_hot_loss(rows[1].ready(), net.layers[2], goal, weight, losses.termination_loss, d, **code)
        back, d_x = self._back(net, x, rows, state.d_termination), state.d_x[:, 1:]
        self._inputs(back, net.layers[0], None, Gradient(d_x), add=d_x)

    def _back_through_rollout(self, rolled: list[Rows], encoded: list[Rows]) -> Gradient:
        """Compute the gradients of the dynamics, from the last step to the first; returns as `world_losses`."""
        state, h, z, net = self.state, self.sizes.horizon, self.sizes.latent_dim, self._dynamics
        first, second, third = rolled
        d_first, d_second, d_third = state.d_dynamics
        last = slice(h - 1, h)
        # Steps are read together afterwards, so their sums are of tiles of one width.
        sizes = self.sizes.batch, 1, z, self.sizes.mlp_dim
        tile = self._tile(*sizes, tiles.GRADIENT) or input_gradient_tile(*sizes, self.how.precision.name)
        d = activation_gradient(
            state.d_x[:, h:, :, :z], third.steps(last), d_third.steps(last), columns=tile.BN, pdl=self.how.pdl
        )
        for t in reversed(range(h)):
            now, before = slice(t, t + 1), slice(t - 1, t)
            d = self._finished(d)
            below_second = self._finished(self._inputs(d, net.layers[2], second.steps(now), d_second.steps(now)))
            below_first = self._inputs(below_second, net.layers[1], first.steps(now), d_first.steps(now))
            below_first = self._finished(below_first)
            d_z = state.d_x[:, now, :, :z]
            below: Rows | None = None
            out = Gradient(d_z)
            if t:
                below, out = third.steps(before), d_third.steps(before)
            elif encoded:
                below, out = encoded[-1].steps(slice(0, 1)), state.d_encoded[-1]
            d = self._inputs(below_first, net.layers[0], below, out, add=d_z, tile=tile)
        if self._once:
            whole = [Gradient(g.x) for g in state.d_dynamics]
            for g, grads in zip(state.d_dynamics, net.grads, strict=True):
                assert g.vectors is not None
                add_up(g.vectors, grads, pdl=self.how.pdl)
        else:
            widths = below_first.tile, below_second.tile, tile.BN
            whole = [Gradient(g.x, g.sums, r, n) for g, r, n in zip(state.d_dynamics, rolled, widths, strict=True)]
        inputs = [Rows(self.inputs.x[:, :h]), first, second]
        for gradient, x, layer, grads in zip(whole, inputs, net.layers, net.grads, strict=True):
            self._weights(gradient, x, layer, grads)
        if self.sizes.task_dim:
            d_e = state.d_x[:, :h, :, z:]
            self._inputs(whole[0], net.layers[0], None, Gradient(d_e), first=z, add=d_e)
        return d

    def _back_through_policy(self, rows: list[Rows]) -> None:
        """Compute the policy's gradients, from the rows of its layers and the critics' gradient of its action."""
        s, state, net = self.sizes, self.state, self._policy
        policy_gradient(
            self._sample(rows[2], self.draws.pi_eps),
            state.d_action[0, ..., s.task_dim :],
            self.losses.policy_weight,
            state.new_scale,
            state.d_policy[2].x,
            entropy_coef=s.entropy_coef,
            pdl=self.how.pdl,
        )
        x = Rows(self.inputs.x[..., : s.latent_dim + s.task_dim])
        gradient = self._back(net, x, rows[:2], state.d_policy)
        if s.task_dim:
            self._inputs(gradient, net.layers[0], None, Gradient(state.d_policy_task), first=s.latent_dim)

    def _back(self, net: _Net, x: Rows, hidden: list[Rows], outs: list[Gradient]) -> Gradient:
        """Go from the last product's gradient, in `outs`, to all parameters of a head.

        Returns the gradient of its first rows.
        """
        gradient = outs[2]
        for i in (2, 1):
            self._weights(gradient, hidden[i - 1], net.layers[i], net.grads[i])
            gradient = self._inputs(gradient, net.layers[i], hidden[i - 1], outs[i - 1])
            gradient = self._finished(gradient, net.grads[i - 1])
        self._weights(gradient, x, net.layers[0], net.grads[0])
        return gradient

    def _act(self, x: Tensor, steps: slice, eps: Tensor, logs: tuple[Tensor, Tensor] | tuple[()] = ()) -> list[Rows]:
        """Evaluate the policy at rows x and write its actions into them; returns the rows of its layers."""
        s, at = self.sizes, self.sizes.latent_dim + self.sizes.task_dim
        rows = [Rows(x[..., :at])]
        for layer, out in zip(self._policy.layers, self.state.policy, strict=True):
            rows.append(self._layer(rows[-1], layer, out.steps(steps)))
        action = x[0, ..., at : at + s.action_dim]
        policy_sample(self._sample(rows[3], eps), action, *logs, pdl=self.how.pdl)
        return rows[1:]

    def _sample(self, logits: Rows, eps: Tensor) -> Sample:
        return Sample(logits.x, eps, self.inputs.mask, self.sizes.log_std_min, self.sizes.log_std_max)

    def _layer(
        self,
        x: Rows,
        layer: Layer,
        out: Rows,
        slabs: Slabs = EACH,
        dropout: Dropout | None = None,
        exact: Tensor | None = None,
    ) -> Rows:
        groups, e, n, d = out.x.shape
        finish = out.active is not None
        tile = None if finish else self._tile(e * n, groups, d, layer.weight.shape[-1], tiles.STATISTICS)
        given: Any = dict(how=self.how, slabs=slabs, dropout=dropout, finish=finish, exact=exact, tile=tile)
        return grouped_layer(x.ready(), None, layer, out, **given)

    def _inputs(
        self,
        gradient: Gradient,
        layer: Layer,
        below: Rows | None,
        out: Gradient,
        slabs: Slabs = EACH,
        first: int = 0,
        add: Tensor | None = None,
        tile: Tile | None = None,
    ) -> Gradient:
        written, e, n, width = out.x.shape
        if self._once and below is not None and width >= tiles.WIDE:
            self._inputs(gradient, layer, None, Gradient(out.x), slabs, first, add)
            return activation_gradient(out.x, below, out, pdl=self.how.pdl)
        # A sum over groups holds the pointers of each.
        summed = written < gradient.x.shape[0]
        widest = tiles.GRADIENT if below is not None else tiles.STATISTICS if summed else tiles.BARE
        return input_gradient(
            gradient,
            layer,
            below,
            out,
            how=self.how,
            slabs=slabs,
            first=first,
            add=add,
            tile=tile or self._tile(e * n, written, width, gradient.columns or layer.width, widest),
        )

    def _weights(self, gradient: Gradient, x: Rows, layer: Layer, out: LayerGradient) -> None:
        groups, d, k = out.weight.shape
        if self._once and out.ln_weight is not None:
            out = replace(out, bias=None)  # it came with the LayerNorm's gradient
        tile = self._tile(d, groups, k, gradient.x.shape[1] * gradient.x.shape[2], tiles.BARE)
        weight_gradient(gradient, x.ready(), layer, out, how=self.how, tile=tile)

    def _finished(self, gradient: Gradient, out: LayerGradient | None = None) -> Gradient:
        """Return the gradient as its readers take it; where that is of the product itself, vectors go to `out`."""
        if not self._once or gradient.rows is None:
            return gradient
        done = norm_gradient(gradient, pdl=self.how.pdl)
        if out is not None:
            assert gradient.vectors is not None
            add_up(gradient.vectors, out, pdl=self.how.pdl)
        return done

    def _tile(self, rows: int, groups: int, columns: int, depth: int, widest: int) -> Tile | None:
        """Return the tile of a product whose operands are ready; None leaves it to its kernel's table."""
        return ready_tile(rows, groups, columns, depth, self.how, widest) if self._once else None

    def _dropout(self, keep: Tensor, first: int) -> Dropout:
        return Dropout(keep, 1 / (1 - self.sizes.dropout), first)

    def _step(self, flat: FlatParameters, rates: Rates, target: FlatTarget | None, norm: str, code: int) -> None:
        """Take a step whose gradient's norm goes to the metric `norm`, and whose failure is `code`."""
        self._shared.sum(flat.grad)
        squared_norm(flat.grad, flat.partials, flat.step, pdl=self.how.pdl)
        adam_step(flat, rates, target, Outcome(self.inputs.flag, self.losses.metric(norm), code), how=self.how)
