"""Losses of the update with their gradients, and the running scale of values."""
