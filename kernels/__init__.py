"""The ops TD-MPC2 is made of, each with its plain-torch implementation.

This floor knows only torch and triton. Every op is named after the maths, not the backend.
Shapes use one legend throughout the project:

    E environments   N samples    P policy-prior samples   H horizon   K bins
    L latent         A action     T task embedding         B batch     D mlp width
    Q critics        V SimNorm group
"""

from typing import Any

__all__ = ["consistency", "normed_linear", "squashed_gaussian", "two_hot_cross_entropy"]

_MOVED = dict(
    autograd_losses="autograd.losses",
    mppi="plan.mppi",
    report="inspect.report",
    update_work="inspect.update_work",
)


def __getattr__(name: str) -> Any:
    """Import a public op now, so that importing one kernel imports no other."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import autograd

    return getattr(autograd, name)
