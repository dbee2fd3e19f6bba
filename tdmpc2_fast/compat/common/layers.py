"""The official `common.layers`: modules to build models of, under the official names of their parameters.

They are plain torch, for models of one's own. `tdmpc2_fast.kernels.normed_linear` is the same layer fused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdmpc2_fast.kernels.layers.activations import simnorm
from tdmpc2_fast.kernels.layers.sizes import SHIFT_PAD

from ...errors import InputError
from ...model.layers import random_shift
from ..state_dict import from_official_entries


class ParameterTree(nn.Module):
    """Parameters by nested names: `tree["0", "ln", "weight"]`, as in a TensorDict of parameters."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        branches: dict[str, dict[str, Tensor]] = {}
        for name, x in parameters.items():
            first, _, rest = name.partition(".")
            if rest:
                branches.setdefault(first, {})[rest] = x
            else:
                self.register_parameter(first, nn.Parameter(x))
        for name, branch in branches.items():
            self.add_module(name, ParameterTree(branch))

    def __getitem__(self, key: str | tuple[str, ...]) -> Any:
        """Return a parameter, or a branch, by its name or path."""
        found: Any = self
        for name in (key,) if isinstance(key, str) else key:
            found = {**found._parameters, **found._modules}[name]
        return found


class Ensemble(nn.Module):
    """Modules of one architecture, evaluated at once; their parameters are stacked under `params`.

    The state dict has the official names. Of what a TensorDict adds to them (`__batch_size`, `__device`), it has
    none, and ignores it in others'.
    """

    def __init__(self, modules: Sequence[nn.Module], **kwargs: Any) -> None:
        super().__init__()
        modules = list(modules)
        if not modules:
            raise InputError("modules: got none, allowed: at least one")
        stacked, _ = torch.func.stack_module_state(modules)
        self.params = ParameterTree({name: x.detach() for name, x in stacked.items()})
        self.__dict__["module"] = copy.deepcopy(modules[0]).to("meta")  # how one is evaluated, without parameters
        self._repr, self._n = str(modules[0]), len(modules)
        self.register_load_state_dict_pre_hook(lambda _, state, prefix, *rest: from_official_entries(state, prefix, {}))

    def __len__(self) -> int:
        return self._n

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what each module gives, stacked: (len(self), ...). Dropout is drawn for each."""
        module = self.__dict__["module"].train(self.training)

        def one(params: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(module, params, args, kwargs)

        found: Tensor = torch.vmap(one, randomness="different")(dict(self.params.named_parameters()))
        return found

    def __repr__(self) -> str:
        return f"Vectorized {len(self)}x {self._repr}"


class ShiftAug(nn.Module):
    """A random shift of images by whole pixels, after padding by replication (DrQ-v2)."""

    def __init__(self, pad: int = SHIFT_PAD) -> None:
        super().__init__()
        self.pad, self.padding = pad, (pad,) * 4

    def forward(self, x: Tensor) -> Tensor:
        """Shift images (B, C, S, S), each by a draw of its own; return them in float32."""
        x = x.float()
        if x.shape[-1] != x.shape[-2]:
            raise InputError(f"x: got images of {tuple(x.shape[-2:])}, allowed: square ones")
        size = (len(x), 1, 1, 2)
        shift = torch.randint(0, 2 * self.pad + 1, size=size, device=x.device, dtype=x.dtype)
        return random_shift(x, shift, self.pad)


class PixelPreprocess(nn.Module):
    """Brings pixels of 0..255 to [-0.5, 0.5]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x / 255 - 0.5."""
        return x.div(255.0).sub(0.5)


class SimNorm(nn.Module):
    """A softmax within groups of `cfg.simnorm_dim` (paper, eq. 4)."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.dim = cfg.simnorm_dim

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., L), L a multiple of `dim`."""
        return simnorm(x, self.dim)

    def __repr__(self) -> str:
        return f"SimNorm(dim={self.dim})"


class NormedLinear(nn.Linear):
    """A linear layer, dropout if any, LayerNorm, and an activation: Mish where none is given."""

    def __init__(self, *args: Any, dropout: float = 0.0, act: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ln = nn.LayerNorm(self.out_features)
        self.act = nn.Mish(inplace=False) if act is None else act
        self.dropout = nn.Dropout(dropout, inplace=False) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in_features) -> (..., out_features)."""
        x = super().forward(x)
        if self.dropout is not None:
            x = self.dropout(x)
        y: Tensor = self.act(self.ln(x))
        return y

    def __repr__(self) -> str:
        dropout = f", dropout={self.dropout.p}" if self.dropout is not None else ""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"NormedLinear({sizes}{dropout}, act={type(self.act).__name__})"


def mlp(
    in_dim: int, mlp_dims: int | Sequence[int], out_dim: int, act: nn.Module | None = None, dropout: float = 0.0
) -> nn.Sequential:
    """Return normed layers with Mish and a last layer: a linear one, or where `act` is given a normed one with it.

    dropout: in the first layer.
    """
    dims = [in_dim, *([mlp_dims] if isinstance(mlp_dims, int) else mlp_dims)]
    layers: list[nn.Module] = [
        NormedLinear(dims[i], dims[i + 1], dropout=dropout * (i == 0)) for i in range(len(dims) - 1)
    ]
    last = nn.Linear(dims[-1], out_dim) if act is None else NormedLinear(dims[-1], out_dim, act=act)
    return nn.Sequential(*layers, last)


def conv(in_shape: Sequence[int], num_channels: int, act: nn.Module | None = None) -> nn.Sequential:
    """Return the encoder of images (B, *in_shape) of 64x64 pixels: a shift, four convolutions, and `act`."""
    if in_shape[-1] != 64:
        raise InputError(f"in_shape: got {tuple(in_shape)}, allowed: (channels, 64, 64)")
    c = num_channels

    def convolutions() -> Iterator[nn.Module]:
        yield from (nn.Conv2d(in_shape[0], c, 7, stride=2), nn.ReLU(inplace=False))
        yield from (nn.Conv2d(c, c, 5, stride=2), nn.ReLU(inplace=False))
        yield from (nn.Conv2d(c, c, 3, stride=2), nn.ReLU(inplace=False))
        yield from (nn.Conv2d(c, c, 3, stride=1), nn.Flatten())

    return nn.Sequential(ShiftAug(), PixelPreprocess(), *convolutions(), *([] if act is None else [act]))


def enc(cfg: Any, out: dict[str, nn.Module] | None = None) -> nn.ModuleDict:
    """Return an encoder for each kind of observation in `cfg.obs_shape`.

    out: others to go with them. The official default is one dict for all calls, so that a second agent of a
    process has the encoders of the first; here it is a new one for each.
    """
    found = dict(out or {})
    for kind, shape in cfg.obs_shape.items():
        if kind == "state":
            hidden = max(cfg.num_enc_layers - 1, 1) * [cfg.enc_dim]
            found[kind] = mlp(shape[0] + cfg.task_dim, hidden, cfg.latent_dim, act=SimNorm(cfg))
        elif kind == "rgb":
            found[kind] = conv(shape, cfg.num_channels, act=SimNorm(cfg))
        else:
            raise NotImplementedError(f"obs_shape: got the kind {kind!r}, allowed: state, rgb")
    return nn.ModuleDict(found)


def api_model_conversion(target_state_dict: Mapping[str, Any], source_state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict of either generation with all the entries that `target_state_dict`, a current one, has.

    What an older file has none of (masks, the range of the log std, the detached critics) is the target's, or its
    own critics under the other name. `source_state_dict` is changed in place, as by the official function.
    """
    if "_detach_Qs_params.0.weight" in source_state_dict:
        return source_state_dict
    own = {k: x for k, x in target_state_dict.items() if k in ("_action_masks", "log_std_min", "log_std_dif")}
    from_official_entries(source_state_dict, "", own)
    for key, value in target_state_dict.items():
        if key not in source_state_dict and key.startswith("_detach_Qs_params.") and isinstance(value, Tensor):
            critics = key.replace("_detach_Qs_params.", "_Qs.params.")
            if critics in source_state_dict:
                source_state_dict[key] = source_state_dict[critics]
        elif key not in source_state_dict and "Qs" in key and not isinstance(value, Tensor):
            source_state_dict[key] = value
    unknown = [k for k in source_state_dict if k not in target_state_dict]
    missing = [k for k in target_state_dict if "Qs" in k and k not in source_state_dict]
    if unknown or missing:
        raise InputError(
            f"source_state_dict: got {'unknown ' + unknown[0] if unknown else 'no ' + missing[0]}, "
            "allowed: the entries of the same model in either generation"
        )
    return source_state_dict


__all__ = [
    "Ensemble",
    "NormedLinear",
    "PixelPreprocess",
    "ShiftAug",
    "SimNorm",
    "api_model_conversion",
    "conv",
    "enc",
    "mlp",
]
