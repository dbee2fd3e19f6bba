"""Layers forward: rows in, rows out, and the heads that read them."""
