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
from nbnorm_backends.numba_cpu.activations import IDENTITY, Tag, curved
from nbnorm_backends.numba_cpu.elements import carried
from nbnorm_backends.numba_cpu.kernels import COUNT, HUGE, K1, K2, M2, MEAN, POOR_PIVOT, RESIDUAL, RSTD
from nbnorm_backends.numba_cpu.options import Joined, Options
from nbnorm_backends.numba_cpu.pool import Kernel, Scheduler
from nbnorm_backends.numba_cpu.tuning import TUNING

Array = NDArray[Any]


class _Grid:
    """How x (n, r, g, c, 1) is folded and cut into tiles; depends on the shape and the call's options only."""

    def __init__(self, scheduler: Scheduler, x: Array, *, folds: bool) -> None:
        self._scheduler, self._size = scheduler, x.size
        n, r, g, c, _ = x.shape
        self.k = _fold(r, g * c) if folds and x.flags.c_contiguous else 1
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

    def optional(self, array: Array | None) -> Array | None:
        return None if array is None else self.view(array)

    def options(self, options: Options) -> tuple[Any, ...]:
        """residual, mask (n, r, w), before, after, as kernels take them; each axis of the mask is 1 or full."""
        return self.optional(options.residual), self._mask(options.mask), options.before, options.after

    def _mask(self, mask: Array | None) -> Array | None:
        if mask is None:
            return None
        n, r, *columns = mask.shape
        full = columns if math.prod(columns) == 1 else self.five[2:]
        return np.ascontiguousarray(np.broadcast_to(mask, (n, r, *full))).reshape(n, r, -1)

    def columns(self, stat: Array) -> Array:
        """A value per group (n, g), or per parameter (1, 1, g, c, 1), on every column: float64 (n, w)."""
        five = stat[:, None, :, None, None] if stat.ndim == 2 else stat
        return np.array(np.broadcast_to(five, self.five), np.float64, order="C").reshape(self.shape[0], -1)

    def groups(self, column: Array) -> Array:
        """The sum over each group's columns, (n, g)."""
        return np.asarray(column.reshape(self.five).sum(axis=(1, 3, 4)))

    def run(self, kernel: Kernel, *args: Any, whole_columns: bool = False) -> None:
        rows, shares = (self.shape[1], 1) if whole_columns else (self.rows, self.shares)
        chunks = math.ceil(self.shape[0] / self.samples) * shares * self.tiles
        sizes = self.samples, rows, self.width
        self._scheduler.run(kernel, chunks, (*sizes, *args), parallel=self._size > TUNING.serial)

    def partial_sums(self, sums: int) -> Array:
        return np.empty((sums, self.shape[0], self.shares, self.shape[2]))


def _fold(r: int, w: int) -> int:
    """The largest divisor of r that folds rows of w elements into at most TUNING.fold columns of TUNING.depth rows."""
    most = max(1, min(TUNING.fold // w, r // TUNING.depth))
    return max(k for k in range(1, most + 1) if r % k == 0)


def forward(
    scheduler: Scheduler,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    options: Options,
    *,
    center: bool,
    eps: float,
    find: bool,
    stats: Array,
    joined: Joined,
    y: Array,
) -> None:
    """Fill `stats` where `find` asks, and y where it is not empty."""
    along_r = any(param is not None and param.shape[1] > 1 for param in (weight, bias))
    grid = _Grid(scheduler, x, folds=not along_r and options.mask is None)
    extra = grid.options(options)
    if find:
        _find(grid, x, extra, joined, center, eps, stats)
    if not y.size:
        return
    mean, rstd = (stats[row].reshape(x.shape[0], x.shape[2]) for row in (MEAN, RSTD))
    scale, shift, *along = _params(grid, rstd, weight, bias, along_r)
    columns = grid.columns(mean), scale, shift
    if x.itemsize < 8 and curved(options.before, options.after):
        columns = _single(*columns)
    grid.run(kernels.columns_apply, grid.view(x), *columns, *along, *extra, grid.view(y))


def _single(mean: Array, scale: Array, shift: Array) -> tuple[Array, Array, Array]:
    """The same in float32, where nothing can overflow or vanish: what rounding takes from the mean joins the shift."""
    size = np.abs(scale)
    if not ((np.abs(mean) < HUGE) & (size < HUGE) & ((size > 1 / HUGE) | (size == 0))).all():
        return mean, scale, shift
    high = mean.astype(np.float32)
    return high, scale.astype(np.float32), (shift + (high - mean) * scale).astype(np.float32)


def _params(
    grid: _Grid, rstd: Array, weight: Array | None, bias: Array | None, along_r: bool
) -> tuple[Array, Array, Array | None, Array | None]:
    """scale and shift of each column (n, w), and weight and bias (r, 1 or c) where they lie along r, else None."""
    scale, shift = grid.columns(rstd), np.zeros((grid.shape[0], grid.shape[2]))
    if along_r:
        return scale, shift, *_along_r(weight, bias)
    if weight is not None:
        scale *= grid.columns(weight)
    if bias is not None:
        shift = grid.columns(bias)
    return scale, shift, None, None


def _along_r(weight: Array | None, bias: Array | None) -> tuple[Array, Array]:
    given = weight if weight is not None else bias
    assert given is not None
    shape = given.shape[1], given.shape[3]
    w = np.ones(shape) if weight is None else weight.reshape(shape).astype(np.float64)
    b = np.zeros(shape) if bias is None else bias.reshape(shape).astype(np.float64)
    return w, b


def _find(
    grid: _Grid, x: Array, extra: tuple[Any, ...], joined: Joined, center: bool, eps: float, stats: Array
) -> None:
    """Statistics of every group: sums about each column's first element, about its mean where that was far out."""
    view, (_, mask, before, _) = grid.view(x), extra
    n, rows, w = grid.shape
    pivot = _pivot(grid, mask, before, x, joined) if center else np.zeros((n, w))
    part = grid.partial_sums(2 if mask is None else 3)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        grid.run(kernels.columns_sums, view, pivot, mask, before, *map(grid.optional, joined), part)
        s, q, *counted = part.sum(axis=2)
        count = counted[0] if counted else np.full((n, w), float(rows))
        poor = ~(s * s <= POOR_PIVOT * count * (q - s * s / count)) & (count > 0)
        if center and poor.any():
            pivot = np.where(poor, pivot + s / count, pivot)
            grid.run(kernels.columns_sums, view, pivot, mask, before, None, None, None, part)
            s, q, *_ = part.sum(axis=2)  # the same bits as before where the pivot stayed
        _merge(grid, center, pivot, s, q, count, stats)
        stats[RSTD] = np.where(stats[COUNT] > 0, reciprocal_std(stats[M2] / stats[COUNT], eps), 0.0)


def _pivot(grid: _Grid, mask: Array | None, before: Tag, x: Array, joined: Joined) -> Array:
    """u of the first element of every column (n, w) that counts; 0 where none does."""
    shape = grid.shape[0], grid.shape[2]
    if joined.source is not None:
        first, other = (np.asarray(part).reshape(grid.shape)[:, 0].astype(np.float64) for part in joined[:2])
        return (first + other).astype(x.dtype).astype(np.float64)
    if mask is None and before is IDENTITY:
        return x.reshape(grid.shape)[:, 0].astype(np.float64, order="C")
    pivot, found = np.zeros(shape), np.zeros(shape)
    one = np.ones((1, 1, 1), np.uint8) if mask is None else mask
    grid.run(kernels.columns_pivot, grid.view(x), one, before, pivot, found, whole_columns=True)
    return pivot


def _merge(grid: _Grid, center: bool, pivot: Array, s: Array, q: Array, count: Array, stats: Array) -> None:
    """The columns of each group as one: each column's mean weighs as its count, and their spread joins m2."""
    total = grid.groups(count)
    stats[COUNT] = total.reshape(-1)
    if not center:
        stats[[MEAN, RESIDUAL]] = 0.0
        stats[M2] = grid.groups(q).reshape(-1)
        return
    per, s, q = (part.reshape(grid.five) for part in (count, s, q))
    some = per > 0
    origin = _origin(grid, pivot, some)
    offset = np.where(some, (pivot.reshape(grid.five) - origin) + s / per, 0.0)
    weighed = (offset * per).sum(axis=(1, 3, 4), keepdims=True)
    step = np.where(total > 0, weighed[:, 0, :, 0, 0] / total, 0.0)[:, None, :, None, None]
    m2 = grid.groups(np.where(some, q - s * s / per, 0.0)) + grid.groups(per * (offset - step) ** 2)
    mean = origin + step
    stats[MEAN] = mean.reshape(-1)
    stats[RESIDUAL] = ((origin - mean) + step).reshape(-1)
    stats[M2] = np.maximum(m2, 0.0).reshape(-1)  # rounding only; NaN stays NaN


def _origin(grid: _Grid, pivot: Array, some: Array) -> Array:
    """For each group the pivot of the first of its columns that has elements, (n, 1, g, 1, 1)."""
    n, _, g, _, _ = grid.five
    pivots, has = (part.reshape(grid.five).swapaxes(1, 2).reshape(n, g, -1) for part in (pivot, some))
    return np.take_along_axis(pivots, has.argmax(axis=2)[..., None], 2)[:, None, :, :, None]


def backward(
    scheduler: Scheduler,
    dy: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    options: Options,
    *,
    stats: Array,
    center: bool,
    fixed: bool,
    find: bool,
    coefficients: Array,
    param_shape: tuple[int, ...] | None,
    addend: Array | None,
    dz: Array | None,
    dx: Array,
) -> tuple[Array | None, Array | None]:
    """Fill `coefficients` where `find` asks, and dx where it is not empty; (dweight, dbias) where they have a shape."""
    n, r, g, _, _ = x.shape
    along_r = any(shape[1] > 1 for shape in (param_shape, *(p.shape for p in (weight, bias) if p is not None)) if shape)
    grid = _Grid(scheduler, x, folds=not along_r and options.mask is None)
    mean, rstd = (grid.columns(stats[row].reshape(n, g)) for row in (MEAN, RSTD))
    if along_r and weight is None and bias is None and param_shape is not None:
        weight = np.ones(param_shape)
    params = _params(grid, stats[RSTD].reshape(n, g), weight, bias, along_r)
    views, extra = (grid.view(dy), grid.view(x), mean), grid.options(options)
    dweight = dbias = None
    if find:
        part = grid.partial_sums(2)
        along = (2, n, grid.tiles, r, 1 if params[2] is None else params[2].shape[1])
        rows = np.zeros(along if along_r and param_shape is not None else (2, 0, 0, 0, 0))
        grid.run(kernels.columns_backward_sums, *views, *params, *extra, part, rows)
        s, q = part.sum(axis=2)
        q *= rstd
        w = 1.0 if along_r or weight is None else grid.columns(weight)
        with np.errstate(invalid="ignore", divide="ignore"):
            for row, total in ((K1, s), (K2, q)):
                found = grid.groups(total * w).reshape(-1) / stats[COUNT]
                coefficients[row] = np.where(stats[COUNT] > 0, found, 0.0)
        if fixed:
            coefficients[:] = 0.0
        if not center:
            coefficients[K1] = 0.0
        if param_shape is not None:
            grads = rows.sum(axis=2)[:, :, :, None, :, None] if along_r else np.stack((q, s)).reshape(2, *grid.five)
            dweight, dbias = (_reduced(grad, param_shape) for grad in grads)
    if dx.size:
        k1, k2 = (grid.columns(coefficients[row].reshape(n, g)) for row in (K1, K2))
        outputs = grid.optional(addend), grid.optional(dz), grid.view(dx)
        ks = k1 * rstd, k2 * rstd * rstd
        grid.run(kernels.columns_backward_apply, *views, *params, *ks, *extra, *outputs)
    return dweight, dbias


def _reduced(grad: Array, param_shape: tuple[int, ...]) -> Array:
    """Summed over the axes that the parameter lacks."""
    return np.asarray(grad.sum(axis=tuple(axis for axis in range(5) if param_shape[axis] == 1), keepdims=True))
