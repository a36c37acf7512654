"""Norms with neighbouring elements in different statistics: batch, group and instance norm channels last, and layer
norm over an axis that is not innermost.

Two passes over tiles of rows and columns. Every column (g, c) has sums of its own; those of one group merge after the
first pass. Short rows are folded: k rows of w elements are one row of k*w columns, whose sums merge likewise.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbnorm.backend import reciprocal_std
from nbnorm_backends.numba_cpu import kernels
from nbnorm_backends.numba_cpu.activations import IDENTITY, Tag
from nbnorm_backends.numba_cpu.elements import carried
from nbnorm_backends.numba_cpu.kernels import (
    COUNT,
    EXTREME,
    FEW,
    HUGE,
    K1,
    K2,
    LARGEST,
    M2,
    MEAN,
    NEAR,
    POOR_PIVOT,
    RESIDUAL,
    RSTD,
    TRUSTED,
)
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
    precise: bool,
    find: bool,
    stats: Array,
    joined: Joined,
    y: Array,
) -> None:
    """Fill `stats` where `find` asks, and y where it is not empty."""
    along_r = any(param is not None and _is_along_r(param) for param in (weight, bias))
    grid = _Grid(scheduler, x, folds=not along_r and options.mask is None)
    extra = grid.options(options)
    if find:
        _find(grid, x, extra, joined, center, eps, precise, stats)
    if not y.size:
        return
    with np.errstate(invalid="ignore", over="ignore"):
        terms = _columns(grid, x, stats, weight, bias, single=x.itemsize < 8).terms()
    grid.run(kernels.columns_apply, grid.view(x), *terms, *_along_r(weight, bias), *extra, grid.view(y))


class _Terms(NamedTuple):
    """What `kernels.affine` takes of each column (n, w): (u * power - mean) * scale + shift. In float32 for float32 and
    half types, where what rounding takes from the mean joins the shift."""

    power: Array | None  # of two; None for 1
    mean: Array
    scale: Array
    shift: Array


class _Columns(NamedTuple):
    """Statistics and parameters of each column (n, w), in float64. u * power - high is what the kernels see."""

    mean: Array
    high: Array  # the mean, rounded to the type that the kernels compute in
    rstd: Array
    weight: Array | float  # without what lies along r
    bias: Array | float
    power: Array
    single: bool

    @property
    def low(self) -> Array:
        return (self.high - self.mean) * self.rstd

    def terms(self) -> _Terms:
        scale = self.rstd * self.weight
        shift = self.bias + (self.high - self.mean) * scale
        rest = scale / self.power
        if not self.single:
            return _Terms(None, self.mean, rest, shift)
        rest = np.where(np.isfinite(rest), rest.clip(-LARGEST, LARGEST), rest)
        parts = (part.astype(np.float32) for part in (self.high * self.power, rest, shift))
        return _Terms(_unless_one(self.power), *parts)

    def gains(self, k1: Array, k2: Array) -> tuple[Array, Array, Array, Array | None]:
        """(gain, k1, k2, lift) of `kernels.backward_affine`; see `kernels.gains`."""
        real = np.float32 if self.single else np.float64
        lift = np.where((self.rstd > 0) & (self.rstd < 1 / HUGE), 1 / EXTREME, np.where(self.rstd > HUGE, EXTREME, 1.0))
        lift = lift * lift if self.single else np.ones(lift.shape)
        gain = self.rstd / lift
        parts = gain * self.weight, -(k1 + self.low * k2) * gain, -(self.rstd / self.power) * k2 * gain
        c0, c1, c2 = (part.astype(real) for part in parts)
        return c0, c1, c2, _unless_one(lift)


def _columns(
    grid: _Grid, x: Array, stats: Array, weight: Array | None, bias: Array | None, *, single: bool
) -> _Columns:
    mean, rstd = (grid.columns(stats[row].reshape(x.shape[0], x.shape[2])) for row in (MEAN, RSTD))
    w = 1.0 if weight is None or _is_along_r(weight) else grid.columns(weight)
    b = 0.0 if bias is None or _is_along_r(bias) else grid.columns(bias)
    if not single:
        return _Columns(mean, mean, rstd, w, b, np.ones(mean.shape), single)
    size = np.abs(rstd * w)
    small = (np.abs(mean) > HUGE) | ((size > 0) & (size < 1 / HUGE))
    power = np.where(small, 1 / EXTREME, np.where(size > HUGE, EXTREME, 1.0))
    return _Columns(mean, mean.astype(np.float32).astype(np.float64), rstd, w, b, power, single)


def _unless_one(factor: Array) -> Array | None:
    return None if (factor == 1.0).all() else factor.astype(np.float32)


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


def _find(
    grid: _Grid, x: Array, extra: tuple[Any, ...], joined: Joined, center: bool, eps: float, precise: bool, stats: Array
) -> None:
    """Statistics of every group: sums about each column's first element; where they cannot be trusted, in float64 and
    about the mean."""
    view, (_, mask, before, _) = grid.view(x), extra
    n, rows, w = grid.shape
    pivot = _pivot(grid, mask, before, x, joined) if center else np.zeros((n, w))
    part = grid.partial_sums(2 if mask is None else 3)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        narrow = not precise and x.itemsize < 8 and rows >= FEW
        first = pivot.astype(np.float32) if narrow else pivot
        grid.run(kernels.columns_sums, view, first, mask, before, *map(grid.optional, joined), part)
        s, q, *counted = part.sum(axis=2)
        count = counted[0] if counted else np.full((n, w), float(rows))
        m2 = q - s * s / count if center else q
        poor = (count > 0) & center & ~(s * s <= POOR_PIVOT * count * m2)
        if narrow:
            poor |= (count > 0) & ~((m2 > TRUSTED[0]) & (m2 < TRUSTED[1]))
        if poor.any():
            pivot = np.where(poor & np.isfinite(s) & center, pivot + s / count, pivot)
            grid.run(kernels.columns_sums, view, pivot, mask, before, None, None, None, part)
            again = part.sum(axis=2)
            s, q = np.where(poor, again[0], s), np.where(poor, again[1], q)
        _merge(grid, center, pivot, s, q, count, stats)
        stats[RSTD] = np.where(stats[COUNT] > 0, reciprocal_std(stats[M2] / stats[COUNT], eps), 0.0)


def _pivot(grid: _Grid, mask: Array | None, before: Tag, x: Array, joined: Joined) -> Array:
    """A pivot for every column (n, w), float32 for float32 and half types: the mean of its first elements (see
    `kernels.pivot_of`), or, under a mask, u of the first that counts; 0 where none does."""
    shape = grid.shape[0], grid.shape[2]
    if joined.source is not None:
        first, other = (np.asarray(part).reshape(grid.shape)[:, 0].astype(np.float64) for part in joined[:2])
        return (first + other).astype(x.dtype).astype(np.float64)
    if mask is None and before is IDENTITY:
        count = NEAR if grid.shape[1] >= NEAR else 1
        means = np.asarray(x.reshape(grid.shape)[:, :count].astype(np.float64).mean(axis=1))
        return means if x.itemsize == 8 else means.astype(np.float32).astype(np.float64)
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
    n, _, g, _, _ = x.shape
    along_r = any(shape[1] > 1 for shape in (param_shape, *(p.shape for p in (weight, bias) if p is not None)) if shape)
    grid = _Grid(scheduler, x, folds=not along_r and options.mask is None)
    if along_r and weight is None and bias is None and param_shape is not None:
        weight = np.ones(param_shape)
    columns = _columns(grid, x, stats, weight, bias, single=x.itemsize < 8)
    narrow = columns.single and dx.size > 0  # else the sums are what is asked for
    params, extra = _along_r(weight, bias), grid.options(options)
    dweight = dbias = None
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if find:
            wide = _columns(grid, x, stats, weight, bias, single=False)
            args = params, extra, along_r and param_shape is not None
            s, q, rows = _backward_sums(grid, dy, x, columns if narrow else wide, *args)
            if narrow and not np.isfinite(q).all():
                again = _backward_sums(grid, dy, x, wide, *args)
                s, q, rows = (np.where(np.isfinite(old), old, new) for old, new in zip((s, q, rows), again))
            for row, total in ((K1, s), (K2, q)):
                found = grid.groups(total * columns.weight).reshape(-1) / stats[COUNT]
                coefficients[row] = np.where(stats[COUNT] > 0, found, 0.0)
            if fixed:
                coefficients[:] = 0.0
            if not center:
                coefficients[K1] = 0.0
            if param_shape is not None:
                grads = rows.sum(axis=2)[:, :, :, None, :, None] if along_r else np.stack((q, s)).reshape(2, *grid.five)
                dweight, dbias = (_reduced(grad, param_shape) for grad in grads)
        if dx.size:
            gains = columns.gains(*(grid.columns(coefficients[row].reshape(n, g)) for row in (K1, K2)))
            outputs = grid.optional(addend), grid.optional(dz), grid.view(dx)
            views = grid.view(dy), grid.view(x)
            grid.run(kernels.columns_backward_apply, *views, *columns.terms(), *params, *gains, *extra, *outputs)
    return dweight, dbias


def _backward_sums(
    grid: _Grid, dy: Array, x: Array, columns: _Columns, params: tuple[Any, ...], extra: tuple[Any, ...], rows: bool
) -> tuple[Array, Array, Array]:
    """sum(t) and sum(t * xhat) of each column (n, w), with weights along r; with `rows`, those of each row."""
    part, (wr, _) = grid.partial_sums(2), params
    n, r, _ = grid.shape
    along = np.zeros((2, n, grid.tiles, r, wr.shape[1]) if rows else (2, 0, 0, 0, 0))
    views = grid.view(dy), grid.view(x)
    grid.run(kernels.columns_backward_sums, *views, *columns.terms(), *params, *extra, part, along)
    s, q = part.sum(axis=2)
    return s, q * (columns.rstd / columns.power) + columns.low * s, along


def _reduced(grad: Array, param_shape: tuple[int, ...]) -> Array:
    """Summed over the axes that the parameter lacks."""
    return np.asarray(grad.sum(axis=tuple(axis for axis in range(5) if param_shape[axis] == 1), keepdims=True))
