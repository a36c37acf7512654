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

from nbnorm.arrays import read_only
from nbnorm_backends.numba_cpu import cuts, kernels, merging, outputs
from nbnorm_backends.numba_cpu.activations import IDENTITY, Tag
from nbnorm_backends.numba_cpu.elements import carried
from nbnorm_backends.numba_cpu.kernels import NEAR_PIVOT, NEAR_ZERO
from nbnorm_backends.numba_cpu.options import Joined, Options, with_rows
from nbnorm_backends.numba_cpu.pool import Kernel, Scheduler
from nbnorm_backends.numba_cpu.tuning import TUNING

Array = NDArray[Any]
SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)


class Grid:
    """How x (n, r, g, c, 1) is folded and cut into tiles; depends on the shape and the call's options only."""

    def __init__(self, scheduler: Scheduler, x: Array, *, folds: bool) -> None:
        self._scheduler, self._size = scheduler, x.size
        n, r, g, c, _ = x.shape
        self.k = cuts.fold(r, g * c) if folds and x.flags.c_contiguous else 1
        self.shape = n, r // self.k, self.k * g * c  # (n, rows, w)
        self.five = n, self.k, g, c, 1  # the columns' own axes
        _, rows, w = self.shape
        self.rows, self.width = cuts.tile(rows, w)
        self.samples = max(1, TUNING.chunk // (rows * w))
        self.shares = math.ceil(rows / self.rows)
        self.tiles = math.ceil(w / self.width)

    def view(self, array: Array) -> Array:
        """x, dy, y or dx as kernels take it; an empty one stays empty."""
        return carried(array).reshape(self.shape if array.size else (0, 0, 0))

    def optional(self, array: Array | None) -> Array | None:
        return None if array is None else self.view(array)

    def options(self, options: Options) -> tuple[Any, ...]:
        """residual, mask (n, r, w) with rows, before, after, as kernels take them; each axis of a mask is 1 or full."""
        mask = with_rows(self._mask(options.mask), self.shape[2])
        return self.optional(options.residual), mask, options.before, options.after

    def _mask(self, mask: Array | None) -> Array | None:
        if mask is None:
            return None
        n, r, *columns = mask.shape
        full = columns if math.prod(columns) == 1 else self.five[2:]
        return read_only(np.ascontiguousarray(np.broadcast_to(mask, (n, r, *full))).reshape(n, r, -1))

    def param(self, param: Array | None) -> Array:
        """weight or bias (1, 1, g or 1, c or 1, 1) for each column of a row, float64 (g*c,); empty where there is none,
        or where it lies along r."""
        if param is None or _is_along_r(param):
            return np.empty(0)
        _, _, g, c, _ = self.five
        full = param if param.size == g * c else np.broadcast_to(param, (1, 1, g, c, 1))
        return full.astype(np.float64).reshape(-1)

    def terms(self, x: Array, stats: Array, weight: Array, bias: Array, *, single: bool) -> tuple[Any, ...]:
        """(power, mean, scale, shift) of `kernels.affine` for each column (n, w).

        They are read with every row, and so lie on cache lines: the second pass takes 0.74 of its time on (6272, 1024).
        """
        found = outputs.aligned((4, self.shape[0], self.shape[2]), SINGLE if single else DOUBLE)
        extreme = merging.columns_terms(stats, *self.groups, weight, bias, single, *found)
        return found[0] if extreme else None, *found[1:]

    @property
    def groups(self) -> tuple[int, int]:
        return self.five[2:4]

    def run(self, kernel: Kernel, *args: Any, whole_columns: bool = False) -> None:
        rows, shares = (self.shape[1], 1) if whole_columns else (self.rows, self.shares)
        chunks = math.ceil(self.shape[0] / self.samples) * shares * self.tiles
        sizes = self.samples, rows, self.width
        self._scheduler.run(kernel, chunks, (*sizes, *args), parallel=self._size > TUNING.serial)

    def partial_sums(self, sums: int) -> Array:
        return np.empty((sums, self.shape[0], self.shares, self.shape[2]))


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
    grid = Grid(scheduler, x, folds=not lie_along_r(weight, bias) and options.mask is None)
    keys: dict[str, Any] = {"joined": joined, "center": center, "eps": eps, "find": find, "stats": stats, "y": y}
    normalize(grid, x, weight, bias, grid.options(options), **keys)


def normalize(
    grid: Grid,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    extra: tuple[Any, ...],
    *,
    joined: Joined,
    center: bool,
    eps: float,
    find: bool,
    stats: Array,
    y: Array,
) -> None:
    """`forward` on a grid, with its options."""
    if find:
        _find(grid, x, extra, joined, center, eps, stats)
    if y.size:
        terms = grid.terms(x, stats, grid.param(weight), grid.param(bias), single=x.itemsize < 8)
        target = grid.view(y)
        stream = outputs.streams(target, grid.width, outputs.STREAM_COLUMNS)
        grid.run(kernels.columns_apply, grid.view(x), *terms, *_along_r(weight, bias), *extra, stream, target)


def lie_along_r(weight: Array | None, bias: Array | None) -> bool:
    """Whether weight or bias do, as those of a norm over channels that are not innermost."""
    return any(param is not None and _is_along_r(param) for param in (weight, bias))


def _is_along_r(param: Array) -> bool:
    return bool(param.shape[1] > 1)


def _along_r(weight: Array | None, bias: Array | None) -> tuple[Array | None, Array | None]:
    """weight and bias (r, 1 or c) where they lie along r."""
    given = weight if weight is not None else bias
    if given is None or not _is_along_r(given):
        return None, None
    shape = given.shape[1], given.shape[3]
    w = np.ones(shape) if weight is None else weight.reshape(shape).astype(np.float64)
    b = np.zeros(shape) if bias is None else bias.reshape(shape).astype(np.float64)
    return w, b


def _find(grid: Grid, x: Array, extra: tuple[Any, ...], joined: Joined, center: bool, eps: float, stats: Array) -> None:
    """Statistics of every group: sums of each column, and again about its mean where that lies too far away."""
    view, (_, mask, before, _) = grid.view(x), extra
    n, rows, w = grid.shape
    double = x.itemsize == 8
    pivot = _pivot(grid, mask, before, x, joined) if double and center else np.zeros((n, w))
    part = grid.partial_sums(2 if mask is None else 3)
    sums, doubted = np.empty((part.shape[0], n, w)), np.empty((n, w), np.bool_)
    first = pivot if double else None
    grid.run(kernels.columns_sums, view, first, mask, before, *map(grid.optional, joined), part)
    far = NEAR_PIVOT if double else NEAR_ZERO
    if merging.settle(part, sums, float(rows), far, pivot, doubted, *grid.groups, center, eps, stats):
        again = np.empty_like(sums)
        grid.run(kernels.columns_sums, view, pivot, mask, before, None, None, None, part)
        merging.merge_shares(part, again)
        merging.replace(sums, again, doubted)
        merging.columns_statistics(sums, float(rows), pivot, *grid.groups, center, eps, stats)


def _pivot(grid: Grid, mask: Array | None, before: Tag, x: Array, joined: Joined) -> Array:
    """A pivot for every column (n, w) of float64: the mean of its first elements where all count as they are, else u of
    the first that counts; 0 where none does."""
    if joined.source is not None:
        first, other = (np.asarray(part).reshape(grid.shape)[:, 0] for part in joined[:2])
        return np.asarray(first + other, np.float64)
    pivot: Array = np.zeros((grid.shape[0], grid.shape[2]))
    if mask is None and before is IDENTITY:
        merging.means_of_first(x.reshape(grid.shape), pivot)
        return pivot
    found = np.zeros_like(pivot)
    counted = mask or with_rows(read_only(np.ones((1, 1, 1), np.uint8)), grid.shape[2])
    grid.run(kernels.columns_pivot, grid.view(x), counted, before, pivot, found, whole_columns=True)
    return pivot


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
    g = x.shape[2]
    along_r = any(shape[1] > 1 for shape in (param_shape, *(p.shape for p in (weight, bias) if p is not None)) if shape)
    grid = Grid(scheduler, x, folds=not along_r and options.mask is None)
    if along_r and weight is None and bias is None and param_shape is not None:
        weight = np.ones(param_shape)
    single = x.itemsize < 8
    params, extra, (w, b) = _along_r(weight, bias), grid.options(options), (grid.param(weight), grid.param(bias))
    terms = grid.terms(x, stats, w, b, single=single)
    dweight = dbias = None
    if find:
        narrow = single and dx.size > 0  # else the sums are what is asked for
        args = grid.view(dy), grid.view(x), params, extra, stats, w, along_r and param_shape is not None

        def wide() -> tuple[Any, ...]:
            return grid.terms(x, stats, w, b, single=False) if single else terms

        sums, rows = _backward_sums(grid, terms if narrow else wide(), *args, single=narrow)
        doubted = np.empty(sums.shape[1:], np.bool_)
        if narrow and merging.overflowed(sums, doubted):
            again, rows = _backward_sums(grid, wide(), *args, single=False)
            merging.replace(sums, again, doubted)
        dparams = np.empty((2, g * x.shape[3]))
        merging.columns_gradients(sums, stats, *grid.groups, w, center, fixed, coefficients, dparams)
        if param_shape is not None:
            grads = rows.sum(axis=2)[:, :, :, None, :, None] if along_r else dparams.reshape(2, 1, 1, g, -1, 1)
            dweight, dbias = (_reduced(grad, param_shape) for grad in grads)
    if dx.size:
        found = outputs.aligned((4, *terms[1].shape), terms[1].dtype)
        extreme = merging.columns_gains(stats, *grid.groups, w, coefficients, single, *found)
        gains = *found[:3], found[3] if extreme else None
        target = grid.view(dx)
        stream = outputs.streams(target, grid.width, outputs.STREAM_COLUMNS_BACKWARD)
        written = grid.optional(addend), grid.optional(dz), stream, target
        grid.run(kernels.columns_backward_apply, grid.view(dy), grid.view(x), *terms, *params, *gains, *extra, *written)
    return dweight, dbias


def _backward_sums(
    grid: Grid,
    terms: tuple[Any, ...],
    dy: Array,
    x: Array,
    params: tuple[Any, ...],
    extra: tuple[Any, ...],
    stats: Array,
    weight: Array,
    rows: bool,
    *,
    single: bool,
) -> tuple[Array, Array]:
    """sum(t) and sum(t * xhat) of each column (2, n, w), with weights along r; with `rows`, those of each row."""
    part, (wr, _) = grid.partial_sums(2), params
    n, r, w = grid.shape
    along = np.zeros((2, n, grid.tiles, r, wr.shape[1]) if rows else (2, 0, 0, 0, 0))
    grid.run(kernels.columns_backward_sums, dy, x, *terms, *params, *extra, part, along)
    sums = np.empty((2, n, w))
    merging.merge_shares(part, sums)
    merging.sums_of_xhat(sums, stats, *grid.groups, weight, single)
    return sums, along


def _reduced(grad: Array, param_shape: tuple[int, ...]) -> Array:
    """Summed over the axes that the parameter lacks."""
    if grad.shape == param_shape:
        return grad
    return np.asarray(grad.sum(axis=tuple(axis for axis in range(5) if param_shape[axis] == 1), keepdims=True))
