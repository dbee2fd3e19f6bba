"""A training run: the loop, its folder, and going on with it."""
