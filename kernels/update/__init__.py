"""An update: batches from the replay, the chain of launches that learns from one, and the optimiser."""
