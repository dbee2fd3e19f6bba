"""Faces towards the official code: its state dicts and checkpoint files."""
