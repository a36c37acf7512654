"""The norms on NVIDIA GPUs, by kernels that Numba compiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbnorm_backends.numba_cuda.backend import CudaBackend


def make() -> CudaBackend:
    """Entry point. Neither Numba nor the driver is looked for before the first request."""
    from nbnorm_backends.numba_cuda.backend import CudaBackend  # noqa: PLC0415

    return CudaBackend()
