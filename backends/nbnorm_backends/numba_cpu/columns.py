"""Norms with neighbouring elements in different statistics: batch, group and instance norm channels last, and layer
norm over an axis that is not innermost.

Two passes over tiles of rows and columns. Every column (g, c) has sums of its own; those of one group merge after the
first pass. Short rows are folded: k rows of w elements are one row of k*w columns, whose sums merge likewise.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm.backend import reciprocal_std
from nbnorm_backends.numba_cpu import kernels
from nbnorm_backends.numba_cpu.elements import carried
from nbnorm_backends.numba_cpu.kernels import K1, K2, M2, MEAN, POOR_PIVOT, RESIDUAL, RSTD
from nbnorm_backends.numba_cpu.pool import Kernel, Scheduler
from nbnorm_backends.numba_cpu.tuning import TUNING

Array = NDArray[Any]
NOTHING = np.zeros(0)


class _Grid:
    """How x (n, r, g, c, 1) is folded and cut into tiles; depends on the shape and the parameters' axes only."""

    def __init__(self, scheduler: Scheduler, x: Array, along_r: bool) -> None:
        self._scheduler, self._size = scheduler, x.size
        n, r, g, c, _ = x.shape
        self.k = 1 if along_r or not x.flags.c_contiguous else _fold(r, g * c)
        self.shape = n, r // self.k, self.k * g * c  # (n, rows, w)
        self.five = n, self.k, g, c, 1  # the columns' own axes
        _, rows, w = self.shape
        self.width = min(w, TUNING.width)
        self.rows = min(rows, max(TUNING.chunk // self.width, math.ceil(rows / TUNING.shares)))  # whatever n is
        self.samples = max(1, TUNING.chunk // (rows * w))
        self.shares = math.ceil(rows / self.rows)
        self.tiles = math.ceil(w / self.width)

    def view(self, array: Array) -> Array:
        """x, dy, y or dx as kernels take it; an empty one stays empty."""
        return carried(array).reshape(self.shape if array.size else (0, 0, 0))

    def columns(self, stat: Array) -> Array:
        """A value per group (n, g), or per parameter (1, 1, g, c, 1), on every column: float64 (n, w)."""
        five = stat[:, None, :, None, None] if stat.ndim == 2 else stat
        return np.array(np.broadcast_to(five, self.five), np.float64, order="C").reshape(self.shape[0], -1)

    def groups(self, column: Array) -> Array:
        """The sum over each group's columns, (n, g)."""
        return np.asarray(column.reshape(self.five).sum(axis=(1, 3, 4)))

    def run(self, kernel: Kernel, *args: Any) -> None:
        chunks = math.ceil(self.shape[0] / self.samples) * self.shares * self.tiles
        sizes = self.samples, self.rows, self.width
        self._scheduler.run(kernel, chunks, (*sizes, *args), parallel=self._size > TUNING.serial)

    def partial_sums(self) -> Array:
        return np.empty((2, self.shape[0], self.shares, self.shape[2]))


def _fold(r: int, w: int) -> int:
    """The largest divisor of r that folds rows of w elements into at most TUNING.fold columns of TUNING.depth rows."""
    most = max(1, min(TUNING.fold // w, r // TUNING.depth))
    return max(k for k in range(1, most + 1) if r % k == 0)


def forward(
    scheduler: Scheduler,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    *,
    center: bool,
    eps: float,
    find: bool,
    stats: Array,
    y: Array,
) -> None:
    """Fill `stats` where `find` asks, and y where it is not empty."""
    along_r = any(param is not None and param.shape[1] > 1 for param in (weight, bias))
    grid = _Grid(scheduler, x, along_r)
    if find:
        _find(grid, x, center, eps, stats)
    if not y.size:
        return
    mean, rstd = (stats[row].reshape(x.shape[0], x.shape[2]) for row in (MEAN, RSTD))
    scale, shift = grid.columns(rstd), np.zeros((grid.shape[0], grid.shape[2]))
    wr = br = NOTHING
    if along_r:
        wr = np.ones(x.shape[1]) if weight is None else weight.reshape(-1).astype(np.float64)
        br = np.zeros(x.shape[1]) if bias is None else bias.reshape(-1).astype(np.float64)
    else:
        if weight is not None:
            scale *= grid.columns(weight)
        if bias is not None:
            shift = grid.columns(bias)
    grid.run(kernels.columns_apply, grid.view(x), grid.columns(mean), scale, shift, wr, br, grid.view(y))


def _find(grid: _Grid, x: Array, center: bool, eps: float, stats: Array) -> None:
    """Statistics of every group: sums about each column's first element, about its mean where that was far out."""
    view = grid.view(x)
    n, rows, w = grid.shape
    first = x.reshape(grid.shape)[:, 0].astype(np.float64, order="C")
    pivot = first if center else np.zeros((n, w))
    part = grid.partial_sums()
    with np.errstate(invalid="ignore", over="ignore"):
        grid.run(kernels.columns_sums, view, pivot, part)
        s, q = part.sum(axis=2)
        poor = ~(s * s <= POOR_PIVOT * rows * (q - s * s / rows))
        if center and poor.any():
            pivot = np.where(poor, pivot + s / rows, pivot)
            grid.run(kernels.columns_sums, view, pivot, part)
            s, q = part.sum(axis=2)  # the same bits as before where the pivot stayed
        _merge(grid, center, pivot, s, q, stats)
        count = rows * grid.k * x.shape[3]
        stats[RSTD] = reciprocal_std(stats[M2] / count, eps)


def _merge(grid: _Grid, center: bool, pivot: Array, s: Array, q: Array, stats: Array) -> None:
    """The columns of each group as one: their counts are equal, so means average, and their spread joins m2."""
    _, rows, _ = grid.shape
    if not center:
        stats[[MEAN, RESIDUAL]] = 0.0
        stats[M2] = grid.groups(q).reshape(-1)
        return
    origin = pivot.reshape(grid.five)[:, :1, :, :1]
    offset = (pivot.reshape(grid.five) - origin) + s.reshape(grid.five) / rows
    step = offset.mean(axis=(1, 3, 4), keepdims=True)
    m2 = grid.groups(q - s * s / rows) + rows * grid.groups((offset - step) ** 2)
    mean = origin + step
    stats[MEAN] = mean.reshape(-1)
    stats[RESIDUAL] = ((origin - mean) + step).reshape(-1)
    stats[M2] = np.maximum(m2, 0.0).reshape(-1)  # rounding only; NaN stays NaN


def backward(
    scheduler: Scheduler,
    dy: Array,
    x: Array,
    weight: Array | None,
    *,
    stats: Array,
    find: bool,
    divisors: Array,
    coefficients: Array,
    param_shape: tuple[int, ...] | None,
    dx: Array,
) -> tuple[Array | None, Array | None]:
    """Fill `coefficients` where `find` asks, and dx where it is not empty; (dweight, dbias) where they have a shape."""
    n, r, g, _, _ = x.shape
    along_r = (param_shape or (weight.shape if weight is not None else (1,) * 5))[1] > 1
    grid = _Grid(scheduler, x, along_r)
    mean, rstd = (grid.columns(stats[row].reshape(n, g)) for row in (MEAN, RSTD))
    w = np.ones((n, grid.shape[2])) if along_r or weight is None else grid.columns(weight)
    wr = NOTHING if not along_r else np.ones(r) if weight is None else weight.reshape(-1).astype(np.float64)
    dweight = dbias = None
    views = grid.view(dy), grid.view(x), mean
    if find:
        part = grid.partial_sums()
        rows = np.empty((2, n, grid.tiles, r) if along_r and param_shape is not None else (2, 0, 0, 0))
        grid.run(kernels.columns_backward_sums, *views, rstd, wr, part, rows)
        s, q = part.sum(axis=2)
        q *= rstd
        with np.errstate(invalid="ignore"):
            for row, total in ((K1, s), (K2, q)):
                coefficients[row] = grid.groups(total * w).reshape(-1) / divisors[row] if divisors[row] else 0.0
        if param_shape is not None:
            grads = rows.sum(axis=2)[..., None, None, None] if along_r else np.stack((q, s)).reshape(2, *grid.five)
            dweight, dbias = (_reduced(grad, param_shape) for grad in grads)
    if dx.size:
        k1, k2 = (grid.columns(coefficients[row].reshape(n, g)) for row in (K1, K2))
        args = rstd * w, k1 * rstd, k2 * rstd * rstd, wr, grid.view(dx)
        grid.run(kernels.columns_backward_apply, *views, *args)
    return dweight, dbias


def _reduced(grad: Array, param_shape: tuple[int, ...]) -> Array:
    """Summed over the axes that the parameter lacks."""
    return np.asarray(grad.sum(axis=tuple(axis for axis in range(5) if param_shape[axis] == 1), keepdims=True))
