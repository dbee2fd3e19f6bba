"""What kernels cost, seen without a GPU: compile reports, and launches, FLOP and bytes counted."""
