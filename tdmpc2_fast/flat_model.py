"""A world model whose parameters are views into the flat buffers of a fused update.

Names and shapes stay as they are; a first layer's rows are farther apart, for the buffer pads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .kernels.launch import Precision
from .kernels.update import FusedUpdate
from .kernels.update_buffers import FlatLayer
from .sizes import pixel_room
from .world_model import WorldModel


class FlatModel:
    """Binds a model's parameters to the buffers of an update, and notices when they are no longer.

    grads: a view of each parameter's gradient by its name, `_pi` included.
    """

    def __init__(self, model: WorldModel, update: FusedUpdate, precision: Precision) -> None:
        self.model, self.update, self.precision = model, update, precision
        self.grads = {name: grad for name, _, grad in self._views(learnable=True)}
        self._bound: list[tuple[dict[str, Any], str, Tensor]] = []
        self._seen: list[int] = []
        self.bind()

    @torch.no_grad()
    def bind(self) -> None:
        """Move the parameters into the buffers; what they hold stays, and so do they as objects."""
        kept = {
            f"{prefix}.{key}" if prefix else key: (module._parameters, key)
            for prefix, module in self.model.named_modules()
            for key in module._parameters
        }
        self._bound = []
        for name, view, _ in self._views():
            holder, key = kept[name]
            parameter = holder[key]
            assert parameter is not None
            if parameter.data_ptr() != view.data_ptr():
                view.copy_(parameter)
                parameter.data = view
            self._bound.append((holder, key, view))
        self.refresh_operands()

    @torch.no_grad()
    def refresh_operands(self) -> None:
        """Round the parameters anew, as products take them."""
        u = self.update
        for flat in (u.world, u.policy):
            if flat.shadow is not None:
                flat.shadow.copy_(self.precision.operand(flat.param))
        if u.target_shadow is not None:
            u.target_shadow.copy_(self.precision.operand(u.target))
        self._seen = self._versions()

    def check(self) -> bool:
        """Take in what others did to the parameters since the last time; whether any lay elsewhere."""
        moved = any(holder[key].data_ptr() != view.data_ptr() for holder, key, view in self._bound)
        if moved:
            self.bind()
        elif self._versions() != self._seen:
            self.refresh_operands()
        return moved

    def wrote(self) -> None:
        """Tell others, who watch version counters, that kernels wrote the parameters."""
        torch.autograd.graph.increment_version([holder[key] for holder, key, _ in self._bound])
        self._seen = self._versions()

    def _versions(self) -> list[int]:
        return [holder[key]._version for holder, key, _ in self._bound]

    def _views(self, learnable: bool = False) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name of each parameter, with its views of the flat parameters and of their gradients."""
        u, model = self.update, self.model
        layout, world, policy = u.layout, u.world, u.policy
        obs = model.cfg.obs

        def mlp(
            module: Any, name: str, layers: Any, param: Tensor, grad: Tensor, slabs: slice | int, base: int = 0
        ) -> Iterator[tuple[str, Tensor, Tensor]]:
            for i, layer in enumerate(layers):
                for key, p in module[i].named_parameters():
                    place = layer, key, p, slabs, base
                    yield f"{name}.{i}.{key}", _part(param, *place), _part(grad, *place)

        if layout.encoder:
            yield from mlp(model._encoder[obs], f"_encoder.{obs}", layout.encoder, world.param, world.grad, 0)
        else:
            at = layout.pixels
            for key, p in model._encoder[obs].named_parameters():
                rows = slice(at, at + p.numel())
                yield f"_encoder.{obs}.{key}", world.param[rows].view(p.shape), world.grad[rows].view(p.shape)
                at += pixel_room(p)
        if model.cfg.multitask:
            weight = model._task_emb.weight
            rows = slice(layout.task, layout.task + weight.numel())
            yield "_task_emb.weight", world.param[rows].view(weight.shape), world.grad[rows].view(weight.shape)
        yield from mlp(model._dynamics, "_dynamics", layout.dynamics, world.param, world.grad, 0)
        yield from mlp(model._reward, "_reward", layout.heads, world.param, world.grad, 0)
        critics = slice(1, None)
        yield from mlp(model._Qs.params, "_Qs.params", layout.heads, world.param, world.grad, critics)
        if model._termination is not None:
            yield from mlp(model._termination, "_termination", layout.termination, world.param, world.grad, 0)
        yield from mlp(model._pi, "_pi", u.policy_layout.policy, policy.param, policy.grad, 0)
        if not learnable:
            start = layout.heads_start
            targets = model._target_Qs_params
            yield from mlp(targets, "_target_Qs_params", layout.heads, u.target, u.target, critics, start)


def _part(flat: Tensor, layer: FlatLayer, key: str, like: Tensor, slabs: slice | int, base: int) -> Tensor:
    """The view of one parameter in a flat buffer that begins at `base` of the layout."""
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
