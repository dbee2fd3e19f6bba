"""A small, plain, eager TD-MPC2 that does what the official code does, step by step.

It evaluates all critics, concatenates its inputs and plans for one environment, and shares
no arithmetic with the product: it is the oracle of the tests and the baseline of the
benchmarks. Nothing in the product calls it.
"""

from .agent import ReferenceAgent

__all__ = ["ReferenceAgent"]
