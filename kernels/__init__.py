"""The ops TD-MPC2 is made of, each with its plain-torch implementation.

Knows torch (and, where kernels exist, triton) only. Every op names the maths, not the
backend. Shapes use one legend throughout the project:

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
    """A public op, imported now: who takes a kernel alone imports no other."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import autograd

    return getattr(autograd, name)
