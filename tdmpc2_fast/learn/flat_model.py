"""A world model whose parameters are views into the flat buffers of a fused update.

Names and shapes stay as they are; a first layer's rows are farther apart, since the buffer pads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tdmpc2_fast.kernels.device.launch import Precision
from tdmpc2_fast.kernels.update.buffers import FlatLayer
from tdmpc2_fast.kernels.update.chain import UpdateChain

from ..model.world_model import WorldModel
from ..sizes import pixel_room


class FlatModel:
    """Binds a model's parameters to the buffers of an update, and notices when they no longer are.

    grads: a view of each parameter's gradient by its name, `_pi` included.
    moments: views of what Adam keeps of each, by `exp_avg` and `exp_avg_sq`.
    """

    def __init__(self, model: WorldModel, update: UpdateChain, precision: Precision) -> None:
        self.model, self.update, self.precision = model, update, precision
        u = update
        self.grads = dict(self._views(u.world.grad, u.policy.grad))
        self.moments = dict(
            exp_avg=dict(self._views(u.world.exp_avg, u.policy.exp_avg)),
            exp_avg_sq=dict(self._views(u.world.exp_avg_sq, u.policy.exp_avg_sq)),
        )
        self._bound: list[tuple[dict[str, Any], str, Tensor]] = []
        self._shared: list[tuple[dict[str, Any], str, Tensor]] = []
        self._seen: list[int] = []
        self.bind()

    @torch.no_grad()
    def bind(self) -> None:
        """Move the parameters into the buffers; their values stay, and so do the parameter objects."""
        kept = {name: (held, key) for name, held, key in self.model.places()}
        self._bound, self._shared = [], []
        u = self.update
        for name, view in self._views(u.world.param, u.policy.param, u.target.param):
            holder, key = kept[name]
            parameter = holder[key]
            assert parameter is not None
            if parameter.device.type == "cpu" and parameter.is_shared():
                # Other processes have this memory: it stays, and takes what an update makes of it.
                self._shared.append((holder, key, view))
                view.copy_(parameter)
                continue
            if parameter.data_ptr() != view.data_ptr():
                view.copy_(parameter)
                parameter.data = view
            self._bound.append((holder, key, view))
        self.refresh_operands()

    @torch.no_grad()
    def refresh_operands(self) -> None:
        """Round the parameters anew to what products take."""
        u = self.update
        for flat in (u.world, u.policy, u.target):
            if flat.shadow is not None:
                flat.shadow.copy_(self.precision.operand(flat.param))
        self._seen = self._versions()

    def check(self) -> bool:
        """Take in what others did to the parameters since the last time, and tell whether any lay elsewhere."""
        moved = any(holder[key].data_ptr() != view.data_ptr() for holder, key, view in self._bound)
        if moved:
            self.bind()
        elif self._shared:
            with torch.no_grad():
                for holder, key, view in self._shared:
                    view.copy_(holder[key])
            self.refresh_operands()
        elif self._versions() != self._seen:
            self.refresh_operands()
        return moved

    def wrote(self) -> None:
        """Advance the version counters, which others watch, since kernels wrote the parameters."""
        with torch.no_grad():
            for holder, key, view in self._shared:
                holder[key].copy_(view)
        torch.autograd.graph.increment_version([holder[key] for holder, key, _ in self._bound])
        self._seen = self._versions()

    def _versions(self) -> list[int]:
        return [holder[key]._version for holder, key, _ in self._bound]

    def _views(self, world: Tensor, policy: Tensor, target: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and its view of flat buffers; the target critics', too, where theirs is given."""
        model, layout = self.model, self.update.layout
        obs = model.cfg.obs

        def mlp(
            module: Any, name: str, layers: Any, flat: Tensor, slabs: slice | int, base: int = 0
        ) -> Iterator[tuple[str, Tensor]]:
            for i, layer in enumerate(layers):
                for key, p in module[i].named_parameters():
                    yield f"{name}.{i}.{key}", _part(flat, layer, key, p, slabs, base)

        if layout.encoder:
            yield from mlp(model._encoder[obs], f"_encoder.{obs}", layout.encoder, world, 0)
        else:
            at = layout.pixels
            for key, p in model._encoder[obs].named_parameters():
                yield f"_encoder.{obs}.{key}", world[at : at + p.numel()].view(p.shape)
                at += pixel_room(p)
        if model.cfg.multitask:
            weight = model._task_emb.weight
            yield "_task_emb.weight", world[layout.task : layout.task + weight.numel()].view(weight.shape)
        yield from mlp(model._dynamics, "_dynamics", layout.dynamics, world, 0)
        yield from mlp(model._reward, "_reward", layout.heads, world, 0)
        critics = slice(1, None)
        yield from mlp(model._Qs.params, "_Qs.params", layout.heads, world, critics)
        if model._termination is not None:
            yield from mlp(model._termination, "_termination", layout.termination, world, 0)
        yield from mlp(model._pi, "_pi", self.update.policy_layout.policy, policy, 0)
        if target is not None:
            targets = model._target_Qs_params
            yield from mlp(targets, "_target_Qs_params", layout.heads, target, critics, layout.heads_start)


def _part(flat: Tensor, layer: FlatLayer, key: str, like: Tensor, slabs: slice | int, base: int) -> Tensor:
    """Return the view of one parameter in a flat buffer that begins at `base` of the layout."""
    gradient = layer.moved(-base).gradient(flat)
    view = {
        "weight": gradient.weight,
        "bias": gradient.bias,
        "ln.weight": gradient.ln_weight,
        "ln.bias": gradient.ln_bias,
    }[key]
    assert view is not None
    view = view[slabs]
    return view[..., : like.shape[-1]] if key == "weight" else view
