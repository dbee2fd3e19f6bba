"""Fused layers and losses as differentiable torch ops, for anybody's module."""

from .layer import normed_linear
from .losses import consistency, squashed_gaussian, two_hot_cross_entropy

__all__ = ["consistency", "normed_linear", "squashed_gaussian", "two_hot_cross_entropy"]
