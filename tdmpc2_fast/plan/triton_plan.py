"""A plan on the Triton backend: the model's weights packed, the chain of kernels captured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import has_dependent_launch
from tdmpc2_fast.kernels.layers.rows import Rows
from tdmpc2_fast.kernels.plan.chain import PlanChain

from ..errors import InputError
from ..model.task_embedding import look_up
from ..model.world_model import WorldModel
from ..rng import PlanNoise
from ..runtime.backend import matmul_precision, plan_precision
from ..runtime.cuda_graph import GraphedFunction
from ..runtime.profiling import annotate
from ..seeds import stream_seed
from ..sizes import plan_sizes
from .packing import PackedModel
from .trace import PlanTrace


class TritonPlan:
    """Plans for `num_envs` environments by one replay of a CUDA graph.

    Draws come from a counter-based generator on the device, whose counter each plan advances.
    throughput, persistent, pdl: see `PlanChain`; `pdl` is None for what the device can.
    """

    def __init__(
        self,
        model: WorldModel,
        num_envs: int,
        seed: int,
        throughput: bool | None = None,
        persistent: int = 0,
        pdl: bool | None = None,
    ) -> None:
        cfg, device = model.cfg, model.device
        self.model, self.cfg, self.num_envs = model, cfg, num_envs
        self.precision = plan_precision(cfg, device)
        sizes = plan_sizes(cfg, num_envs)
        self._packed = PackedModel(model, sizes, self.precision)
        self.fused = PlanChain(
            sizes,
            self._packed.weights,
            self.precision,
            device,
            pdl=has_dependent_launch(device) if pdl is None else pdl,
            throughput=throughput,
            persistent=persistent,
            annotate=annotate,
        )
        inputs = self.fused.inputs
        inputs.discount.fill_(cfg.discounts[0])
        self._discounts = torch.tensor(cfg.discounts, device=device)
        self._task = torch.zeros(num_envs, dtype=torch.int64, device=device) if cfg.multitask else None
        shape = cfg.observation_shape
        self._images = torch.zeros(num_envs, *shape, device=device) if cfg.obs == "rgb" else None
        self._packed.refresh()
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        inputs.rng.copy_(torch.tensor([stream_seed(seed, "plan"), 0]))
        with self._on_device():
            self._capture()

    def _capture(self) -> None:
        """Capture the plan, and leave what its warm-up runs would change as it was."""
        inputs = self.fused.inputs
        kept = [(x, x.clone()) for x in (inputs.prev_mean, inputs.rng)]
        self._graph = GraphedFunction(self._run, inputs.obs.device, "Planner")
        for x, before in kept:
            x.copy_(before)
        self._read = self._addresses()

    def _addresses(self) -> list[int]:
        """Where the model's tensors are that a plan reads, or renormalises, without a packed copy."""
        read: list[Tensor] = []
        if self._task is not None:
            read += [self.model._task_emb.weight, self.model._action_masks]
        if self._images is not None:
            read += self.model._encoder.parameters()
        return [x.data_ptr() for x in read]

    @property
    def prev_mean(self) -> Tensor:
        """(E, H, A)."""
        return self.fused.inputs.prev_mean

    @property
    def counter(self) -> Tensor:
        """Of the draws: seed, plans so far."""
        return self.fused.inputs.rng

    @property
    def why_eager(self) -> str | None:
        """Why plans are not replays of a CUDA graph, or None where they are."""
        return self._graph.why_eager

    @torch.no_grad()
    def _run(self) -> None:
        self.fused.draw()
        self._inputs_from_torch()
        self.fused.run(draw=False)

    @torch.no_grad()
    def plan(
        self,
        obs: Tensor,
        t0: bool | Tensor,
        eval_mode: bool | Tensor,
        task: Tensor | None,
        noise: PlanNoise | None,
        trace: PlanTrace | None,
    ) -> Tensor:
        """Actions (E, A); arguments as checked by `Planner.plan`."""
        inputs = self.fused.inputs
        if self.model.device != inputs.obs.device or self.model.dtype != torch.float32:
            raise InputError(
                f"model: got {self.model.dtype} on {self.model.device}, allowed: torch.float32 on "
                f"{inputs.obs.device}, where this planner was built; build another after moving the model"
            )
        with self._on_device():
            self._packed.refresh()
            if self._addresses() != self._read:
                # They were put elsewhere (`load_state_dict(assign=True)`): the graph has the old ones.
                self._capture()
            (inputs.obs if self._images is None else self._images).copy_(obs, non_blocking=True)
            for buffer, flag in ((inputs.t0, t0), (inputs.eval_mode, eval_mode)):
                if isinstance(flag, bool):
                    buffer.fill_(flag)
                else:
                    buffer.copy_(flag, non_blocking=True)
            if self._task is not None:
                assert task is not None
                self._task.copy_(task, non_blocking=True)
            if noise is None and trace is None:
                self._graph()
            else:
                self._run_given(noise, trace)
            # A copy: the next plan overwrites the buffer.
            return self.fused.state.action.clone()

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Within: kernels go to the planner's device, after the plan before, whatever its stream."""
        if self._done is None:
            yield
            return
        with torch.cuda.device(self.fused.inputs.obs.device):
            torch.cuda.current_stream().wait_event(self._done)
            yield
            self._done.record()

    def _run_given(self, noise: PlanNoise | None, trace: PlanTrace | None) -> None:
        """The same plan, eagerly, from given draws or watched."""
        fused = self.fused
        if noise is None:
            fused.draw()
        else:
            self._take(noise)
        self._inputs_from_torch()
        fused.run(draw=False, observe=None if trace is None else lambda event: self._observe(event, trace))
        if trace is not None:
            s = fused.state
            # The latent is activated by torch: each of its readers here does that for itself.
            z = fused.encode().activated()[0, :, 0].float()
            # The prior's sequences stay where they are while the plan goes on.
            pi_actions = s.actions[:, :, : self.cfg.num_pi_trajs]
            trace.record(z=z, pi_actions=pi_actions, chosen=s.chosen, picked=s.picked)

    def _take(self, noise: PlanNoise) -> None:
        draws = self.fused.draws
        names = ["pi_eps", "samples", "value_eps", "elite", "action", "members"]
        for name in names if draws.shift is None else [*names, "shift"]:
            to, given = getattr(draws, name), getattr(noise, name)
            if given is None or given.shape != to.shape:
                got = None if given is None else tuple(given.shape)
                raise InputError(f"noise.{name}: got shape {got}, allowed: {tuple(to.shape)}")
            to.copy_(given)

    def _inputs_from_torch(self) -> None:
        """What is looked up or encoded by torch ops: the task's rows, and the latent of pixels."""
        inputs = self.fused.inputs
        if self._task is not None:
            assert inputs.task_embedding is not None
            assert inputs.mask is not None
            inputs.task_embedding.copy_(look_up(self.model._task_emb.weight, self._task))
            inputs.mask.copy_(self.model._action_masks[self._task])
            inputs.discount.copy_(self._discounts[self._task])
        if self._images is not None:
            assert inputs.z0 is not None
            with annotate("encode"), matmul_precision(self.cfg, inputs.z0.device):
                inputs.z0.copy_(self.model.encode_parts(self._images, None, self.fused.draws.shift))

    def _observe(self, event: str, trace: PlanTrace) -> None:
        s = self.fused.state
        if event == "values":
            trace.record(actions=s.actions)
        else:
            trace.record(values=s.values, elites=s.elites, scores=s.scores, means=s.mean, stds=s.std)

    @torch.no_grad()
    def values(self, z: Tensor, actions: Tensor, task: Tensor | None, eps: Tensor, members: Tensor) -> Tensor:
        """Values (E, N) of sequences (E, H, N, A) from latents z (E, N, L); see `TorchPlan.values`."""
        fused = self.fused
        with self._on_device():
            self._packed.refresh()
            if self._task is not None:
                assert task is not None
                self._task.copy_(task)
                self._inputs_from_torch()
            fused.draws.value_eps[0].copy_(eps)
            fused.draws.members[0].copy_(members)
            fused.state.actions.copy_(actions)
            fused.rollout(Rows(z.unsqueeze(0)), fused.share(None))
            fused.terminal_value(0)
            fused.update()
            return fused.state.values.clone()
