"""The fallback and the reference: the four required methods in NumPy, computed in float64 throughout.

Shortest, not fastest: every step makes a float64 temporary of x's size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nbnorm.backend import WHOLE_OPS, Backend
from nbnorm.statistics import Moments

Array = NDArray[Any]
REDUCED = (1, 3, 4)
BLOCK = 32  # rows that are added one by one


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
                return Moments(count, zeros, _sum(wide * wide, REDUCED)[:, 0, :, 0, 0])
            pivot = wide[:, :1, :, :1, :1]
            deviation = wide - pivot
            mean = _sum(deviation, REDUCED) / count
            deviation -= mean
            rest = _sum(deviation, REDUCED) / count
            m2 = _sum(deviation * deviation, REDUCED) - count * rest * rest
            step = mean + rest
            total = pivot + step
            found = total, np.maximum(m2, 0.0), (pivot - total) + step
            return Moments(count, *(part[:, 0, :, 0, 0] for part in found))

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
                dweight, dbias = _sum(product, shared), _sum(wide, shared)
            if weight is not None:
                wide *= weight
                product *= weight
            s1, s2 = (_sum(part, REDUCED)[:, 0, :, 0, 0] for part in (wide, product))
            return s1, s2, dweight, dbias

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

    whole_ops: ClassVar[frozenset[str]] = frozenset(WHOLE_OPS)

    def local_response_norm(
        self, x: Array, window: tuple[int, int], alpha: float, beta: float, k: float, *, out: Array | None = None
    ) -> Array:
        wide = x.astype(np.float64)
        with np.errstate(all="ignore"):
            energy = k + alpha * _window_sum(wide * wide, *window)
            return _rounded(wide / _power(energy, beta), x.dtype, out)

    def local_response_norm_backward(
        self, dy: Array, x: Array, window: tuple[int, int], alpha: float, beta: float, k: float
    ) -> Array:
        """An element weighs in the sums of those whose windows hold it: the mirrored window."""
        before, after = window
        wide = x.astype(np.float64)
        with np.errstate(all="ignore"):
            energy = k + alpha * _window_sum(wide * wide, before, after)
            dx = dy / _power(energy, beta)
            if alpha * beta != 0.0:  # else the sum, which may have no value, does not matter
                dx -= 2.0 * alpha * beta * wide * _window_sum(dx * (wide / energy), after, before)
            return _rounded(dx, x.dtype)

    def normalize(self, x: Array, p: float, eps: float, *, out: Array | None = None) -> Array:
        wide = x.astype(np.float64)
        with np.errstate(all="ignore"):
            return _rounded(wide / np.maximum(_norm(wide, p), eps), x.dtype, out)

    def normalize_backward(self, dy: Array, x: Array, p: float, eps: float) -> Array:
        wide, dx = x.astype(np.float64), dy.astype(np.float64)
        with np.errstate(all="ignore"):
            norm = _norm(wide, p)
            bound = np.maximum(norm, eps)
            total = np.sum(dx * (wide / bound), axis=1, keepdims=True)
            total[~(norm >= eps)] = 0.0
            if p != 0.0:
                dx -= np.where(total == 0.0, 0.0, total * _norm_slope(wide, norm, p))
            return _rounded(dx / bound, x.dtype)


def _sum(array: Array, axes: tuple[int, ...]) -> Array:
    """Over `axes`, which keep length 1.

    NumPy adds pairwise along the innermost axis, and one by one along the others: there in blocks, and these again, for
    the errors of a long sum of few values do not cancel.
    """
    innermost = max((axis for axis in range(5) if array.shape[axis] > 1), default=4)
    for axis in axes:
        while axis != innermost and array.shape[axis] > BLOCK:
            array = _blocks(array, axis)
    return np.asarray(array.sum(axis=axes, keepdims=True))


def _blocks(array: Array, axis: int) -> Array:
    """Sums of BLOCK neighbours along an axis, and the elements that are left."""
    whole, rest = np.split(array, [array.shape[axis] // BLOCK * BLOCK], axis)
    shape = *array.shape[:axis], -1, BLOCK, *array.shape[axis + 1 :]
    return np.concatenate([whole.reshape(shape).sum(axis=axis + 1), rest], axis)


def _rounded(wide: Array, dtype: np.dtype[Any], out: Array | None = None) -> Array:
    if out is None:
        return wide.astype(dtype, order="C")
    out[...] = wide
    return out


def _window_sum(values: Array, before: int, after: int) -> Array:
    """The sum over the window about each element of axis 1, without subtraction, which would cancel."""
    length = values.shape[1]
    total = np.zeros_like(values)
    for shift in range(-min(before, length - 1), min(after, length - 1) + 1):
        begin, end = max(0, -shift), min(length, length - shift)
        total[:, begin:end] += values[:, begin + shift : end + shift]
    return total


def _power(base: Array, exponent: float) -> Array:
    """Square roots where they do: they are many times faster."""
    if exponent == 0.75:
        root = np.sqrt(base)
        return np.asarray(root * np.sqrt(root))
    return np.asarray(base**exponent)


def _norm(wide: Array, p: float) -> Array:
    """The p-norm over axis 1, which is kept; scaled, so that no power leaves the range of float64."""
    size = np.abs(wide)
    if p == 0.0:
        return np.count_nonzero(size, axis=1, keepdims=True).astype(np.float64)
    scale = np.asarray(size.max(axis=1, keepdims=True) if p > 0 else size.min(axis=1, keepdims=True))
    if np.isinf(p):
        return scale
    scale[~((scale > 0.0) & (scale < np.inf))] = 1.0
    return np.asarray(scale * np.sum((size / scale) ** p, axis=1, keepdims=True) ** (1.0 / p))


def _norm_slope(wide: Array, norm: Array, p: float) -> Array:
    """The derivative of the norm by each element; at 0, where it may have none, 0."""
    if np.isinf(p):
        chosen = np.abs(wide) == norm
        return np.asarray(np.sign(wide) * chosen / np.count_nonzero(chosen, axis=1, keepdims=True))
    slope = np.sign(wide) * (np.abs(wide) / norm) ** (p - 1.0)
    return np.where(wide == 0.0, 0.0, slope)


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
