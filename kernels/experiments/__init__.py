"""Experiments: built and tested, but not proven to pay. Nothing here runs unless it is asked for by name."""
