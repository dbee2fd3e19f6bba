"""A plan by kernels, of a GPU or of the CPU: the weights packed, the chain captured or on a tape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from typing_extensions import override

from tdmpc2_fast.kernels.device.cluster_check import how_on
from tdmpc2_fast.kernels.device.launch import host
from tdmpc2_fast.kernels.layers.rows import Rows
from tdmpc2_fast.kernels.plan.chain import PlanChain

from ..errors import InputError
from ..model.task_embedding import look_up
from ..model.world_model import WorldModel
from ..rng import PlanNoise
from ..runtime.access import access_to
from ..runtime.backend import matmul_precision, plan_precision
from ..runtime.on_device import OnDevice
from ..runtime.profiling import annotate
from ..seeds import stream_seed
from ..sizes import plan_sizes
from .backend import PlanBackend, PlanRequest
from .packing import PackedModel, Places
from .staging import Staging
from .trace import PlanTrace


class KernelPlan(PlanBackend):
    """Plans for `num_envs` environments by one replay of a CUDA graph.

    Draws come from a counter-based generator on the device, whose counter each plan advances.
    once, early: see `PlanChain`.
    """

    def __init__(
        self,
        model: WorldModel,
        num_envs: int,
        seed: int,
        once: bool | None = None,
        early: bool = False,
    ) -> None:
        cfg, device = model.cfg, model.device
        self.model, self.cfg = model, cfg
        self.precision = plan_precision(cfg, device)
        sizes = plan_sizes(cfg, num_envs)
        self._packed = PackedModel(model, sizes, self.precision)
        self.chain = PlanChain(
            sizes,
            self._packed.weights,
            how_on(device, self.precision),
            device,
            once=once,
            early=early,
            annotate=annotate,
        )
        inputs = self.chain.inputs
        self.prev_mean, self.counter = inputs.prev_mean, inputs.rng
        inputs.discount.fill_(cfg.discounts[0])
        self._discounts = torch.tensor(cfg.discounts, device=device)
        self._task = torch.zeros(num_envs, dtype=torch.int64, device=device) if cfg.multitask else None
        pixels = cfg.obs == "rgb"
        self._images = torch.zeros(num_envs, *cfg.observation_shape, device=device) if pixels else None
        self._given = dict(t0=inputs.t0, eval_mode=inputs.eval_mode)
        if not pixels:
            self._given["obs"] = inputs.obs
        if self._task is not None:
            self._given["task"] = self._task
        self._staging = Staging(self._given) if device.type == "cuda" else None
        if self._staging is not None:
            self._given = given = self._staging.parts
            inputs.t0, inputs.eval_mode = given["t0"], given["eval_mode"]
            inputs.obs, self._task = given.get("obs", inputs.obs), given.get("task")
        self._unpacked = Places(self._read_unpacked())
        self._stale = True  # whether a graph has not seen the packed weights of now
        self._device = OnDevice(device, "Planner")
        inputs.rng.copy_(torch.tensor([stream_seed(seed, "plan"), 0]))
        with self._device.turn(), self._turn_at_parameters():
            self._refresh()
            self._capture()

    def _capture(self) -> None:
        self._graph = self._device.captured(self._run, (self.prev_mean, self.counter))
        self._read = self._unpacked.addresses()
        self._stale = True

    def _refresh(self) -> None:
        """Pack the weights anew if they have changed."""
        self._stale = self._packed.refresh(self._check) or self._stale

    def _check(self) -> None:
        self._device.check(self.model.device, self.model.dtype)

    def _turn_at_parameters(self) -> AbstractContextManager[None]:
        """Return what a whole plan is made in: one from packed weights alone only reads while it packs."""
        if self._task is not None:  # looking rows of the embedding up renormalises them
            return access_to(self.model).writing()
        return nullcontext() if self._images is None else access_to(self.model).reading()

    def _read_unpacked(self) -> Iterator[tuple[Mapping[str, Tensor | None], str]]:
        """Yield where the model's tensors are that a plan reads, or renormalises, without a packed copy."""
        if self._task is not None:
            yield getattr(self.model, "_orig_mod", self.model)._buffers, "_action_masks"
        read = ("_task_emb.",) if self._images is None else ("_task_emb.", "_encoder.")
        for name, held, key in self.model.places():
            if name.startswith(read):
                yield held, key

    @property
    def why_eager(self) -> str | None:
        """Why plans are not replays of a CUDA graph, or None where they are."""
        return self._graph.why_eager

    @torch.no_grad()
    def _run(self) -> None:
        self.chain.draw()
        if self._task is not None or self._images is not None:
            host(self._inputs_from_torch)
        self.chain.run(draw=False)

    @override
    def plan(self, request: PlanRequest) -> Tensor:
        noise, trace = request.noise, request.trace
        with self._device.turn(), self._turn_at_parameters():
            self._refresh()
            if self._read and self._unpacked.addresses() != self._read:
                # They were put elsewhere (`load_state_dict(assign=True)`): the graph has the old ones.
                self._capture()
            self._take_in(request)
            if noise is None and trace is None:
                self._graph(stale=self._stale)
                self._stale = False
            else:
                self._run_given(noise, trace)
            # A copy: the next plan overwrites the buffer.
            return self.chain.state.action.clone()

    def _take_in(self, request: PlanRequest) -> None:
        """Have the buffers hold what is asked for."""
        if self._images is not None:
            self._images.copy_(request.obs, non_blocking=True)
        values: dict[str, bool | Tensor] = {name: getattr(request, name) for name in self._given}
        if self._staging is not None:
            self._staging.send(values)
            return
        for name, value in values.items():
            if isinstance(value, bool):
                self._given[name].fill_(value)
            else:
                self._given[name].copy_(value)

    @torch.no_grad()
    def _run_given(self, noise: PlanNoise | None, trace: PlanTrace | None) -> None:
        """Run the same plan eagerly, from given draws or watched."""
        chain = self.chain
        if noise is None:
            chain.draw()
        else:
            self._take(noise)
        self._inputs_from_torch()
        chain.run(draw=False, observe=None if trace is None else lambda event: self._observe(event, trace))
        if trace is not None:
            s = chain.state
            # The latent is activated by torch: each of its readers here does that for itself.
            z = chain.encode().activated()[0, :, 0].float()
            # The prior's sequences stay where they are while the plan goes on.
            pi_actions = s.actions[:, :, : self.cfg.num_pi_trajs]
            trace.record(z=z, pi_actions=pi_actions, chosen=s.chosen, picked=s.picked)

    def _take(self, noise: PlanNoise) -> None:
        draws = self.chain.draws
        names = ["pi_eps", "samples", "value_eps", "elite", "action", "members"]
        for name in names if draws.shift is None else [*names, "shift"]:
            to, given = getattr(draws, name), getattr(noise, name)
            if given is None or given.shape != to.shape:
                got = None if given is None else tuple(given.shape)
                raise InputError(f"noise.{name}: got shape {got}, allowed: {tuple(to.shape)}")
            to.copy_(given)

    @torch.no_grad()
    def _inputs_from_torch(self) -> None:
        """Fill in what torch ops look up or encode: the task's rows, and the latent of pixels."""
        inputs = self.chain.inputs
        if self._task is not None:
            assert inputs.task_embedding is not None
            assert inputs.mask is not None
            inputs.task_embedding.copy_(look_up(self.model._task_emb.weight, self._task))
            inputs.mask.copy_(self.model._action_masks[self._task])
            inputs.discount.copy_(self._discounts[self._task])
        if self._images is not None:
            assert inputs.z0 is not None
            with annotate("encode"), matmul_precision(self.cfg, inputs.z0.device):
                inputs.z0.copy_(self.model.encode_parts(self._images, None, self.chain.draws.shift))

    def _observe(self, event: str, trace: PlanTrace) -> None:
        s = self.chain.state
        if event == "values":
            trace.record(actions=s.actions)
        else:
            trace.record(values=s.values, elites=s.elites, scores=s.scores, means=s.mean, stds=s.std)

    @override
    @torch.no_grad()
    def values(self, z: Tensor, actions: Tensor, task: Tensor | None, eps: Tensor, members: Tensor) -> Tensor:
        chain = self.chain
        with self._device.turn(), self._turn_at_parameters():
            self._refresh()
            if self._task is not None:
                assert task is not None
                self._task.copy_(task)
                self._inputs_from_torch()
            chain.draws.value_eps[0].copy_(eps)
            chain.draws.members[0].copy_(members)
            chain.state.actions.copy_(actions)
            chain.rollout(Rows(z.unsqueeze(0)), chain.share(None))
            chain.terminal_value(0)
            chain.refine()
            return chain.state.values.clone()
