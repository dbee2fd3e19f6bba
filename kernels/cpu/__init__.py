"""The kernels for a CPU: C++ sources of the same names and arguments, how they are built, and how they are called."""
