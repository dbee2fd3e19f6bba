"""A world model's parameters packed for the fused plan, and the packed copy kept up to date."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from tdmpc2_fast.kernels.device.launch import Precision
from tdmpc2_fast.kernels.layers.rows import Layer
from tdmpc2_fast.kernels.plan.buffers import CRITICS, DYNAMICS, POLICY, REWARD, PlanSizes, PlanWeights
from tdmpc2_fast.kernels.plan.copy_table import CopyTable

from ..model.world_model import WorldModel
from ..runtime.access import access_to


@cache
def _have_fused_steps_counted() -> None:
    """Have fused optimisers, too, advance the version counters of what they write; torch's own do not."""

    def count(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            if group.get("fused"):
                torch.autograd.graph.increment_version(group["params"])

    register_optimizer_step_post_hook(count)


class Places:
    """Where a model keeps some of its tensors: dicts and keys, since others may be put there."""

    def __init__(self, places: Iterable[tuple[Mapping[str, Tensor | None], str]]) -> None:
        found = [(held, key) for held, key in places if held[key] is not None]
        self._held: list[Any] = [held for held, _ in found]
        self._keys = [key for _, key in found]

    def tensors(self) -> list[Tensor]:
        """Return those that are there now."""
        return list(map(getitem, self._held, self._keys))

    def addresses(self) -> list[int]:
        """Return where they lie now."""
        return list(map(Tensor.data_ptr, self.tensors()))


class _Seen(NamedTuple):
    """Parameters at one time."""

    versions: list[int]
    addresses: list[int]


class PackedModel:
    """The packed weights of a world model.

    The buffers keep their addresses, so a captured graph reads what `refresh` writes.
    """

    def __init__(self, model: WorldModel, sizes: PlanSizes, precision: Precision) -> None:
        self.model, self._sizes, self._precision = model, sizes, precision
        self.weights = PlanWeights.empty(sizes, precision, model.device)
        self._seen: _Seen | None = None
        self._held: list[Tensor] = []
        self._table: CopyTable | None = None
        _have_fused_steps_counted()
        unpacked = ("_target_Qs_params.", "_task_emb.") + (() if sizes.obs_dim else ("_encoder.",))
        self._places = Places((held, key) for name, held, key in model.places() if not name.startswith(unpacked))
        self._on_cpu = model.device.type == "cpu"

    def refresh(self, check: Callable[[], object] | None = None) -> bool:
        """Copy the parameters if one changed since the last time, and tell whether one did.

        Changes are noticed by torch's version counters, which in-place operations of torch
        advance (`load_state_dict`, `copy_`, steps of optimisers). Writes through `.data`, by
        kernels and by the replay of a captured update do not: call `stale` after them.

        check: is called first where one changed; it may raise.
        """
        parameters = self._places.tensors()
        seen = _Seen([p._version for p in parameters], list(map(Tensor.data_ptr, parameters)))
        # What another process writes into shared memory advances no counter here.
        if seen == self._seen and not (self._on_cpu and any(p.is_shared() for p in parameters)):
            return False
        if check is not None:
            check()
        with access_to(self.model).reading():
            # Addresses of then: `share_memory_` moves a tensor and what was detached from it.
            if self._table is None or self._seen is None or self._seen.addresses != seen.addresses:
                with torch.no_grad():
                    self._table = CopyTable(self._pairs(), self._precision)
                # Held until the next time, so that no other parameter can come to lie at an address of these.
                self._held = [p.detach() for p in parameters]
            self._table.copy()
        self._seen = seen
        return True

    def stale(self) -> None:
        """Have the next `refresh` copy, whatever the version counters say."""
        self._seen = None

    def _pairs(self) -> list[tuple[Tensor, Tensor, bool]]:
        """List every packed tensor, the parameter it is a copy of, and whether it is an operand of products."""
        m: Any = self.model
        w, z, t = self.weights, self._sizes.latent_dim, self._sizes.task_dim
        pairs: list[tuple[Tensor, Tensor, bool]] = []

        def linear(weight: Tensor, bias: Tensor, source: Any) -> None:
            pairs.append((weight, source.weight, True))
            pairs.append((bias, source.bias, False))

        def normed(layer: Layer, slab: int | slice, source: Any, columns: slice, side: slice | None) -> None:
            assert layer.ln_weight is not None
            assert layer.ln_bias is not None
            weight, ln = source.weight, source.ln
            pairs.append((layer.weight[slab], weight[..., columns], True))
            pairs.append((layer.bias[slab], source.bias, False))
            pairs.append((layer.ln_weight[slab], ln.weight, False))
            pairs.append((layer.ln_bias[slab], ln.bias, False))
            if layer.side is not None and side is not None:
                pairs.append((layer.side[slab], weight[..., side], True))

        every, latent, task, action = slice(None), slice(0, z), slice(z, z + t), slice(z + t, None)
        for i, layer in enumerate(w.encoder):
            source = m._encoder[self.model.cfg.obs][i]
            obs = layer.weight.shape[-1]
            normed(layer, 0, source, slice(0, obs), slice(obs, None))
        heads: list[tuple[int | slice, Any]] = [
            (DYNAMICS, m._dynamics),
            (POLICY, m._pi),
            (REWARD, m._reward),
            (slice(CRITICS, None), m._Qs.params),
        ]
        for slab, head in heads:
            first, second = head[0], head[1]
            normed(w.first, slab, first, latent, None if slab == POLICY else action)
            normed(w.second, slab, second, every, None)
            if w.task is not None:
                assert w.task.side is not None
                pairs.append((w.task.side[slab], first.weight[..., task], True))
                pairs.append((w.task.bias[slab], first.bias, False))
        normed(w.third, 0, m._dynamics[2], every, None)
        linear(w.scalars.weight[0], w.scalars.bias[0], m._reward[2])
        linear(w.scalars.weight[1:], w.scalars.bias[1:], m._Qs.params[2])
        # Rows of means and of log stds in turns (`interleave`).
        for i, (weight, bias) in enumerate(zip(m._pi[2].weight.chunk(2), m._pi[2].bias.chunk(2), strict=True)):
            pairs.append((w.policy.weight[0, i::2], weight, True))
            pairs.append((w.policy.bias[0, i::2, None], bias[:, None], False))
        if w.termination is not None:
            assert m._termination is not None
            normed(w.termination[0], 0, m._termination[0], every, None)
            normed(w.termination[1], 0, m._termination[1], every, None)
            linear(w.termination[2].weight[0], w.termination[2].bias[0], m._termination[2])
        return pairs
