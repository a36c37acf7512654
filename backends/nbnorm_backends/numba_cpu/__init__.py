"""The Numba CPU backend: fused forward and backward kernels over fixed chunks, float64 statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbnorm_backends.numba_cpu.backend import NumbaBackend


def make() -> NumbaBackend:
    """Entry point. Imports Numba, which takes 0.2 s; nothing is compiled before a kernel's first call."""
    from nbnorm_backends.numba_cpu.backend import NumbaBackend  # noqa: PLC0415

    return NumbaBackend()
