"""Where and how it runs: devices, backends, CUDA graphs, profiling."""
