"""Data sets of episodes: our format on disk, what it is made of, and how batches are drawn from it."""
