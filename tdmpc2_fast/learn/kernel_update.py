"""An update by kernels, of a GPU or of the CPU: parameters in flat buffers, the chain captured or on a tape."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from tdmpc2_fast.kernels.cpu.tape import TapedFunction
from tdmpc2_fast.kernels.device.cluster_check import how_on
from tdmpc2_fast.kernels.device.launch import host
from tdmpc2_fast.kernels.update.chain import POLICY, WORLD, UpdateChain
from tdmpc2_fast.kernels.update.replay_gather import DeviceReplay, Slices, draw_slices

from ..errors import InputError, NonFiniteError
from ..model.task_embedding import look_up
from ..model.world_model import WorldModel
from ..rng import COUNTER, UpdateNoise
from ..runtime.backend import matmul_precision, plan_precision
from ..runtime.cuda_graph import GraphedFunction
from ..runtime.on_device import OnDevice
from ..runtime.profiling import annotate
from ..runtime.ranks import ALONE, Ranks
from ..seeds import stream_seed
from ..sizes import update_sizes
from .backend import TASK_GRADIENT, UpdateBackend
from .batch import Batch, Sampler, UpdateTrace
from .flat_model import FlatModel
from .metrics import termination_statistics
from .replay import ReplayBuffer
from .scale import RunningScale
from .tasks import Tasks

_FAILED_BEFORE = WORLD  # any code: while the flag is set no parameter changes


class KernelUpdate(UpdateBackend):
    """Trains a world model by one replay of a CUDA graph an update.

    Draws come from a counter-based generator on the device, whose counter each update advances.
    The parameters become views into flat buffers, which the optimisers go over in one pass; names,
    shapes and the parameter objects stay. once, early: see `UpdateChain`.
    ranks: as of `Updater`.
    """

    def __init__(self, model: WorldModel, once: bool | None = None, early: bool = True, ranks: Ranks = ALONE) -> None:
        cfg, device = model.cfg, model.device
        self.model, self.cfg = model, cfg
        self.precision = plan_precision(cfg, device)
        self.chain = UpdateChain(
            update_sizes(model, ranks.count),
            how_on(device, self.precision),
            device,
            once=once,
            early=early,
            annotate=annotate,
            together=ranks if ranks.count > 1 else None,
        )
        self._ranks = ranks
        self.flat = FlatModel(model, self.chain, self.precision)
        self.scale = RunningScale(cfg.tau, device)
        self.scale.value = self.chain.state.scale
        inputs = self.chain.inputs
        inputs.discount.fill_(cfg.discounts[0])
        inputs.rng.copy_(torch.tensor([stream_seed(cfg.seed, "update"), 0]))
        if ranks.count > 1:
            inputs.own_rng.copy_(torch.tensor([stream_seed(cfg.seed, f"update of {ranks}"), 0]))
        self._tasks = Tasks(model, self.chain, self.flat.grads["_task_emb.weight"]) if cfg.multitask else None
        self._frozen = [self.flat.grads[name] for name in model.frozen()]
        images = cfg.horizon + 1, self.chain.sizes.batch, *cfg.observation_shape
        self._images = torch.zeros(images, dtype=torch.uint8, device=device) if cfg.obs == "rgb" else None
        self._z0: Tensor | None = None
        self._lend_gradients()
        self.steps = 0
        self._statistics: dict[str, Tensor] = {}
        self._flag = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = OnDevice(device, "Updater")
        # Captured when first asked for: updates from given batches, and from a replay.
        self._from_batch: GraphedFunction | TapedFunction | None = None
        self._from_replay: GraphedFunction | TapedFunction | None = None
        self._replay: DeviceReplay | None = None

    def _captured(self, run: Callable[[], None]) -> GraphedFunction | TapedFunction:
        """Return an update as a graph; its warm-up runs change nothing, since a set flag masks them."""
        chain = self.chain
        written = [chain.inputs.rng, chain.world.step, chain.policy.step]
        if self._tasks is not None:
            written += [self._tasks.weight, self._tasks.grad]
        chain.inputs.flag.fill_(_FAILED_BEFORE)
        try:
            return self._device.captured(run, written)
        finally:
            chain.inputs.flag.zero_()

    @property
    def why_eager(self) -> str | None:
        """Why updates are not replays of a CUDA graph, or None where they are or none has come yet."""
        return next((g.why_eager for g in (self._from_batch, self._from_replay) if g is not None), None)

    @override
    def step(self, batch: Batch, noise: UpdateNoise | None, trace: UpdateTrace | None) -> dict[str, Tensor]:
        with self._one_update():
            self._take(batch)
            if noise is not None or trace is not None:
                self._run_given(noise, trace)
                return self._metrics()
            if self._from_batch is None:
                self._from_batch = self._captured(self._run)
            self._from_batch()
            return self._metrics()

    @override
    def step_from(self, buffer: Sampler) -> dict[str, Tensor] | None:
        replay = buffer.on_device() if isinstance(buffer, ReplayBuffer) else None
        if replay is None or replay.table.device != self._device.device:
            return None
        with self._one_update():
            if self._from_replay is None or self._replay is not replay:
                self._replay = replay
                self._from_replay = self._captured(self._run_from_replay)
            self._from_replay()
            return self._metrics()

    @override
    def state(self) -> dict[str, Tensor]:
        chain = self.chain
        found = {f"{key}.{n}": x for key, views in self.flat.moments.items() for n, x in views.items()}
        found |= {"world.step": chain.world.step, "policy.step": chain.policy.step, "scale": self.scale.value}
        found[COUNTER] = chain.inputs.rng
        if self._tasks is not None:
            found[TASK_GRADIENT] = self._tasks.grad
        return found

    @override
    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        mine = self.state()
        with self._device.turn():
            for name, x in mine.items():
                if name in state:  # else it has not taken a step, or is of the other backend
                    x.copy_(state[name].reshape(x.shape))
            self.chain.inputs.own_rng[1:].copy_(self.chain.inputs.rng[1:])

    @contextlib.contextmanager
    def _one_update(self) -> Iterator[None]:
        """Make what is within one update: in its turn, of the model as others have changed it."""
        self._device.check(self.model.device, self.model.dtype)
        with self._device.turn(), torch.no_grad():
            self._raise_if_failed(wait=False)
            self._take_in_changes()
            yield
            self.steps += 1
            self.flat.wrote()
            self._flag.copy_(self.chain.inputs.flag, non_blocking=True)
        self._raise_if_failed(wait=False)

    @override
    def synchronise(self) -> None:
        with self._device.turn():
            self._raise_if_failed(wait=True)

    @override
    @torch.no_grad()
    def td_target(self, next_z: Tensor, batch: Batch, eps: Tensor, members: Tensor) -> Tensor:
        chain, z, t = self.chain, self.cfg.latent_dim, self.cfg.task_dim
        inputs, (h, b) = chain.inputs, next_z.shape[:2]
        with self._device.turn():
            self._take_in_changes()
            x = inputs.next_x[0, :h, :b]
            x[..., :z] = next_z
            if self._tasks is not None:
                assert batch.task is not None
                self._tasks.index[:b].copy_(batch.task)
                self._tasks.look_up()
                x[..., z : z + t] = look_up(self._tasks.weight, batch.task.to(x.device))
            inputs.target[0, :h, :b] = batch.reward[..., 0]
            inputs.terminated[0, :h, :b] = batch.terminated[..., 0]
            chain.draws.td_eps[:h, :b] = eps
            chain.draws.td_members.copy_(members)
            chain.td_target()
            return inputs.target[1, :h, :b, None].clone()

    # ---- one update, in its order

    def _run(self) -> None:
        self.chain.draw()
        self._update(None)

    def _run_from_replay(self) -> None:
        replay, inputs, sizes = self._replay, self.chain.inputs, self.chain.sizes
        assert replay is not None
        obs = inputs.obs[0, ..., : sizes.obs_dim] if self._images is None else self._images.flatten(2)
        task = None if self._tasks is None else self._tasks.index
        out = Slices(task, obs, self._actions, inputs.target[0], inputs.terminated[0])
        draw_slices(inputs.own_rng, replay, out, pdl=self.chain.how.pdl)
        self._run()

    @property
    def _actions(self) -> Tensor:
        """The buffer that a batch's actions go to: (H, B, A)."""
        at = self.cfg.latent_dim + self.cfg.task_dim
        return self.chain.inputs.x[0, : self.cfg.horizon, :, at : at + self.chain.sizes.action_dim]

    @torch.no_grad()
    def _update(self, trace: UpdateTrace | None) -> None:
        chain = self.chain
        tasks, pixels = self._tasks, self._images is not None
        if tasks is not None:
            host(tasks.look_up)
        encoded = [] if pixels else chain.encode()
        if pixels:
            host(self._encode_images)
        chain.td_target()
        gradient = chain.world_losses(encoded)
        if pixels:
            host(self._image_gradients)
        else:
            chain.encoder_gradients(encoded, gradient)
        if tasks is not None:
            host(partial(tasks.add_world_gradient, trace))
        if self._frozen:  # without a gradient neither the norm nor Adam's moments know of them
            host(partial(torch._foreach_zero_, self._frozen))
        if self.cfg.episodic:
            host(self._termination_statistics)
        chain.step_world()
        if trace is not None:
            self._trace_world(trace)
        if tasks is not None:
            host(tasks.look_up_again)
        chain.policy_losses()
        chain.step_policy()
        if trace is not None:
            self._trace_gradients(trace, of_policy=True)
        if tasks is not None:
            host(tasks.leave_policy_gradient)
        chain.summarise()

    def _run_given(self, noise: UpdateNoise | None, trace: UpdateTrace | None) -> None:
        """Run the same update eagerly, from given draws or watched."""
        if noise is None:
            self.chain.draw()
        else:
            self._take_noise(noise)
        self._update(trace)

    def _encode_images(self) -> None:
        """Encode all observations, which are pixels, and keep the first latent with its graph."""
        chain, z = self.chain, self.cfg.latent_dim
        shift = chain.draws.shift
        assert self._images is not None
        assert shift is not None
        with annotate("encode"), matmul_precision(self.cfg, self._images.device):
            latents = self.model.encode_parts(self._images[1:], None, shift[1:])
            chain.inputs.next_x[0, ..., :z] = chain.inputs.next_latent[:] = latents
            with torch.enable_grad():
                z0 = self.model.encode_parts(self._images[0], None, shift[0])
        chain.inputs.x[0, 0, :, :z] = z0.detach()
        self._z0 = z0

    def _image_gradients(self) -> None:
        """Go on from the first latent's gradient to the encoder's parameters."""
        chain, z0 = self.chain, self._z0
        assert z0 is not None
        chain.world.grad[chain.layout.pixels : chain.layout.encoder_end].zero_()
        with matmul_precision(self.cfg, z0.device):
            z0.backward(chain.state.d_x[0, 0, :, : self.cfg.latent_dim])
        self._z0 = None

    # ---- in and out

    def _take_in_changes(self) -> None:
        """Honour what others did to the parameters; graphs read the flat buffers, whose addresses stay."""
        if self.flat.check():
            self._lend_gradients()

    def _lend_gradients(self) -> None:
        """Let gradients that torch writes, or others look at, be those in the flat buffer."""
        if self.cfg.multitask and self.cfg.task_grad_leak:
            self.model._task_emb.weight.grad = self.flat.grads["_task_emb.weight"]
        if self._images is not None:
            for name, p in self.model._encoder.named_parameters():
                p.grad = self.flat.grads[f"_encoder.{name}"]

    def _take(self, batch: Batch) -> None:
        inputs = self.chain.inputs
        if self._images is None:
            inputs.obs[0, ..., : batch.obs.shape[-1]].copy_(batch.obs, non_blocking=True)
        else:
            self._images.copy_(batch.obs, non_blocking=True)
        self._actions.copy_(batch.action, non_blocking=True)
        inputs.target[0].copy_(batch.reward[..., 0], non_blocking=True)
        inputs.terminated[0].copy_(batch.terminated[..., 0], non_blocking=True)
        if self._tasks is not None:
            assert batch.task is not None
            self._tasks.index.copy_(batch.task, non_blocking=True)

    def _take_noise(self, noise: UpdateNoise) -> None:
        draws = self.chain.draws
        shift = None
        if noise.shift_first is not None and noise.shift_next is not None:
            shift = torch.cat([noise.shift_first[None], noise.shift_next])
        given = dict(
            td_eps=noise.td_eps,
            pi_eps=noise.pi_eps,
            td_members=noise.td_members,
            pi_members=noise.pi_members,
            value_keep=None if noise.value_dropout is None else noise.value_dropout != 0,
            pi_keep=None if noise.pi_dropout is None else noise.pi_dropout != 0,
            shift=shift,
        )
        for name, x in given.items():
            to = getattr(draws, name)
            if to is None and x is None:
                continue
            if to is None or x is None or x.shape != to.shape:
                got, allowed = (None if y is None else tuple(y.shape) for y in (x, to))
                raise InputError(f"noise, for {name}: got {got}, allowed: {allowed}")
            to.copy_(x)

    def _metrics(self) -> dict[str, Tensor]:
        """Return copies of the metrics: the next update overwrites the buffer."""
        found = self.chain.losses.metrics()
        if self.cfg.episodic:
            found |= {k: v.clone() for k, v in self._statistics.items()}
        return found

    def _termination_statistics(self) -> None:
        """Keep the statistics of the last step: its logits' gradient is weight (sigmoid - target)."""
        chain = self.chain
        target = chain.inputs.terminated[0, -1, :, None]
        slope = chain.state.d_termination[2].x[0, -1].float()
        prob = slope / chain.losses.termination_weight[0, -1] + target
        found = termination_statistics(self._ranks.whole(prob), self._ranks.whole(target))
        if not self._statistics:
            self._statistics = {k: torch.zeros_like(v) for k, v in found.items()}
        for k, v in found.items():
            self._statistics[k].copy_(v)

    def _trace_world(self, trace: UpdateTrace) -> None:
        inputs, z = self.chain.inputs, self.cfg.latent_dim
        zs = torch.cat([inputs.x[0, :1, :, :z].float(), inputs.latent])
        trace.tensors.update(td_target=inputs.target[1, ..., None].clone(), zs=zs)
        self._trace_gradients(trace, of_policy=False)

    def _trace_gradients(self, trace: UpdateTrace, of_policy: bool) -> None:
        trace.grads.update((n, g.clone()) for n, g in self.flat.grads.items() if n.startswith("_pi.") == of_policy)

    def _raise_if_failed(self, wait: bool) -> None:
        """Raise `NonFiniteError` where an update failed, once that is known; `wait` until it is."""
        code = int(self._flag) if self._device.is_done(wait) else 0
        if not code:
            return
        self._flag.zero_()
        chain = self.chain
        chain.inputs.flag.zero_()
        if code == POLICY:  # then all other losses are finite
            bad = [] if math.isfinite(chain.losses.metric("pi_loss")) else ["pi_loss"]
        else:
            bad = [k for k in chain.losses.not_finite() if k.endswith("_loss")]
        if not bad:
            own = [n for n in self.flat.grads if n.startswith("_pi.") == (code == POLICY)]
            bad = [n for n in own if not bool(self.flat.grads[n].isfinite().all())]
        raise NonFiniteError(
            f"update {int(chain.inputs.rng[1])}: {', '.join(bad[:3]) or 'gradient norm'} is not finite; "
            f"the step of {'_pi' if code == POLICY else 'the world model'} and what follows it was not taken"
        )
