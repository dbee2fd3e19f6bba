"""The published models, whose plans and updates are compiled and counted where no config is at hand."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from ..layers.sizes import MODEL_SIZES, ModelSizes
from ..plan.buffers import PlanSizes
from ..update.buffers import UpdateSizes

# What a plan can be besides: a multi-task model adds an embedding and an action mask, an episodic
# one the termination head.
FORMS: dict[str, dict[str, Any]] = {"single": {}, "multi": dict(task_dim=96), "episodic": dict(episodic=True)}

# What launches depend on besides the architecture; the config's defaults, as a test makes sure.
HYPERPARAMETERS = dict(
    horizon=3, num_samples=512, num_pi_trajs=24, num_elites=64, num_bins=101, simnorm_dim=8, dropout=0.01
)

_OBS_DIM = 24
_LARGE = 19  # millions of parameters from which a batch is 1024

_Sizes = TypeVar("_Sizes", bound=ModelSizes)


def plan_sizes(size: int, envs: int, actions: int, form: str = "single") -> PlanSizes:
    """Return a plan of a published model size; two more iterations for many actions, as in the paper."""
    return _sizes(PlanSizes, size, actions, form, envs=envs, iterations=8 if actions >= 20 else 6)


def update_sizes(size: int, actions: int, form: str = "single") -> UpdateSizes:
    """Return an update of a published model size at its published batch size."""
    return _sizes(UpdateSizes, size, actions, form, batch=256 if size < _LARGE else 1024, encoder_numel=0, num_tasks=0)


def _sizes(kind: type[_Sizes], size: int, actions: int, form: str, **own: Any) -> _Sizes:
    """Return sizes by their names; rates, weights and ranges, which no launch depends on, are all 1."""
    names = {f.name: f.type for f in fields(kind)}
    found: dict[str, Any] = {name: 1.0 for name, of in names.items() if of == "float"}
    found |= dict(task_dim=0, episodic=False, obs_dim=_OBS_DIM, action_dim=actions)
    found |= {name: x for name, x in HYPERPARAMETERS.items() if name in names}
    return kind(**found | own | MODEL_SIZES[size] | FORMS[form])
