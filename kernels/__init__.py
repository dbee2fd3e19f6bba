"""The ops TD-MPC2 is made of, each with its plain-torch implementation.

Knows torch (and, where kernels exist, triton) only. Every op names the maths, not the
backend. Shapes use one legend throughout the project:

    E environments   N samples    P policy-prior samples   H horizon   K bins
    L latent         A action     T task embedding         B batch     D mlp width
    Q critics        V SimNorm group
"""

from .activations import mish, simnorm
from .mppi import elite_update, pick_elite, sample_actions, shift_mean
from .normed_linear import linear, normed_linear
from .policy_head import PolicyOutput, policy_action, policy_head
from .two_hot import soft_cross_entropy, symexp, symlog, two_hot, two_hot_inv

__all__ = [
    "PolicyOutput",
    "elite_update",
    "linear",
    "mish",
    "normed_linear",
    "pick_elite",
    "policy_action",
    "policy_head",
    "sample_actions",
    "shift_mean",
    "simnorm",
    "soft_cross_entropy",
    "symexp",
    "symlog",
    "two_hot",
    "two_hot_inv",
]
