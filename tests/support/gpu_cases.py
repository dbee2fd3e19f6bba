"""What tests of plans and updates run on a GPU, so that it can be compiled ahead, on all cores.

Every configuration is some thirty kernels of a plan or fifty of an update, and a kernel takes seconds to compile. So a
form is tested where most of its kernels are those of another, and published sizes are those that are measured, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from small_configs import TINY, tiny_config, tiny_multitask

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.kernels.plan.buffers import PlanSizes
from tdmpc2_fast.kernels.update.buffers import UpdateSizes
from tdmpc2_fast.sizes import plan_sizes, update_sizes

# Nothing is a multiple of anything; published sizes are of everything.
ODD: dict[str, Any] = dict(latent_dim=40, mlp_dim=51, enc_dim=37, simnorm_dim=4, num_samples=61)
SEVERAL = 7  # environments, where there is more than one


def published(size: int, action_dim: int, **changes: Any) -> Config:
    """A published model of states."""
    return Config.from_dict({"model_size": size, **changes}).with_env({"state": (24,)}, action_dim, 500)


def of_pixels(**changes: Any) -> Config:
    """An odd model of pixels, but for the latent, which has 16 features a channel."""
    keys = dict(TINY, obs="rgb", num_channels=4) | ODD | dict(latent_dim=64)
    return Config.from_dict({**keys, **changes}).with_env({"rgb": (9, 64, 64)}, 2, 50)


CONFIGS: dict[str, Callable[..., Config]] = dict(
    odd=lambda **k: tiny_config(**ODD, **k),
    episodic=lambda **k: tiny_config(episodic=True, **ODD, **k),
    multitask=lambda **k: tiny_multitask(**ODD, **k),
    pixels=lambda **k: of_pixels(**k),
    model_1=lambda **k: published(1, 6, **k),
    model_5=lambda **k: published(5, 6, **k),
    model_5_dog=lambda **k: published(5, 38, **k),
    model_19=lambda **k: published(19, 6, batch_size=1024, **k),
)


class Case(NamedTuple):
    """A plan for `envs` environments, or where that is 0 an update.

    once: as the chains take it. later: whether it can wait until what matters most has been seen.
    """

    name: str
    precision: str
    envs: int = 0
    once: bool | None = None
    later: bool = False

    @property
    def parameter(self) -> Any:
        """The case as a parameter of a test."""
        words = [
            self.name,
            self.precision,
            *([f"E{self.envs}"] if self.envs else []),
            *(["other"] * (self.once is False)),
        ]
        return pytest.param(self, id="-".join(words), marks=[pytest.mark.later] if self.later else [])

    def sizes(self) -> PlanSizes | UpdateSizes:
        """What the kernels are told."""
        cfg = CONFIGS[self.name](device="cpu", backend="torch")
        return plan_sizes(cfg, self.envs) if self.envs else update_sizes(TDMPC2(cfg).model)


_FORMS = ("odd", "episodic", "multitask")
_TENSOR = ("tf32", "bfloat16")

# Values of a plan, judged by float64.
VALUES = [
    *(Case("model_5", p, 1) for p in _TENSOR),
    *(Case(n, p, SEVERAL) for p in _TENSOR for n in _FORMS),
    *(Case(n, "float32", SEVERAL, later=True) for n in _FORMS),
    *(Case("odd", p, SEVERAL, once=False, later=True) for p in _TENSOR),
    *(Case(n, "tf32", 1, later=True) for n in ("model_1", "model_5_dog")),
    Case("model_19", "bfloat16", 1, later=True),
]
# Plans that are replayed.
PLANS = [
    Case("model_5", "tf32", 1),
    *(Case(n, "tf32", SEVERAL) for n in (*_FORMS, "pixels")),
    *(Case(n, "tf32", 1, later=True) for n in (*_FORMS, "pixels")),
    Case("model_5", "tf32", SEVERAL, later=True),
]
# Gradients of an update, judged by float64; the other way is the one that only a CPU takes by itself.
GRADIENTS = [
    *(Case("model_5", p) for p in _TENSOR),
    *(Case(n, p) for p in _TENSOR for n in _FORMS),
    *(Case(n, "float32", later=True) for n in _FORMS),
    Case("model_1", "tf32", later=True),
    Case("model_19", "bfloat16", later=True),
    *(Case(n, "bfloat16", once=False, later=True) for n in _FORMS),
    Case("odd", "tf32", once=False, later=True),
]
# Updates that are replayed.
UPDATES = [
    Case("model_5", "tf32"),
    *(Case(n, "tf32") for n in (*_FORMS, "pixels")),
    *(Case(n, "bfloat16", once=False, later=True) for n in _FORMS[1:]),
]


def parameters(cases: Sequence[Case]) -> list[Any]:
    """Cases as parameters of a test."""
    return [case.parameter for case in cases]


def compiled(later: bool) -> Iterator[tuple[PlanSizes | UpdateSizes, str, bool | None]]:
    """Yield sizes, precision and `once` of what the tests of either call run."""
    for case in dict.fromkeys(c for cases in (VALUES, PLANS, GRADIENTS, UPDATES) for c in cases):
        if case.later == later:
            yield case.sizes(), case.precision, case.once
