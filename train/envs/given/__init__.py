"""Environments that a program hands over: objects, factories, vectors of them; and those known by name."""

from .source import Source, source_of

__all__ = ["Source", "source_of"]
