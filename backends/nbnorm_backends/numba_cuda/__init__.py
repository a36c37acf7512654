"""The norms on NVIDIA GPUs, by kernels that Numba compiles."""
