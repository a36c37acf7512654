"""The fallback and the reference: the four required methods in NumPy, computed in float64 throughout.

Shortest, not fastest: every step makes a float64 temporary of x's size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm.backend import Backend
from nbnorm.statistics import Moments

Array = NDArray[Any]
REDUCED = (1, 3, 4)


class NumpyBackend(Backend):
    """Every op, layout and dtype, wherever NumPy runs."""

    name = "numpy"

    def moments(self, x: Array, *, center: bool) -> Moments:
        """Two passes about the first element, the second corrected by what the first one's rounding left."""
        count = x.shape[1] * x.shape[3] * x.shape[4]
        wide = x.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            if not center:
                zeros = np.zeros((x.shape[0], x.shape[2]))
                return Moments(count, zeros, np.sum(wide * wide, axis=REDUCED))
            pivot = wide[:, :1, :, :1, :1]
            deviation = wide - pivot
            mean = deviation.mean(axis=REDUCED)
            deviation -= _stat(mean)
            rest = deviation.mean(axis=REDUCED)
            m2 = np.sum(deviation * deviation, axis=REDUCED) - count * rest * rest
            first, step = pivot[:, 0, :, 0, 0], mean + rest
            total = first + step
            return Moments(count, total, np.maximum(m2, 0.0), (first - total) + step)

    def apply(
        self, x: Array, mean: Array | None, rstd: Array, weight: Array | None, bias: Array | None, *, out: Array | None
    ) -> Array:
        with np.errstate(invalid="ignore", over="ignore"):
            y = _xhat(x, mean, rstd)
            if weight is not None:
                y *= weight
            if bias is not None:
                y += bias
            if out is None:
                return y.astype(x.dtype, order="C")
            out[...] = y
            return out

    def backward_sums(
        self,
        dy: Array,
        x: Array,
        mean: Array | None,
        rstd: Array,
        weight: Array | None,
        param_shape: tuple[int, ...] | None,
    ) -> tuple[Array, Array, Array | None, Array | None]:
        with np.errstate(invalid="ignore", over="ignore"):
            wide = dy.astype(np.float64)
            product = wide * _xhat(x, mean, rstd)
            dweight = dbias = None
            if param_shape is not None:
                shared = tuple(axis for axis in range(5) if param_shape[axis] == 1)
                dweight, dbias = product.sum(shared, keepdims=True), wide.sum(shared, keepdims=True)
            if weight is not None:
                wide *= weight
                product *= weight
            return wide.sum(REDUCED), product.sum(REDUCED), dweight, dbias

    def backward_apply(
        self,
        dy: Array,
        x: Array,
        mean: Array | None,
        rstd: Array,
        weight: Array | None,
        k1: Array | None,
        k2: Array | None,
    ) -> Array:
        with np.errstate(invalid="ignore", over="ignore"):
            dx = dy.astype(np.float64)
            if weight is not None:
                dx *= weight
            if k1 is not None:
                dx -= _stat(k1)
            if k2 is not None:
                dx -= _xhat(x, mean, rstd) * _stat(k2)
            dx *= _stat(rstd)
            return dx.astype(x.dtype, order="C")


def _stat(stat: Array) -> Array:
    """(n, g) -> (n, 1, g, 1, 1)"""
    return stat[:, None, :, None, None]


def _xhat(x: Array, mean: Array | None, rstd: Array) -> Array:
    deviation = x.astype(np.float64)
    if mean is not None:
        deviation -= _stat(mean)
    deviation *= _stat(rstd)
    return deviation


def make() -> NumpyBackend:
    """Entry point."""
    return NumpyBackend()
