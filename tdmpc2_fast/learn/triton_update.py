"""An update on the Triton backend: parameters in flat buffers, the chain of kernels captured."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import has_dependent_launch
from tdmpc2_fast.kernels.update.chain import POLICY, WORLD, UpdateChain
from tdmpc2_fast.kernels.update.metrics import METRICS
from tdmpc2_fast.kernels.update.replay_gather import Slices, draw_slices

from ..errors import InputError, NonFiniteError
from ..model.task_embedding import look_up
from ..model.world_model import WorldModel
from ..rng import COUNTER, UpdateNoise
from ..runtime.backend import matmul_precision, plan_precision
from ..runtime.cuda_graph import GraphedFunction
from ..runtime.profiling import annotate
from ..seeds import stream_seed
from ..sizes import update_sizes
from .batch import Batch, UpdateTrace
from .flat_model import FlatModel
from .metrics import termination_statistics
from .replay import DeviceReplay
from .scale import RunningScale
from .torch_update import TASK_GRADIENT

_FAILED_BEFORE = WORLD  # any code: while the flag is set no parameter changes


class TritonUpdate:
    """Trains a world model by one replay of a CUDA graph an update.

    Draws come from a counter-based generator on the device, whose counter each update advances.
    The parameters become views into flat buffers, which the optimisers go over in one pass; names,
    shapes and the parameter objects stay. throughput, pdl: see `UpdateChain`; `pdl` is None for what
    the device can.
    """

    def __init__(self, model: WorldModel, throughput: bool | None = None, pdl: bool | None = None) -> None:
        cfg, device = model.cfg, model.device
        self.model, self.cfg = model, cfg
        self.precision = plan_precision(cfg, device)
        self.fused = UpdateChain(
            update_sizes(model),
            self.precision,
            device,
            pdl=has_dependent_launch(device) if pdl is None else pdl,
            throughput=throughput,
            annotate=annotate,
        )
        self.flat = FlatModel(model, self.fused, self.precision)
        self.scale = RunningScale(cfg.tau, device)
        self.scale.value = self.fused.state.scale
        inputs = self.fused.inputs
        inputs.discount.fill_(cfg.discounts[0])
        inputs.rng.copy_(torch.tensor([stream_seed(cfg.seed, "update"), 0]))
        h, b = cfg.horizon, cfg.batch_size
        self._discounts = torch.tensor(cfg.discounts, device=device)
        self._task = torch.zeros(b, dtype=torch.int64, device=device) if cfg.multitask else None
        shape = cfg.observation_shape
        pixels = cfg.obs == "rgb"
        self._images = torch.zeros(h + 1, b, *shape, dtype=torch.uint8, device=device) if pixels else None
        self._masks = model._action_masks.clone() if cfg.multitask else None
        self._lend_gradients()
        self.steps = 0
        self._statistics: dict[str, Tensor] = {}
        self._flag = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        # Captured when first asked for: updates from given batches, and from a replay.
        self._from_batch: GraphedFunction | None = None
        self._from_replay: GraphedFunction | None = None
        self._replay: DeviceReplay | None = None

    def _capture(self, run: Callable[[], None]) -> GraphedFunction:
        """Capture an update; its warm-up runs change nothing, for a set flag masks them."""
        u = self.fused
        kept = [(x, x.clone()) for x in (u.inputs.rng, u.world.step, u.policy.step)]
        if self._task is not None:
            weight = self.model._task_emb.weight.data
            kept += [(x, x.clone()) for x in (weight, self.flat.grads["_task_emb.weight"])]
        u.inputs.flag.fill_(_FAILED_BEFORE)
        graph = GraphedFunction(run, u.inputs.x.device, "Updater")
        for x, before in kept:
            x.copy_(before)
        u.inputs.flag.zero_()
        return graph

    @property
    def why_eager(self) -> str | None:
        """Why updates are not replays of a CUDA graph; None where they are, or none has come yet."""
        return next((g.why_eager for g in (self._from_batch, self._from_replay) if g is not None), None)

    def step(self, batch: Batch, noise: UpdateNoise | None, trace: UpdateTrace | None) -> dict[str, Tensor]:
        """As `Updater.step`, the batch checked."""
        with self._one_update():
            self._take(batch)
            if noise is not None or trace is not None:
                self._run_given(noise, trace)
                return self._metrics()
            if self._from_batch is None:
                self._from_batch = self._capture(self._run)
            self._from_batch()
            return self._metrics()

    def step_from(self, replay: DeviceReplay) -> dict[str, Tensor]:
        """Metrics of one step on a batch drawn by the kernels, in the graph."""
        with self._one_update():
            if self._from_replay is None or self._replay is not replay:
                self._replay = replay
                self._from_replay = self._capture(self._run_from_replay)
            self._from_replay()
            return self._metrics()

    def state(self) -> dict[str, Tensor]:
        """As `Updater.state`."""
        u = self.fused
        found = {f"{key}.{n}": x for key, views in self.flat.moments.items() for n, x in views.items()}
        found |= {"world.step": u.world.step, "policy.step": u.policy.step, "scale": self.scale.value}
        found[COUNTER] = u.inputs.rng
        if self.cfg.multitask:
            found[TASK_GRADIENT] = self.flat.grads["_task_emb.weight"]
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """As `Updater.load_state`."""
        mine = self.state()
        with self._on_device():
            for name, x in mine.items():
                if name in state:  # else it has not taken a step, or is of the other backend
                    x.copy_(state[name].reshape(x.shape))

    @contextlib.contextmanager
    def _one_update(self) -> Iterator[None]:
        """Within: on a model as it was left, or with what others changed taken in."""
        device = self.fused.inputs.x.device
        if self.model.device != device or self.model.dtype != torch.float32:
            raise InputError(
                f"model: got {self.model.dtype} on {self.model.device}, allowed: torch.float32 on {device}, where "
                "this updater was built; build another after moving the model"
            )
        with self._on_device(), torch.no_grad():
            self._raise_if_failed(wait=False)
            self._take_in_changes()
            yield
            self.steps += 1
            self.flat.wrote()
            self._flag.copy_(self.fused.inputs.flag, non_blocking=True)
        self._raise_if_failed(wait=self._done is None)

    def synchronise(self) -> None:
        """Wait for the updates so far; raises what they failed with."""
        with self._on_device():
            self._raise_if_failed(wait=True)

    @torch.no_grad()
    def td_target(self, next_z: Tensor, batch: Batch, eps: Tensor, members: Tensor) -> Tensor:
        """r + gamma (1 - terminated) min of two target critics at a policy action: (H, B, 1)."""
        u, z, t = self.fused, self.cfg.latent_dim, self.cfg.task_dim
        h, b = next_z.shape[:2]
        with self._on_device():
            self._take_in_changes()
            x = u.inputs.next_x[0, :h, :b]
            x[..., :z] = next_z
            if self._task is not None:
                assert batch.task is not None
                self._task[:b].copy_(batch.task)
                self._look_up()
                x[..., z : z + t] = look_up(self.model._task_emb.weight.data, batch.task.to(x.device))
            u.inputs.target[0, :h, :b] = batch.reward[..., 0]
            u.inputs.terminated[0, :h, :b] = batch.terminated[..., 0]
            u.draws.td_eps[:h, :b] = eps
            u.draws.td_members.copy_(members)
            u.td_target()
            return u.inputs.target[1, :h, :b, None].clone()

    # ---- one update, in its order

    def _run(self) -> None:
        self.fused.draw()
        self._update(None)

    def _run_from_replay(self) -> None:
        replay, inputs, sizes = self._replay, self.fused.inputs, self.fused.sizes
        assert replay is not None
        obs = inputs.obs[0, ..., : sizes.obs_dim] if self._images is None else self._images.flatten(2)
        out = Slices(obs, self._actions, inputs.target[0], inputs.terminated[0], self._task)
        draw_slices(inputs.rng, replay.table, replay.first, replay.count, replay.steps, out, pdl=self.fused.pdl)
        self._run()

    @property
    def _actions(self) -> Tensor:
        """Where a batch's actions go: (H, B, A)."""
        at = self.cfg.latent_dim + self.cfg.task_dim
        return self.fused.inputs.x[0, : self.cfg.horizon, :, at : at + self.fused.sizes.action_dim]

    @torch.no_grad()
    def _update(self, trace: UpdateTrace | None) -> None:
        u = self.fused
        if self._task is not None:
            self._look_up()
        z0 = self._encode()
        u.td_target()
        u.world_losses()
        if z0 is None:
            u.encoder_gradients()
        else:
            u.world.grad[u.layout.pixels : u.layout.encoder_end].zero_()
            with matmul_precision(self.cfg, z0.device):
                z0.backward(u.state.d_x[0, 0, :, : self.cfg.latent_dim])
        if self._task is not None:
            self._world_gradient_of_tasks(trace)
        if self.cfg.episodic:
            self._termination_statistics()
        if trace is not None:
            self._trace_world(trace)
        u.step_world()
        if self._task is not None:
            self._look_up_again()
        u.policy_losses()
        if trace is not None:
            trace.grads.update((n, g.clone()) for n, g in self.flat.grads.items() if n.startswith("_pi."))
        u.step_policy()
        if self._task is not None:
            self._policy_gradient_of_tasks()
        u.summarise()

    def _run_given(self, noise: UpdateNoise | None, trace: UpdateTrace | None) -> None:
        """The same update, eagerly, from given draws or watched."""
        if noise is None:
            self.fused.draw()
        else:
            self._take_noise(noise)
        self._update(trace)

    def _encode(self) -> Tensor | None:
        """All latents; of pixels the first is returned, with its graph."""
        u, z = self.fused, self.cfg.latent_dim
        if self._images is None:
            u.encode()
            return None
        shift = u.draws.shift
        assert shift is not None
        with annotate("encode"), matmul_precision(self.cfg, self._images.device):
            u.inputs.next_x[0, ..., :z] = self.model.encode_parts(self._images[1:], None, shift[1:])
            with torch.enable_grad():
                z0 = self.model.encode_parts(self._images[0], None, shift[0])
        u.inputs.x[0, 0, :, :z] = z0.detach()
        return z0

    # ---- tasks: what is looked up, and where its gradients go

    def _look_up(self) -> None:
        assert self._task is not None
        inputs = self.fused.inputs
        e = look_up(self.model._task_emb.weight.data, self._task)
        z, o, t = self.cfg.latent_dim, self.fused.sizes.obs_dim, self.cfg.task_dim
        for x, at in ((inputs.obs, o), (inputs.x, z), (inputs.next_x, z)):
            x[..., at : at + t] = e
        assert inputs.mask is not None
        assert self._masks is not None
        inputs.mask.copy_(self._masks[self._task])
        inputs.discount.copy_(self._discounts[self._task])

    def _look_up_again(self) -> None:
        """The embedding has taken its step."""
        assert self._task is not None
        z = self.cfg.latent_dim
        self.fused.inputs.x[..., z : z + self.cfg.task_dim] = look_up(self.model._task_emb.weight.data, self._task)

    def _of_tasks(self, d: Tensor) -> Tensor:
        """Sums over the rows of each task, in a fixed order: (B, T) -> (tasks, T)."""
        assert self._task is not None
        return (self._task == torch.arange(len(self.cfg.tasks), device=d.device)[:, None]).to(d.dtype) @ d

    def _world_gradient_of_tasks(self, trace: UpdateTrace | None) -> None:
        """Added to what the policy loss before has left there, as in the official code."""
        state, z = self.fused.state, self.cfg.latent_dim
        grad = self.flat.grads["_task_emb.weight"]
        if trace is not None and self.cfg.task_grad_leak and int(self.fused.world.step):
            trace.tensors["task_emb_grad_before"] = grad.clone()
        with matmul_precision(self.cfg.replace(precision="float32"), grad.device):
            grad += self._of_tasks(state.d_obs[0, 0] + state.d_x[0, ..., z:].sum(0))

    def _policy_gradient_of_tasks(self) -> None:
        """What the next world update inherits; nothing where `task_grad_leak` is off."""
        u, state, t = self.fused, self.fused.state, self.cfg.task_dim
        grad = self.flat.grads["_task_emb.weight"]
        if not self.cfg.task_grad_leak:
            grad.zero_()
            return
        factor = -0.5 * u.losses.policy_weight / state.new_scale
        d = state.d_policy_task[0].sum(0) + (factor[:, None, None] * state.d_action[0, ..., :t]).sum(0)
        with matmul_precision(self.cfg.replace(precision="float32"), grad.device):
            grad.copy_(self._of_tasks(d))

    # ---- in and out

    def _take_in_changes(self) -> None:
        """Honour what others did to the parameters; graphs read the flat buffers, whose addresses stay."""
        if self.flat.check():
            self._lend_gradients()

    def _lend_gradients(self) -> None:
        """Gradients that torch writes, or others look at, are those in the flat buffer."""
        if self.cfg.multitask and self.cfg.task_grad_leak:
            self.model._task_emb.weight.grad = self.flat.grads["_task_emb.weight"]
        if self._images is not None:
            for name, p in self.model._encoder.named_parameters():
                p.grad = self.flat.grads[f"_encoder.{name}"]

    def _take(self, batch: Batch) -> None:
        inputs = self.fused.inputs
        if self._images is None:
            inputs.obs[0, ..., : batch.obs.shape[-1]].copy_(batch.obs, non_blocking=True)
        else:
            self._images.copy_(batch.obs, non_blocking=True)
        self._actions.copy_(batch.action, non_blocking=True)
        inputs.target[0].copy_(batch.reward[..., 0], non_blocking=True)
        inputs.terminated[0].copy_(batch.terminated[..., 0], non_blocking=True)
        if self._task is not None:
            assert batch.task is not None
            self._task.copy_(batch.task, non_blocking=True)

    def _take_noise(self, noise: UpdateNoise) -> None:
        draws = self.fused.draws
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
        """A copy: the next update overwrites the buffer."""
        values = dict(zip(METRICS, self.fused.losses.metrics.clone(), strict=True))
        found = {k: v for k, v in values.items() if not k.startswith("_")}
        if self.cfg.episodic:
            found |= {k: v.clone() for k, v in self._statistics.items()}
        return found

    def _termination_statistics(self) -> None:
        """From the gradient of the logits, weight (sigmoid - target), and the targets of the last step."""
        u = self.fused
        target = u.inputs.terminated[0, -1, :, None]
        slope = u.state.d_termination[2].x[0, -1].float()
        prob = slope / u.losses.termination_weight[0, -1] + target
        found = termination_statistics(prob, target)
        if not self._statistics:
            self._statistics = {k: torch.zeros_like(v) for k, v in found.items()}
        for k, v in found.items():
            self._statistics[k].copy_(v)

    def _trace_world(self, trace: UpdateTrace) -> None:
        inputs, z = self.fused.inputs, self.cfg.latent_dim
        trace.tensors.update(td_target=inputs.target[1, ..., None].clone(), zs=inputs.x[0, ..., :z].clone())
        trace.grads.update((n, g.clone()) for n, g in self.flat.grads.items() if not n.startswith("_pi."))

    def _raise_if_failed(self, wait: bool) -> None:
        """Say what was not finite, once it is known; `wait` for it or look whether it is."""
        if self._done is not None and (wait or self._done.query()):
            self._done.synchronize()
        elif self._done is not None:
            return
        code = int(self._flag)
        if not code:
            return
        self._flag.zero_()
        u = self.fused
        u.inputs.flag.zero_()
        if code == POLICY:  # then all other losses are finite
            bad = [] if math.isfinite(u.losses.metric("pi_loss")) else ["pi_loss"]
        else:
            bad = [k for k in u.losses.not_finite() if k.endswith("_loss")]
        if not bad:
            own = [n for n in self.flat.grads if n.startswith("_pi.") == (code == POLICY)]
            bad = [n for n in own if not bool(self.flat.grads[n].isfinite().all())]
        raise NonFiniteError(
            f"update {int(u.inputs.rng[1])}: {', '.join(bad[:3]) or 'gradient norm'} is not finite; "
            f"the step of {'_pi' if code == POLICY else 'the world model'} and what follows it was not taken"
        )

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Within: kernels go to the updater's device, after the update before, whatever its stream."""
        if self._done is None:
            yield
            return
        with torch.cuda.device(self.fused.inputs.x.device):
            torch.cuda.current_stream().wait_event(self._done)
            yield
            self._done.record()
