"""What the loops of a run share, and the one without an environment."""
