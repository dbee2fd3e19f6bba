"""What ranks that share a run do otherwise: going on from each other's checkpoints, and evaluating together."""
